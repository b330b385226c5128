//! Rows of numbers as rows of 8-bit codes with a scale each.

use sage_core::oracle::E4M3_MAX;

use super::absmax_bits;

/// Largest magnitude of an INT8 code.
const INT8_MAX: f32 = 127.0;

/// Rows to quantise.
pub(crate) struct QuantizeRows<'a, T> {
    /// Rows of `head_dim` numbers; what was subtracted is gone afterwards.
    pub rows: &'a mut [f32],
    /// Subtracted from every row: `head_dim` numbers, or none.
    pub constant: &'a [f32],
    pub head_dim: usize,
    /// Rows of `head_dim` codes.
    pub codes: &'a mut [T],
    /// A scale for each row.
    pub scales: &'a mut [f32],
}

/// Codes are `x / scale` to the nearest integer, the scale a row's largest magnitude over 127.
#[inline(always)]
pub(super) fn quantize_int8(args: &mut QuantizeRows<'_, i8>) {
    rows(args, INT8_MAX, |quotient| {
        const SHIFT: f32 = 12_582_912.0;
        // Adding 1.5 · 2²³ leaves no bits for a fraction, and the integer in the lowest ones.
        (quotient.clamp(-INT8_MAX, INT8_MAX) + SHIFT).to_bits() as i8
    });
}

/// Codes are `x / scale` to the nearest E4M3 value, the scale a row's largest magnitude over 448.
#[inline(always)]
pub(super) fn quantize_e4m3(args: &mut QuantizeRows<'_, u8>) {
    rows(args, E4M3_MAX, |quotient| {
        let magnitude = quotient.abs().min(E4M3_MAX);
        // Normal ones: round away 20 of 23 bits, ties to even, and move the exponent's bias from 127 to 7.
        let bits = magnitude.to_bits();
        let normal = ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub((127 - 7) << 3);
        // Subnormal ones are multiples of 2⁻⁹, the last place of 2¹⁴.
        let subnormal = (magnitude + 16384.0).to_bits() & 0xf;
        let code = if magnitude < 0.015625 { subnormal } else { normal };
        code as u8 | (quotient.to_bits() >> 24 & 0x80) as u8
    });
}

#[inline(always)]
fn rows<T: Copy + Default>(args: &mut QuantizeRows<'_, T>, levels: f32, code: impl Fn(f32) -> T) {
    let QuantizeRows { rows, constant, head_dim, codes, scales } = args;
    let rows = rows.chunks_exact_mut(*head_dim).zip(codes.chunks_exact_mut(*head_dim));
    for ((row, codes), scale) in rows.zip(scales.iter_mut()) {
        row.iter_mut().zip(constant.iter()).for_each(|(x, c)| *x -= c);
        let max = f32::from_bits(absmax_bits(row));
        *scale = if max.is_finite() { max / levels } else { f32::NAN };
        if *scale > 0.0 {
            codes.iter_mut().zip(&*row).for_each(|(to, x)| *to = code(x / *scale));
        } else {
            codes.fill(T::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    fn codes(row: &[f32]) -> (Vec<u8>, f32) {
        let (mut row, mut codes, mut scale) = (row.to_vec(), vec![0; row.len()], [0.0]);
        let head_dim = row.len();
        quantize_e4m3(&mut QuantizeRows {
            rows: &mut row,
            constant: &[],
            head_dim,
            codes: &mut codes,
            scales: &mut scale,
        });
        (codes, scale[0])
    }

    /// What a code stands for: its bits are those of a half, 2⁸ times too small.
    fn value(code: u8) -> f32 {
        let bits = (u16::from(code) & 0x80) << 8 | (u16::from(code) & 0x7f) << 7;
        f16::from_bits(bits).to_f32() * 256.0
    }

    #[test]
    fn e4m3_codes_are_the_nearest() {
        // The first element makes the scale 1.
        let halfway = (0..0x7e).map(|code| (value(code) + value(code + 1)) / 2.0);
        let all = (0..0x7f).map(value).chain(halfway.flat_map(|x| [x, x.next_up(), x.next_down()]));
        for x in all.flat_map(|x| [x, -x]) {
            let (codes, scale) = codes(&[448.0, x]);
            assert_eq!((codes[0], scale), (0x7e, 1.0));
            assert_eq!(value(codes[1]), sage_core::oracle::round_e4m3(x), "{x:e}");
        }
    }
}
