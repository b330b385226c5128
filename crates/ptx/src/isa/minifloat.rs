//! Floats of 8 and 4 bits: what `cvt.rn.satfinite` to and from them means (OCP 8-bit and MX formats).

/// A float of few bits without infinities in use: conversion to it saturates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minifloat {
    exponent_bits: u32,
    mantissa_bits: u32,
    /// Largest finite magnitude.
    max: u16,
    /// Code of NaN, where there is one.
    nan: Option<u8>,
}

/// 4 exponent bits, 3 mantissa bits, largest 448.
pub const E4M3: Minifloat = Minifloat { exponent_bits: 4, mantissa_bits: 3, max: 448, nan: Some(0x7f) };
/// 5 exponent bits, 2 mantissa bits, largest 57344.
pub const E5M2: Minifloat = Minifloat { exponent_bits: 5, mantissa_bits: 2, max: 57344, nan: Some(0x7f) };
/// 2 exponent bits, 1 mantissa bit, largest 6.
pub const E2M1: Minifloat = Minifloat { exponent_bits: 2, mantissa_bits: 1, max: 6, nan: None };

impl Minifloat {
    const fn bias(self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    /// Nearest code, ties to even, saturating; NaN becomes the format's NaN, or its largest value where it has none.
    pub fn encode(self, x: f32) -> u8 {
        let sign = u8::from(x.is_sign_negative()) << (self.exponent_bits + self.mantissa_bits);
        if x.is_nan() {
            return self.nan.unwrap_or_else(|| self.encode(self.max as f32));
        }
        let magnitude = f64::from(x.abs()).min(f64::from(self.max));
        // Exponent of the lowest mantissa bit around the value; subnormals share the smallest.
        let exponent = if magnitude == 0.0 { i32::MIN } else { magnitude.log2().floor() as i32 };
        let exponent = exponent.max(1 - self.bias());
        let steps =
            (magnitude * f64::exp2(f64::from(self.mantissa_bits as i32 - exponent))).round_ties_even();
        // A mantissa that rounds up to the next power of two carries into the exponent by itself.
        let code = (((exponent + self.bias() - 1) as u32) << self.mantissa_bits) + steps as u32;
        sign | (code as u8).min(self.largest_code())
    }

    fn largest_code(self) -> u8 {
        match (self.exponent_bits, self.mantissa_bits) {
            (4, 3) => 0x7e,
            (5, 2) => 0x7b,
            _ => 0x7,
        }
    }

    /// Value of a code.
    pub fn decode(self, code: u8) -> f32 {
        let magnitude = u32::from(code) & ((1 << (self.exponent_bits + self.mantissa_bits)) - 1);
        let negative = code >> (self.exponent_bits + self.mantissa_bits) & 1 == 1;
        let mantissa = magnitude & ((1 << self.mantissa_bits) - 1);
        let exponent = (magnitude >> self.mantissa_bits) as i32;
        let value = if self == E5M2 && exponent == 31 {
            if mantissa == 0 { f32::INFINITY } else { f32::NAN }
        } else if Some(magnitude as u8) == self.nan {
            f32::NAN
        } else {
            let (lead, exponent) = if exponent == 0 { (0, 1) } else { (1 << self.mantissa_bits, exponent) };
            (lead + mantissa) as f32 * f32::exp2((exponent - self.bias() - self.mantissa_bits as i32) as f32)
        };
        if negative { -value } else { value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value between two codes goes to the nearer one, ties to the even one.
    #[test]
    fn encoding_rounds_to_nearest_even() {
        for format in [E4M3, E5M2, E2M1] {
            for code in 0..=format.largest_code() {
                assert_eq!(format.encode(format.decode(code)), code, "{format:?} {code:#x}");
                if code == format.largest_code() {
                    continue;
                }
                let (low, high) = (format.decode(code), format.decode(code + 1));
                let middle = (low + high) / 2.0;
                let even = code + (code & 1);
                assert_eq!(format.encode(middle), even, "{format:?} {middle}");
                assert_eq!(format.encode(middle.next_down()), code);
                assert_eq!(format.encode(middle.next_up()), code + 1);
                assert_eq!(format.encode(-middle) & format.largest_code(), even & format.largest_code());
            }
            let largest = f32::from(format.max);
            for x in [largest, largest * 1.5, f32::INFINITY] {
                assert_eq!(format.decode(format.encode(x)), largest);
                assert_eq!(format.decode(format.encode(-x)), -largest);
            }
        }
        assert_eq!(E4M3.encode(f32::NAN), 0x7f);
    }

    #[test]
    fn e4m3_agrees_with_float8() {
        for code in 0..=255u8 {
            let ours = E4M3.decode(code);
            let theirs = float8::F8E4M3::from_bits(code).to_f32();
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{code:#x}: {ours} {theirs}");
        }
    }
}
