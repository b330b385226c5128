//! The schemes by name: one for each public function and variant of the original, and our own.

use std::fmt;
use std::str::FromStr;

use crate::{
    Accumulator, Error, Fp4Format, Granularity, IntBits, IntQuantizer, PLevels, Pv, Qk, Result, Rounding,
    ScaleRows, Scheme, SmoothK, SmoothQ, Smoothing, Tile, ZeroGroup,
};

/// A scheme with a name.
///
/// ```
/// use sage_core::Preset;
///
/// let preset: Preset = "sage2-int8-fp8-per-thread".parse()?;
/// assert_eq!(preset.scheme(128).to_string(), "INT8 QK per-thread · smooth K · FP8 PV (448, f32+f32)");
/// # Ok::<(), sage_core::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Preset {
    name: &'static str,
    summary: &'static str,
    original: Option<&'static str>,
    scheme: Scheme,
    // Query rows of a warp where head_dim is above 64, if not those of the scheme.
    warp_q_of_wide_heads: Option<usize>,
}

impl Preset {
    /// The name: stable, kebab-case, used on the command line and in reports.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// What it is, in one line.
    pub const fn summary(&self) -> &'static str {
        self.summary
    }

    /// The original's function and arguments, or the paper's name where nothing was shipped; `None` for our own.
    pub const fn original(&self) -> Option<&'static str> {
        self.original
    }

    /// The scheme, for heads of `head_dim` channels.
    pub fn scheme(&self, head_dim: usize) -> Scheme {
        let mut scheme = self.scheme;
        if let (Qk::Int(quantizer), Some(warp_q)) = (&mut scheme.qk, self.warp_q_of_wide_heads)
            && head_dim > 64
        {
            quantizer.tile.warp_q = warp_q;
        }
        scheme
    }

    const fn with_warp_q_of_wide_heads(self, warp_q: usize) -> Self {
        Preset { warp_q_of_wide_heads: Some(warp_q), ..self }
    }
}

impl PartialEq for Preset {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Preset {}

impl fmt::Debug for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Preset({})", self.name)
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Preset::ALL.iter().find(|preset| preset.name == name).copied().ok_or_else(|| {
            let names: Vec<&str> = Preset::ALL.iter().map(|preset| preset.name).collect();
            Error::value("scheme", name, format!("one of {}", names.join(", ")))
        })
    }
}

/// A constant for each preset, and the list of all.
macro_rules! presets {
    ($($id:ident $name:literal: $summary:literal, $original:expr, $scheme:expr $(, $with:ident($argument:expr))?;)*) => {
        impl Preset {
            $(
                #[doc = $summary]
                pub const $id: Preset = Preset {
                    name: $name,
                    summary: $summary,
                    original: $original,
                    scheme: $scheme,
                    warp_q_of_wide_heads: None,
                }$(.$with($argument))?;
            )*

            /// All presets: our own first, then the original's by generation.
            pub const ALL: &'static [Preset] = &[$(Preset::$id),*];
        }
    };
}

