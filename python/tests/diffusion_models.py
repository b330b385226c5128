"""diffusers' transformers, tiny and random, with inputs: `build(device, dtype, masked)` gives a model and what to call it with.

Two text entries of a batch; where `masked`, the second is shorter, by a mask in models that take one.
"""

import diffusers
import torch
from exact import random


def _ready(model, device, dtype):
    return model.to(device=device, dtype=dtype).eval()


def _text_mask(masked, length, device, short=7):
    mask = torch.ones(2, length, dtype=torch.bool, device=device)
    if masked:
        mask[1, short:] = False
    return mask


def wan(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=128, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 4, 3, 16, 16, seed=0, dtype=dtype, device=device),
        timestep=torch.tensor([500], device=device),
        encoder_hidden_states=random(1, 12, 32, seed=1, dtype=dtype, device=device),
    )
    return _ready(model, device, dtype), inputs


def wan22(device, dtype, masked=False):
    """Wan 2.2's 5B model gives each token a time step of its own: those of a first frame that is known are 0."""
    model, inputs = wan(device, dtype)
    tokens = 3 * 8 * 8
    timestep = torch.full((1, tokens), 500, device=device)
    timestep[:, :64] = 0
    return model, {**inputs, "timestep": timestep}


def flux(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 144, 4, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(1, 20, 32, seed=1, dtype=dtype, device=device),
        pooled_projections=random(1, 32, seed=2, dtype=dtype, device=device),
        timestep=torch.tensor([0.5], device=device, dtype=dtype),
        img_ids=torch.zeros(144, 3, device=device, dtype=dtype),
        txt_ids=torch.zeros(20, 3, device=device, dtype=dtype),
    )
    return _ready(model, device, dtype), inputs


def flux2(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(16, 16, 16, 16),
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 144, 4, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(1, 20, 32, seed=1, dtype=dtype, device=device),
        timestep=torch.tensor([0.5], device=device, dtype=dtype),
        guidance=torch.tensor([4.0], device=device, dtype=dtype),
        img_ids=torch.zeros(144, 4, device=device),
        txt_ids=torch.zeros(20, 4, device=device),
    )
    return _ready(model, device, dtype), inputs


def hunyuan_video15(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=32, rope_axes_dim=(16, 24, 24), target_size=64,
        task_type="t2v",
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(2, 4, 2, 12, 12, seed=0, dtype=dtype, device=device),
        timestep=torch.tensor([500, 500], device=device, dtype=dtype),
        encoder_hidden_states=random(2, 20, 32, seed=1, dtype=dtype, device=device),
        encoder_attention_mask=_text_mask(masked, 20, device),
        encoder_hidden_states_2=random(2, 9, 32, seed=2, dtype=dtype, device=device),
        encoder_attention_mask_2=_text_mask(masked, 9, device, short=2),
        image_embeds=torch.zeros(2, 5, 32, device=device, dtype=dtype),
    )
    return _ready(model, device, dtype), inputs


def qwen_image(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(2, 144, 16, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(2, 20, 32, seed=1, dtype=dtype, device=device),
        encoder_hidden_states_mask=_text_mask(masked, 20, device).long(),
        timestep=torch.tensor([0.5, 0.5], device=device, dtype=dtype),
        img_shapes=[[(1, 12, 12)]] * 2,
    )
    return _ready(model, device, dtype), inputs


def z_image(device, dtype, masked=False):
    """Its mask is of images of several sizes."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=128, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[16, 24, 24], axes_lens=[64, 32, 32],
    )  # fmt: skip
    side = 8 if masked else 16
    inputs = dict(
        x=[random(4, 1, side_, 16, seed=0, dtype=dtype, device=device) for side_ in (16, side)],
        t=torch.tensor([0.5, 0.5], device=device, dtype=dtype),
        cap_feats=[random(20, 32, seed=1, dtype=dtype, device=device) for _ in range(2)],
    )
    return _ready(model, device, dtype), inputs


def ltx2(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=32,
        audio_cross_attention_dim=64, num_layers=1, caption_channels=32,
    )  # fmt: skip
    mask = _text_mask(masked, 20, device).long()
    inputs = dict(
        hidden_states=random(2, 3 * 6 * 6, 4, seed=0, dtype=dtype, device=device),
        audio_hidden_states=random(2, 11, 4, seed=1, dtype=dtype, device=device),
        encoder_hidden_states=random(2, 20, 32, seed=2, dtype=dtype, device=device),
        audio_encoder_hidden_states=random(2, 20, 32, seed=3, dtype=dtype, device=device),
        timestep=torch.full((2, 108), 500.0, device=device, dtype=dtype),
        audio_timestep=torch.full((2, 11), 500.0, device=device, dtype=dtype),
        encoder_attention_mask=mask,
        audio_encoder_attention_mask=mask,
        num_frames=3,
        height=6,
        width=6,
        audio_num_frames=11,
    )
    return _ready(model, device, dtype), inputs


def cogvideox(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=12, sample_height=12, sample_frames=5, max_text_seq_length=20,
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 2, 4, 12, 12, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(1, 20, 32, seed=1, dtype=dtype, device=device),
        timestep=torch.tensor([500], device=device),
    )
    return _ready(model, device, dtype), inputs


def mochi(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=32, time_embed_dim=16, max_sequence_length=20,
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(2, 4, 2, 12, 12, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(2, 20, 32, seed=1, dtype=dtype, device=device),
        timestep=torch.tensor([500, 500], device=device),
        encoder_attention_mask=_text_mask(masked, 20, device),
    )
    return _ready(model, device, dtype), inputs


def sd35(device, dtype, masked=False):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=32, out_channels=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 4, 16, 16, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(1, 12, 32, seed=1, dtype=dtype, device=device),
        pooled_projections=random(1, 32, seed=2, dtype=dtype, device=device),
        timestep=torch.tensor([500], device=device),
    )
    return _ready(model, device, dtype), inputs


# Models whose attention goes through diffusers' dispatcher, and those that call torch's function themselves.
DISPATCHED = [wan, wan22, flux, flux2, hunyuan_video15, qwen_image, z_image, ltx2]
THEIR_OWN = [cogvideox, mochi, sd35]
MASKED = [hunyuan_video15, qwen_image, z_image, ltx2, mochi]


def outputs(model, inputs):
    """All numbers that a model gives, in one row."""
    given = model(**inputs, return_dict=False)
    flat = []
    for output in given:
        flat += output if isinstance(output, (list, tuple)) else [output]
    return torch.cat([output.flatten() for output in flat])
