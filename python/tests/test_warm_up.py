"""Kernels are compiled before calls are made; the driver is given a place to remember them."""

import os
import subprocess
import sys

import pytest
import sageattention
import torch
from exact import random
from sageattention import _native, _warm_up, warm_up
from sageattention.sparse import Predictor

X = (1, 4, 300, 64)


def test_a_cpu_has_nothing_to_compile():
    assert warm_up([X, (X, X), (X, X, X)], torch.float32, device="cpu") == []
    assert warm_up([], device=torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            r"shapes\[1\]: value is 3, expected the shape of q, or the shapes \(q, k\)",
            lambda: warm_up([X, 3]),
        ),
        (
            ValueError,
            r"shapes\[0\]: value is .*, expected the shape of q, or the shapes \(q, k\) or \(q, k, v\)",
            lambda: warm_up([((1, 2), (1, 2), (1, 2), (1, 2))]),
        ),
        (TypeError, r"shapes\[0\]\[1\]: value is 4, expected a shape", lambda: warm_up([(X, 4)])),
        (TypeError, r"shapes\[0\]\[2\]: value is 3.5, .*, expected an integer", lambda: warm_up([(1, 4, 3.5, 64)])),
        (ValueError, r"shapes\[0\]: value is .*, expected sizes of 0 to", lambda: warm_up([(1, 4, -3, 64)])),
        (ValueError, "tensor_layout: value is SBHD, expected HND or NHD", lambda: warm_up([X], tensor_layout="SBHD")),
        (TypeError, "dtype: value is None, expected a dtype, or its name", lambda: warm_up([X], None)),
        (
            TypeError,
            r"attn_mask: value is 5, expected \(shape, dtype\), or a tensor",
            lambda: warm_up([X], attn_mask=5),
        ),
        (
            ValueError,
            "cu_seqlens_q: value is None, expected boundaries, as cu_seqlens_k is given",
            lambda: warm_up([X[1:]], cu_seqlens_k=[0, 300]),
        ),
        (ValueError, "device: value is tpu, expected cuda, cuda:N, N, or cpu", lambda: warm_up([X], device="tpu")),
        (ValueError, "device: value is -1, expected the number of a GPU", lambda: warm_up([X], device=-1)),
        (TypeError, "is_casual: warm_up has no such keyword, expected is_causal", lambda: warm_up([X], is_casual=True)),
    ],
)
def test_what_is_wrong_is_said(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_without_a_gpu_that_is_said():
    with pytest.raises(RuntimeError, match="^CUDA "):
        warm_up([X], device=99)


def test_shapes_and_options_reach_the_gpu_as_calls_do(monkeypatch):
    """What is noted for each call, with a stand-in for the Rust module's part."""
    noted = []

    class Noting:
        def __init__(self, ordinal):
            noted.append(ordinal)

        def note(self, *arguments):
            noted.append(arguments)

        def load(self):
            return [("attention", "disk", 1.5)]

    monkeypatch.setattr(_native, "WarmUp", Noting)
    meta = torch.empty(1, 1, 300, 300, dtype=torch.bool, device="meta")
    found = warm_up([X, (X, (1, 2, 500, 64))], torch.float16, is_causal=True, attn_mask=meta, return_lse=True, device=3)
    assert found == [("attention", "disk", 1.5)] and found[0].origin == "disk"
    ordinal, first, second = noted
    q = (0, X, (76800, 19200, 64, 1), "float16")
    assert ordinal == 3 and first[:3] == (q, q, q)
    assert second[:3] == (q, (0, (1, 2, 500, 64), (64000, 32000, 64, 1), "float16"), second[1])
    assert first[4:] == (True, (0, (1, 1, 300, 300), (90000, 90000, 300, 1), "bool"), None, None, None, False)

    noted.clear()
    warm_up([(300, 4, 64)], "bfloat16", cu_seqlens_q=[0, 100, 300], device="cuda:1")
    assert noted[0] == 1 and noted[1][6] == ([0, 100, 300], [0, 100, 300])
    noted.clear()
    warm_up([X], predictor=Predictor.sla(0.25), device=torch.device("cuda", 2))
    assert noted[0] == 2 and isinstance(noted[1][7], _native.Predictor)
    noted.clear()
    warm_up([X, (300, 6, 64)], sinks=True, kv_lens=True, device=0)
    assert [call[8:] for call in noted[1:]] == [((0, (heads,), (1,), "float32"), True) for heads in (4, 6)]


def test_a_driver_that_remembers_nothing_is_told(monkeypatch, caplog):
    class Loading:
        def __init__(self, ordinal):
            pass

        def load(self):
            return [("attention", self.origin, 1.5)]

    monkeypatch.setattr(_native, "WarmUp", Loading)
    monkeypatch.setattr(_native, "driver_forgets", lambda: "/home/.nv/ComputeCache: read-only")
    for Loading.origin, lines in (("compiled", 0), ("driver", 1)):
        caplog.clear()
        warm_up([], device=0)
        assert len(caplog.records) == lines
    assert "the driver's cache: /home/.nv/ComputeCache: read-only; some kernels are compiled anew" in caplog.text


def test_the_driver_is_given_a_folder_where_it_has_none(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_CACHE_PATH", raising=False)
    monkeypatch.setattr(_native, "driver_cache_folder", lambda: None)
    _warm_up.arrange_driver_cache()
    assert "CUDA_CACHE_PATH" not in os.environ
    monkeypatch.setattr(_native, "driver_cache_folder", lambda: tmp_path)
    _warm_up.arrange_driver_cache()
    assert os.environ["CUDA_CACHE_PATH"] == str(tmp_path)
    # What somebody has chosen stays.
    monkeypatch.setenv("CUDA_CACHE_PATH", "chosen")
    _warm_up.arrange_driver_cache()
    assert os.environ["CUDA_CACHE_PATH"] == "chosen"


def test_where_the_driver_can_write_nothing_is_changed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_CACHE_PATH"}
    program = "import os, sageattention; print(os.environ.get('CUDA_CACHE_PATH'))"
    environment["HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None" and not list(tmp_path.iterdir())


def test_a_warmed_up_call_is_right_and_loads_nothing(cuda):
    shapes = [((2, 8, 333, 128), (2, 2, 400, 128))]
    kernels = warm_up(shapes, torch.float16, is_causal=True)
    assert kernels and all(kernel.origin in ("compiled", "driver", "disk", "loaded") for kernel in kernels)
    assert all(kernel.origin == "loaded" and kernel.ms == 0 for kernel in warm_up(shapes, "float16", is_causal=True))
    q, k, v = (random(*shape, seed=seed).half().to(cuda) for seed, shape in enumerate([*shapes[0], shapes[0][1]]))
    out = sageattention.sageattn(q, k, v, is_causal=True)
    bias = torch.ones(333, 400, dtype=torch.bool, device=cuda).tril(400 - 333)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    assert (out - wanted).abs().sum() < 0.03 * wanted.abs().sum()
    with pytest.raises(ValueError, match=r"shapes\[1\]: k: shape is \[1, 3, 300, 64\], expected a number of heads"):
        warm_up([X, (X, (1, 3, 300, 64))], torch.float16)
    with pytest.raises(TypeError, match=r"shapes\[0\]: .*f32"):
        warm_up([X], torch.float32)