presets! {
    FULL "full": "No quantisation.",
        None, Scheme { qk: Qk::Full, pv: Pv::F32, smooth: SMOOTH_NOTHING, rotate: false };
    INT8 "int8": "INT8 QK per block, 12-bit PV in exact integers: the CPU backend's default.",
        None, int(OURS, Pv::Fixed12 { block: 128 });
    INT8_PER_TOKEN "int8-per-token": "INT8 QK per token, 12-bit PV in exact integers.",
        None, int(OURS.per(Granularity::PerToken), Pv::Fixed12 { block: 128 });
    INT8_PER_TOKEN_ROTATED "int8-per-token-rotated":
        "INT8 QK per token of rotated Q and K, 12-bit PV in exact integers: about half the error of INT8_PER_TOKEN on trained models.",
        None, int(OURS.per(Granularity::PerToken), Pv::Fixed12 { block: 128 }).rotated();
    INT8_F32 "int8-f32": "INT8 QK per block, single-precision PV.",
        None, int(OURS, Pv::F32);
    NVFP4_FP8 "nvfp4-fp8": "FP4 QK with Q and K smoothed as SageAttention3 does, FP8 PV summed in f16 within a tile.",
        None, sage3(FP8_NARROW);
    NVFP4_FP16 "nvfp4-fp16": "FP4 QK with Q and K smoothed as SageAttention3 does, FP16 PV summed in f32.",
        None, sage3(Pv::F16(Accumulator::F32));
    INT8_FP8 "int8-fp8": "INT8 QK per thread, FP8 PV summed in the tensor core alone; means and scales of 128 rows: the fastest on Hopper.",
        None, int(CUDA_PER_WARP.per(Granularity::PerThread), FP8_SAMPLED).of_sampled_keys();

    SAGE1_INT8_FP16 "sage1-int8-fp16": "SageAttention1: INT8 QK per block, FP16 PV.",
        Some("sageattn_qk_int8_pv_fp16_triton(quantization_backend=\"triton\")"),
        int(TRITON_PER_BLOCK, Pv::F16(Accumulator::F16ThenF32));
    SAGE1_INT8_FP16_CUDA_QUANTISER "sage1-int8-fp16-cuda-quantiser":
        "SageAttention1 with Q and K quantised by the CUDA kernels.",
        Some("sageattn_qk_int8_pv_fp16_triton(quantization_backend=\"cuda\")"),
        int(IntQuantizer { scale_q_first: true, ..CUDA_PER_WARP }.per(Granularity::PerBlock), Pv::F16(Accumulator::F16ThenF32));
    SAGE1_INT8_FP16_VARLEN "sage1-int8-fp16-varlen":
        "SageAttention1 on packed sequences; K's mean here is of each sequence, not of all.",
        Some("sageattn_varlen"), int(TRITON_PER_BLOCK, Pv::F16(Accumulator::F16ThenF32));
    SAGE1_INT8_FP16_PER_TOKEN "sage1-int8-fp16-per-token": "SageAttention1 with INT8 QK per token.",
        Some("SageAttn-T of the SageAttention paper"),
        int(TRITON_PER_BLOCK.per(Granularity::PerToken), Pv::F16(Accumulator::F16ThenF32));
    SAGE1_INT8_INT8 "sage1-int8-int8": "SageAttention1 with INT8 QK per block and INT8 PV.",
        Some("SageAttn-vB of the SageAttention paper"), int(TRITON_PER_BLOCK, Pv::Int8);
    SAGE1_INT8_INT8_PER_TOKEN "sage1-int8-int8-per-token": "SageAttention1 with INT8 QK per token and INT8 PV.",
        Some("SageAttn-vT of the SageAttention paper"),
        int(TRITON_PER_BLOCK.per(Granularity::PerToken), Pv::Int8);

    SAGE2_INT8_FP16_PER_THREAD "sage2-int8-fp16-per-thread": "INT8 QK per thread, FP16 PV summed in f32.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp32\")"),
        int(PER_THREAD, Pv::F16(Accumulator::F32));
    SAGE2_INT8_FP16_PER_WARP "sage2-int8-fp16-per-warp": "INT8 QK per warp, FP16 PV summed in f32.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp32\")"),
        int(CUDA_PER_WARP, Pv::F16(Accumulator::F32));
    SAGE2_INT8_FP16_F16_PER_THREAD "sage2-int8-fp16-f16-per-thread": "INT8 QK per thread, FP16 PV summed in f16.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp16\")"),
        int(PER_THREAD, Pv::F16(Accumulator::F16));
    SAGE2_INT8_FP16_F16_PER_WARP "sage2-int8-fp16-f16-per-warp": "INT8 QK per warp, FP16 PV summed in f16.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp16\")"),
        int(CUDA_PER_WARP, Pv::F16(Accumulator::F16));
    SAGE2_INT8_FP16_F16_SMOOTH_V_PER_THREAD "sage2-int8-fp16-f16-smooth-v-per-thread":
        "INT8 QK per thread, FP16 PV of a smoothed V summed in f16.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp16\", smooth_v=True)"),
        int(PER_THREAD, Pv::F16(Accumulator::F16)).smooth_v();
    SAGE2_INT8_FP16_F16_SMOOTH_V_PER_WARP "sage2-int8-fp16-f16-smooth-v-per-warp":
        "INT8 QK per warp, FP16 PV of a smoothed V summed in f16.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp16\", smooth_v=True)"),
        int(CUDA_PER_WARP, Pv::F16(Accumulator::F16)).smooth_v();
    SAGE2_INT8_FP16_F16F32_PER_THREAD "sage2-int8-fp16-f16f32-per-thread":
        "INT8 QK per thread, FP16 PV summed in f16 within a tile, in f32 across.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp16+fp32\")"),
        int(PER_THREAD, Pv::F16(Accumulator::F16ThenF32)), with_warp_q_of_wide_heads(16);
    SAGE2_INT8_FP16_F16F32_PER_WARP "sage2-int8-fp16-f16f32-per-warp":
        "INT8 QK per warp, FP16 PV summed in f16 within a tile, in f32 across.",
        Some("sageattn_qk_int8_pv_fp16_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp16+fp32\")"),
        int(CUDA_PER_WARP, Pv::F16(Accumulator::F16ThenF32)), with_warp_q_of_wide_heads(16);

    SAGE2_INT8_FP8_PER_THREAD "sage2-int8-fp8-per-thread":
        "SageAttention2: INT8 QK per thread, FP8 PV summed in two levels.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp32+fp32\")"),
        int(PER_THREAD, FP8);
    SAGE2_INT8_FP8_PER_WARP "sage2-int8-fp8-per-warp":
        "SageAttention2: INT8 QK per warp, FP8 PV summed in two levels.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp32+fp32\")"),
        int(CUDA_PER_WARP, FP8);
    SAGE2_INT8_FP8_F32_PER_THREAD "sage2-int8-fp8-f32-per-thread":
        "INT8 QK per thread, FP8 PV summed in the tensor core alone.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp32\")"),
        int(PER_THREAD, FP8_ONE_LEVEL);
    SAGE2_INT8_FP8_F32_PER_WARP "sage2-int8-fp8-f32-per-warp":
        "INT8 QK per warp, FP8 PV summed in the tensor core alone.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp32\")"),
        int(CUDA_PER_WARP, FP8_ONE_LEVEL);
    SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD "sage2-int8-fp8-f32-smooth-v-per-thread":
        "INT8 QK per thread, FP8 PV of a smoothed V summed in the tensor core alone.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp32\", smooth_v=True)"),
        int(PER_THREAD, FP8_ONE_LEVEL).smooth_v();
    SAGE2_INT8_FP8_F32_SMOOTH_V_PER_WARP "sage2-int8-fp8-f32-smooth-v-per-warp":
        "INT8 QK per warp, FP8 PV of a smoothed V summed in the tensor core alone.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp32\", smooth_v=True)"),
        int(CUDA_PER_WARP, FP8_ONE_LEVEL).smooth_v();
    SAGE2_INT8_FP8_SM90_PER_THREAD "sage2-int8-fp8-sm90-per-thread":
        "SageAttention2 on Hopper: INT8 QK per thread, FP8 PV summed in two levels, tiles of 64 × 128.",
        Some("sageattn_qk_int8_pv_fp8_cuda_sm90(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp32+fp32\")"),
        int(IntQuantizer { tile: SM90_TILE, ..PER_THREAD }, FP8);
    SAGE2_INT8_FP8_SM90_PER_WARP "sage2-int8-fp8-sm90-per-warp":
        "SageAttention2 on Hopper: INT8 QK per warp, FP8 PV summed in two levels, tiles of 64 × 128.",
        Some("sageattn_qk_int8_pv_fp8_cuda_sm90(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp32+fp32\")"),
        int(IntQuantizer { tile: SM90_TILE, ..CUDA_PER_WARP }, FP8);
    SAGE2_INT4_FP8 "sage2-int4-fp8": "SageAttention2: INT4 QK per thread with Q smoothed as well, FP8 PV.",
        Some("SageAttn2-4b of the SageAttention2 paper"),
        int(IntQuantizer { bits: IntBits::Four, ..PER_THREAD }, FP8).smooth_q(SmoothQ::Block(128));
    SAGE2PP_INT8_FP8_PER_THREAD "sage2pp-int8-fp8-per-thread":
        "SageAttention2++: INT8 QK per thread, FP8 PV summed in f16 within a tile, in f32 across.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_thread\", pv_accum_dtype=\"fp32+fp16\")"),
        int(PER_THREAD, FP8_NARROW);
    SAGE2PP_INT8_FP8_PER_WARP "sage2pp-int8-fp8-per-warp":
        "SageAttention2++: INT8 QK per warp, FP8 PV summed in f16 within a tile, in f32 across.",
        Some("sageattn_qk_int8_pv_fp8_cuda(qk_quant_gran=\"per_warp\", pv_accum_dtype=\"fp32+fp16\")"),
        int(CUDA_PER_WARP, FP8_NARROW);
    SAGE2PP_INT4_FP8 "sage2pp-int4-fp8":
        "SageAttention2++: INT4 QK per thread with Q smoothed as well, FP8 PV summed in f16 within a tile.",
        Some("SageAttn2++(4+8) of the SageAttention2++ paper"),
        int(IntQuantizer { bits: IntBits::Four, ..PER_THREAD }, FP8_NARROW).smooth_q(SmoothQ::Block(128));

    SAGE3_NVFP4 "sage3-nvfp4": "SageAttention3: FP4 QK and PV, Q smoothed by blocks of 128.",
        Some("sageattn3_blackwell(per_block_mean=True)"), sage3(NVFP4);
    SAGE3_NVFP4_SEQUENCE_MEAN "sage3-nvfp4-sequence-mean": "SageAttention3: FP4 QK and PV, Q smoothed as a whole.",
        Some("sageattn3_blackwell(per_block_mean=False)"), sage3(NVFP4).smooth_q(SmoothQ::Sequence);
    SAGE3_NVFP4_ONE_LEVEL "sage3-nvfp4-one-level": "FP4 QK and PV, P scaled by its groups alone.",
        Some("Direct quantisation of P, of the SageAttention3 paper"), sage3(NVFP4_ONE_LEVEL);
    SAGE3_NVFP4_ONE_LEVEL_SEQUENCE_MEAN "sage3-nvfp4-one-level-sequence-mean":
        "FP4 QK and PV, Q smoothed as a whole, P scaled by its groups alone.",
        Some("Direct quantisation of P, of the SageAttention3 paper, with per_block_mean=False"),
        sage3(NVFP4_ONE_LEVEL).smooth_q(SmoothQ::Sequence);
    SAGE3_MXFP4 "sage3-mxfp4": "SageAttention3 with groups of 32 and powers of two as scales.",
        Some("MXFP4 of the SageAttention3 paper"), sage3(Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One });
    ATTN_QAT_NVFP4 "attn-qat-nvfp4": "FP4 QK and PV for models trained with it: nothing smoothed, P scaled by its groups alone.",
        Some("sageattn_blackwell(single_level_p_quant=True) of Attn-QAT"),
        Scheme { qk: Qk::Fp4(Fp4Format::Nv), pv: NVFP4_ONE_LEVEL, smooth: SMOOTH_NOTHING, rotate: false };

    SPARGE_INT8_FP16 "sparge-int8-fp16": "SpargeAttn: INT8 QK per block, FP16 PV.",
        Some("spas_sage_attn_meansim_cuda, spas_sage_attn_meansim_topk_cuda"),
        int(SPARGE, Pv::F16(Accumulator::F16ThenF32));
    SPARGE_INT8_FP8 "sparge-int8-fp8": "SpargeAttn: INT8 QK per block, FP8 PV.",
        Some("spas_sage2_attn_meansim_cuda, spas_sage2_attn_meansim_topk_cuda, block_sparse_sage2_attn_cuda"),
        int(SPARGE, FP8_NARROW);
    SPARGE_INT8_FP8_SM90 "sparge-int8-fp8-sm90": "SpargeAttn on Hopper: tiles of 64 × 128, FP8 PV summed in two levels.",
        Some("spas_sage2_attn_meansim_cuda and its kin on compute capability 9.0"),
        int(IntQuantizer { tile: SM90_TILE, ..SPARGE }, Pv::Fp8 { v_max: 2.25, rows: ScaleRows::All, accumulator: Accumulator::F32ThenF32 });
    SPARGE_INT8_FP16_TRITON "sparge-int8-fp16-triton": "The older block-sparse kernel: SageAttention1's arithmetic.",
        Some("sparse_sageattn"), int(TRITON_PER_BLOCK, Pv::F16(Accumulator::F16ThenF32));
}

