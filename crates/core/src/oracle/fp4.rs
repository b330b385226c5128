//! FP4: E2M1 values with a scale for each group of neighbours (SageAttention3 §3.1; OCP Microscaling Formats 1.0).

use float8::F8E4M3;

use super::{Matrix, absmax};
use crate::Fp4Format;

/// Largest E2M1 magnitude.
pub const E2M1_MAX: f32 = 6.0;

/// The E2M1 magnitudes by code; bit 3 is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Code of the nearest E2M1 value, ties to the even code, magnitudes above 6 to 6. E2M1 has no NaN: the code of NaN
/// is 0, and its group's scale must say so.
pub fn e2m1_code(x: f32) -> u8 {
    let magnitude = x.abs();
    // Halfway between neighbours; where the lower code is odd, the tie goes up.
    let code = (0..7u8)
        .take_while(|&code| {
            let halfway = (E2M1[usize::from(code)] + E2M1[usize::from(code) + 1]) / 2.0;
            magnitude > halfway || (magnitude == halfway && code % 2 == 1)
        })
        .count() as u8;
    code | if x.is_sign_negative() { 8 } else { 0 }
}

/// The value of an E2M1 code; only its low four bits count.
pub const fn e2m1_value(code: u8) -> f32 {
    let magnitude = E2M1[(code & 7) as usize];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// Exponent of the largest power of two among E2M1's values, 4.
const E2M1_MAX_EXPONENT: i32 = 2;

/// E8M0 bits of 1; neighbouring codes differ by a factor of two.
const E8M0_ONE: i32 = 127;

/// E8M0 bits of NaN.
const E8M0_NAN: u8 = 255;

impl Fp4Format {
    /// Bits of the scale of a group whose largest magnitude is `max`; NaN for a `max` that is not finite.
    ///
    /// | format | scale | limits |
    /// |---|---|---|
    /// | `Nv` | `e4m3(max / 6)` | underflows to 0 for `max ≤ 6·2⁻¹⁰`, saturates above 2688 |
    /// | `Mx` | `2^(⌊log₂ max⌋ − 2)`: values of 4 up to 8, of which those above 6 saturate | at least 2⁻¹²⁷ |
    pub fn scale(self, max: f32) -> u8 {
        match self {
            Fp4Format::Nv => F8E4M3::from_f32(max / E2M1_MAX).to_bits(),
            Fp4Format::Mx if !max.is_finite() => E8M0_NAN,
            // A float's biased exponent is E8M0's code; that of 0 and of subnormals is 0.
            Fp4Format::Mx => (max.to_bits() >> 23).saturating_sub(E2M1_MAX_EXPONENT as u32) as u8,
        }
    }

    /// The number that a scale's bits stand for.
    pub fn scale_value(self, scale: u8) -> f32 {
        match self {
            Fp4Format::Nv => F8E4M3::from_bits(scale).to_f32(),
            Fp4Format::Mx if scale == E8M0_NAN => f32::NAN,
            Fp4Format::Mx => f32::exp2((i32::from(scale) - E8M0_ONE) as f32),
        }
    }

    /// Code of `x` in a group of the given scale: `e2m1(x · (1/σ))` with the rounded scale σ, by which the tensor core
    /// multiplies; 0 where that is 0 or NaN.
    pub fn code(self, x: f32, scale: u8) -> u8 {
        let scale = self.scale_value(scale);
        if scale > 0.0 { e2m1_code(x * (1.0 / scale)) } else { 0 }
    }
}

/// Rows in FP4: groups of neighbours within a row, the last perhaps shorter.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp4Rows {
    /// Groups, and what their scales are.
    pub format: Fp4Format,
    /// E2M1 codes, one a byte.
    pub codes: Matrix<u8>,
    /// Bits of the scales, `[rows, ⌈width / group⌉]`; NaN for a group that holds a non-finite value.
    pub scales: Matrix<u8>,
}

impl Fp4Rows {
    /// Quantises each group of neighbours within a row.
    pub fn quantize(rows: &Matrix<f32>, format: Fp4Format) -> Self {
        let group = format.group();
        let scales = Matrix::from_fn(rows.rows(), rows.width().div_ceil(group), |i, g| {
            let values = rows.row(i).iter().skip(g * group).take(group);
            format.scale(absmax(values.copied()))
        });
        let codes = Matrix::from_fn(rows.rows(), rows.width(), |i, c| {
            format.code(rows.row(i)[c], scales.row(i)[c / group])
        });
        Fp4Rows { format, codes, scales }
    }

