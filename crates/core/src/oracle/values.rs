//! V as each scheme's P·V sees it.

use half::{bf16, f16};

use super::{Fixed12Blocks, Fp4Rows, Fp8Channels, Matrix, SeenKeys, absmax};
use crate::Pv;

/// The real numbers that V's quantised form stands for, `[kv_len, value_dim]`.
///
/// Keys are counted from the start of their sequence: that is where blocks and groups of 16 begin. Rows that no query
/// sees are zeros.
///
/// # Panics
/// When [`Pv::Fixed12`]'s block is 0.
pub fn quantize_v(v: &Matrix<f32>, pv: &Pv, keys: &SeenKeys) -> Matrix<f64> {
    match *pv {
        Pv::F32 => v.map(f64::from),
        Pv::F16(_) => v.map(|x| f16::from_f32(x).to_f64()),
        Pv::BF16(_) => v.map(|x| bf16::from_f32(x).to_f64()),
        Pv::Fp8 { v_max, rows, .. } => Fp8Channels::quantize(v, v_max, rows, keys).dequantize(),
        Pv::Int8 => Int8Channels::quantize(v, keys).dequantize(),
        Pv::Fixed12 { block } => Fixed12Blocks::quantize(v, block, keys).dequantize(),
        Pv::Fp4 { format, .. } => {
            let channels = saturated(v, format.group(), keys).transposed();
            Fp4Rows::quantize(&channels, format).dequantize().transposed()
        }
    }
}

/// V, but within each `group` of keys no magnitude above those that the group's scale is taken from.
fn saturated(v: &Matrix<f32>, group: usize, keys: &SeenKeys) -> Matrix<f32> {
    let measured: Vec<Vec<usize>> = (0..v.rows().div_ceil(group))
        .map(|g| keys.measured(g * group..v.rows().min((g + 1) * group)))
        .collect();
    Matrix::from_fn(v.rows(), v.width(), |j, c| {
        let max = absmax(measured[j / group].iter().map(|&i| v.row(i)[c]));
        if max.is_nan() { v.row(j)[c] } else { v.row(j)[c].clamp(-max, max) }
    })
}

/// INT8 V, and the scale of each channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Channels {
    /// Integers in −127..=127.
    pub values: Matrix<i8>,
    /// `value ≈ scale · integer`, one a channel: the channel's largest magnitude over 127. 0 for a channel of zeros,
    /// NaN for one that holds a non-finite value.
    pub scales: Vec<f32>,
}

impl Int8Channels {
    /// Quantises V: `round_ties_even(V / scale)` at most 127 in magnitude, zeros where the scale is 0 or NaN.
    pub fn quantize(v: &Matrix<f32>, keys: &SeenKeys) -> Self {
        let measured = keys.measured(0..v.rows());
        let magnitude = |c: usize| absmax(measured.iter().map(|&j| v.row(j)[c]));
        let scales: Vec<f32> = (0..v.width()).map(|c| magnitude(c) / 127.0).collect();
        let values = Matrix::from_fn(v.rows(), v.width(), |j, c| {
            let quotient = if scales[c] > 0.0 { v.row(j)[c] / scales[c] } else { 0.0 };
            quotient.round_ties_even().clamp(-127.0, 127.0) as i8
        });
        Int8Channels { values, scales }
    }

    /// The real numbers that the integers stand for; exact.
    pub fn dequantize(&self) -> Matrix<f64> {
        Matrix::from_fn(self.values.rows(), self.values.width(), |j, c| {
            f64::from(self.scales[c]) * f64::from(self.values.row(j)[c])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::matrix;
    use crate::{Fp4Format, PLevels};

    #[test]
    fn numbers_worked_out_by_hand() {
        let channels = Int8Channels::quantize(&matrix(1, &[-254.0, 3.0, 5.1, 0.9]), &SeenKeys::all(4));
        assert_eq!((channels.values.as_slice(), channels.scales[0]), (&[-127, 2, 3, 0][..], 2.0));
        let v = matrix(1, &[1.0, 1.0 + 1.0 / 512.0, 70_000.0]);
        let back = |pv: Pv| quantize_v(&v, &pv, &SeenKeys::all(3));
        // 10 bits of fraction keep 1/512 but not 70000; 7 bits the reverse: 70000 = 136.72·2⁹.
        assert_eq!(
            back(Pv::F16(crate::Accumulator::F32)).as_slice(),
            [1.0, 1.0 + 1.0 / 512.0, f64::INFINITY]
        );
        assert_eq!(back(Pv::BF16(crate::Accumulator::F32)).as_slice(), [1.0, 1.0, 137.0 * 512.0]);
    }

    #[test]
    fn fp4_groups_are_neighbouring_tokens_of_a_channel() {
        // Channel 0: tokens 0..16 up to 6, tokens 16.. up to 12; channel 1 is the same, doubled.
        let v = Matrix::from_fn(20, 2, |j, c| if j < 16 { 6.0 } else { 12.0 } * (c + 1) as f32);
        let nvfp4 = Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::Two };
        assert_eq!(quantize_v(&v, &nvfp4, &SeenKeys::all(20)), v.map(f64::from));
        // In one group of 32 with 12, 6 is 3 of its scale, 2; in one of 6 alone it is 6 of 1.
        let mxfp4 = Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One };
        assert_eq!(quantize_v(&v, &mxfp4, &SeenKeys::all(20)), v.map(f64::from));
    }

    #[test]
    fn channels_of_zeros_are_zeros_and_bad_ones_nan() {
        let v = matrix(3, &[0.0, f32::NAN, 1.0, 0.0, 1.0, 2.0]);
        for pv in [
            Pv::Int8,
            Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::Two },
            Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One },
            Pv::Fixed12 { block: 4 },
            Pv::Fp8 { v_max: 2.25, rows: crate::ScaleRows::All, accumulator: crate::Accumulator::F32 },
        ] {
            let back = quantize_v(&v, &pv, &SeenKeys::all(2));
            assert!(back.column(0).all(|x| x == 0.0), "{pv:?}");
            assert!(back.column(1).all(f64::is_nan), "{pv:?}");
            assert!(back.column(2).all(f64::is_finite), "{pv:?}");
        }
    }
}
