//! Scores and outputs of a few queries, with keys and values as a quantised cache stores them.
//!
//! Queries are 16-bit integers, which leaves nothing of their own quantisation error. They cost no more than 8-bit ones
//! where keys are widened to 16 bits in any case, for want of a dot product of signed bytes, as on AVX2; elsewhere
//! memory is what decoding waits for.

use half::{bf16, f16};

use super::Kernels;
use crate::isa::Isa;
use crate::tile::TILE_KEYS;

/// Channels to which rows of queries, constants and outputs are padded with zeros: a whole number of vectors of
/// every set, of integers and of singles. Keys and values are not padded, but may be read that far.
pub(crate) const CHANNELS: usize = 32;

/// Query rows that share each key and value in registers: accumulators for more would not fit sixteen of them.
const ROWS: usize = 3;

/// Largest magnitude of a query's integers. With keys of 127 and 256 channels, sums stay below 2³¹.
pub(crate) const QUERY_MAX: f32 = 32767.0;

/// Scores of some keys of one page.
pub(crate) struct CachedScores<'a> {
    /// Query rows, each of `width` integers.
    pub q: &'a [i16],
    /// What an integer of each row stands for, `sm_scale · log₂e` included.
    pub q_scales: &'a [f32],
    /// The same rows as numbers.
    pub q_wide: &'a [f32],
    pub rows: usize,
    /// `head_dim`, padded to [`CHANNELS`].
    pub width: usize,
    /// What was subtracted from the page's keys, `width` numbers.
    pub constant: &'a [f32],
    /// From the first key on, rows of `head_dim`, and [`CHANNELS`] more.
    pub k: &'a [i8],
    /// A scale for each key.
    pub k_scales: &'a [f32],
    pub head_dim: usize,
    /// Where this page's scores begin in each row.
    pub offset: usize,
    /// Rows of [`TILE_KEYS`].
    pub scores: &'a mut [f32],
    /// Memory to ask for meanwhile.
    pub ahead: Ahead,
}

/// `O ← α·O + β·(P·V)` of some values of one page.
pub(crate) struct CachedOutputs<'a, T> {
    /// Rows of [`TILE_KEYS`] probabilities.
    pub p: &'a [f32],
    pub rows: usize,
    /// Where this page's probabilities begin in each row.
    pub offset: usize,
    /// From the first value on, rows of `head_dim`, and [`CHANNELS`] more.
    pub v: &'a [T],
    /// A scale for each value; empty where the format has none.
    pub v_scales: &'a [f32],
    pub keys: usize,
    pub head_dim: usize,
    /// `head_dim`, padded to [`CHANNELS`].
    pub width: usize,
    /// Rows of `width` numbers.
    pub out: &'a mut [f32],
    pub alpha: &'a [f32],
    pub beta: &'a [f32],
    /// Memory to ask for meanwhile.
    pub ahead: Ahead,
}

/// Memory that the next kernel will read: asked for while this one computes, for pages lie anywhere, and a processor
/// that has to guess what comes next guesses the memory behind this page.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// Any address.
    pub start: *const u8,
    /// Bytes for each key of this kernel.
    pub stride: usize,
}

impl Ahead {
    /// Nothing.
    pub const NONE: Ahead = Ahead { start: std::ptr::null(), stride: 0 };

    /// The rows of `codes`.
    pub fn rows<T>(codes: &[T], head_dim: usize) -> Self {
        Ahead { start: codes.as_ptr().cast(), stride: head_dim * size_of::<T>() }
    }

    /// Asks for what belongs to `keys` keys from `key` on.
    #[inline(always)]
    unsafe fn ask<I: Isa>(self, key: usize, keys: usize) {
        for line in (0..keys * self.stride).step_by(LINE_BYTES) {
            // SAFETY: any address will do; the caller vouches for the instruction set.
            unsafe { I::prefetch(self.start.wrapping_add(key * self.stride + line)) }
        }
    }
}

/// A type in which a cache stores values.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// What [`Stored::vector`] must be multiplied by.
    const UNIT: f32;
    /// Nothing.
    const ZERO: Self;
    /// A vector of numbers.
    unsafe fn vector<I: Isa>(p: *const Self) -> I::F;
    /// This type's outputs kernel.
    fn outputs(kernels: &Kernels, args: CachedOutputs<'_, Self>);
}

