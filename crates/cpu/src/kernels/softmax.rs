//! Online softmax of a tile of scores, in base 2, and the soft cap.

mod fp4;
mod rounded;

use sage_core::oracle::FIXED12_MAX;

use crate::isa::{EXP2, EXP2_LOWEST, Isa, exp2, exp2_or_zero, scaled_exp2};
use crate::tile::TILE_KEYS;

pub(crate) use fp4::Fp4Softmax;
pub(super) use fp4::softmax_fp4;
pub(crate) use rounded::RoundedSoftmax;
pub(super) use rounded::softmax_rounded;

/// One step of online softmax, in base 2.
pub(crate) struct Softmax<'a> {
    pub rows: usize,
    /// Scores of a row, hidden ones −∞: a multiple of the kernels' width.
    pub columns: usize,
    /// Rows of [`TILE_KEYS`] scores; the forms in floating point leave probabilities here.
    pub scores: &'a mut [f32],
    /// Rows of `TILE_KEYS / 2` words: the 12-bit form leaves probabilities here, FP4 its own words.
    pub pairs: &'a mut [u32],
    pub state: &'a mut RowState,
}

/// What online softmax remembers of each row, and what the last step asks of the output.
///
/// The output is divided by the sum of probabilities after each tile and not at the end: so it is never larger than the
/// largest value, where a sum over many keys would exceed what a single holds.
///
/// The vectors are padded to whole vectors of every instruction set.
#[derive(Default)]
pub(crate) struct RowState {
    /// Largest score so far.
    pub max: Vec<f32>,
    /// Sum of probabilities relative to it, as they were multiplied by values: what the output was divided by.
    pub sum: Vec<f32>,
    /// The same before they were rounded: what the log-sum-exp is of.
    pub lse_sum: Vec<f32>,
    /// Factor on the output so far.
    pub alpha: Vec<f32>,
    /// Factor on the tile's output.
    pub beta: Vec<f32>,
    /// Largest score of the tile.
    pub(super) tile_max: Vec<f32>,
    /// Sum of the tile's probabilities relative to it.
    pub(super) tile_sum: Vec<f32>,
    /// The same before they were rounded.
    pub(super) tile_lse_sum: Vec<f32>,
}

impl RowState {
    /// Starts `rows` rows afresh.
    pub fn reset(&mut self, rows: usize) {
        let padded = rows.next_multiple_of(16);
        for (values, start) in [
            (&mut self.max, f32::NEG_INFINITY),
            (&mut self.sum, 0.0),
            (&mut self.lse_sum, 0.0),
            (&mut self.alpha, 0.0),
            (&mut self.beta, 0.0),
            (&mut self.tile_max, f32::NEG_INFINITY),
            (&mut self.tile_sum, 0.0),
            (&mut self.tile_lse_sum, 0.0),
        ] {
            values.clear();
            values.resize(padded, start);
        }
    }

    /// Rows there is room for.
    fn capacity(&self) -> usize {
        let of_rows = [&self.max, &self.sum, &self.lse_sum, &self.alpha, &self.beta];
        let of_tile = [&self.tile_max, &self.tile_sum, &self.tile_lse_sum];
        of_rows.into_iter().chain(of_tile).map(Vec::len).min().unwrap_or(0)
    }

    /// Accounts for a tile whose probabilities, relative to its maximum, are multiples of `unit`.
    #[inline(always)]
    pub(super) unsafe fn update<I: Isa>(&mut self, rows: usize, unit: f32) {
        let padded = rows.next_multiple_of(I::LANES);
        assert!(padded <= self.capacity());
        for r in (0..padded).step_by(I::LANES) {
            // SAFETY: the assertion bounds every index; the caller vouches for the instruction set.
            unsafe {
                let old = I::load(self.max.as_ptr().add(r));
                let tile = I::load(self.tile_max.as_ptr().add(r));
                let new = I::max(old, tile);
                let shift = finite_shift::<I>(new);
                let alpha = exp2_or_zero::<I>(I::sub(old, shift));
                let beta = I::mul(exp2_or_zero::<I>(I::sub(tile, shift)), I::splat(unit));
                let before = I::mul(I::load(self.sum.as_ptr().add(r)), alpha);
                let sum = I::fma(I::load(self.tile_sum.as_ptr().add(r)), beta, before);
                let lse_before = I::mul(I::load(self.lse_sum.as_ptr().add(r)), alpha);
                let lse_sum = I::fma(I::load(self.tile_lse_sum.as_ptr().add(r)), beta, lse_before);
                // A row that has seen no key has a sum of 0 and keeps its output of zeros; a sum of NaN stays one.
                let some = I::splat(f32::MIN_POSITIVE);
                let share = |part| I::zero_below(sum, some, I::div(part, sum));
                I::store(self.max.as_mut_ptr().add(r), new);
                I::store(self.alpha.as_mut_ptr().add(r), share(before));
                I::store(self.beta.as_mut_ptr().add(r), share(beta));
                I::store(self.sum.as_mut_ptr().add(r), sum);
                I::store(self.lse_sum.as_mut_ptr().add(r), lse_sum);
            }
        }
    }
}

