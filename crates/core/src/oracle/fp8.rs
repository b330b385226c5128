//! E4M3: V with a scale for each channel, and P.

use float8::F8E4M3;

use super::{Matrix, SeenKeys, absmax};
use crate::ScaleRows;

/// Largest finite E4M3 value.
pub const E4M3_MAX: f32 = 448.0;

/// Base-2 exponent that kernels add to scores so that P fills E4M3's range: about `log₂ 448`, but a little less, so
/// that the row maximum itself does not saturate (`2^8.807 = 447.89`).
pub const E4M3_P_EXPONENT: f32 = 8.807;

/// The largest number that a channel is multiplied by before it becomes E4M3: `2¹²⁶`, whose inverse is the least normal
/// one.
pub const LARGEST_FACTOR: f32 = f32::from_bits((127 + 126) << 23);

/// The nearest E4M3 value, ties to even, magnitudes above 448 to 448; NaN stays NaN.
pub fn round_e4m3(x: f32) -> f32 {
    F8E4M3::from_f32(x).to_f32()
}

/// Slot in which token `r` of a group of 16 is stored, so that a lane's score columns `2t, 2t+1, 2t+8, 2t+9` are the
/// four neighbouring keys of its operand of P·V. Slots 0..16 hold tokens 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, …
pub const fn v_token_slot(r: usize) -> usize {
    2 * (r % 16 / 8) + 4 * (r / 2 % 4) + r % 2
}

/// E4M3 codes, and the scale of each channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Channels {
    /// Bits of the E4M3 values, in the order of tokens (not of [`v_token_slot`]).
    pub codes: Matrix<u8>,
    /// `value ≈ scale · e4m3`, one a channel. 0 for a channel of zeros, NaN for one that holds a non-finite value.
    pub scales: Vec<f32>,
}

impl Fp8Channels {
    /// Quantises V, which is a head of a sequence: with `a` the channel's largest magnitude in the rows that scales are
    /// taken from, the codes are `e4m3(V · (v_max / a))` and the scale is `a / v_max`.
    ///
    /// Where `v_max / a` would exceed [`LARGEST_FACTOR`], that is the factor, and its inverse the scale.
    pub fn quantize(v: &Matrix<f32>, v_max: f32, rows: ScaleRows, keys: &SeenKeys) -> Self {
        let factor = |a: f32| (a > 0.0).then(|| (v_max / a).min(LARGEST_FACTOR));
        let measured = keys.measured(0..v.rows());
        let maxima = |rows: ScaleRows| -> Vec<f32> {
            let magnitude = |c: usize| absmax(rows.of(measured.len()).map(|i| v.row(measured[i])[c]));
            (0..v.width()).map(magnitude).collect()
        };
        let fits = |(&a, &sampled): (&f32, &f32)| match factor(sampled) {
            Some(factor) => a * factor <= E4M3_MAX,
            None => a == 0.0,
        };
        let (all, sampled) = (maxima(ScaleRows::All), maxima(rows));
        let maxima = if all.iter().zip(&sampled).all(fits) { sampled } else { all };
        Fp8Channels {
            codes: Matrix::from_fn(v.rows(), v.width(), |i, c| {
                factor(maxima[c]).map_or(0, |factor| F8E4M3::from_f32(v.row(i)[c] * factor).to_bits())
            }),
            scales: maxima
                .iter()
                .map(|&a| if factor(a) == Some(LARGEST_FACTOR) { 1.0 / LARGEST_FACTOR } else { a / v_max })
                .collect(),
        }
    }

