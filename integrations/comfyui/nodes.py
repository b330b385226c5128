"""ComfyUI's nodes: one sets a model's attention, one says afterwards what was accelerated."""

from __future__ import annotations

from typing import Any

from .attention_override import AttentionOverride, parse_blocks

AUTO = "auto"
SCHEMES = [
    AUTO,
    "full",
    "int8",
    "int8-fp8",
    "sage2-int8-fp16-per-thread",
    "sage2-int8-fp8-per-thread",
    "sage2pp-int8-fp8-per-thread",
    "sage3-nvfp4",
    "nvfp4-fp8",
]
_KEY = "optimized_attention_override"


class SageAttentionModel:
    """Gives a loaded model our attention, by block and by step."""

    CATEGORY = "model_patches/attention"
    DESCRIPTION = (
        "Attention in 8 or 4 bits for this model alone. Masks, any head size and grouped heads are computed; what is "
        "not keeps ComfyUI's attention, and the report says why."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = {"default": 0, "min": 0, "max": 1000}
        return {
            "required": {
                "model": ("MODEL",),
                "scheme": (SCHEMES, {"default": AUTO, "tooltip": "auto: the fastest accurate one of this device"}),
            },
            "optional": {
                "blocks": ("STRING", {"default": "all", "tooltip": "all, or numbers of blocks such as 0-9, 15"}),
                "outer_scheme": (SCHEMES, {"default": AUTO, "tooltip": "of the first and last steps"}),
                "first_steps": ("INT", {**steps, "tooltip": "steps at the start with outer_scheme"}),
                "last_steps": ("INT", {**steps, "tooltip": "steps at the end with outer_scheme"}),
            },
        }

    def apply(
        self,
        model: Any,
        scheme: str,
        blocks: str = "all",
        outer_scheme: str = AUTO,
        first_steps: int = 0,
        last_steps: int = 0,
    ) -> tuple[Any]:
        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        previous = options.get(_KEY)
        if isinstance(previous, AttentionOverride):
            # This node twice: the last one counts.
            previous = previous.previous
        options[_KEY] = AttentionOverride(
            None if scheme == AUTO else scheme,
            None if outer_scheme == AUTO else outer_scheme,
            first_steps,
            last_steps,
            parse_blocks(blocks),
            previous,
        )
        return (model,)


class SageAttentionReport:
    """Says what was accelerated since the last report. It comes after the sampler, whose latents it hands on."""

    CATEGORY = "model_patches/attention"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    def report(self, model: Any, latent: Any) -> dict[str, Any]:
        override = model.model_options.get("transformer_options", {}).get(_KEY)
        if isinstance(override, AttentionOverride):
            text = override.report()
            override.reset()
        else:
            text = "This model has no SageAttention: connect the output of the SageAttention node."
        return {"ui": {"text": [text]}, "result": (latent, text)}


NODE_CLASS_MAPPINGS = {"SageAttentionModel": SageAttentionModel, "SageAttentionReport": SageAttentionReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SageAttentionModel": "SageAttention (8 and 4 bits)",
    "SageAttentionReport": "SageAttention: what was accelerated",
}
