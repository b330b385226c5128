//! 12-bit fixed point: V in blocks of keys.

use super::{Matrix, SeenKeys, absmax};

/// Largest magnitude of a 12-bit value here; the sign is extra.
pub const FIXED12_MAX: f32 = 4095.0;

/// Scale of a block and channel whose largest magnitude is `a`: `a / 4095`, NaN where that is not finite.
///
/// Subnormal quotients are rounded up, so that no integer exceeds 4095. However coarse such a scale is, the integers
/// are quotients by the scale itself, and so the error is at most half a step as elsewhere.
pub fn fixed12_scale(a: f32) -> f32 {
    let scale = if a.is_finite() { a / FIXED12_MAX } else { f32::NAN };
    if scale < f32::MIN_POSITIVE && scale * FIXED12_MAX < a { scale.next_up() } else { scale }
}

/// 12-bit integers, and a scale for each block of keys and channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Fixed12Blocks {
    /// Integers in −4095..=4095.
    pub values: Matrix<i16>,
    /// `value ≈ scale · integer`, `[⌈kv_len / block⌉, value_dim]`. 0 for a block and channel of zeros, NaN for one
    /// that holds a non-finite value.
    pub scales: Matrix<f32>,
    /// Keys of a block.
    pub block: usize,
}

impl Fixed12Blocks {
    /// Quantises V: with `a` the largest magnitude of a block and channel, the integers are
    /// `round_ties_even(V · (4095 / a))` and the scale is `a / 4095`.
    ///
    /// Where `a` is so small that `4095 / a` overflows, the integers are `round_ties_even(V / scale)`: see
    /// [`fixed12_scale`].
    ///
    /// # Panics
    /// When `block` is 0.
    pub fn quantize(v: &Matrix<f32>, block: usize, keys: &SeenKeys) -> Self {
        let measured: Vec<Vec<usize>> = (0..v.rows().div_ceil(block))
            .map(|b| keys.measured(b * block..v.rows().min((b + 1) * block)))
            .collect();
        let maxima = Matrix::from_fn(measured.len(), v.width(), |b, c| {
            absmax(measured[b].iter().map(|&j| v.row(j)[c]))
        });
        let scales = maxima.map(fixed12_scale);
        let values = Matrix::from_fn(v.rows(), v.width(), |j, c| {
            let (x, a) = (v.row(j)[c], maxima.row(j / block)[c]);
            let quotient = match FIXED12_MAX / a {
                _ if a == 0.0 => 0.0,
                factor if factor.is_infinite() => x / scales.row(j / block)[c],
                factor => x * factor,
            };
            quotient.round_ties_even().clamp(-FIXED12_MAX, FIXED12_MAX) as i16
        });
        Fixed12Blocks { values, scales, block }
    }

    /// The real numbers that the integers stand for; exact.
    pub fn dequantize(&self) -> Matrix<f64> {
        Matrix::from_fn(self.values.rows(), self.values.width(), |j, c| {
            f64::from(self.scales.row(j / self.block)[c]) * f64::from(self.values.row(j)[c])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{matrix, normal_matrix};

    #[test]
    fn numbers_worked_out_by_hand() {
        // Two keys a block. First block: a = 4095, scale 1; second: a = 8190, scale 2, 3/2 ties to 2.
        let blocks =
            Fixed12Blocks::quantize(&matrix(1, &[4095.0, -1.4, -8190.0, 3.0, 0.5]), 2, &SeenKeys::all(5));
        assert_eq!(blocks.values.as_slice(), [4095, -1, -4095, 2, 4095]);
        assert_eq!(blocks.scales.as_slice(), [1.0, 2.0, 0.5 / 4095.0]);
    }

    #[test]
    fn the_error_is_at_most_half_a_step() {
        let v = normal_matrix(1, 300, 8);
        let blocks = Fixed12Blocks::quantize(&v, 128, &SeenKeys::all(300));
        assert_eq!(blocks.scales.rows(), 3);
        assert!(blocks.values.as_slice().iter().all(|x| x.abs() <= 4095));
        for (j, row) in blocks.dequantize().iter().enumerate() {
            for (c, x) in row.iter().enumerate() {
                // Beside half a step, two single-precision roundings of a quotient of at most 4095.
                let bound = f64::from(blocks.scales.row(j / 128)[c]) * (0.5 + 4095.0 * 1.2e-7);
                assert!((x - f64::from(v.row(j)[c])).abs() <= bound);
            }
        }
    }

    #[test]
    fn blocks_of_zeros_are_zeros_and_bad_ones_nan() {
        let v = matrix(1, &[0.0, -0.0, 1.0, f32::NAN, f32::INFINITY, 0.0]);
        let back = Fixed12Blocks::quantize(&v, 2, &SeenKeys::all(6)).dequantize();
        let back = back.as_slice();
        assert_eq!(back[..2], [0.0; 2]);
        assert!(back[2..].iter().all(|x| x.is_nan()));
    }

    #[test]
    fn values_of_any_size_are_within_half_a_step() {
        let normal = normal_matrix(1, 128, 4);
        for exponent in
            [127, 120, 40, 0, -40, -110, -116, -117, -120, -126, -130, -137, -138, -140, -148, -160]
        {
            // 2^exponent in two factors, of which each is a number.
            let [half, rest] = [exponent / 2, exponent - exponent / 2].map(|e| 2f32.powi(e));
            let v = normal.map(|x| x / 4.0 * half * rest);
            let blocks = Fixed12Blocks::quantize(&v, 128, &SeenKeys::all(128));
            assert!(blocks.values.as_slice().iter().all(|x| x.abs() <= 4095));
            for (j, row) in blocks.dequantize().iter().enumerate() {
                for (c, x) in row.iter().enumerate() {
                    // As above; and a subnormal scale may exceed its quotient by nearly 2⁻¹⁴⁹.
                    let bound = f64::from(blocks.scales.row(0)[c]) * (0.5 + 4095.0 * 1.2e-7);
                    let error = (x - f64::from(v.row(j)[c])).abs();
                    assert!(error <= bound, "2^{exponent}: {} became {x}", v.row(j)[c]);
                }
            }
        }
    }
}