    /// The real numbers that the codes stand for; exact.
    pub fn dequantize(&self) -> Matrix<f64> {
        Matrix::from_fn(self.codes.rows(), self.codes.width(), |i, c| {
            f64::from(self.scales[c]) * F8E4M3::from_bits(self.codes.row(i)[c]).to_f64()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{matrix, normal, normal_matrix};

    /// All finite E4M3 values from the format's definition: 4 bits of exponent with bias 7, 3 of mantissa.
    fn e4m3_values() -> Vec<(u8, f32)> {
        (0..=255u8)
            .filter(|code| code & 0x7f != 0x7f)
            .map(|code| {
                let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
                let magnitude = match exponent {
                    0 => mantissa / 8.0 * 2f32.powi(-6),
                    _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
                };
                (code, if code & 0x80 == 0 { magnitude } else { -magnitude })
            })
            .collect()
    }

    /// The nearest value over all codes, the even code where two are as near.
    fn nearest(x: f32) -> f32 {
        let distance = |value: f32| (f64::from(value) - f64::from(x)).abs();
        e4m3_values()
            .into_iter()
            .min_by(|a, b| distance(a.1).total_cmp(&distance(b.1)).then((a.0 & 1).cmp(&(b.0 & 1))))
            .unwrap()
            .1
    }

    #[test]
    fn rounding_finds_the_nearest_value() {
        let mut values: Vec<f32> = e4m3_values().into_iter().map(|(_, value)| value).collect();
        values.sort_by(f32::total_cmp);
        let halfway = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let beside = halfway.flat_map(|x| [x, x.next_up(), x.next_down()]);
        let random = normal(1, 2000).into_iter().zip((-12..9).cycle()).map(|(x, e)| x * 2f32.powi(e));
        for x in values.iter().copied().chain(beside).chain(random) {
            assert_eq!(round_e4m3(x), nearest(x), "{x:e}");
        }
        assert_eq!((round_e4m3(1e9), round_e4m3(-1e9)), (448.0, -448.0));
        assert_eq!((round_e4m3(464.0), round_e4m3(f32::INFINITY)), (448.0, 448.0));
        assert!(round_e4m3(f32::NAN).is_nan());
    }

    #[test]
    fn the_row_maximum_of_p_does_not_saturate() {
        assert!(E4M3_P_EXPONENT.exp2() < E4M3_MAX && E4M3_P_EXPONENT.exp2() > 447.8);
    }

    #[test]
    fn tokens_lie_where_a_lane_wants_them() {
        let mut token_of_slot = [usize::MAX; 16];
        (0..16).for_each(|r| token_of_slot[v_token_slot(r)] = r);
        assert_eq!(token_of_slot, [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]);
        for lane in 0..4 {
            let wanted = [2 * lane, 2 * lane + 1, 2 * lane + 8, 2 * lane + 9];
            assert_eq!(token_of_slot[4 * lane..4 * lane + 4], wanted);
        }
    }

    #[test]
    fn numbers_worked_out_by_hand() {
        // The channel's maximum 2 maps to 448, so 1 to 224 and −0.01 to −2.24, whose neighbours are −2.25 and −2.
        let channels =
            Fp8Channels::quantize(&matrix(1, &[2.0, 1.0, -0.01]), 448.0, ScaleRows::All, &SeenKeys::all(3));
        assert_eq!(channels.scales, [2.0 / 448.0]);
        let values: Vec<f32> =
            channels.codes.column(0).map(|code| F8E4M3::from_bits(code).to_f32()).collect();
        assert_eq!(values, [448.0, 224.0, -2.25]);
    }

    #[test]
    fn each_channel_fills_its_range() {
        for v_max in [448.0, 2.25] {
            let v = normal_matrix(2, 200, 16);
            let channels = Fp8Channels::quantize(&v, v_max, ScaleRows::All, &SeenKeys::all(v.rows()));
            for c in 0..16 {
                let largest = absmax(channels.codes.column(c).map(|code| F8E4M3::from_bits(code).to_f32()));
                assert_eq!(largest, v_max);
            }
            let back = channels.dequantize();
            for (x, y) in v.as_slice().iter().zip(back.as_slice()) {
                // Half a unit of 3 mantissa bits, or half the smallest subnormal 2⁻⁹ times the scale.
                let bound = (x.abs() / 16.0).max(5.0 / v_max * 2f32.powi(-10));
                assert!((f64::from(*x) - y).abs() <= f64::from(bound) * 1.001, "{x} became {y} with {v_max}");
            }
        }
    }

    #[test]
    fn channels_of_zeros_are_zeros_and_bad_ones_nan() {
        let v = matrix(3, &[0.0, f32::NAN, 1.0, 0.0, 1.0, f32::INFINITY]);
        let back = Fp8Channels::quantize(&v, 448.0, ScaleRows::All, &SeenKeys::all(v.rows())).dequantize();
        assert!(back.iter().all(|row| row[0] == 0.0 && row[1].is_nan() && row[2].is_nan()));
    }

    #[test]
    fn channels_of_tiny_values_do_not_vanish() {
        for largest in [1e-30, 1e-36, 1e-38] {
            let v = matrix(1, &[largest, -0.3 * largest, 0.07 * largest]);
            let channels = Fp8Channels::quantize(&v, 448.0, ScaleRows::All, &SeenKeys::all(3));
            for (x, y) in v.as_slice().iter().zip(channels.dequantize().as_slice()) {
                // Half a unit of 3 mantissa bits, and single precision's own below its normal numbers.
                let bound = f64::from(x.abs()) / 15.9;
                assert!((f64::from(*x) - y).abs() <= bound, "{x:e} became {y:e}");
            }
        }
    }

    #[test]
    fn sampled_scales_leave_room_or_take_all_rows() {
        // Rows 0 and 2 of four are sampled: 1 becomes 56, and 7, the largest of all, 392, which is nearest to 384.
        let v = matrix(1, &[1.0, 7.0, -0.5, 2.0]);
        let sampled = Fp8Channels::quantize(&v, 56.0, ScaleRows::Sampled(2), &SeenKeys::all(v.rows()));
        assert_eq!(sampled.scales, [1.0 / 56.0]);
        assert_eq!(sampled.dequantize().column(0).collect::<Vec<_>>()[1], 384.0 * f64::from(1f32 / 56.0));
        // 9 would become 504, in one of two channels: both take all rows.
        for beyond in [9.0, f32::INFINITY, f32::NAN] {
            let v = matrix(2, &[1.0, 1.0, 7.0, beyond, -0.5, 1.0, 2.0, 1.0]);
            let [sampled, all] = [ScaleRows::Sampled(2), ScaleRows::All]
                .map(|rows| Fp8Channels::quantize(&v, 56.0, rows, &SeenKeys::all(v.rows())));
            assert_eq!(sampled.codes, all.codes);
            assert_eq!(sampled.scales[0], 0.125);
        }
        // So does a channel that is zero where it is sampled.
        let v = matrix(1, &[0.0, 3.0, 0.0, 0.0]);
        assert_eq!(
            Fp8Channels::quantize(&v, 56.0, ScaleRows::Sampled(2), &SeenKeys::all(v.rows())).scales,
            [3.0 / 56.0]
        );
    }
}
