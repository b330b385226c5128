//! Values rounded to formats of 8 and 16 bits, as numbers.

use sage_core::MAX_VALUE_DIM;
use sage_core::oracle::LARGEST_FACTOR;

use super::super::narrow::{bfloat, e4m3, half};
use super::{nearest_even, saturated};
use crate::tile::Rounded;

/// Largest magnitude of an INT8 code.
const INT8_MAX: f32 = 127.0;

/// Rounds rows of `value_dim` values in place. `channels` has the largest magnitude of each channel in the sequence,
/// where the format wants it.
#[inline(always)]
pub(super) fn round_values(to: Rounded, value_dim: usize, channels: &[f32], rows: &mut [f32]) {
    match to {
        Rounded::F16 => rows.iter_mut().for_each(|x| *x = half(*x)),
        Rounded::BF16 => rows.iter_mut().for_each(|x| *x = bfloat(*x)),
        Rounded::Fp8 { v_max, .. } => fp8(v_max, value_dim, channels, rows),
        Rounded::Int8 => int8(value_dim, channels, rows),
    }
}

#[inline(always)]
fn fp8(v_max: f32, value_dim: usize, channels: &[f32], rows: &mut [f32]) {
    let (mut factors, mut scales) = ([0f32; MAX_VALUE_DIM], [0f32; MAX_VALUE_DIM]);
    let (factors, scales) = (&mut factors[..value_dim], &mut scales[..value_dim]);
    for ((factor, scale), &max) in factors.iter_mut().zip(scales.iter_mut()).zip(channels) {
        (*factor, *scale) = match fp8_factor(v_max, max) {
            Some(LARGEST_FACTOR) => (LARGEST_FACTOR, 1.0 / LARGEST_FACTOR),
            Some(factor) => (factor, max / v_max),
            // Zeros, or what makes the channel NaN.
            None => (0.0, max),
        };
    }
    for row in rows.chunks_exact_mut(value_dim) {
        for ((x, factor), scale) in row.iter_mut().zip(&*factors).zip(&*scales) {
            *x = e4m3(*x * factor) * scale;
        }
    }
}

/// What takes a channel whose largest magnitude is `max` to E4M3's range; none where that is 0 or NaN.
#[inline(always)]
pub(crate) fn fp8_factor(v_max: f32, max: f32) -> Option<f32> {
    (max > 0.0).then(|| (v_max / max).min(LARGEST_FACTOR))
}

/// Quotients, not products with an inverse: scales may have none.
#[inline(always)]
fn int8(value_dim: usize, channels: &[f32], rows: &mut [f32]) {
    let mut scales = [0f32; MAX_VALUE_DIM];
    let scales = &mut scales[..value_dim];
    scales.iter_mut().zip(channels).for_each(|(scale, max)| *scale = max / INT8_MAX);
    for row in rows.chunks_exact_mut(value_dim) {
        for (x, scale) in row.iter_mut().zip(&*scales) {
            let quotient = if *scale > 0.0 { saturated(*x / scale, INT8_MAX) } else { 0.0 };
            *x = nearest_even(quotient) as f32 * scale;
        }
    }
}
