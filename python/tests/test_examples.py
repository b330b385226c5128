"""python/examples runs offline, on random weights."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("family", ["wan", "mochi"])
def test_generate(family, tmp_path):
    pytest.importorskip("diffusers")
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(EXAMPLES / "generate.py"), family, "--steps", "2", "--device", "cpu"]
    done = subprocess.run([*command, "--out", str(picture)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    assert int(re.search(r"calls computed here: (\d+); left to torch: none", done.stdout).group(1)) >= 4
    assert 0 < float(re.search(r"relative L1 ([0-9.]+)", done.stdout).group(1)) < 0.02
    assert picture.stat().st_size > 1000
