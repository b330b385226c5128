"""Attention spread over two processes: rings and Ulysses of diffusers and torch, and sparse parts of a ring.

`scripts/multi_gpu.py` is what runs, with gloo on the CPU; `scripts/gpu.sh multi` runs it on GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "multi_gpu.py"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")
def test_two_processes_give_what_one_gives(tmp_path):
    pytest.importorskip("diffusers")
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    # gloo finds its peer by the host's name, which a container need not resolve.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--device", "cpu", "--json", str(result)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    checks = json.loads(result.read_text())["checks"]
    # What fails is named by the program; what it left out would be missed here.
    names = {check["check"] for check in checks}
    assert {"diffusers ring, masked keys", "diffusers ulysses, masked keys", "sparse ring"} <= names
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        assert {"torch ring", "torch ring, causal"} <= names
