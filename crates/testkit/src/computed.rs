//! What a backend computed, and how far that may be from what is right.

use sage_core::metrics::Accuracy;
use sage_core::oracle::Output;
use sage_core::{DType, Scheme};

/// What came out of a call, in the order of [`Output`], whatever the caller's layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// The scheme that was computed.
    pub scheme: Scheme,
    /// `[batch, num_q_heads, seq, value_dim]`.
    pub shape: [usize; 4],
    /// The output, widened.
    pub out: Vec<f32>,
    /// Log-sum-exps; none where they were not asked for.
    pub lse: Vec<f32>,
    /// Names of the kernels, where the backend has any.
    pub kernels: Vec<String>,
}

/// How far a result may be from an oracle's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// `Σ|found − wanted| / Σ|wanted|` of the output as a whole.
    pub relative_l1: f64,
    /// Error of each element, as a part of the largest magnitude expected anywhere: what one hidden key too many, or a
    /// row of another head, must not stay under. None where single elements are not looked at.
    pub element: Option<f64>,
    /// Error of each element relative to itself, on top: the rounding of the output.
    pub rounding: f64,
    /// Error of each log-sum-exp, relative to it where it is larger than 1.
    pub lse: f64,
}

/// Largest relative error of rounding a normal number to an element type: half a unit in the last of 8 or 11 bits.
/// (The mean over many numbers is less than half of it.)
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
    }
}

impl Tolerance {
    /// The same, with the rounding of the output to `dtype` on top.
    #[must_use]
    pub fn rounded(self, dtype: DType) -> Self {
        let rounding = unit_roundoff(dtype);
        Tolerance { relative_l1: self.relative_l1 + rounding, rounding: self.rounding + rounding, ..self }
    }

    /// So many times as much.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        Tolerance {
            relative_l1: factor * self.relative_l1,
            element: self.element.map(|element| factor * element),
            rounding: self.rounding,
            lse: factor * self.lse,
        }
    }
}

impl Computed {
    /// The bits of output and log-sum-exp, for comparisons in which a NaN equals itself.
    pub fn bits(&self) -> Vec<u32> {
        self.out.iter().chain(&self.lse).map(|x| x.to_bits()).collect()
    }

    /// How far the output is from an oracle's.
    pub fn accuracy(&self, expected: &Output) -> Accuracy {
        Accuracy::of(&self.out, &expected.out)
    }

    /// `Σ|found − wanted| / Σ|wanted|` of the output.
    pub fn relative_l1(&self, expected: &Output) -> f64 {
        self.accuracy(expected).relative_l1
    }

    /// Largest error of a log-sum-exp; NaN where one side is NaN or −∞ alone.
    pub fn lse_error(&self, expected: &Output) -> f64 {
        Accuracy::of(&self.lse, &expected.lse).max_abs_error
    }

    /// Compares with what an oracle expects: where that is not finite, neither is the result; rows that see no key are
    /// zeros, bit for bit.
    ///
    /// # Errors
    /// Says what is wrong, and where.
    pub fn check(&self, expected: &Output, tolerance: &Tolerance) -> Result<(), String> {
        if self.out.len() != expected.out.len() {
            return Err(format!("{} elements, expected {}", self.out.len(), expected.out.len()));
        }
        self.check_elements(expected, tolerance)?;
        let accuracy = self.accuracy(expected);
        if accuracy.relative_l1 > tolerance.relative_l1 {
            return Err(format!("{accuracy}; relative L1 may be {:.5}", tolerance.relative_l1));
        }
        if self.lse.is_empty() { Ok(()) } else { self.check_lse(expected, tolerance) }
    }

    fn check_elements(&self, expected: &Output, tolerance: &Tolerance) -> Result<(), String> {
        let scale = expected.out.iter().fold(0f64, |max, x| max.max(x.abs()));
        let width = self.shape[3];
        for (at, (&found, &wanted)) in self.out.iter().zip(&expected.out).enumerate() {
            let error = |wanted: String| Err(format!("{} is {found}, expected {wanted}", self.element(at)));
            if found.is_nan() != wanted.is_nan() || found.is_finite() != wanted.is_finite() {
                return error(format!("{wanted}"));
            }
            if expected.lse[at / width] == f64::NEG_INFINITY && found.to_bits() != 0 {
                return error("0, as the row sees no key".into());
            }
            if let Some(element) = tolerance.element {
                // Below the normal range of half precision the last place is 2⁻²⁴.
                let bound = element * scale + tolerance.rounding * wanted.abs() + 2f64.powi(-25);
                if (f64::from(found) - wanted).abs() > bound {
                    return error(format!("{wanted} ± {bound:.2e}"));
                }
            }
        }
        Ok(())
    }

