//! The sums and exponentials on which it depends which blocks are kept, operation by operation: kernels compute the
//! same, and so keep the same blocks.

use std::f32::consts::LOG2_E;

use crate::oracle::Matrix;

/// [`weight`] of the largest score.
const WEIGHT_OF_MAX: f32 = (1 << 30) as f32;

/// The polynomial of [`weight`]: `2^f` on `0..1`, minimax among those that end with 1, which is left out here, the
/// highest coefficient first. Its relative error is 8e-8, 1.7e-7 when evaluated in single precision.
pub const EXP2: [f32; 5] = [0.001_867_13, 0.009_017_031, 0.055_799_913, 0.240_164_44, 0.693_151_3];

/// A sum in single precision, in the order of every sum over tokens, channels or blocks: eight terms that follow each
/// other are added one by one, from +0; then the sums of the eights are folded in halves, those from place 2ⁱ on to
/// those before it, where 2ⁱ is the largest power of two below their number.
///
/// A thread that holds eight rows of eight channels so adds up either by itself, and the rest is a butterfly across
/// threads. Zeros behind the terms change nothing, so a block may be filled up with them.
///
/// ```
/// use sage_core::sparse::sum;
///
/// // One by one, 2²⁴ would not grow by a one.
/// let terms = [16_777_216.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0];
/// assert_eq!(sum(terms), 16_777_218.0);
/// assert_eq!(terms.into_iter().sum::<f32>(), 16_777_216.0);
/// ```
pub fn sum(terms: impl IntoIterator<Item = f32>) -> f32 {
    sum_of_rows(1, terms.into_iter().map(|term| [term]))[0]
}

/// The [`sum`] of each channel over rows of `width` channels.
pub(super) fn sum_of_rows<R: AsRef<[f32]>>(width: usize, rows: impl IntoIterator<Item = R>) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    let mut last = 0;
    for (at, row) in rows.into_iter().enumerate() {
        if at % 8 == 0 {
            last = at / 8 * width;
            sums.resize(last + width, 0.0);
        }
        sums[last..].iter_mut().zip(row.as_ref()).for_each(|(sum, term)| *sum += *term);
    }
    while sums.len() > width {
        let half = (sums.len() / width).next_power_of_two() / 2 * width;
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        sums.truncate(half);
    }
    sums
}

/// `⟨a, b_j⟩` of a row with each column of a matrix, in single precision: products are rounded and then added in order.
pub(super) fn products(a: &[f32], b: &Matrix<f32>) -> Vec<f32> {
    let mut sums = vec![0.0; b.width()];
    for (x, row) in a.iter().zip(b.iter()) {
        sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
    }
    sums
}

/// `⌊2³⁰ · exp(score − max)⌋`, for finite scores and `score ≤ max`: what a block weighs in its row's softmax.
///
/// Weights are integers so that their sums are exact, in whatever order they are added. With `x = (score − max) ·
/// log₂e`, `n = ⌊x⌋` and `f = x − n`, it is the integer part of `2³⁰ · p(f)`, shifted right by `−n` bits, where `p` is
/// a polynomial of degree five by Horner's rule: each product is rounded, and then each sum.
///
/// ```
/// use sage_core::sparse::weight;
///
/// assert_eq!(weight(1.5, 1.5), 1 << 30);
/// assert_eq!(weight(-100.0, 1.5), 0);
/// ```
pub fn weight(score: f32, max: f32) -> u32 {
    let x = (score - max) * LOG2_E;
    let n = x.floor();
    let f = x - n;
    let p = EXP2.iter().fold(0.0, |p, c| p * f + c) * f + 1.0;
    // p is 1 to about 2: the product fits 32 bits, and is exact, as only the exponent changes.
    ((p * WEIGHT_OF_MAX) as u32).checked_shr(-n as u32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_eights_are_folded_in_halves() {
        let large = 16_777_216.0;
        let eights =
            |sums: &[f32]| sum(sums.iter().flat_map(|&sum| [sum, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
        // (2²⁴ + 1) + 1, not 2²⁴ + (1 + 1).
        assert_eq!(eights(&[large, 1.0, 1.0]), large);
        // (2²⁴ + 0) + (1 + 1).
        assert_eq!(eights(&[large, 1.0, 0.0, 1.0]), large + 2.0);
        // ((2²⁴ + 1) + 0) + (1 + 0).
        assert_eq!(eights(&[large, 1.0, 0.0, 0.0, 1.0]), large);
        assert_eq!(sum([]), 0.0);
        assert_eq!(sum([1.0; 100]), 100.0);
    }

    #[test]
    fn zeros_behind_the_terms_change_nothing() {
        let terms = sage_testkit::normal(1, 100);
        for len in 0..terms.len() {
            let padded = terms[..len].iter().copied().chain(std::iter::repeat_n(0.0, 128 - len));
            assert_eq!(sum(padded).to_bits(), sum(terms[..len].iter().copied()).to_bits(), "{len} terms");
        }
    }

    #[test]
    fn a_weight_is_the_exponential_to_seven_digits() {
        for step in 0..40_000 {
            let score = -(step as f32) / 2000.0;
            let exact = f64::from(score).exp() * f64::from(1 << 30);
            // Beside the polynomial, x is rounded twice to 2⁻²⁴ of at most 29, and the integer part drops up to 1.
            let bound = exact * (1.7e-7 + 29.0 * 2.0 * 2f64.powi(-24) * std::f64::consts::LN_2) + 1.0;
            let weight = f64::from(weight(score, 0.0));
            assert!((weight - exact).abs() <= bound, "exp({score}) became {weight}, not {exact}");
        }
    }

    #[test]
    fn weights_of_halves_and_of_nothing() {
        // ln 2 · log₂e rounds to 1 here, so that these are exact.
        let halves = |times: f32| weight(-times * std::f32::consts::LN_2, 0.0);
        assert_eq!((halves(0.0), halves(1.0), halves(2.0)), (1 << 30, 1 << 29, 1 << 28));
        assert_eq!((halves(31.0), halves(40.0), weight(f32::MIN, 0.0)), (0, 0, 0));
    }
}
