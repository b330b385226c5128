"""What a warm call costs the host, ours beside torch's scaled_dot_product_attention.

    python python/benches/host_cost.py [--device cuda] [--rounds 200]

A call's tensors are so small that nothing but the host counts. Contestants take turns, and a figure is the least over
rounds, as whatever else the machine does only adds to it; on a GPU calls are queued in groups, for which nobody waits
while the clock runs.
"""

import argparse
import time

import sageattention
import torch
import torch.nn.functional as F

# Far fewer launches than a GPU's queue holds, so that the host never waits for room.
GROUP = 20


def contestants(device):
    """Names and calls without arguments, torch's first."""
    dtype, length, head_dim = (torch.float16, 128, 64) if device == "cuda" else (torch.float32, 1, 16)
    q, k, v = (torch.randn(1, 1, length, head_dim, dtype=dtype, device=device) for _ in range(3))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    torch_sdpa = F.scaled_dot_product_attention
    with sageattention.patched():
        ours = F.scaled_dot_product_attention
    return {
        "torch's scaled_dot_product_attention": lambda: torch_sdpa(q, k, v),
        "sageattn": lambda: sageattention.sageattn(q, k, v),
        "sageattn, causal, NHD": lambda: sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True),
        "sageattn, log-sum-exp": lambda: sageattention.sageattn(q, k, v, return_lse=True),
        "sageattn_qk_int8_pv_fp16_cuda": lambda: sageattention.sageattn_qk_int8_pv_fp16_cuda(q, k, v),
        "sageattn_varlen": lambda: sageattention.sageattn_varlen(*packed, cu_seqlens, cu_seqlens, length, length),
        "torch's function, patched": lambda: ours(q, k, v),
    }


def microseconds(call, device):
    """The host's time for a call, of a group of them."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(GROUP):
        call()
    return (time.perf_counter() - begin) / GROUP * 1e6


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = contestants(options.device)
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            times[name].append(microseconds(call, options.device))
    torchs = min(next(iter(times.values())))
    for name, samples in times.items():
        print(f"{name:40} {min(samples):6.1f} µs, {min(samples) / torchs:5.2f} times torch's")


if __name__ == "__main__":
    main()