    fn check_lse(&self, expected: &Output, tolerance: &Tolerance) -> Result<(), String> {
        if self.lse.len() != expected.lse.len() {
            return Err(format!("{} log-sum-exps, expected {}", self.lse.len(), expected.lse.len()));
        }
        for (row, (&found, &wanted)) in self.lse.iter().zip(&expected.lse).enumerate() {
            let wide = f64::from(found);
            let near = (wide - wanted).abs() <= tolerance.lse * wanted.abs().max(1.0);
            // The lowest biases have no equals in base 2: the log-sum-exp of a row of them is the least finite number.
            let least = wanted < -1e38 && found == f32::MIN;
            if !(near || wide == wanted || wide.is_nan() && wanted.is_nan() || least) {
                return Err(format!("log-sum-exp {row} is {found}, expected {wanted}"));
            }
        }
        Ok(())
    }

    /// Words for the place of an element.
    fn element(&self, at: usize) -> String {
        let [_, heads, rows, width] = self.shape;
        let (row, channel) = (at / width, at % width);
        let (batch, head) = (row / rows / heads, row / rows % heads);
        format!("batch {batch}, head {head}, row {}, channel {channel}", row % rows)
    }
}

#[cfg(test)]
mod tests {
    use sage_core::Preset;

    use super::*;

    const TIGHT: Tolerance = Tolerance { relative_l1: 1e-6, element: None, rounding: 0.0, lse: 1e-6 };

    fn computed(out: &[f32], lse: &[f32]) -> Computed {
        let shape = [1, 2, out.len() / 4, 2];
        let scheme = Preset::FULL.scheme(2);
        Computed { scheme, shape, out: out.to_vec(), lse: lse.to_vec(), kernels: Vec::new() }
    }

    fn expected(out: &[f64], lse: &[f64]) -> Output {
        Output { out: out.to_vec(), lse: lse.to_vec() }
    }

    #[test]
    fn what_is_right_passes() {
        let right = expected(&[1.0, 2.0, 0.0, 0.0], &[0.5, f64::NEG_INFINITY]);
        assert_eq!(computed(&[1.0, 2.0, 0.0, 0.0], &[0.5, f32::NEG_INFINITY]).check(&right, &TIGHT), Ok(()));
        assert_eq!(computed(&[1.0, 2.0, 0.0, 0.0], &[]).check(&right, &TIGHT), Ok(()));
    }

    #[test]
    fn an_error_names_the_place() {
        let right = expected(&[1.0, 2.0, 3.0, 4.0], &[0.5, 0.5]);
        let error =
            |out: &[f32], lse: &[f32], tolerance| computed(out, lse).check(&right, tolerance).unwrap_err();
        assert_eq!(
            error(&[1.0, 2.0, f32::NAN, 4.0], &[], &TIGHT),
            "batch 0, head 1, row 0, channel 0 is NaN, expected 3"
        );
        let each = Tolerance { relative_l1: 1.0, element: Some(1e-3), ..TIGHT };
        let error_of_one = error(&[1.0, 2.0, 3.0, 4.1], &[], &each);
        assert!(
            error_of_one.starts_with("batch 0, head 1, row 0, channel 1 is 4.1, expected 4 ± "),
            "{error_of_one}"
        );
        assert_eq!(error(&[1.0, 2.0, 3.0, 4.0], &[0.5, 0.6], &TIGHT), "log-sum-exp 1 is 0.6, expected 0.5");
        assert!(error(&[1.0, 2.0, 3.0, 4.1], &[], &TIGHT).contains("relative L1 may be"));
    }

    #[test]
    fn a_row_without_keys_must_be_zero() {
        let empty = expected(&[0.0; 4], &[f64::NEG_INFINITY; 2]);
        let error = computed(&[0.0, 0.0, 0.0, -0.0], &[]).check(&empty, &TIGHT).unwrap_err();
        assert_eq!(error, "batch 0, head 1, row 0, channel 1 is -0, expected 0, as the row sees no key");
    }
}
