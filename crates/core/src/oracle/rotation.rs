//! Hadamard rotation of Q and K.

use super::{Matrix, absmax};

/// Largest magnitude above which a row of `size` channels, a power of two, is multiplied by `1/√size` before the sums
/// and not after: they might overflow.
pub fn hadamard_large(size: usize) -> f32 {
    f32::MAX / (2 * size).max(512) as f32
}

/// Each row, padded with zeros to the next power of two, times the orthonormal Walsh–Hadamard matrix of that size.
///
/// The matrix is its own inverse and keeps inner products: `⟨Hq, Hk⟩ = ⟨q, k⟩`. An outlier channel is spread over
/// all channels, so that fewer levels are lost to it. Single precision: butterflies of sums and differences with
/// strides 1, 2, 4 …, then one product with `1/√size` (first, in rows of magnitudes above [`hadamard_large`]).
pub fn hadamard(rows: &Matrix<f32>) -> Matrix<f32> {
    let size = rows.width().next_power_of_two();
    let normalise = 1.0 / (size as f32).sqrt();
    let rotated: Vec<Vec<f32>> = rows
        .iter()
        .map(|row| {
            let mut row = row.to_vec();
            row.resize(size, 0.0);
            let large = absmax(row.iter().copied()) > hadamard_large(size);
            let (before, after) = if large { (normalise, 1.0) } else { (1.0, normalise) };
            row.iter_mut().for_each(|x| *x *= before);
            walsh_hadamard(&mut row);
            row.iter_mut().for_each(|x| *x *= after);
            row
        })
        .collect();
    Matrix::from_fn(rows.rows(), size, |i, c| rotated[i][c])
}

/// The unnormalised Walsh–Hadamard transform of a row whose length is a power of two, in place.
fn walsh_hadamard(row: &mut [f32]) {
    let mut stride = 1;
    while stride < row.len() {
        for pair in row.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{matrix, normal_matrix};

    #[test]
    fn large_rows_are_rotated_without_overflow() {
        let normal = normal_matrix(1, 5, 32);
        let large = hadamard(&normal.map(|x| x * 2f32.powi(125)));
        for (x, wanted) in large.as_slice().iter().zip(hadamard(&normal).as_slice()) {
            // The product with 1/√32 is rounded before the sums, not after.
            assert!((x * 2f32.powi(-125) - wanted).abs() <= 2e-6, "{x}, expected {wanted} · 2^125");
        }
    }

    #[test]
    fn a_row_of_the_largest_magnitude_that_is_not_large_does_not_overflow() {
        for size in [2, 256, 512, 1024] {
            let rotated = hadamard(&Matrix::from_fn(1, size, |_, _| hadamard_large(size)));
            let wanted = hadamard_large(size) * (size as f32).sqrt();
            assert!((rotated.row(0)[0] / wanted - 1.0).abs() < 1e-6, "{size}: {}", rotated.row(0)[0]);
            assert!(rotated.row(0)[1..].iter().all(|&x| x == 0.0), "{size}");
        }
    }

    #[test]
    fn two_channels_worked_out_by_hand() {
        let half = 0.5f32.sqrt();
        assert_eq!(hadamard(&matrix(2, &[3.0, 1.0])).row(0), [4.0 * half, 2.0 * half]);
    }

    #[test]
    fn the_matrix_is_orthonormal() {
        for size in [1, 2, 64, 128, 256, 1024] {
            let identity = Matrix::from_fn(size, size, |i, c| if i == c { 1.0 } else { 0.0 });
            let rotation = hadamard(&identity);
            for i in 0..size {
                for j in 0..size {
                    let product: f32 = rotation.row(i).iter().zip(rotation.row(j)).map(|(a, b)| a * b).sum();
                    // 1/√size is rounded when size is not a power of 4.
                    assert!((product - if i == j { 1.0 } else { 0.0 }).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn inner_products_stay_when_rows_are_padded() {
        let x = normal_matrix(1, 2, 80);
        let y = hadamard(&x);
        assert_eq!(y.width(), 128);
        let product = |m: &Matrix<f32>| m.row(0).iter().zip(m.row(1)).map(|(a, b)| a * b).sum::<f32>();
        // Seven butterflies of values around 1 and a sum of 128 products, each rounded by 6e-8.
        assert!((product(&x) - product(&y)).abs() < 1e-4);
    }

    #[test]
    fn an_outlier_channel_is_spread_over_all() {
        let mut row = [0.0; 64];
        row[5] = 64.0;
        assert!(hadamard(&matrix(64, &row)).row(0).iter().all(|x| x.abs() == 8.0));
    }
}
