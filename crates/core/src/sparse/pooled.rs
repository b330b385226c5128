//! Blocks of tokens, each as its mean.

use std::ops::Range;

use half::{bf16, f16};

use super::arithmetic::{sum, sum_of_rows};
use crate::DType;
use crate::oracle::Matrix;

/// The blocks of the queries or keys of one head, each as the mean of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct PooledBlocks {
    /// The mean of each block, `[blocks, head_dim]`, rounded to the tensor's element type; zeros where no token counts.
    pub means: Matrix<f32>,
    /// How alike the tokens of each block are: the mean cosine of all pairs, each with itself among them.
    pub similarities: Vec<f32>,
}

impl PooledBlocks {
    /// Pools rows `tokens[b]` of `rows` into block `b`, all in single precision.
    ///
    /// - The mean of a channel is [`sum`](super::sum()) over the tokens, divided by their number, and rounded to
    ///   `dtype`.
    /// - The similarity is `sum_c(u_c²) / n²` with `u_c = sum_i(x_ic · r_i)` and `r_i = 1 / √(sum_c(x_ic²))`; `r_i` is
    ///   0 where that sum is 0, and the similarity NaN where no token counts. Every `sum` is [`sum`](super::sum()),
    ///   and every product, quotient and root is rounded.
    ///
    /// SpargeAttn (arXiv 2502.18137, §3.2) computes the similarity from the Gram matrix of the normalised rows x̂. The
    /// mean of its elements is the same, `Σ_ab ⟨x̂_a, x̂_b⟩ / n² = |Σ_a x̂_a|² / n²`, for n rather than n² products a
    /// channel. With 128 tokens and 256 channels no value passes more than 64 roundings, so the result is within
    /// `64 · 2⁻²⁴` of the definition; the original rounds each x̂ to f16, which is 2⁻¹¹.
    ///
    /// # Panics
    /// When `rows` lacks a token.
    pub fn new(rows: &Matrix<f32>, tokens: &[Range<usize>], dtype: DType) -> Self {
        let similarities = tokens.iter().map(|tokens| similarity(rows, tokens)).collect();
        PooledBlocks { means: means(rows, tokens, dtype), similarities }
    }

    /// The means alone, where nobody asks for similarities: these are most of the work.
    pub(super) fn means_alone(rows: &Matrix<f32>, tokens: &[Range<usize>], dtype: DType) -> Self {
        PooledBlocks { means: means(rows, tokens, dtype), similarities: Vec::new() }
    }
}

/// The mean of each block, rounded to the element type.
fn means(rows: &Matrix<f32>, tokens: &[Range<usize>], dtype: DType) -> Matrix<f32> {
    let width = rows.width();
    let mut means = Matrix::from_fn(tokens.len(), width, |_, _| 0.0);
    for (b, tokens) in tokens.iter().enumerate() {
        let count = tokens.len().max(1) as f32;
        let sums = sum_of_rows(width, tokens.clone().map(|i| rows.row(i)));
        means.row_mut(b).iter_mut().zip(sums).for_each(|(mean, sum)| *mean = rounded(sum / count, dtype));
    }
    means
}

/// The mean of each channel over all tokens that count, in single precision: the [`sum`](super::sum()) over blocks of
/// the [`sum`](super::sum()) over each block's tokens, divided by their number. Zeros where no token counts.
///
/// What is subtracted before quantising, [`oracle::mean`](crate::oracle::mean()), may differ by a kernel's own
/// roundings. This one may not, as a rounding may decide which block is kept.
///
/// # Panics
/// When `rows` lacks a token.
pub fn mean_of_blocks(rows: &Matrix<f32>, tokens: &[Range<usize>]) -> Vec<f32> {
    let count: usize = tokens.iter().map(Range::len).sum();
    let of_block = |tokens: &Range<usize>| sum_of_rows(rows.width(), tokens.clone().map(|i| rows.row(i)));
    let mut mean = sum_of_rows(rows.width(), tokens.iter().map(of_block));
    mean.iter_mut().for_each(|total| *total /= count.max(1) as f32);
    mean
}

