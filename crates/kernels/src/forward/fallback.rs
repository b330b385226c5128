//! Which scheme a GPU computes in place of one that it has no kernels for.
//!
//! | in the scheme | on a GPU | who decides |
//! | --- | --- | --- |
//! | scales of more query rows or keys than kernels have | scales of parts of those rows | the plan, which says so |
//! | P·V in f32 or 12 bits, the CPU's forms | P·V in the inputs' 16 bits, summed in f32; before sm_80 in f16 | the plan, which says so |
//! | scales per tensor | scales per block | the caller |
//! | P·V in INT8; in FP8 before sm_89 | P·V in the inputs' 16 bits | the caller |
//! | P·V in bf16 before sm_80 | in f16 | the caller |
//! | full-precision scores of bf16 before sm_80 | INT8 scores per token | the caller |
//! | P·V in FP8 summed in f16; 16-bit P·V summed in forms that it lacks | summed in f32 | the caller |
//! | smoothed V with 16-bit P·V; with sampled scales | V as it is, summed in f32; scales of all rows | the caller |
//! | NVFP4, MXFP4 but on sm_120a and its kin; P·V in them beside other scores | INT8 scores per thread, P·V in FP8 | the caller |
//! | smoothed V with P·V in FP4 | V as it is | the caller |
//! | smoothed Q in blocks that are no multiple of 64 rows | in blocks of fewer rows, but of 64 at least | the caller |
//! | smoothing or rotation of full-precision scores | left out: it changes nothing there | the caller |
//!
//! What the plan decides has the same operands, with scales of fewer rows or wider sums. Where an operand's format
//! changes, the speed does, and so the caller decides: the plan is refused with an error that names the nearest
//! scheme.

use sage_core::{
    Accumulator, DType, Error, Granularity, IntQuantizer, Preset, Pv, Qk, ScaleRows, Scheme, SmoothK,
    SmoothQ, Smoothing,
};
use sage_ptx::Target;

use super::choice::with_own_values;
use crate::machine::{Machine, product_dtype};
use crate::sequence::KEY_TILE;

/// What a message offers by name where the nearest scheme is no preset: of the integer schemes the most accurate.
const BY_NAME: Preset = Preset::INT8_PER_TOKEN;

/// The scheme of kernels for `target` and tensors of type `dtype` that is nearest to `scheme` and, where it has such
/// operands, at least as accurate; `scheme` itself where there is no reason to leave it. P·V in f32 stands for the
/// 16 bits that products of the inputs are computed in.
pub fn nearest_scheme(mut scheme: Scheme, dtype: DType, target: Target) -> Scheme {
    let has_own = product_dtype(dtype, target) == dtype;
    let has_fp4 = Machine::typical(target).has_fp4();
    if matches!(scheme.qk, Qk::Fp4(_)) && !has_fp4 {
        let int8 = Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64);
        scheme.qk = int8.qk;
        scheme.smooth.q = SmoothQ::Off;
    }
    match &mut scheme.qk {
        Qk::Int(quantizer) => {
            if quantizer.granularity == Granularity::PerTensor {
                quantizer.granularity = Granularity::PerBlock;
            }
            *quantizer = with_groups_of_tiles(*quantizer);
        }
        Qk::Full if !has_own => {
            let Scheme { qk, smooth, rotate, .. } = BY_NAME.scheme(64);
            scheme.qk = qk;
            scheme.smooth = Smoothing { v: scheme.smooth.v, ..smooth };
            scheme.rotate = rotate;
        }
        Qk::Full => {
            scheme.rotate = false;
            scheme.smooth = Smoothing { q: SmoothQ::Off, k: SmoothK::Off, ..scheme.smooth };
        }
        Qk::Fp4(_) => {}
    }
    if let SmoothQ::Block(rows) = scheme.smooth.q {
        // A mean of fewer rows is nearer to each of them.
        scheme.smooth.q = SmoothQ::Block((rows / 64 * 64).max(64));
    }
    let has_fp8 = target.sm() >= 89;
    scheme.pv = match scheme.pv {
        as_it_is @ Pv::Fp4 { .. } if has_fp4 && matches!(scheme.qk, Qk::Fp4(_)) => as_it_is,
        Pv::F16(Accumulator::F32ThenF32) => Pv::F16(Accumulator::F32),
        Pv::F16(_) if scheme.smooth.v => Pv::F16(Accumulator::F32),
        Pv::BF16(_) if product_dtype(DType::BF16, target) != DType::BF16 => Pv::F16(Accumulator::F32),
        Pv::BF16(_) => Pv::BF16(Accumulator::F32),
        Pv::Fp8 { .. } | Pv::Fp4 { .. } if !has_fp8 => Pv::F32,
        Pv::Fp8 { v_max, rows, accumulator: Accumulator::F16 } => {
            Pv::Fp8 { v_max, rows, accumulator: Accumulator::F32 }
        }
        Pv::Fp4 { .. } => Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64).pv,
        Pv::Int8 => Pv::F32,
        as_it_is @ (Pv::F32 | Pv::Fixed12 { .. } | Pv::F16(_) | Pv::Fp8 { .. }) => as_it_is,
    };
    match &mut scheme.pv {
        Pv::Fp8 { rows, .. } if scheme.smooth.v => *rows = ScaleRows::All,
        Pv::Fp8 { .. } => {}
        _ => scheme.smooth.v = false,
    }
    scheme
}