/// A maximum that can be subtracted: −∞, where every score is hidden, would give −∞ − −∞ = NaN.
#[inline(always)]
pub(super) unsafe fn finite_shift<I: Isa>(max: I::F) -> I::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { I::max(max, I::splat(f32::MIN)) }
}

/// Caps base-2 scores: `cap · tanh(s / cap)`.
pub(crate) struct SoftCap<'a> {
    /// Whole vectors.
    pub scores: &'a mut [f32],
    /// In base 2 too.
    pub cap: f32,
}

#[inline(always)]
pub(super) unsafe fn soft_cap<I: Isa>(args: &mut SoftCap<'_>) {
    /// Coefficients of `tanh(x) / x` in `x²`, the highest first.
    const SERIES: [f32; 5] = [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0];
    let SoftCap { scores, cap } = args;
    assert!(scores.len().is_multiple_of(I::LANES));
    for chunk in scores.chunks_exact_mut(I::LANES) {
        // SAFETY: a chunk is one vector; the caller vouches for the instruction set.
        unsafe {
            let s = I::load(chunk.as_ptr());
            let (zero, one) = (I::splat(0.0), I::splat(1.0));
            let magnitude = I::max(I::sub(zero, s), s);
            // Up to |x| = ¼ the series of tanh (next term: 1e-8), where the quotient below would cancel.
            let limit = I::splat(0.25);
            let x = I::div(magnitude, I::splat(*cap));
            let small = I::sub(zero, I::max(I::sub(zero, limit), I::sub(zero, x)));
            let square = I::mul(small, small);
            let mut series = I::splat(SERIES[0]);
            for c in &SERIES[1..] {
                series = I::fma(series, square, I::splat(*c));
            }
            let series = I::mul(series, small);
            // Beyond, tanh|x| = (1 − e^(−2|x|)) / (1 + e^(−2|x|)).
            let [e] = exp2::<I, 1>(&EXP2, [I::mul(x, I::splat(-2.0 * std::f32::consts::LOG2_E))]);
            let quotient = I::div(I::sub(one, e), I::add(one, e));
            let tanh =
                I::sub(I::add(series, I::zero_below(x, limit, quotient)), I::zero_below(x, limit, series));
            let positive = I::zero_below(s, zero, tanh);
            let signed = I::sub(I::add(positive, positive), tanh);
            I::store(chunk.as_mut_ptr(), I::mul(signed, I::splat(*cap)));
        }
    }
}

/// Largest of `columns` scores.
#[inline(always)]
pub(super) unsafe fn row_max<I: Isa>(row: *const f32, columns: usize) -> f32 {
    // SAFETY: the caller's row holds `columns` scores, a multiple of two vectors.
    unsafe {
        let mut max = [I::splat(f32::NEG_INFINITY); 2];
        for c in (0..columns).step_by(2 * I::LANES) {
            max[0] = I::max(I::load(row.add(c)), max[0]);
            max[1] = I::max(I::load(row.add(c + I::LANES)), max[1]);
        }
        I::reduce_max(I::max(max[0], max[1]))
    }
}

#[inline(always)]
pub(super) fn check_softmax<I: Isa>(args: &Softmax<'_>) {
    assert!(args.columns <= TILE_KEYS && args.columns.is_multiple_of(2 * I::LANES));
    assert!(args.scores.len() >= args.rows * TILE_KEYS);
    assert!(args.state.capacity() >= args.rows);
}

/// Loads `N` vectors of scores, subtracts `shift` and raises 2 to them. `EXACT_ZERO`: a hidden key's probability is 0
/// and not `2^-125`, which in 12 bits rounds to 0 anyway.
#[inline(always)]
unsafe fn probabilities<I: Isa, const N: usize, const EXACT_ZERO: bool>(
    polynomial: &[f32],
    scores: *const f32,
    shift: I::F,
) -> [I::F; N] {
    // SAFETY: the caller vouches for the instruction set and the pointer.
    unsafe {
        let mut x = [shift; N];
        for (i, x) in x.iter_mut().enumerate() {
            *x = I::sub(I::load(scores.add(i * I::LANES)), shift);
        }
        let mut p = exp2::<I, N>(polynomial, x);
        if EXACT_ZERO {
            for (p, x) in p.iter_mut().zip(&x) {
                *p = I::zero_below(*x, I::splat(EXP2_LOWEST), *p);
            }
        }
        p
    }
}