/// Rows whose statistics stand for all: a mean of so many makes scales 1/256 larger than the mean of all would, and K
/// and V are read once.
const SAMPLED_ROWS: usize = 128;

const SMOOTH_NOTHING: Smoothing = Smoothing { q: SmoothQ::Off, k: SmoothK::Off, v: false };
const SMOOTH_K: Smoothing = Smoothing { k: SmoothK::Mean, ..SMOOTH_NOTHING };

/// E4M3 as SageAttention2 has it: V fills the range, and sums move to true f32 after each tile.
const FP8: Pv = Pv::Fp8 { v_max: 448.0, rows: ScaleRows::All, accumulator: Accumulator::F32ThenF32 };
const FP8_ONE_LEVEL: Pv = Pv::Fp8 { v_max: 448.0, rows: ScaleRows::All, accumulator: Accumulator::F32 };
/// Rows that were not sampled may be eight times as large before a head takes all of its rows.
const FP8_SAMPLED: Pv =
    Pv::Fp8 { v_max: 56.0, rows: ScaleRows::Sampled(SAMPLED_ROWS), accumulator: Accumulator::F32 };
/// SageAttention2++: 64 products of P ≤ 448 and V ≤ 2.25 fit f16's range.
const FP8_NARROW: Pv = Pv::Fp8 { v_max: 2.25, rows: ScaleRows::All, accumulator: Accumulator::F16ThenF32 };

