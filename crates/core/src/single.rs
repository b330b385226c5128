//! Numbers that callers give in double precision.

use std::borrow::Cow;

use crate::{Error, Result};

/// The option `name`, given in double precision, in single precision: before [`crate::Call::check`] sees it.
///
/// ```
/// let error = sage_core::single("sm_scale", 1e-46).unwrap_err();
/// assert_eq!(error.to_string(), "sm_scale: value is 1e-46, expected a magnitude of 1e-45 to 3.4e38, or 0");
/// ```
///
/// # Errors
/// When rounding makes 0 or infinity of another number: an error about those would not name what the caller gave.
pub fn single(name: impl Into<Cow<'static, str>>, value: f64) -> Result<f32> {
    let narrow = value as f32;
    if (narrow == 0.0) == (value == 0.0) && narrow.is_infinite() == value.is_infinite() {
        return Ok(narrow);
    }
    Err(Error::value(name, format!("{value:?}"), "a magnitude of 1e-45 to 3.4e38, or 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_single_precision_holds_passes() {
        for value in [0.0, -0.0, 0.125, -1e-45, 3.4e38, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(single("x", value), Ok(value as f32));
        }
        assert!(single("x", f64::NAN).is_ok_and(f32::is_nan));
        for (value, text) in [(-1e-46, "-1e-46"), (5e-324, "5e-324"), (1e39, "1e39"), (-1e300, "-1e300")] {
            let error = single("logit_softcap", value).unwrap_err().to_string();
            let wanted = "expected a magnitude of 1e-45 to 3.4e38, or 0";
            assert_eq!(error, format!("logit_softcap: value is {text}, {wanted}"));
        }
    }
}