    /// The real numbers that the codes stand for; exact.
    pub fn dequantize(&self) -> Matrix<f64> {
        Matrix::from_fn(self.codes.rows(), self.codes.width(), |i, c| {
            let scale = self.format.scale_value(self.scales.row(i)[c / self.format.group()]);
            f64::from(scale) * f64::from(e2m1_value(self.codes.row(i)[c]))
        })
    }
}

/// Token that stored K row `p` holds: within every 32 rows, row `8a + 2b + c` holds token `8b + 2a + c`.
///
/// So lane `b` of a quad ends up with the scores of eight neighbouring tokens, and the 16 probabilities that share a
/// scale lie in two neighbouring lanes.
pub const fn k_token_of_row(p: usize) -> usize {
    let (a, b, c) = (p % 32 / 8, p % 8 / 2, p % 2);
    p / 32 * 32 + 8 * b + 2 * a + c
}

/// Byte at which the scale of `row` and group `column` lies, among `columns` scales a row (a multiple of 4).
///
/// Slabs of 64 rows follow one another; a slab holds 256-byte atoms of 64 rows × 4 columns. One aligned word is the
/// four scales of one row that a tensor-core step of 64 elements needs.
pub const fn scale_offset(row: usize, column: usize, columns: usize) -> usize {
    let (slab, r) = (row / 64, row % 64);
    64 * slab * columns + 256 * (column / 4) + 16 * (r % 16) + 4 * (r / 16) + column % 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{matrix, normal, normal_matrix};

    #[test]
    fn rounding_finds_the_nearest_value() {
        let nearest = |x: f32| {
            let distance = |code: u8| (f64::from(e2m1_value(code)) - f64::from(x)).abs();
            (0..16u8)
                .min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))))
                .unwrap()
        };
        let halfway = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0];
        let beside =
            halfway.iter().flat_map(|&x| [x, x.next_up(), x.next_down(), -x, -x.next_up(), -x.next_down()]);
        for x in beside.chain(normal(1, 2000).into_iter().map(|x| 3.0 * x)) {
            assert_eq!(e2m1_value(e2m1_code(x)), e2m1_value(nearest(x)), "{x}");
        }
        assert_eq!(halfway.map(|x| e2m1_value(e2m1_code(x))), [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]);
        assert_eq!((e2m1_code(1e9), e2m1_code(-1e9), e2m1_code(f32::NAN) & 7), (7, 15, 0));
        assert!((0..16).all(|code| e2m1_code(e2m1_value(code)) == code));
    }

    fn back(format: Fp4Format, x: &[f32]) -> Vec<f64> {
        Fp4Rows::quantize(&matrix(x.len(), x), format).dequantize().row(0).to_vec()
    }

    #[test]
    fn numbers_worked_out_by_hand() {
        // 12/6 = 2 is an E4M3 value; 12, 3, −1.1, 0.4 become 6, 1.5, −0.5 (of −0.55) and 0 (of 0.2) times 2.
        assert_eq!(back(Fp4Format::Nv, &[12.0, 3.0, -1.1, 0.4]), [12.0, 3.0, -1.0, 0.0]);
        // 1/6 = 0.1667 rounds to 0.171875 = 11/64; 1 is 5.818 of it, nearest 6; 0.3 is 1.745, nearest 1.5.
        assert_eq!(back(Fp4Format::Nv, &[1.0, 0.3]), [6.0 * 11.0 / 64.0, 1.5 * 11.0 / 64.0]);
        // The largest power of two in 13 is 8, a quarter of which is 2: 6.5, 1.5, −0.55 and 0.2 of it.
        assert_eq!(back(Fp4Format::Mx, &[13.0, 3.0, -1.1, 0.4]), [12.0, 3.0, -1.0, 0.0]);
        // 1/4: 1 is 4 of it; 0.3 is 1.2, nearest 1.
        assert_eq!(back(Fp4Format::Mx, &[1.0, 0.3]), [1.0, 0.25]);
    }

    #[test]
    fn groups_are_neighbours() {
        let x = normal_matrix(2, 3, 40);
        // Half the widest step (2, between 4 and 6) relative to the maximum: for E4M3 of a scale that may be 1/16 too
        // large, or too small and so cut the maximum short by 6/17; for a power of two, up to 2 of 8 cut.
        for (format, groups, error) in [(Fp4Format::Nv, 3, 17.0 / 16.0 / 6.0), (Fp4Format::Mx, 2, 0.25)] {
            let rows = Fp4Rows::quantize(&x, format);
            assert_eq!((rows.scales.rows(), rows.scales.width()), (3, groups));
            for (i, row) in x.iter().enumerate() {
                for (g, group) in row.chunks(format.group()).enumerate() {
                    let max = absmax(group.iter().copied());
                    assert_eq!(rows.scales.row(i)[g], format.scale(max));
                    for (c, &x) in group.iter().enumerate() {
                        let back = rows.dequantize().row(i)[g * format.group() + c];
                        let off = (back - f64::from(x)).abs();
                        assert!(off <= error * f64::from(max), "{format:?}: {x} off by {off}");
                    }
                }
            }
        }
    }

    #[test]
    fn groups_of_zeros_are_zeros_and_bad_ones_nan() {
        for format in [Fp4Format::Nv, Fp4Format::Mx] {
            assert_eq!(back(format, &[0.0; 32]), [0.0; 32]);
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = [1.0; 64];
                x[50] = bad;
                let back = back(format, &x);
                let group = format.group();
                let of_group = |c: usize| c / group == 50 / group;
                assert!(back.iter().enumerate().all(|(c, x)| x.is_nan() == of_group(c)), "{format:?} {bad}");
            }
        }
    }

    #[test]
    fn scales_end_where_their_format_does() {
        // 6·2⁻¹⁰ is half the smallest scale times 6, and ties to the even code 0.
        assert_eq!(back(Fp4Format::Nv, &[6.0 / 1024.0; 2]), [0.0; 2]);
        assert_ne!(back(Fp4Format::Nv, &[6.1 / 1024.0; 2]), [0.0; 2]);
        assert_eq!(back(Fp4Format::Nv, &[1e6, 0.0]), [2688.0, 0.0]);
        // Floats end before powers of two do, but for the least, whose scale would be below 2⁻¹²⁷.
        for x in [1e-30f32, 3.0 * 2f32.powi(-125), 1e30, 6.0 * 2f32.powi(125)] {
            let back = back(Fp4Format::Mx, &[x])[0];
            assert!((back / f64::from(x) - 1.0).abs() <= 0.25, "{x} became {back}");
        }
        assert_eq!(Fp4Format::Mx.scale_value(0), 2f32.powi(-127));
        let powers = (0..=254u8).map(|code| Fp4Format::Mx.scale_value(code));
        assert!(powers.enumerate().all(|(code, x)| f64::from(x) == (code as f64 - 127.0).exp2()));
    }

    /// Accumulator tile `a` of a quad's lane `b` holds stored rows `8a + 2b` and `8a + 2b + 1`.
    #[test]
    fn a_lane_ends_up_with_eight_neighbouring_tokens() {
        for (slab, lane) in (0..3).flat_map(|slab| (0..4).map(move |lane| (slab, lane))) {
            let held = (0..4).flat_map(|a| [0, 1].map(|c| k_token_of_row(32 * slab + 8 * a + 2 * lane + c)));
            let tokens: Vec<usize> = (32 * slab + 8 * lane..32 * slab + 8 * lane + 8).collect();
            assert_eq!(held.collect::<Vec<_>>(), tokens);
        }
    }

    #[test]
    fn every_scale_has_a_byte_of_its_own() {
        for (rows, columns) in [(64, 4), (128, 8), (192, 16)] {
            let mut taken = vec![false; rows * columns];
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                assert!(!std::mem::replace(&mut taken[scale_offset(row, column, columns)], true));
            }
        }
        // Row 1 + 16·2 of the second slab, column 6: 64·8 + 256 + 16 + 8 + 2.
        assert_eq!(scale_offset(64 + 33, 6, 8), 794);
        // Four scales of a row are one aligned word.
        assert!(
            (0..4).all(|k| scale_offset(17, k, 4) == scale_offset(17, 0, 4) + k)
                && scale_offset(17, 0, 4).is_multiple_of(4)
        );
    }
}