/// P in two levels, and in one.
const NVFP4: Pv = Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::Two };
const NVFP4_ONE_LEVEL: Pv = Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::One };

const WIDE_TILE: Tile = Tile { block_q: 128, warp_q: 32, block_k: 64, warp_k: 64 };
const SM90_TILE: Tile = Tile { block_q: 64, warp_q: 16, block_k: 128, warp_k: 128 };

/// The original has no guard here: an all-zero group is 0/0. Elsewhere the scale is the same.
const TRITON_PER_BLOCK: IntQuantizer = IntQuantizer {
    bits: IntBits::Eight,
    granularity: Granularity::PerBlock,
    tile: WIDE_TILE,
    rounding: Rounding::HalfAwayFromZero,
    zero_group: ZeroGroup::Guard,
    scale_q_first: true,
};

const PER_THREAD: IntQuantizer = IntQuantizer {
    granularity: Granularity::PerThread,
    zero_group: ZeroGroup::AddToScale,
    scale_q_first: false,
    ..TRITON_PER_BLOCK
};

const CUDA_PER_WARP: IntQuantizer = IntQuantizer {
    granularity: Granularity::PerWarp,
    rounding: Rounding::NearestEven,
    zero_group: ZeroGroup::ClampMaximum,
    scale_q_first: false,
    ..TRITON_PER_BLOCK
};

