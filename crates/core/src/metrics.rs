//! How far one result is from another.

use std::fmt;

/// Distance of a result from the one expected, over all elements at once (flattened), as the SageAttention papers
/// measure it.
///
/// The field names are those of every report this project writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// `Σ a·e / (‖a‖·‖e‖)`: 1 is best. 1 when both are all zero, 0 when only one is.
    pub cosine: f64,
    /// `Σ|a − e| / Σ|e|`: 0 is best. 0 when both are all zero, infinite when only the expected one is.
    pub relative_l1: f64,
    /// `√mean (a − e)²`, in the unit of the elements.
    pub rmse: f64,
    /// `max |a − e|`, in the unit of the elements.
    pub max_abs_error: f64,
}

impl Accuracy {
    /// Compares `actual` with `expected`, element by element.
    ///
    /// Whatever cannot be compared is never a good score: a NaN on either side makes every field NaN, and so do
    /// slices of different lengths. Two empty slices are equal.
    ///
    /// ```
    /// use sage_core::metrics::Accuracy;
    ///
    /// let accuracy = Accuracy::of(&[1.0f32, 2.0], &[1.0f64, 4.0]);
    /// assert_eq!(accuracy.relative_l1, 0.4);
    /// assert_eq!(accuracy.max_abs_error, 2.0);
    /// assert!(Accuracy::of(&[f32::NAN], &[0.0f32]).cosine.is_nan());
    /// ```
    pub fn of<A, E>(actual: &[A], expected: &[E]) -> Self
    where
        A: Copy + Into<f64>,
        E: Copy + Into<f64>,
    {
        if actual.len() != expected.len() {
            return Self::INCOMPARABLE;
        }
        let (mut product, mut actual_square, mut expected_square) = (0.0, 0.0, 0.0);
        let (mut error, mut error_square, mut magnitude, mut largest) = (0.0, 0.0, 0.0, 0f64);
        for (&a, &e) in actual.iter().zip(expected) {
            let (a, e): (f64, f64) = (a.into(), e.into());
            if a.is_nan() || e.is_nan() {
                return Self::INCOMPARABLE;
            }
            // Equal infinities (a log-sum-exp of a row without keys) are no error; their difference is NaN.
            let distance = if a == e { 0.0 } else { (a - e).abs() };
            product += a * e;
            actual_square += a * a;
            expected_square += e * e;
            error += distance;
            error_square += distance * distance;
            magnitude += e.abs();
            largest = largest.max(distance);
        }
        let norms = f64::sqrt(actual_square) * f64::sqrt(expected_square);
        Accuracy {
            cosine: match (actual_square == 0.0, expected_square == 0.0) {
                (true, true) => 1.0,
                (false, false) => (product / norms).clamp(-1.0, 1.0),
                _ => 0.0,
            },
            relative_l1: if error == 0.0 { 0.0 } else { error / magnitude },
            rmse: if actual.is_empty() { 0.0 } else { (error_square / actual.len() as f64).sqrt() },
            max_abs_error: largest,
        }
    }

    const INCOMPARABLE: Self =
        Accuracy { cosine: f64::NAN, relative_l1: f64::NAN, rmse: f64::NAN, max_abs_error: f64::NAN };
}

impl fmt::Display for Accuracy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cosine {:.6}, relative L1 {:.5}, RMSE {:.3e}, max |error| {:.3e}",
            self.cosine, self.relative_l1, self.rmse, self.max_abs_error
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_metric_is_its_formula() {
        // a·e = 3 + 8 = 11, ‖a‖² = 5, ‖e‖² = 25, |a − e| = 2, 2.
        let accuracy = Accuracy::of(&[1.0f32, 2.0], &[3.0f32, 4.0]);
        assert_eq!(accuracy.cosine, 11.0 / (5f64.sqrt() * 5.0));
        assert_eq!(accuracy.relative_l1, 4.0 / 7.0);
        assert_eq!(accuracy.rmse, 2.0);
        assert_eq!(accuracy.max_abs_error, 2.0);
    }

    #[test]
    fn zeros_are_defined() {
        let both = Accuracy::of(&[0f64; 3], &[0f64; 3]);
        assert_eq!((both.cosine, both.relative_l1, both.rmse), (1.0, 0.0, 0.0));
        let expected = Accuracy::of(&[1f64; 3], &[0f64; 3]);
        assert_eq!((expected.cosine, expected.relative_l1), (0.0, f64::INFINITY));
        let actual = Accuracy::of(&[0f64; 3], &[1f64; 3]);
        assert_eq!((actual.cosine, actual.relative_l1), (0.0, 1.0));
        assert_eq!(Accuracy::of::<f32, f32>(&[], &[]).cosine, 1.0);
    }

    #[test]
    fn what_cannot_be_compared_scores_nan() {
        for (actual, expected) in
            [(vec![1.0, f64::NAN], vec![1.0, 2.0]), (vec![1.0], vec![f64::NAN]), (vec![1.0], vec![1.0, 2.0])]
        {
            let Accuracy { cosine, relative_l1, rmse, max_abs_error } = Accuracy::of(&actual, &expected);
            assert!([cosine, relative_l1, rmse, max_abs_error].iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn an_infinity_is_never_a_good_score() {
        let accuracy = Accuracy::of(&[1.0, f64::INFINITY], &[1.0, 2.0]);
        assert!(accuracy.cosine.is_nan() && accuracy.relative_l1 == f64::INFINITY);
    }
}