macro_rules! stored {
    ($T:ty, $zero:expr, $load:ident, $unit:expr, $outputs:ident) => {
        impl Stored for $T {
            const UNIT: f32 = $unit;
            const ZERO: Self = $zero;
            #[inline(always)]
            unsafe fn vector<I: Isa>(p: *const Self) -> I::F {
                // SAFETY: the caller vouches for the instruction set and the pointer.
                unsafe { I::$load(p) }
            }
            fn outputs(kernels: &Kernels, args: CachedOutputs<'_, Self>) {
                kernels.$outputs(args)
            }
        }
    };
}
stored!(f16, f16::ZERO, load_f16, 1.0, cached_outputs_f16);
stored!(bf16, bf16::ZERO, load_bf16, 1.0, cached_outputs_bf16);
stored!(i8, 0, load_i8, 1.0, cached_outputs_i8);
// A byte without a sign is E4M3.
stored!(u8, 0, load_e4m3, 256.0, cached_outputs_e4m3);

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

#[inline(always)]
pub(super) unsafe fn cached_scores<I: Isa>(args: &mut CachedScores<'_>) {
    let CachedScores { rows, width, head_dim, offset, .. } = *args;
    let keys = args.k_scales.len();
    assert!(width.is_multiple_of(CHANNELS) && head_dim <= width);
    assert!(offset + keys <= TILE_KEYS && args.scores.len() >= rows * TILE_KEYS);
    assert!(args.q.len() >= rows * width && args.q_wide.len() >= rows * width && args.q_scales.len() >= rows);
    assert!(args.constant.len() >= width && (keys == 0 || args.k.len() >= (keys - 1) * head_dim + width));
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(ROWS);
        // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
        unsafe {
            match count {
                1 => score_rows::<I, 1>(args, row),
                2 => score_rows::<I, 2>(args, row),
                _ => score_rows::<I, ROWS>(args, row),
            }
        }
        row += count;
    }
}

/// Scores of rows `first..first + R`.
#[inline(always)]
unsafe fn score_rows<I: Isa, const R: usize>(args: &mut CachedScores<'_>, first: usize) {
    let CachedScores { width, head_dim, offset, .. } = *args;
    let keys = args.k_scales.len();
    // SAFETY: `cached_scores` checked every length.
    unsafe {
        let q: [*const i16; R] = std::array::from_fn(|r| args.q.as_ptr().add((first + r) * width));
        let mut constant = [0f32; R];
        for (r, constant) in constant.iter_mut().enumerate() {
            let q = args.q_wide.as_ptr().add((first + r) * width);
            let mut sums = [I::splat(0.0); 2];
            for d in (0..width).step_by(2 * I::LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = d + i * I::LANES;
                    *sum = I::fma(I::load(q.add(at)), I::load(args.constant.as_ptr().add(at)), *sum);
                }
            }
            *constant = I::reduce_add(I::add(sums[0], sums[1]));
        }
        let mut finish = |r: usize, key: usize, sum: i32| {
            let scale = args.q_scales[first + r] * args.k_scales[key];
            args.scores[(first + r) * TILE_KEYS + offset + key] = sum as f32 * scale + constant[r];
        };
        let mut key = 0;
        // Four keys at once: their sums end in one vector.
        while key + 4 <= keys {
            let k: [*const i8; 4] = std::array::from_fn(|i| args.k.as_ptr().add((key + i) * head_dim));
            let mut sums = [[I::splat_int(0); 4]; R];
            for d in (0..width).step_by(2 * I::LANES) {
                for (i, k) in k.iter().enumerate() {
                    let k = I::load_i8_pairs(k.add(d));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        sums[i] = I::dot_i16(sums[i], I::load_int(q[r].add(d).cast()), k);
                    }
                }
            }
            if first == 0 {
                args.ahead.ask::<I>(key, 4);
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (i, sum) in I::reduce_add_ints(sums).into_iter().enumerate() {
                    finish(r, key + i, sum);
                }
            }
            key += 4;
        }
        for key in key..keys {
            let k = args.k.as_ptr().add(key * head_dim);
            let mut sums = [I::splat_int(0); R];
            for d in (0..width).step_by(2 * I::LANES) {
                let k = I::load_i8_pairs(k.add(d));
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = I::dot_i16(*sum, I::load_int(q[r].add(d).cast()), k);
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                finish(r, key, I::reduce_add_int(sum));
            }
        }
    }
}