/// The pass that pools blocks also quantises them, and does not know the softmax scale.
const SPARGE: IntQuantizer =
    IntQuantizer { zero_group: ZeroGroup::AddToScale, scale_q_first: false, ..TRITON_PER_BLOCK };

const OURS: IntQuantizer =
    IntQuantizer { rounding: Rounding::NearestEven, scale_q_first: false, ..TRITON_PER_BLOCK };

impl IntQuantizer {
    const fn per(self, granularity: Granularity) -> Self {
        IntQuantizer { granularity, ..self }
    }
}

impl Scheme {
    const fn smooth_q(self, q: SmoothQ) -> Self {
        Scheme { smooth: Smoothing { q, ..self.smooth }, ..self }
    }

    const fn rotated(self) -> Self {
        Scheme { rotate: true, ..self }
    }

    const fn of_sampled_keys(self) -> Self {
        Scheme { smooth: Smoothing { k: SmoothK::Sampled(SAMPLED_ROWS), ..self.smooth }, ..self }
    }

    const fn smooth_v(self) -> Self {
        Scheme { smooth: Smoothing { v: true, ..self.smooth }, ..self }
    }
}

/// Integer Q and K, of which K is smoothed.
const fn int(quantizer: IntQuantizer, pv: Pv) -> Scheme {
    Scheme { qk: Qk::Int(quantizer), pv, smooth: SMOOTH_K, rotate: false }
}

/// Q and K in NVFP4, or in the format that V has, both smoothed as SageAttention3 does.
const fn sage3(pv: Pv) -> Scheme {
    let format = if let Pv::Fp4 { format, .. } = pv { format } else { Fp4Format::Nv };
    Scheme {
        qk: Qk::Fp4(format),
        pv,
        smooth: Smoothing { q: SmoothQ::Block(128), ..SMOOTH_K },
        rotate: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_kebab_case_and_parse_back() {
        for (at, preset) in Preset::ALL.iter().enumerate() {
            assert!(preset.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            assert!(Preset::ALL[..at].iter().all(|other| other != preset), "{preset} twice");
            assert_eq!(preset.name.parse::<Preset>().unwrap(), *preset);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = "sage4".parse::<Preset>().unwrap_err().to_string();
        assert!(message.starts_with("scheme: value is sage4, expected one of full, int8, "), "{message}");
    }

    #[test]
    fn every_preset_passes_its_checks() {
        for preset in Preset::ALL {
            for head_dim in [64, 128, 256] {
                preset.scheme(head_dim).check().unwrap();
            }
        }
    }

    #[test]
    fn warps_narrow_with_wide_heads_only_where_they_do_in_the_original() {
        let warp_q = |preset: Preset, head_dim| match preset.scheme(head_dim).qk {
            Qk::Int(quantizer) => quantizer.tile.warp_q,
            _ => 0,
        };
        assert_eq!(warp_q(Preset::SAGE2_INT8_FP16_F16F32_PER_WARP, 64), 32);
        assert_eq!(warp_q(Preset::SAGE2_INT8_FP16_F16F32_PER_WARP, 128), 16);
        assert_eq!(warp_q(Preset::SAGE2_INT8_FP16_PER_WARP, 128), 32);
    }
}
