"""Attention spread over several processes: is it right, and how does it scale?

    torchrun --nproc-per-node 2 scripts/multi_gpu.py [--device cuda] [--json FILE] [--only PART,PART] [--no-times]
    torchrun --nproc-per-node 2 scripts/multi_gpu.py --device cpu          # gloo, small, no times

First what comes out: diffusers' rings and Ulysses behind `sageattention.register_diffusers` (with masks, grouped heads,
parts of unlike length, and in a whole Wan), torch's ring attention with `sageattention.register_flash_attention`,
yunchang's USP and a ring of block-sparse attention, merged by log-sum-exp. Each is compared with one process that has
all of the tokens, and with attention in float64.

Then, on GPUs, times of one GPU and of all: attention of a 720p Wan (75,600 tokens, 40 heads of 128) and two of its
blocks through diffusers, ours beside cuDNN through the same code.

Needs torch and the wheel of this repository; takes diffusers and yunchang where they are installed. Every process must
see the same of them.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path

import sageattention
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python" / "tests"))
from exact import TOLERANCE, attention, qkv, random, relative_l1, visible  # noqa: E402

# A part's output is off by the scheme's error, and merged outputs are means of parts with weights that sum to 1, so that
# each of the two is off by at most that; and outputs of 16 bits are rounded once more, by half a bit of 8.
EXACT_BOUND = TOLERANCE["fp16"] + 2**-8
ONE_PROCESS_BOUND = 2 * EXACT_BOUND


class Ranks:
    """This process among all."""

    def __init__(self, device):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.large = device == "cuda"

    def part(self, x, dim=1):
        """This process's tokens."""
        return x.chunk(self.count, dim=dim)[self.rank].contiguous()

    def together(self, x, dim=1):
        """All tokens, of parts of any length."""
        lengths = [None] * self.count
        dist.all_gather_object(lengths, x.shape[dim])
        longest = max(lengths)
        padding = list(x.shape)
        padding[dim] = longest - x.shape[dim]
        x = torch.cat([x, x.new_zeros(padding)], dim).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x)
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths)], dim)


def tensors(ranks, kv_heads=None, length=None):
    """q, k and v `[batch, seq, heads, head_dim]`, alike in all processes."""
    heads, length, head_dim = (8, length or 1024 * ranks.count, 128) if ranks.large else (4, length or 192 * ranks.count, 64)
    return qkv(
        2, heads, kv_heads or heads, length, length, head_dim, layout="NHD", dtype=torch.bfloat16, device=ranks.device
    )


