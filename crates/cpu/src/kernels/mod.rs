//! The kernels: every algorithm is written once above [`Isa`], and tabled for each instruction set.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod cached;
mod direct;
pub(crate) mod fp4;
mod mask;
mod narrow;
mod pack;
mod product;
mod quantize;
mod softmax;

pub(crate) use cached::{Ahead, CHANNELS, CachedOutputs, CachedScores, QUERY_MAX, Stored};
pub(crate) use direct::{DirectScores, DirectValues, Load};
pub(crate) use mask::{AddBias, HideKeys};
pub(crate) use pack::{GroupMax, PackQueries, PackTile, absmax_bits, fp8_factor, hadamard};
pub(crate) use product::{AddMeans, Scores, Values};
pub(crate) use quantize::QuantizeRows;
pub(crate) use softmax::{Fp4Softmax, RoundedSoftmax, RowState, SoftCap, Softmax};

use half::{bf16, f16};

use crate::isa::{self, Isa};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::tile::Fixed12Word;
use crate::tile::Packing;

/// Declares the table: its fields are the kernels, its methods call them.
macro_rules! kernels {
    ($($(#[$doc:meta])* $kernel:ident: $Args:ty,)*) => {
        /// The kernels of one instruction set.
        #[derive(Clone, Copy)]
        pub(crate) struct Kernels {
            /// Rows of a register tile.
            pub rows: usize,
            pub packing: Packing,
            /// Where the processor multiplies bfloat16.
            pub bf16: Option<Bf16Kernels>,
            $($kernel: unsafe fn(&mut $Args),)*
        }

        impl Kernels {
            $(
                $(#[$doc])*
                pub fn $kernel(&self, mut args: $Args) {
                    // SAFETY: `crate::kernels` hands out tables of detected instruction sets only, and each
                    // kernel checks its arguments.
                    unsafe { (self.$kernel)(&mut args) }
                }
            )*
        }
    };
}

kernels! {
    /// Packs a tile of keys and values.
    pack_tile: PackTile<'_>,
    /// Packs a block of queries.
    pack_queries: PackQueries<'_>,
    /// Q·Kᵀ in floating point.
    scores_float: Scores<'_>,
    /// Q·Kᵀ in integers.
    scores_int: Scores<'_>,
    /// Q·Kᵀ in FP4.
    scores_fp4: Scores<'_>,
    /// Caps scores.
    soft_cap: SoftCap<'_>,
    /// Hides the keys of a boolean mask's row.
    hide_keys: HideKeys<'_>,
    /// Adds to scores what smoothing Q took from them.
    add_means: AddMeans<'_>,
    /// Adds a mask's row in f32.
    add_bias_f32: AddBias<'_, f32>,
    /// Adds a mask's row in f16.
    add_bias_f16: AddBias<'_, f16>,
    /// Adds a mask's row in bf16.
    add_bias_bf16: AddBias<'_, bf16>,
    /// Softmax with probabilities in floating point, in place of the scores.
    softmax_float: Softmax<'_>,
    /// Softmax with probabilities in floating point that are rounded to fewer bits.
    softmax_rounded: RoundedSoftmax<'_>,
    /// Softmax with probabilities in FP4.
    softmax_fp4: Fp4Softmax<'_>,
    /// Softmax with probabilities in 12 bits.
    softmax_fixed12: Softmax<'_>,
    /// P·V in floating point.
    values_float: Values<'_>,
    /// P·V in FP4.
    values_fp4: Values<'_>,
    /// P·V in 12 bits.
    values_fixed12: Values<'_>,
    /// Scores of a few queries with keys in f32.
    direct_scores_f32: DirectScores<'_, f32>,
    /// Scores of a few queries with keys in f16.
    direct_scores_f16: DirectScores<'_, f16>,
    /// Scores of a few queries with keys in bf16.
    direct_scores_bf16: DirectScores<'_, bf16>,
    /// Outputs of a few queries with values in f32.
    direct_values_f32: DirectValues<'_, f32>,
    /// Outputs of a few queries with values in f16.
    direct_values_f16: DirectValues<'_, f16>,
    /// Outputs of a few queries with values in bf16.
    direct_values_bf16: DirectValues<'_, bf16>,
    /// Quantises rows for a cache to INT8.
    quantize_int8: QuantizeRows<'_, i8>,
    /// Quantises rows for a cache to E4M3.
    quantize_e4m3: QuantizeRows<'_, u8>,
    /// Scores of a few queries with cached keys.
    cached_scores: CachedScores<'_>,
    /// Outputs of a few queries with cached values in f16.
    cached_outputs_f16: CachedOutputs<'_, f16>,
    /// Outputs of a few queries with cached values in bf16.
    cached_outputs_bf16: CachedOutputs<'_, bf16>,
    /// Outputs of a few queries with cached values in E4M3.
    cached_outputs_e4m3: CachedOutputs<'_, u8>,
    /// Outputs of a few queries with cached values in INT8.
    cached_outputs_i8: CachedOutputs<'_, i8>,
}

/// The kernels of bfloat16 operands, two to a word.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Kernels {
    scores: unsafe fn(&mut Scores<'_>),
    softmax: unsafe fn(&mut Softmax<'_>),
    values: unsafe fn(&mut Values<'_>),
}

impl Bf16Kernels {
    /// Q·Kᵀ.
    pub fn scores(&self, mut args: Scores<'_>) {
        // SAFETY: as of `Kernels`.
        unsafe { (self.scores)(&mut args) }
    }

    /// Softmax.
    pub fn softmax(&self, mut args: Softmax<'_>) {
        // SAFETY: as of `Kernels`.
        unsafe { (self.softmax)(&mut args) }
    }

    /// P·V.
    pub fn values(&self, mut args: Values<'_>) {
        // SAFETY: as of `Kernels`.
        unsafe { (self.values)(&mut args) }
    }
}

/// Builds the table of one instruction set: every kernel inside a function that enables its features.
macro_rules! table {
    ($(#[$attribute:meta])* $NAME:ident: $Isa:ty, rows $R:literal, vectors $V:literal $(, $features:literal)?) => {
        $(#[$attribute])*
        pub(crate) static $NAME: Kernels = {
            /// Vectors of [`CHANNELS`] numbers.
            const CHANNEL_VECTORS: usize = CHANNELS / <$Isa as Isa>::LANES;
            /// Half the rows of a register tile.
            const HALF: usize = $R / 2;
            macro_rules! kernel {
                ($kernel:expr, $Args:ty) => {{
                    $(#[target_feature(enable = $features)])?
                    // The packing kernels are safe: they use no intrinsics.
                    #[allow(unused_unsafe)]
                    unsafe fn kernel(args: &mut $Args) {
                        // SAFETY: the caller vouches for the instruction set.
                        unsafe { $kernel(args) }
                    }
                    kernel
                }};
            }
            Kernels {
                rows: $R,
                packing: Packing::plain($V * <$Isa as Isa>::LANES, <$Isa as Isa>::WORD),
                bf16: None,
                pack_tile: kernel!(pack::pack_tile, PackTile<'_>),
                pack_queries: kernel!(pack::pack_queries, PackQueries<'_>),
                scores_float: kernel!(product::scores_float::<$Isa, $R, $V>, Scores<'_>),
                scores_int: kernel!(product::scores_int::<$Isa, $R, $V>, Scores<'_>),
                scores_fp4: kernel!(fp4::scores_fp4::<$Isa, HALF, $V>, Scores<'_>),
                soft_cap: kernel!(softmax::soft_cap::<$Isa>, SoftCap<'_>),
                hide_keys: kernel!(mask::hide_keys::<$Isa>, HideKeys<'_>),
                add_means: kernel!(product::add_means::<$Isa>, AddMeans<'_>),
                add_bias_f32: kernel!(mask::add_bias::<$Isa, f32>, AddBias<'_, f32>),
                add_bias_f16: kernel!(mask::add_bias::<$Isa, f16>, AddBias<'_, f16>),
                add_bias_bf16: kernel!(mask::add_bias::<$Isa, bf16>, AddBias<'_, bf16>),
                softmax_float: kernel!(softmax::softmax_float::<$Isa>, Softmax<'_>),
                softmax_rounded: kernel!(softmax::softmax_rounded::<$Isa>, RoundedSoftmax<'_>),
                softmax_fp4: kernel!(softmax::softmax_fp4::<$Isa>, Fp4Softmax<'_>),
                softmax_fixed12: kernel!(softmax::softmax_fixed12::<$Isa, softmax::Pairs>, Softmax<'_>),
                values_float: kernel!(product::values_float::<$Isa, $R, $V>, Values<'_>),
                values_fp4: kernel!(fp4::values_fp4::<$Isa, HALF, $V>, Values<'_>),
                values_fixed12: kernel!(product::values_fixed12::<$Isa, $R, $V>, Values<'_>),
                direct_scores_f32: kernel!(direct::direct_scores::<$Isa, f32>, DirectScores<'_, f32>),
                direct_scores_f16: kernel!(direct::direct_scores::<$Isa, f16>, DirectScores<'_, f16>),
                direct_scores_bf16: kernel!(direct::direct_scores::<$Isa, bf16>, DirectScores<'_, bf16>),
                direct_values_f32: kernel!(direct::direct_values::<$Isa, f32>, DirectValues<'_, f32>),
                direct_values_f16: kernel!(direct::direct_values::<$Isa, f16>, DirectValues<'_, f16>),
                direct_values_bf16: kernel!(direct::direct_values::<$Isa, bf16>, DirectValues<'_, bf16>),
                quantize_int8: kernel!(quantize::quantize_int8, QuantizeRows<'_, i8>),
                quantize_e4m3: kernel!(quantize::quantize_e4m3, QuantizeRows<'_, u8>),
                cached_scores: kernel!(cached::cached_scores::<$Isa>, CachedScores<'_>),
                cached_outputs_f16: kernel!(
                    cached::cached_outputs::<$Isa, f16, CHANNEL_VECTORS>,
                    CachedOutputs<'_, f16>
                ),
                cached_outputs_bf16: kernel!(
                    cached::cached_outputs::<$Isa, bf16, CHANNEL_VECTORS>,
                    CachedOutputs<'_, bf16>
                ),
                cached_outputs_e4m3: kernel!(
                    cached::cached_outputs::<$Isa, u8, CHANNEL_VECTORS>,
                    CachedOutputs<'_, u8>
                ),
                cached_outputs_i8: kernel!(
                    cached::cached_outputs::<$Isa, i8, CHANNEL_VECTORS>,
                    CachedOutputs<'_, i8>
                ),
            }
        };
    };
}

// Register tiles: accumulators, one row of words and one broadcast must fit the register file
// (16 vectors on AVX2 and SSE2, 32 on AVX-512 and NEON).
table!(PORTABLE: isa::Portable, rows 2, vectors 2);
#[cfg(target_arch = "x86_64")]
table!(AVX2: isa::Avx2, rows 6, vectors 2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
table!(AVX_VNNI: isa::AvxVnni, rows 6, vectors 2, "avx2,fma,f16c,avxvnni");
#[cfg(target_arch = "x86_64")]
table!(AVX512: isa::Avx512, rows 12, vectors 2, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni");
/// AVX-512's, but for products of 8-bit integers and of bfloat16.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) static AMX: Kernels = Kernels {
    packing: Packing { depth_step: amx::DEPTH_STEP, fixed12: Fixed12Word::Digits, ..AVX512.packing },
    bf16: Some(Bf16Kernels {
        scores: amx::scores_bf16,
        softmax: amx::softmax_bf16,
        values: amx::values_bf16,
    }),
    scores_int: amx::scores_int,
    softmax_fixed12: amx::softmax_fixed12,
    values_fixed12: amx::values_fixed12,
    ..AVX512
};
#[cfg(target_arch = "aarch64")]
table!(NEON: isa::Neon, rows 6, vectors 4, "neon");
