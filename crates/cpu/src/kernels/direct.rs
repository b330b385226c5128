//! Scores and outputs of a few queries, with keys and values read as they lie in memory.

use super::{Kernels, RowState, TILE_KEYS};
use crate::isa::Isa;

/// Scores of a few queries and keys read as they lie in memory.
pub(crate) struct DirectScores<'a, E> {
    /// Rows of `head_dim` numbers, already scaled.
    pub q: &'a [f32],
    pub rows: usize,
    /// From the first key on; rows are `stride` apart.
    pub k: &'a [E],
    pub stride: usize,
    pub keys: usize,
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
    pub head_dim: usize,
    /// Rows of `head_dim` numbers.
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
}

macro_rules! load {
    ($T:ty, $load:ident, $scores:ident, $values:ident) => {
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
        }
    };
}
load!(f32, load, direct_scores_f32, direct_values_f32);
load!(half::f16, load_f16, direct_scores_f16, direct_values_f16);
load!(half::bf16, load_bf16, direct_scores_bf16, direct_values_bf16);

/// How far ahead of those being read rows are asked for: enough to cover the latency of memory at the rate at which one
/// core reads (2 KiB: 17 → 22 GB/s of the 25 that plain reads reach; 4 KiB: 18).
const PREFETCH_BYTES: usize = 2048;

/// The distance, in elements, of the row to ask for.
#[inline(always)]
fn prefetch_distance<E>(head_dim: usize, stride: usize) -> usize {
    (PREFETCH_BYTES / (head_dim * size_of::<E>())).max(DIRECT_ROWS) * stride
}

/// Rows read side by side: enough independent sums to hide the latency of an addition.
const DIRECT_ROWS: usize = 4;

/// The positions of `DIRECT_ROWS` rows from `first` on, the last one repeated beyond the end.
#[inline(always)]
fn direct_rows(first: usize, keys: usize, stride: usize) -> [usize; DIRECT_ROWS] {
    let mut rows = [0; DIRECT_ROWS];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = (first + i).min(keys - 1) * stride;
    }
    rows
}

#[inline(always)]
fn check_direct(keys: usize, stride: usize, head_dim: usize, len: usize) {
    assert!(keys <= TILE_KEYS && (keys == 0 || len >= (keys - 1) * stride + head_dim));
}

#[inline(always)]
pub(super) unsafe fn direct_scores<I: Isa, E: Load>(args: &mut DirectScores<'_, E>) {
    check_direct(args.keys, args.stride, args.head_dim, args.k.len());
    assert!(args.q.len() >= args.rows * args.head_dim && args.scores.len() >= args.rows * TILE_KEYS);
    let vectors = args.head_dim / I::LANES * I::LANES;
    let ahead = prefetch_distance::<E>(args.head_dim, args.stride);
    for first in (0..args.keys).step_by(DIRECT_ROWS) {
        let keys = direct_rows(first, args.keys, args.stride);
        for row in 0..args.rows {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let q = args.q.as_ptr().add(row * args.head_dim);
                let mut acc = [I::splat(0.0); DIRECT_ROWS];
                for d in (0..vectors).step_by(I::LANES) {
                    let q = I::load(q.add(d));
                    for (acc, &key) in acc.iter_mut().zip(&keys) {
                        let k = args.k.as_ptr().add(key + d);
                        I::prefetch(k.wrapping_add(ahead));
                        *acc = I::fma(q, E::vector::<I>(k), *acc);
                    }
                }
                for (i, (&acc, &key)) in acc.iter().zip(&keys).enumerate().take(args.keys - first) {
                    let mut sum = I::reduce_add(acc);
                    for d in vectors..args.head_dim {
                        sum += *q.add(d) * args.k.get_unchecked(key + d).to_f32();
                    }
                    *args.scores.get_unchecked_mut(row * TILE_KEYS + first + i) = sum;
                }
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn direct_values<I: Isa, E: Load>(args: &mut DirectValues<'_, E>) {
    check_direct(args.keys, args.stride, args.head_dim, args.v.len());
    assert!(args.p.len() >= args.rows * TILE_KEYS && args.out.len() >= args.rows * args.head_dim);
    assert!(args.state.alpha.len() >= args.rows && args.state.beta.len() >= args.rows);
    let vectors = args.head_dim / I::LANES * I::LANES;
    let ahead = prefetch_distance::<E>(args.head_dim, args.stride);
    for row in 0..args.rows {
        let alpha = args.state.alpha[row];
        for x in &mut args.out[row * args.head_dim..(row + 1) * args.head_dim] {
            *x *= alpha;
        }
    }
    for first in (0..args.keys).step_by(DIRECT_ROWS) {
        let keys = direct_rows(first, args.keys, args.stride);
        for row in 0..args.rows {
            let beta = args.state.beta[row];
            let mut p = [0.0; DIRECT_ROWS];
            for (i, p) in p.iter_mut().enumerate().take(args.keys - first) {
                *p = beta * args.p[row * TILE_KEYS + first + i];
            }
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let out = args.out.as_mut_ptr().add(row * args.head_dim);
                for d in (0..vectors).step_by(I::LANES) {
                    let mut acc = I::load(out.add(d));
                    for (&p, &key) in p.iter().zip(&keys) {
                        let v = args.v.as_ptr().add(key + d);
                        I::prefetch(v.wrapping_add(ahead));
                        acc = I::fma(I::splat(p), E::vector::<I>(v), acc);
                    }
                    I::store(out.add(d), acc);
                }
                for d in vectors..args.head_dim {
                    for (&p, &key) in p.iter().zip(&keys) {
                        *out.add(d) += p * args.v.get_unchecked(key + d).to_f32();
                    }
                }
            }
        }
    }
}