/// The scheme with scales of the kernels' groups of rows and 16-bit values of type `dtype` in place of the CPU's, and
/// why it is not as given.
pub(super) fn computed(scheme: Scheme, dtype: DType, reasons: &mut Vec<String>) -> Scheme {
    let mut scheme = with_own_values(scheme, dtype, reasons);
    if let Qk::Int(quantizer) = &mut scheme.qk {
        let given = *quantizer;
        *quantizer = with_groups_of_tiles(given);
        if *quantizer != given {
            let name = given.granularity.name();
            reasons.push(match quantizer.granularity {
                same if same == given.granularity => {
                    let of = |q: &IntQuantizer| match q.granularity {
                        Granularity::PerBlock => (q.tile.block_q, q.tile.block_k),
                        Granularity::PerWarp => (q.tile.warp_q, q.tile.block_k),
                        _ => (q.tile.warp_q, q.tile.warp_k),
                    };
                    let ((q, k), (given_q, given_k)) = (of(quantizer), of(&given));
                    format!(
                        "scales {name} of {q} queries and {k} keys, where the scheme has them of {given_q} and {given_k}: \
                         finer ones lose no accuracy"
                    )
                }
                finer => format!("scales {}: no kernel's tiles are made of the scheme's groups {name}", finer.name()),
            });
        }
    }
    scheme
}

/// The quantiser with groups of rows that the kernels have, each a part of one of the given groups.
fn with_groups_of_tiles(quantizer: IntQuantizer) -> IntQuantizer {
    let mut finer = quantizer;
    let tile = &mut finer.tile;
    let divisor = |rows: usize, groups: [usize; 2]| groups.into_iter().find(|&n| rows.is_multiple_of(n));
    let (q, k) = match quantizer.granularity {
        Granularity::PerToken | Granularity::PerTensor => return quantizer,
        Granularity::PerBlock => (divisor(tile.block_q, [128, 64]), divisor(tile.block_k, [KEY_TILE; 2])),
        Granularity::PerWarp => (divisor(tile.warp_q, [32, 16]), divisor(tile.block_k, [KEY_TILE; 2])),
        Granularity::PerThread => (divisor(tile.warp_q, [32, 16]), divisor(tile.warp_k, [KEY_TILE; 2])),
    };
    let (Some(q), Some(k)) = (q, k) else {
        return IntQuantizer { granularity: Granularity::PerToken, ..quantizer };
    };
    match quantizer.granularity {
        Granularity::PerBlock => tile.block_q = q,
        _ => tile.warp_q = q,
    }
    (tile.block_k, tile.warp_k) = (k, k.min(tile.warp_k));
    if !tile.block_q.is_multiple_of(tile.warp_q) {
        tile.warp_q = tile.block_q;
    }
    finer
}

/// `error` of a scheme that a GPU has no kernels for, with the `nearest` that it has.
pub(super) fn naming_nearest(error: Error, nearest: &Scheme, head_dim: usize) -> Error {
    let nearest = format!("the nearest that this GPU computes is {}", nearest.named_or(head_dim, BY_NAME));
    match error {
        Error::Unsupported { what, instead } => Error::unsupported(what, format!("{instead}; {nearest}")),
        Error::Value { name, found, wanted } => Error::value(name, found, format!("{wanted}; {nearest}")),
        other => other,
    }
}
