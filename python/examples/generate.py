"""Images and videos with our attention beside PyTorch's: time, difference, and a picture of both.

    python generate.py wan                                       # random weights, tiny: runs anywhere, offline
    python generate.py wan --checkpoint Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a lighthouse in a storm"
    python generate.py flux --checkpoint DIR --scheme sage2pp-int8-fp8-per-thread
    python generate.py wan --checkpoint DIR --scheme sage3-nvfp4 --first 4 --last 4     # 8 bits in the outer steps
    torchrun --nproc-per-node 2 generate.py wan --checkpoint DIR --parallel ulysses     # a video on several GPUs

Families: cogvideox, flux, hunyuan, ltx, mochi, qwen, wan. A checkpoint is any of diffusers' pipelines of that family, a
folder or a name on its hub. Without one the transformer is a tiny random one, and what is drawn are its latents.

Needs diffusers and the wheel of this repository.
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import sageattention
import torch
from PIL import Image

# Tiny random transformers stand there once, for tests and for this.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

FAMILIES = {
    "cogvideox": "cogvideox",
    "flux": "flux",
    "hunyuan": "hunyuan_video15",
    "ltx": "ltx2",
    "mochi": "mochi",
    "qwen": "qwen_image",
    "wan": "wan",
}


def progress(step, steps, started):
    """A line that is written over."""
    done = int(30 * step / steps)
    line = f"\r  [{'#' * done}{'.' * (30 - done)}] step {step} of {steps}, {time.perf_counter() - started:.1f} s"
    print(line, end="\n" if step == steps else "", file=sys.stderr, flush=True)


def random_weights(options):
    """A function that follows a random transformer from noise, a step of Euler at a time, and gives latents."""
    import diffusion_models

    dtype = torch.bfloat16
    model, inputs = getattr(diffusion_models, FAMILIES[options.family])(options.device, dtype, True)
    times = inputs["timestep"]

    def run(after_step):
        latents, started = inputs["hidden_states"], time.perf_counter()
        for step in range(options.steps):
            now = {**inputs, "hidden_states": latents, "timestep": (times * (1 - step / options.steps)).to(times.dtype)}
            velocity = model(**now, return_dict=False)[0]
            latents = latents + velocity.to(dtype) / options.steps
            after_step()
            progress(step + 1, options.steps, started)
        return latents.float().cpu()

    return run, model


def checkpoint(options):
    """A function that runs a pipeline, and gives the frames `[count, height, width, 3]`."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(options.checkpoint, torch_dtype=torch.bfloat16).to(
        options.device
    )

    def run(after_step):
        def on_step_end(pipe, step, timestep, kwargs):
            after_step()
            return kwargs

        out = pipe(
            options.prompt,
            num_inference_steps=options.steps,
            generator=torch.Generator("cpu").manual_seed(options.seed),
            output_type="np",
            callback_on_step_end=on_step_end,
        )
        frames = out.frames[0] if hasattr(out, "frames") else out.images
        return torch.as_tensor(frames).float()

    return run, pipe.transformer


def timed(run, options, after_step=lambda: None):
    """What a run gives, and its seconds."""
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    out = run(after_step)
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    return out, time.perf_counter() - started


def picture(torch_out, ours, path):
    """The middle of both, and ten times their difference, side by side."""

    def plane(x):
        if x.shape[-1] == 3:
            return x[x.shape[0] // 2] if x.ndim == 4 else x
        # Latents of any shape: as many of their numbers as fill a square, black to white.
        flat = x.flatten()
        side = int(flat.numel() ** 0.5)
        return flat[: side * side].reshape(side, side, 1).expand(-1, -1, 3)

    left, right = plane(torch_out), plane(ours)
    low, high = left.min(), left.max()
    scale = lambda x: ((x - low) / (high - low)).clamp(0, 1)
    row = torch.cat([scale(left), scale(right), (10 * (left - right).abs() / (high - low)).clamp(0, 1)], dim=1)
    image = Image.fromarray((row * 255).byte().numpy())
    if image.height < 256:
        factor = 256 // image.height
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.save(path)


@contextlib.contextmanager
def spread(transformer, options):
    """The model over all processes, where torchrun has started several; whether this one speaks."""
    if options.parallel is None:
        yield True
        return
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    sageattention.register_diffusers(options.schedule)
    transformer.set_attention_backend("sage")
    transformer.enable_parallelism(
        config=ContextParallelConfig(**{f"{options.parallel}_degree": dist.get_world_size()})
    )
    yield dist.get_rank() == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--checkpoint", help="a pipeline of diffusers; without one, random weights")
    parser.add_argument("--prompt", default="a lighthouse in a storm, waves breaking over the rocks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scheme", help="the name of a scheme; without one, the device's own choice")
    parser.add_argument("--first", type=int, default=0, help="steps at the start that have the device's own choice")
    parser.add_argument("--last", type=int, default=0, help="steps at the end that have it")
    parser.add_argument("--parallel", choices=("ring", "ulysses"), help="over all processes, which torchrun starts")
    parser.add_argument("--out", type=Path, default=Path("side-by-side.png"))
    options = parser.parse_args()
    options.schedule = sageattention.HybridSchedule(
        options.steps, first=options.first, last=options.last, inner=options.scheme
    )
    if options.parallel:
        if "RANK" not in os.environ or not options.device.startswith("cuda"):
            parser.error("--parallel: expected a start by torchrun, on GPUs")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    with torch.inference_mode():
        generate(options)
    if options.parallel:
        torch.distributed.destroy_process_group()


def generate(options):
    """Both runs, and what they say of each other."""
    run, transformer = (checkpoint if options.checkpoint else random_weights)(options)
    # The first run of a shape compiles, torch's and ours.
    timed(run, options)
    torch_out, torch_seconds = timed(run, options)
    with spread(transformer, options) as speaks:
        ours = contextlib.nullcontext() if options.parallel else sageattention.patched(options.schedule)
        with ours:
            timed(run, options, options.schedule.step)
            sageattention.counts(reset=True)
            out, seconds = timed(run, options, options.schedule.step)
    counts = sageattention.counts()
    if not speaks:
        return
    error = ((out - torch_out).abs().sum() / torch_out.abs().sum()).item()
    print(f"torch's attention: {torch_seconds:.2f} s")
    print(f"ours: {seconds:.2f} s, {torch_seconds / seconds:.2f} times as fast")
    print(f"calls computed here: {counts.accelerated}; left to torch: {counts.fallbacks or 'none'}")
    print(f"output: relative L1 {error:.4f} from torch's")
    picture(torch_out, out, options.out)
    print(f"{options.out}: torch's, ours, ten times their difference")


if __name__ == "__main__":
    main()
