//! Hyper-parameters that heads may have of their own.

use crate::{Error, Result};

/// A hyper-parameter: one for all query heads, or one for each.
#[derive(Clone, Debug, PartialEq)]
pub enum PerHead {
    /// The same for all heads.
    All(f32),
    /// One for each query head.
    Each(Vec<f32>),
}

impl PerHead {
    /// The value for query head `head`, which was checked to be there.
    pub(super) fn of(&self, head: usize) -> f32 {
        match self {
            PerHead::All(value) => *value,
            PerHead::Each(values) => values[head],
        }
    }

    /// That there is a share, 0 to 1, for each of `heads` heads.
    pub(super) fn check_share(&self, name: &'static str, heads: usize) -> Result<()> {
        self.check(name, heads, "0 to 1", |value| (0.0..=1.0).contains(&value))
    }

    /// That there is a finite number for each of `heads` heads.
    pub(super) fn check_finite(&self, name: &'static str, heads: usize) -> Result<()> {
        self.check(name, heads, "a finite number", f32::is_finite)
    }

    /// That there is a finite number that is not negative for each of `heads` heads.
    pub(super) fn check_not_negative(&self, name: &'static str, heads: usize) -> Result<()> {
        let fits = |value: f32| value.is_finite() && value >= 0.0;
        self.check(name, heads, "a finite number of at least 0", fits)
    }

    fn check(
        &self,
        name: &'static str,
        heads: usize,
        wanted: &str,
        fits: impl Fn(f32) -> bool,
    ) -> Result<()> {
        match self {
            PerHead::All(value) if fits(*value) => Ok(()),
            PerHead::All(value) => Err(Error::value(name, value, wanted)),
            PerHead::Each(values) if values.len() != heads => {
                Err(Error::shape(name, &[values.len()], format!("[{heads}], one for each query head")))
            }
            PerHead::Each(values) => match values.iter().position(|&value| !fits(value)) {
                None => Ok(()),
                Some(head) => Err(Error::value(format!("{name}[{head}]"), values[head], wanted)),
            },
        }
    }
}

impl From<f32> for PerHead {
    fn from(value: f32) -> Self {
        PerHead::All(value)
    }
}

impl From<Vec<f32>> for PerHead {
    fn from(values: Vec<f32>) -> Self {
        PerHead::Each(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_named_with_its_head() {
        let error = |value: PerHead| value.check_share("topk", 2).unwrap_err().to_string();
        assert_eq!(error(1.5.into()), "topk: value is 1.5, expected 0 to 1");
        assert_eq!(error(vec![0.5, f32::NAN].into()), "topk[1]: value is NaN, expected 0 to 1");
        assert_eq!(error(vec![0.5].into()), "topk: shape is [1], expected [2], one for each query head");
        assert!(PerHead::from(vec![0.0, 1.0]).check_share("topk", 2).is_ok());
        let infinite = PerHead::from(f32::INFINITY).check_finite("tau", 2).unwrap_err().to_string();
        assert_eq!(infinite, "tau: value is inf, expected a finite number");
    }
}
