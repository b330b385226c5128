"""Every test that takes `device` runs on the CPU, and on the GPU where torch finds one."""

import os

import pytest
import torch

# JAX would take most of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The tensors here are small: more threads of torch only wait for each other. Ours are not affected.
torch.set_num_threads(1)

REASON = "torch finds no CUDA GPU"


def _cuda_ready():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not _cuda_ready():
        pytest.skip(REASON)
    return request.param


@pytest.fixture
def cuda():
    if not _cuda_ready():
        pytest.skip(REASON)
    return "cuda"


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield
