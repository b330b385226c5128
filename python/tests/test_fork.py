"""Calls in forked processes: they end, and give the bits of the parent. A child that hangs fails its test."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from sageattention import sageattn

# Far longer than any call here takes, on a busy machine too.
TIMEOUT_S = 120

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def tensors(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, 4, 300, 64).to(device, dtype) for _ in range(3)]


def attend(qkv, **options):
    return sageattn(*qkv, is_causal=True, **options)


@pytest.fixture
def qkv():
    """Tensors of which attention has been computed in this process."""
    qkv = tensors()
    attend(qkv)
    return qkv


def run_in_fork(work):
    """Runs `work` in a forked process; it must return true."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the child failed with status {status}"
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


def test_os_fork_after_a_call(qkv):
    wanted = attend(qkv)
    # Twice: in the child's own threads too, the first call starts what the second finds.
    run_in_fork(lambda: torch.equal(attend(qkv), wanted) and torch.equal(attend(qkv), wanted))
    run_in_fork(lambda: torch.equal(attend(qkv), wanted))
    assert torch.equal(attend(qkv), wanted)


def test_decoding_in_a_fork(qkv):
    q, k, v = qkv
    row = q[:, :, -1:].contiguous()
    wanted = attend((row, k, v))
    run_in_fork(lambda: torch.equal(attend((row, k, v)), wanted))


def test_a_fork_of_a_fork(qkv):
    wanted = attend(qkv)

    def child():
        first = torch.equal(attend(qkv), wanted)
        run_in_fork(lambda: torch.equal(attend(qkv), wanted))
        return first

    run_in_fork(child)


def put_attention(queue, qkv):
    # As bytes: a tensor would lie in memory that ends with the process.
    queue.put(attend(qkv).numpy().tobytes())


def test_multiprocessing_with_the_start_method_fork(qkv):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=put_attention, args=(queue, qkv), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    wanted = attend(qkv).numpy().tobytes()
    try:
        assert [queue.get(timeout=TIMEOUT_S) for _ in workers] == [wanted, wanted]
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.kill()


class Attended(torch.utils.data.Dataset):
    def __init__(self, qkv):
        self.qkv = qkv

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return attend(self.qkv) * index


def test_workers_of_a_data_loader(qkv):
    loader = torch.utils.data.DataLoader(
        Attended(qkv), batch_size=1, num_workers=2, timeout=TIMEOUT_S, multiprocessing_context="fork"
    )
    wanted = attend(qkv)
    for index, batch in enumerate(loader):
        assert torch.equal(batch[0], wanted * index)


def test_cuda_in_a_fork_is_an_error_that_says_what_to_do(cuda, qkv):
    on_gpu = tensors(cuda, torch.float16)
    attend(on_gpu)
    wanted = attend(qkv)

    def child():
        try:
            attend(on_gpu)
        except RuntimeError as error:
            # Torch has an error of its own, which says the same, where it allocates the output first.
            told = "spawn" in str(error)
        else:
            told = False
        return told and torch.equal(attend(qkv), wanted)

    run_in_fork(child)
