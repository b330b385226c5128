//! Means that are subtracted before quantising.

use super::{Matrix, SeenKeys};
use crate::SmoothK;

/// The mean of each channel over all rows, `[width]`; zeros when there is no row.
///
/// Summed in double precision and rounded to single once, so that the result does not depend on an order of
/// summation: a kernel may differ from it by the rounding of its own sums.
pub fn mean(rows: &Matrix<f32>) -> Vec<f32> {
    mean_of(rows, 0..rows.rows())
}

/// The mean of each channel over the keys that count, `[width]`; zeros when there is none.
pub fn mean_of_counted(rows: &Matrix<f32>, keys: &SeenKeys) -> Vec<f32> {
    mean_of(rows, keys.counted().into_iter())
}

/// What smoothing subtracts from every row of K, `[width]`: zeros where it is off. Rows are sampled evenly from those
/// that count.
pub fn key_mean(rows: &Matrix<f32>, smooth: SmoothK, keys: &SeenKeys) -> Vec<f32> {
    let counted = keys.counted();
    let len = counted.len();
    mean_of(rows, (0..smooth.rows(len)).map(|index| counted[smooth.row(index, len)]))
}

/// The mean of each channel over each block of `block` rows, `[⌈rows / block⌉, width]`. The last block may be
/// shorter; its mean is over the rows there are.
///
/// # Panics
/// When `block` is 0.
pub fn block_means(rows: &Matrix<f32>, block: usize) -> Matrix<f32> {
    let means: Vec<Vec<f32>> = (0..rows.rows().div_ceil(block))
        .map(|b| mean_of(rows, b * block..rows.rows().min((b + 1) * block)))
        .collect();
    Matrix::from_fn(means.len(), rows.width(), |b, c| means[b][c])
}

/// The rows minus `mean`, in single precision.
pub fn subtract(rows: &Matrix<f32>, mean: &[f32]) -> Matrix<f32> {
    Matrix::from_fn(rows.rows(), rows.width(), |i, c| rows.row(i)[c] - mean[c])
}

/// The rows minus their block's mean, in single precision.
///
/// # Panics
/// When `block` is 0, or `means` has no row for a block.
pub fn subtract_block_means(rows: &Matrix<f32>, means: &Matrix<f32>, block: usize) -> Matrix<f32> {
    Matrix::from_fn(rows.rows(), rows.width(), |i, c| rows.row(i)[c] - means.row(i / block)[c])
}

fn mean_of(rows: &Matrix<f32>, indices: impl ExactSizeIterator<Item = usize>) -> Vec<f32> {
    let mut sum = vec![0f64; rows.width()];
    let count = indices.len().max(1) as f64;
    for i in indices {
        for (sum, &x) in sum.iter_mut().zip(rows.row(i)) {
            *sum += f64::from(x);
        }
    }
    sum.iter().map(|s| (s / count) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::matrix;

    #[test]
    fn means_are_of_the_rows_there_are() {
        let rows = matrix(2, &[1.0, 10.0, 3.0, 20.0, 8.0, -6.0]);
        assert_eq!(mean(&rows), [4.0, 8.0]);
        assert_eq!(mean(&matrix(2, &[])), [0.0, 0.0]);
        let all = SeenKeys::all(3);
        assert_eq!(key_mean(&rows, SmoothK::Sampled(2), &all), [2.0, 15.0], "of rows 0 and 1");
        assert_eq!(key_mean(&rows, SmoothK::Sampled(9), &all), mean(&rows));
        assert_eq!(key_mean(&rows, SmoothK::Off, &all), [0.0, 0.0]);
        let means = block_means(&rows, 2);
        assert_eq!(means.as_slice(), [2.0, 15.0, 8.0, -6.0]);
        assert_eq!(subtract(&rows, &mean(&rows)).as_slice(), [-3.0, 2.0, -1.0, 12.0, 4.0, -14.0]);
        assert_eq!(subtract_block_means(&rows, &means, 2).as_slice(), [-1.0, -5.0, 1.0, 5.0, 0.0, 0.0]);
    }

    #[test]
    fn a_mean_is_not_lost_to_the_length_of_its_sum() {
        // In single precision a sum of 2²⁴ no longer grows by ones.
        let rows = Matrix::from_fn(1 << 15, 1, |i, _| if i == 0 { 16_777_216.0 } else { 1.0 });
        assert_eq!(mean(&rows), [((16_777_216.0 + 32_767.0) / 32_768.0) as f32]);
    }
}