fn similarity(rows: &Matrix<f32>, tokens: &Range<usize>) -> f32 {
    let inverse = |i: usize| match sum(rows.row(i).iter().map(|x| x * x)).sqrt() {
        0.0 => 0.0,
        norm => 1.0 / norm,
    };
    let unit = |i: usize| {
        let inverse = inverse(i);
        rows.row(i).iter().map(|x| x * inverse).collect::<Vec<f32>>()
    };
    let channels = sum_of_rows(rows.width(), tokens.clone().map(unit));
    let count = tokens.len() as f32;
    sum(channels.into_iter().map(|u| u * u)) / (count * count)
}

/// The nearest value of an element type, ties to even.
fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{matrix, normal_matrix};

    fn pool(width: usize, elements: &[f32], tokens: &[Range<usize>]) -> PooledBlocks {
        PooledBlocks::new(&matrix(width, elements), tokens, DType::F32)
    }

    #[test]
    fn means_are_of_the_tokens_that_count() {
        let pooled = pool(2, &[1.0, 3.0, 3.0, 5.0, 7.0, -1.0, f32::NAN, 9.0], &[0..2, 2..3, 3..3]);
        assert_eq!(pooled.means.as_slice(), [2.0, 4.0, 7.0, -1.0, 0.0, 0.0]);
        let mean = mean_of_blocks(&matrix(1, &[1.0, 2.0, 6.0, 9.0]), &[0..2, 2..3]);
        assert_eq!(mean, [3.0], "of three tokens");
        assert_eq!(mean_of_blocks(&matrix(1, &[1.0]), &[0..0, 1..1]), [0.0]);
    }

    #[test]
    fn means_are_rounded_to_the_element_type() {
        // Between 1 and the next number of ten bits, between 1 and that of seven: ties go to even.
        let (f16_step, bf16_step) = (1.0 / 1024.0, 1.0 / 128.0);
        let mean = |high: f32, dtype| {
            PooledBlocks::new(&matrix(1, &[1.0, high]), std::slice::from_ref(&(0..2)), dtype).means.row(0)[0]
        };
        assert_eq!(mean(1.0 + f16_step, DType::F16), 1.0);
        assert_eq!(mean(1.0 + 3.0 * f16_step, DType::F16), 1.0 + 2.0 * f16_step);
        assert_eq!(mean(1.0 + bf16_step, DType::BF16), 1.0);
        assert_eq!(mean(1.0 + bf16_step, DType::F32), 1.0 + bf16_step / 2.0);
    }

    #[test]
    fn similarities_worked_out_by_hand() {
        let of = |elements: &[f32]| {
            pool(2, elements, std::slice::from_ref(&(0..elements.len() / 2))).similarities[0]
        };
        assert_eq!(of(&[3.0, 4.0, 6.0, 8.0]), 1.0, "one direction");
        assert_eq!(of(&[2.0, 0.0, 0.0, 5.0]), 0.5, "(1 + 0 + 0 + 1) / 4");
        assert_eq!(of(&[2.0, 0.0, -1.0, 0.0]), 0.0, "(1 − 1 − 1 + 1) / 4");
        assert_eq!(of(&[2.0, 0.0, 0.0, 0.0]), 0.25, "a token of zeros is like none");
        assert_eq!(of(&[7.0, 0.0]), 1.0, "alone");
        assert!(of(&[]).is_nan() && of(&[1.0, f32::NAN]).is_nan() && of(&[1.0, f32::INFINITY]).is_nan());
    }

    #[test]
    fn the_closed_form_is_the_gram_matrix_within_rounding() {
        for (seed, (tokens, width)) in [(64, 64), (128, 256), (100, 40), (3, 1)].into_iter().enumerate() {
            for common in [0.0, 0.3, 3.0] {
                let rows = normal_matrix(seed as u64, tokens, width).map(|x| x + common);
                let unit = |i: usize| {
                    let row: Vec<f64> = rows.row(i).iter().map(|&x| f64::from(x)).collect();
                    let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                    row.into_iter().map(move |x| x / norm).collect::<Vec<_>>()
                };
                let units: Vec<Vec<f64>> = (0..tokens).map(unit).collect();
                let cosine = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
                let gram: f64 = units.iter().flat_map(|a| units.iter().map(move |b| cosine(a, b))).sum();
                let exact = gram / (tokens * tokens) as f64;
                let closed =
                    PooledBlocks::new(&rows, std::slice::from_ref(&(0..tokens)), DType::F32).similarities[0];
                let difference = (f64::from(closed) - exact).abs();
                assert!(difference <= 64.0 * 2f64.powi(-24), "{tokens} × {width}: {closed} is not {exact}");
            }
        }
    }
}