/// `C` is the number of vectors in [`CHANNELS`].
#[inline(always)]
pub(super) unsafe fn cached_outputs<I: Isa, T: Stored, const C: usize>(args: &mut CachedOutputs<'_, T>) {
    let CachedOutputs { rows, offset, keys, head_dim, width, .. } = *args;
    assert!(width.is_multiple_of(CHANNELS) && head_dim <= width && C * I::LANES == CHANNELS);
    assert!(offset + keys <= TILE_KEYS && args.p.len() >= rows * TILE_KEYS);
    assert!(args.out.len() >= rows * width && (keys == 0 || args.v.len() >= (keys - 1) * head_dim + width));
    assert!(args.alpha.len() >= rows && args.beta.len() >= rows);
    assert!(args.v_scales.is_empty() || args.v_scales.len() >= keys);
    let mut weights = [[0f32; TILE_KEYS]; ROWS];
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(ROWS);
        for (r, weights) in weights.iter_mut().enumerate().take(count) {
            let p = &args.p[(row + r) * TILE_KEYS + offset..][..keys];
            let beta = args.beta[row + r] * T::UNIT;
            if args.v_scales.is_empty() {
                weights.iter_mut().zip(p).for_each(|(weight, p)| *weight = beta * p);
            } else {
                let scaled = weights.iter_mut().zip(p).zip(args.v_scales);
                scaled.for_each(|((weight, p), scale)| *weight = beta * p * scale);
            }
        }
        let mut channel = 0;
        while channel < width {
            // One row alone takes twice as many channels, so that enough sums are under way.
            let two = count == 1 && channel + 2 * CHANNELS <= width;
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                match (count, two) {
                    (1, true) => output_block::<I, T, 1, 2, C>(args, &weights, row, channel),
                    (1, false) => output_block::<I, T, 1, 1, C>(args, &weights, row, channel),
                    (2, _) => output_block::<I, T, 2, 1, C>(args, &weights, row, channel),
                    _ => output_block::<I, T, ROWS, 1, C>(args, &weights, row, channel),
                }
            }
            channel += if two { 2 * CHANNELS } else { CHANNELS };
        }
        row += count;
    }
}

/// Rows `row..row + R`, channels `channel..channel + B·CHANNELS`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // the indices are of several arrays, and of memory
unsafe fn output_block<I: Isa, T: Stored, const R: usize, const B: usize, const C: usize>(
    args: &mut CachedOutputs<'_, T>,
    weights: &[[f32; TILE_KEYS]; ROWS],
    row: usize,
    channel: usize,
) {
    let CachedOutputs { keys, head_dim, width, .. } = *args;
    // SAFETY: `cached_outputs` checked every length.
    unsafe {
        let mut sums = [[[I::splat(0.0); C]; B]; R];
        let first = row == 0 && channel == 0;
        for key in 0..keys {
            let v = args.v.as_ptr().add(key * head_dim + channel);
            if first {
                args.ahead.ask::<I>(key, 1);
            }
            let weight: [I::F; R] = std::array::from_fn(|r| I::splat(*weights[r].get_unchecked(key)));
            for b in 0..B {
                for c in 0..C {
                    let v = T::vector::<I>(v.add(b * CHANNELS + c * I::LANES));
                    for r in 0..R {
                        sums[r][b][c] = I::fma(weight[r], v, sums[r][b][c]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let alpha = I::splat(args.alpha[row + r]);
            let out = args.out.as_mut_ptr().add((row + r) * width + channel);
            for (i, sum) in sums.as_flattened().iter().enumerate() {
                let out = out.add(i * I::LANES);
                I::store(out, I::fma(alpha, I::load(out), *sum));
            }
        }
    }
}