/// Turns a row of scores, whole pairs of vectors, into probabilities relative to `shift`, and returns their sum.
#[inline(always)]
unsafe fn weigh<I: Isa>(row: &mut [f32], shift: I::F) -> f32 {
    let columns = row.len();
    let row = row.as_mut_ptr();
    // SAFETY: the caller vouches for the instruction set, and the row's length bounds every index.
    unsafe {
        let mut sum = [I::splat(0.0); 2];
        let mut store = |c: usize, p: [I::F; 2]| {
            for (i, (sum, &p)) in sum.iter_mut().zip(&p).enumerate() {
                *sum = I::add(*sum, p);
                I::store(row.add(c + i * I::LANES), p);
            }
        };
        let whole = columns / (4 * I::LANES) * 4 * I::LANES;
        for c in (0..whole).step_by(4 * I::LANES) {
            let [p0, p1, p2, p3] = probabilities::<I, 4, true>(&EXP2, row.add(c), shift);
            store(c, [p0, p1]);
            store(c + 2 * I::LANES, [p2, p3]);
        }
        for c in (whole..columns).step_by(2 * I::LANES) {
            store(c, probabilities::<I, 2, true>(&EXP2, row.add(c), shift));
        }
        I::reduce_add(I::add(sum[0], sum[1]))
    }
}

#[inline(always)]
pub(super) unsafe fn softmax_float<I: Isa>(args: &mut Softmax<'_>) {
    check_softmax::<I>(args);
    for r in 0..args.rows {
        // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
        unsafe {
            let row = &mut args.scores[r * TILE_KEYS..][..args.columns];
            let max = row_max::<I>(row.as_ptr(), row.len());
            let sum = weigh::<I>(row, finite_shift::<I>(I::splat(max)));
            args.state.tile_max[r] = max;
            (args.state.tile_sum[r], args.state.tile_lse_sum[r]) = (sum, sum);
        }
    }
    // SAFETY: the caller vouches for the instruction set.
    unsafe { args.state.update::<I>(args.rows, 1.0) }
}

/// How 12-bit probabilities are stored: see [`crate::tile::Fixed12Word`].
pub(super) trait StoreFixed12<I: Isa> {
    /// Stores those of two vectors of a row, from a column on.
    ///
    /// # Safety
    /// The row must be valid for `TILE_KEYS / 2` words, and the processor must have `I`.
    unsafe fn store(row: *mut u32, column: usize, p: [I::I; 2]);
}

/// Two to a word.
pub(super) struct Pairs;

impl<I: Isa> StoreFixed12<I> for Pairs {
    #[inline(always)]
    unsafe fn store(row: *mut u32, column: usize, [low, high]: [I::I; 2]) {
        // SAFETY: the caller's promise.
        unsafe { I::store_i16(row.cast::<i16>().add(column), low, high) }
    }
}

/// What a row's 12-bit probabilities add up to.
struct Fixed12Sum<I: Isa> {
    levels: [I::I; 2],
    /// A NaN vanishes in the conversion to integers; this sum keeps it.
    nan: I::F,
}

impl<I: Isa> Fixed12Sum<I> {
    /// Rounds two vectors of a row, from a column on, stores and adds them.
    #[inline(always)]
    unsafe fn store<S: StoreFixed12<I>>(&mut self, row: *mut u32, column: usize, p: [I::F; 2]) {
        // SAFETY: the caller vouches for the instruction set and the pointer.
        unsafe {
            self.nan = I::add(self.nan, I::add(p[0], p[1]));
            let levels = [I::float_to_int(p[0]), I::float_to_int(p[1])];
            self.levels = [I::add_int(self.levels[0], levels[0]), I::add_int(self.levels[1], levels[1])];
            S::store(row, column, levels);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn softmax_fixed12<I: Isa, S: StoreFixed12<I>>(args: &mut Softmax<'_>) {
    const POLYNOMIAL: [f32; 5] = scaled_exp2(FIXED12_MAX);
    check_softmax::<I>(args);
    assert!(args.pairs.len() >= args.rows * TILE_KEYS / 2);
    for r in 0..args.rows {
        // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
        unsafe {
            let row = args.scores.as_ptr().add(r * TILE_KEYS);
            let pairs = args.pairs.as_mut_ptr().add(r * TILE_KEYS / 2);
            let max = row_max::<I>(row, args.columns);
            let shift = finite_shift::<I>(I::splat(max));
            let mut sum = Fixed12Sum::<I> { levels: [I::splat_int(0); 2], nan: I::splat(0.0) };
            let whole = args.columns / (4 * I::LANES) * 4 * I::LANES;
            for c in (0..whole).step_by(4 * I::LANES) {
                let [p0, p1, p2, p3] = probabilities::<I, 4, false>(&POLYNOMIAL, row.add(c), shift);
                sum.store::<S>(pairs, c, [p0, p1]);
                sum.store::<S>(pairs, c + 2 * I::LANES, [p2, p3]);
            }
            for c in (whole..args.columns).step_by(2 * I::LANES) {
                sum.store::<S>(pairs, c, probabilities::<I, 2, false>(&POLYNOMIAL, row.add(c), shift));
            }
            let level = I::reduce_add_int(I::add_int(sum.levels[0], sum.levels[1])) as f32;
            let sum = if I::reduce_add(sum.nan).is_nan() { f32::NAN } else { level };
            args.state.tile_max[r] = max;
            (args.state.tile_sum[r], args.state.tile_lse_sum[r]) = (sum, sum);
        }
    }
    // SAFETY: the caller vouches for the instruction set.
    unsafe { args.state.update::<I>(args.rows, 1.0 / FIXED12_MAX) }
}

#[cfg(test)]
mod tests;
