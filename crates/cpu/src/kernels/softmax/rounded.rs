//! Softmax whose probabilities are rounded to 8 or 16 bits before they are multiplied by values.

use sage_core::oracle::E4M3_P_EXPONENT;

use super::super::narrow::{bfloat, e4m3, half};
use super::{Softmax, check_softmax, finite_shift, row_max, weigh};
use crate::isa::Isa;
use crate::tile::{Rounded, TILE_KEYS};

/// A step of online softmax, and what its probabilities are rounded to.
pub(crate) struct RoundedSoftmax<'a> {
    /// The rounded probabilities take the places of the scores.
    pub softmax: Softmax<'a>,
    pub to: Rounded,
}

#[inline(always)]
pub(in super::super) unsafe fn softmax_rounded<I: Isa>(args: &mut RoundedSoftmax<'_>) {
    let RoundedSoftmax { softmax: args, to } = args;
    check_softmax::<I>(args);
    for r in 0..args.rows {
        // SAFETY: `check_softmax` bounds the row; the caller vouches for the instruction set.
        unsafe { weigh_row::<I>(args, r) }
        let row = &mut args.scores[r * TILE_KEYS..][..args.columns];
        if round_row(row, *to) {
            // SAFETY: as above.
            args.state.tile_sum[r] = unsafe { row_sum::<I>(row) };
        }
    }
    // SAFETY: the caller vouches for the instruction set.
    unsafe { args.state.update::<I>(args.rows, 1.0) }
}

/// Turns a row of scores into probabilities relative to the largest score so far, as they are on a GPU: what is small
/// beside that loses bits.
#[inline(always)]
pub(super) unsafe fn weigh_row<I: Isa>(args: &mut Softmax<'_>, r: usize) {
    let Softmax { scores, state, columns, .. } = args;
    let row = &mut scores[r * TILE_KEYS..][..*columns];
    // SAFETY: the row holds whole pairs of vectors; the caller vouches for the instruction set.
    unsafe {
        // The running maximum is no NaN: `row_max` and `update` ignore those.
        let max = row_max::<I>(row.as_ptr(), row.len()).max(state.max[r]);
        let sum = weigh::<I>(row, finite_shift::<I>(I::splat(max)));
        state.tile_max[r] = max;
        (state.tile_sum[r], state.tile_lse_sum[r]) = (sum, sum);
    }
}

/// Rounds a row of probabilities; whether the output is divided by their sum and not by that of what they were.
#[inline(always)]
fn round_row(row: &mut [f32], to: Rounded) -> bool {
    /// Largest INT8 probability, which stands for 1.
    const INT8_MAX: f32 = 127.0;
    match to {
        Rounded::F16 => row.iter_mut().for_each(|p| *p = half(*p)),
        Rounded::BF16 => row.iter_mut().for_each(|p| *p = bfloat(*p)),
        Rounded::Fp8 { .. } => {
            let factor = E4M3_P_EXPONENT.exp2();
            let inverse = 1.0 / factor;
            row.iter_mut().for_each(|p| *p = e4m3(*p * factor) * inverse);
        }
        Rounded::Int8 => {
            // Adding 1.5 · 2²³ leaves no bits for a fraction.
            const SHIFT: f32 = 12_582_912.0;
            row.iter_mut().for_each(|p| *p = ((*p * INT8_MAX + SHIFT) - SHIFT) * (1.0 / INT8_MAX));
        }
    }
    matches!(to, Rounded::F16 | Rounded::BF16)
}

#[inline(always)]
unsafe fn row_sum<I: Isa>(row: &[f32]) -> f32 {
    // SAFETY: the row holds whole vectors; the caller vouches for the instruction set.
    unsafe {
        let mut sum = I::splat(0.0);
        for at in (0..row.len()).step_by(I::LANES) {
            sum = I::add(sum, I::load(row.as_ptr().add(at)));
        }
        I::reduce_add(sum)
    }
}