def parallel_config(ranks, **degrees):
    from diffusers import ContextParallelConfig, ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    context = ContextParallelConfig(**degrees)
    config = ParallelConfig(context_parallel_config=context)
    mesh = init_device_mesh(ranks.device.type, context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    config.setup(ranks.rank, ranks.count, ranks.device, mesh=mesh)
    return config


def diffusers_degrees(ranks):
    degrees = {"ring": {"ring_degree": ranks.count}, "ulysses": {"ulysses_degree": ranks.count}}
    if ranks.count % 2 == 0 and ranks.count > 2:
        degrees["unified"] = {"ring_degree": ranks.count // 2, "ulysses_degree": 2}
    return degrees


def through_diffusers(ranks, q, k, v, config, **options):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, backend="sage", parallel_config=config, **options)


def check_diffusers(ranks):
    """Rings and Ulysses, plain, masked, with grouped heads, and with the log-sum-exp."""
    sageattention.register_diffusers()
    q, k, v = tensors(ranks)
    keys = k.shape[1]
    # The first sequence's last part of the keys is hidden as a whole.
    padding = torch.ones(2, keys, dtype=torch.bool, device=ranks.device)
    padding[0, keys - keys // ranks.count :] = False
    padding[1, keys // 3 : keys // 2] = False
    for name, degrees in diffusers_degrees(ranks).items():
        config = parallel_config(ranks, **degrees)
        own = [ranks.part(x) for x in (q, k, v)]
        out = through_diffusers(ranks, *own, config)
        yield f"diffusers {name}", ranks.together(out), sageattention.sageattn(q, k, v, "NHD"), attention(q, k, v, layout="NHD")[0]
        masked = through_diffusers(ranks, *own, config, attn_mask=ranks.part(padding))
        mask = padding[:, None, None]
        one = sageattention.sageattn(q, k, v, "NHD", attn_mask=mask)
        yield f"diffusers {name}, masked keys", ranks.together(masked), one, attention(q, k, v, layout="NHD", mask=mask)[0]
        out, lse = through_diffusers(ranks, *own, config, attention_kwargs={"return_lse": True})
        wanted = attention(q, k, v, layout="NHD")[1]
        yield f"diffusers {name}, log-sum-exp", ranks.together(lse).transpose(1, 2), wanted, wanted
    q, k, v = tensors(ranks, kv_heads=2)
    config = parallel_config(ranks, ring_degree=ranks.count)
    out = through_diffusers(ranks, *(ranks.part(x) for x in (q, k, v)), config, enable_gqa=True)
    yield "diffusers ring, grouped heads", ranks.together(out), sageattention.sageattn(q, k, v, "NHD"), attention(q, k, v, layout="NHD")[0]
    q, k, v = tensors(ranks, length=96 * ranks.count + 40)
    ends = [96 * (rank + 1) for rank in range(ranks.count - 1)] + [q.shape[1]]
    start = 96 * ranks.rank
    for name, degrees in {
        "ring": {"ring_degree": ranks.count, "ring_anything": True},
        "ulysses": {"ulysses_degree": ranks.count, "ulysses_anything": True},
    }.items():
        out = through_diffusers(ranks, *(x[:, start : ends[ranks.rank]] for x in (q, k, v)), parallel_config(ranks, **degrees))
        yield f"diffusers {name}, parts of unlike length", ranks.together(out), sageattention.sageattn(q, k, v, "NHD"), attention(q, k, v, layout="NHD")[0]


def check_wan(ranks):
    """A small Wan whose tokens are spread by diffusers."""
    from diffusers import ContextParallelConfig
    from diffusion_models import wan

    sageattention.register_diffusers()
    model, inputs = wan(ranks.device, torch.bfloat16)
    model.set_attention_backend("native")
    exact = model(**inputs, return_dict=False)[0]
    model.set_attention_backend("sage")
    one = model(**inputs, return_dict=False)[0]
    for name, degrees in diffusers_degrees(ranks).items():
        if degrees.get("ulysses_degree", 1) > 2:
            continue  # it has two heads
        model, inputs = wan(ranks.device, torch.bfloat16)
        model.set_attention_backend("sage")
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
        yield f"diffusers {name}, Wan", model(**inputs, return_dict=False)[0], one, exact.double()


def check_torch(ranks):
    """torch's ring attention over its own operator: on a GPU as users reach it, on the CPU by the ring's function."""
    q, k, v = (x.transpose(1, 2) for x in tensors(ranks))
    if ranks.large:
        yield from _check_context_parallel(ranks, q, k, v)
        return
    from sageattention import _flash
    from torch.distributed.device_mesh import init_device_mesh

    _attention = ring_module()
    mesh = init_device_mesh("cpu", (ranks.count,))
    library = torch.library.Library("aten", "IMPL", "CPU")
    forward = _flash.forward_of(None, None)
    library.impl("_scaled_dot_product_flash_attention", forward, "CPU", with_keyset=True)
    balanced = _attention._cp_options.enable_load_balance
    _attention._cp_options.enable_load_balance = False
    try:
        for causal in (False, True):
            own = [ranks.part(x, dim=2) for x in (q, k, v)]
            out = _attention._scaled_dot_product_ring_flash_attention(mesh, *own, is_causal=causal)[0]
            one = sageattention.sageattn(q, k, v, is_causal=causal)
            exact = attention(q, k, v, causal="top_left" if causal else None)[0]
            yield f"torch ring{', causal' if causal else ''}", ranks.together(out, dim=2), one, exact
    finally:
        _attention._cp_options.enable_load_balance = balanced
        library._destroy()


def ring_module():
    """torch's module of rings, which has moved."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention
    except ImportError:
        from torch.distributed.tensor.experimental import _attention
    return _attention


def _check_context_parallel(ranks, q, k, v):
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh

    _attention = ring_module()
    sageattention.register_flash_attention()
    torch.nn.attention.activate_flash_attention_impl("sage")
    mesh = init_device_mesh("cuda", (ranks.count,))
    balanced = _attention._cp_options.enable_load_balance
    try:
        for causal in (False, True):
            _attention._cp_options.enable_load_balance = causal
            buffers = [x.clone() for x in (q, k, v)]
            with (
                _attention.context_parallel(mesh, buffers=buffers, buffer_seq_dims=(2, 2, 2)),
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
            ):
                before = sageattention.counts().accelerated
                out = F.scaled_dot_product_attention(*buffers, is_causal=causal)
                assert sageattention.counts().accelerated > before, "torch's own kernel was called"
                (out,) = _attention.context_parallel_unshard(mesh, [out], [2])
            one = sageattention.sageattn(q, k, v, is_causal=causal)
            exact = attention(q, k, v, causal="top_left" if causal else None)[0]
            yield f"torch context_parallel{', causal' if causal else ''}", out, one, exact
    finally:
        _attention._cp_options.enable_load_balance = balanced
        torch.nn.attention.restore_flash_attention_impl()


def check_yunchang(ranks):
    """USP as xDiT uses it, whose ring calls us by flash-attention's keywords."""
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    q, k, v = tensors(ranks)
    for name, degrees in {"ring": (1, ranks.count), "ulysses": (ranks.count, 1)}.items():
        set_seq_parallel_pg(*degrees, ranks.rank, ranks.count)
        for kind in (AttnType.SAGE_AUTO, AttnType.SAGE_FP16):
            layer = LongContextAttention(ring_impl_type="basic", attn_type=kind)
            for causal in (False, True):
                out = layer(*(ranks.part(x) for x in (q, k, v)), causal=causal)
                one = sageattention.sageattn(q, k, v, "NHD", is_causal=causal)
                exact = attention(q, k, v, layout="NHD", causal="top_left" if causal else None)[0]
                yield f"yunchang {name}, {kind.value}{', causal' if causal else ''}", ranks.together(out), one, exact


def check_sparse(ranks):
    """A ring of block-sparse attention: each part of the keys has its own map, and outputs merge by log-sum-exp."""
    from sageattention.sparse import Predictor, sparse_attention

    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors(ranks, length=512 * ranks.count))
    predictor = Predictor.sparge_attn(topk=0.5, simthreshd1=-0.1)
    own = ranks.part(q, dim=2)
    out = lse = None
    maps = []
    for step in range(ranks.count):
        keys, values = (x.chunk(ranks.count, dim=2)[(ranks.rank + step) % ranks.count].contiguous() for x in (k, v))
        part, part_lse, part_map = sparse_attention(own, keys, values, predictor, return_lse=True, return_map=True)
        maps.append(part_map)
        part = part.float()
        if out is None:
            out, lse = part, part_lse
            continue
        both = torch.logaddexp(lse, part_lse)
        out = out * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
        lse = both
    maps = torch.cat([maps[(part - ranks.rank) % ranks.count] for part in range(ranks.count)], dim=3)
    rows, columns = -(-own.shape[2] // maps.shape[2]), -(-k.shape[2] // maps.shape[3])
    exact = attention(own, k, v, mask=visible(maps, rows, columns, own.shape[2], k.shape[2]))[0]
    assert 0.2 < maps.float().mean() < 0.9, "a map that leaves out nothing, or all"
    yield "sparse ring", ranks.together(out, dim=2), ranks.together(exact, dim=2), ranks.together(exact, dim=2)


CHECKS = {
    "diffusers": (check_diffusers, "diffusers"),
    "wan": (check_wan, "diffusers"),
    "torch": (check_torch, None),
    "yunchang": (check_yunchang, "yunchang"),
    "sparse": (check_sparse, None),
}


@torch.no_grad()
def check_all(ranks, only):
    rows = []
    for part, (check, needs) in CHECKS.items():
        if only and part not in only:
            continue
        if needs and importlib.util.find_spec(needs) is None:
            say(ranks, f"left out: {part}, as Python has no {needs} here")
            continue
        if part == "wan" and not ranks.large:
            say(ranks, "left out: wan, as diffusers' enable_parallelism counts accelerators, and there is none")
            continue
        if part == "torch" and not hasattr(torch.nn.attention, "register_flash_attention_impl"):
            say(ranks, f"left out: {part}, as torch {torch.__version__} has no registry of flash attention")
            continue
        for name, found, one, exact in check(ranks):
            row = {"check": name, "of_one": relative_l1(found, one.double()), "of_exact": relative_l1(found, exact)}
            row["holds"] = row["of_one"] <= ONE_PROCESS_BOUND and row["of_exact"] <= EXACT_BOUND
            say(ranks, f"{name:<48} {row['of_one']:9.5f} to one process {row['of_exact']:9.5f} to float64")
            rows.append(row)
    return rows


def say(ranks, line):
    if ranks.rank == 0:
        print(line, flush=True)


def median_ms(run, calls=5):
    """Median time of a call; the slowest process's, as the others wait for it."""
    for _ in range(2):
        run()
    times = []
    for _ in range(calls):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


@torch.no_grad()
def times(ranks):
    """One GPU beside all, for attention alone and for blocks; every GPU computes the former by itself."""
    rows = []
    for row in [*_attention_times(ranks), *_wan_times(ranks)]:
        rows.append(row)
        say(
            ranks,
            f"{row['what']:<10} {row['tokens']:>6} tokens {row['backend']:<14} {row['way']:<8} {row['ms']:9.2f} ms"
            f"  {row['speedup']:5.2f}x one GPU",
        )
    return rows


PEERS = {"sage": "ours", "_native_cudnn": "cuDNN"}


def _rows(what, tokens, backend, one, ways):
    yield {"what": what, "tokens": tokens, "backend": PEERS[backend], "way": "one GPU", "ms": one, "speedup": 1.0}
    for way, ms in ways.items():
        yield {"what": what, "tokens": tokens, "backend": PEERS[backend], "way": way, "ms": ms, "speedup": one / ms}


def _attention_times(ranks):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    configs = {name: parallel_config(ranks, **degrees) for name, degrees in diffusers_degrees(ranks).items()}
    for tokens in (17776, 75600):
        # The same numbers in all processes.
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, tokens // ranks.count * ranks.count, 40, 128)
        whole = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(3)]
        own = [ranks.part(x) for x in whole]
        for backend in PEERS:
            run = lambda parts, config: dispatch_attention_fn(*parts, backend=backend, parallel_config=config)
            one = median_ms(lambda: run(whole, None))
            ways = {name: median_ms(lambda: run(own, config)) for name, config in configs.items()}
            yield from _rows("attention", tokens, backend, one, ways)


def _wan_times(ranks):
    """Two blocks of Wan 2.2's 14B model with random weights, through diffusers."""
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    tokens = 75600
    inputs = dict(
        hidden_states=random(1, 16, 21, 90, 160, seed=0, dtype=torch.bfloat16, device="cuda"),
        timestep=torch.tensor([500], device="cuda"),
        encoder_hidden_states=random(1, 512, 4096, seed=1, dtype=torch.bfloat16, device="cuda"),
        return_dict=False,
    )

    def model(backend):
        torch.manual_seed(0)
        with torch.device("cuda"):
            built = WanTransformer3DModel(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=2)
        built = built.to(torch.bfloat16).eval()
        built.set_attention_backend(backend)
        return built

    for backend in PEERS:
        whole = model(backend)
        one = median_ms(lambda: whole(**inputs), calls=3)
        del whole
        ways = {}
        for name, degrees in diffusers_degrees(ranks).items():
            parallel = model(backend)
            parallel.enable_parallelism(config=ContextParallelConfig(**degrees))
            ways[name] = median_ms(lambda: parallel(**inputs), calls=3)
            del parallel
        yield from _rows("2 blocks", tokens, backend, one, ways)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help=f"parts of {', '.join(CHECKS)}")
    parser.add_argument("--no-times", action="store_true")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit("multi_gpu: RANK is not set, expected a start by torchrun")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    # Named for each device: diffusers looks for "cpu" when it gathers the lengths of parts.
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "cpu:gloo")
    ranks = Ranks(options.device)
    result = {"torch": torch.__version__, "processes": ranks.count, "device": options.device}
    if ranks.large:
        result["gpu"] = torch.cuda.get_device_name()
    try:
        result["checks"] = check_all(ranks, set(filter(None, options.only.split(","))))
        if ranks.large and not options.no_times and importlib.util.find_spec("diffusers") is not None:
            sageattention.register_diffusers()
            result["times"] = times(ranks)
        if options.json and ranks.rank == 0:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        dist.destroy_process_group()
    wrong = [row["check"] for row in result["checks"] if not row["holds"]]
    if wrong:
        sys.exit(f"multi_gpu: not within {ONE_PROCESS_BOUND:.4f} of one process and {EXACT_BOUND:.4f} of float64: {wrong}")
    if not result["checks"]:
        sys.exit("multi_gpu: nothing was checked")


if __name__ == "__main__":
    main()
