//! Scores and outputs of a few queries, with keys and values read as they lie in memory.

use super::{AddBias, Kernels, RowState};
use crate::isa::Isa;
use crate::seen::Seen;
use crate::tile::TILE_KEYS;

/// Scores of a few queries and keys read as they lie in memory.
pub(crate) struct DirectScores<'a, E> {
    /// Rows of `head_dim` numbers, already scaled.
    pub q: &'a [f32],
    pub rows: usize,
    /// From the first key on; rows are `stride` apart.
    pub k: &'a [E],
    pub stride: usize,
    pub keys: usize,
    /// What the queries see of each key, or empty: see [`crate::seen::SeenKeys`]. Keys that no query sees are not
    /// read, and their scores are left as they are.
    pub seen: &'a [Seen],
    pub head_dim: usize,
    /// Rows of [`TILE_KEYS`] scores.
    pub scores: &'a mut [f32],
}

/// `O ← α·O + β·(P·V)` of a few queries and values read as they lie in memory.
pub(crate) struct DirectValues<'a, E> {
    /// Rows of [`TILE_KEYS`] probabilities.
    pub p: &'a [f32],
    pub rows: usize,
    /// From the first key on; rows are `stride` apart.
    pub v: &'a [E],
    pub stride: usize,
    pub keys: usize,
    /// What the queries see of each key, or empty. Keys that no query sees are not read.
    pub seen: &'a [Seen],
    pub value_dim: usize,
    /// Rows of `value_dim` numbers.
    pub out: &'a mut [f32],
    pub state: &'a RowState,
}

/// An element type that the direct kernels read.
pub(crate) trait Load: sage_core::Element {
    /// A vector of numbers.
    unsafe fn vector<I: Isa>(p: *const Self) -> I::F;
    /// This type's scores kernel.
    fn scores(kernels: &Kernels, args: DirectScores<'_, Self>);
    /// This type's values kernel.
    fn values(kernels: &Kernels, args: DirectValues<'_, Self>);
    /// This type's kernel for masks.
    fn add_bias(kernels: &Kernels, args: AddBias<'_, Self>);
}

macro_rules! load {
    ($T:ty, $load:ident, $scores:ident, $values:ident, $bias:ident) => {
        impl Load for $T {
            #[inline(always)]
            unsafe fn vector<I: Isa>(p: *const Self) -> I::F {
                // SAFETY: the caller vouches for the instruction set and the pointer.
                unsafe { I::$load(p) }
            }
            fn scores(kernels: &Kernels, args: DirectScores<'_, Self>) {
                kernels.$scores(args)
            }
            fn values(kernels: &Kernels, args: DirectValues<'_, Self>) {
                kernels.$values(args)
            }
            fn add_bias(kernels: &Kernels, args: AddBias<'_, Self>) {
                kernels.$bias(args)
            }
        }
    };
}
load!(f32, load, direct_scores_f32, direct_values_f32, add_bias_f32);
load!(half::f16, load_f16, direct_scores_f16, direct_values_f16, add_bias_f16);
load!(half::bf16, load_bf16, direct_scores_bf16, direct_values_bf16, add_bias_bf16);

/// How far ahead of what is being read cache lines are asked for: enough to cover the latency of memory at the rate at
/// which one core reads.
const PREFETCH_BYTES: usize = 2048;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Independent sums of a dot product, to hide the latency of an addition.
const SUMS: usize = 4;

/// Asks for the line that lies [`PREFETCH_BYTES`] further on among rows that are `stride` apart, once for each line.
#[inline(always)]
unsafe fn prefetch<I: Isa, E: Load>(rows: &[E], row: usize, d: usize, channels: usize, stride: usize) {
    if (d * size_of::<E>()).is_multiple_of(LINE_BYTES) {
        let ahead = (PREFETCH_BYTES / (channels * size_of::<E>())).max(1);
        // SAFETY: any address will do; the caller vouches for the instruction set.
        unsafe { I::prefetch(rows.as_ptr().wrapping_add((row + ahead) * stride + d)) }
    }
}

#[inline(always)]
fn check_direct(keys: usize, stride: usize, channels: usize, len: usize) {
    assert!(keys <= TILE_KEYS && (keys == 0 || len >= (keys - 1) * stride + channels));
}

#[inline(always)]
pub(super) unsafe fn direct_scores<I: Isa, E: Load>(args: &mut DirectScores<'_, E>) {
    let DirectScores { q, rows, k, stride, keys, seen, head_dim, ref mut scores } = *args;
    check_direct(keys, stride, head_dim, k.len());
    assert!(q.len() >= rows * head_dim && scores.len() >= rows * TILE_KEYS);
    let unrolled = head_dim / (SUMS * I::LANES) * (SUMS * I::LANES);
    let vectors = head_dim / I::LANES * I::LANES;
    // Keys in the order of memory: several side by side would be several streams for the processor to follow.
    for key in 0..keys {
        if seen.get(key) == Some(&Seen::Hidden) {
            continue;
        }
        for row in 0..rows {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let q = q.as_ptr().add(row * head_dim);
                let k_row = k.as_ptr().add(key * stride);
                let mut sums = [I::splat(0.0); SUMS];
                for d in (0..unrolled).step_by(SUMS * I::LANES) {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let d = d + i * I::LANES;
                        prefetch::<I, E>(k, key, d, head_dim, stride);
                        *sum = I::fma(I::load(q.add(d)), E::vector::<I>(k_row.add(d)), *sum);
                    }
                }
                for d in (unrolled..vectors).step_by(I::LANES) {
                    prefetch::<I, E>(k, key, d, head_dim, stride);
                    sums[0] = I::fma(I::load(q.add(d)), E::vector::<I>(k_row.add(d)), sums[0]);
                }
                let mut score = I::reduce_add(I::add(I::add(sums[0], sums[1]), I::add(sums[2], sums[3])));
                for d in vectors..head_dim {
                    score += *q.add(d) * (*k_row.add(d)).to_f32();
                }
                *scores.get_unchecked_mut(row * TILE_KEYS + key) = score;
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn direct_values<I: Isa, E: Load>(args: &mut DirectValues<'_, E>) {
    let DirectValues { p, rows, v, stride, keys, seen, value_dim, ref mut out, state } = *args;
    check_direct(keys, stride, value_dim, v.len());
    assert!(p.len() >= rows * TILE_KEYS && out.len() >= rows * value_dim);
    assert!(state.alpha.len() >= rows && state.beta.len() >= rows);
    let vectors = value_dim / I::LANES * I::LANES;
    for (out, alpha) in out.chunks_exact_mut(value_dim).zip(&state.alpha).take(rows) {
        out.iter_mut().for_each(|x| *x *= alpha);
    }
    for key in 0..keys {
        if seen.get(key) == Some(&Seen::Hidden) {
            continue;
        }
        for row in 0..rows {
            let weight = state.beta[row] * p[row * TILE_KEYS + key];
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let out = out.as_mut_ptr().add(row * value_dim);
                let v_row = v.as_ptr().add(key * stride);
                let weights = I::splat(weight);
                for d in (0..vectors).step_by(I::LANES) {
                    prefetch::<I, E>(v, key, d, value_dim, stride);
                    let out = out.add(d);
                    I::store(out, I::fma(weights, E::vector::<I>(v_row.add(d)), I::load(out)));
                }
                for d in vectors..value_dim {
                    *out.add(d) += weight * (*v_row.add(d)).to_f32();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
