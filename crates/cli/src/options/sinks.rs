//! Attention sinks on the command line: numbers, or a file that has them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use sageattention::Attention;

use super::call::single;
use crate::failure::{Failure, Result};
use crate::inputs;

/// Attention sinks of a call.
#[derive(Clone, Debug, Default, Args)]
pub struct SinksOption {
    /// Attention sinks, a logit for each query head: numbers, one alone for all heads, or a file (safetensors) with a
    /// tensor "sinks" or, for the tensors behind a prefix, one behind that
    #[arg(long, value_name = "X,…|FILE", allow_hyphen_values = true)]
    pub sinks: Option<Sinks>,
}

/// Where attention sinks come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Sinks {
    /// They stand on the command line.
    Numbers(Vec<f32>),
    /// A tensor in a file.
    File(PathBuf),
}

impl FromStr for Sinks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split(',').map(str::trim).collect();
        if words.iter().any(|word| word.parse::<f32>().is_err()) {
            return Ok(Sinks::File(text.into()));
        }
        words.into_iter().map(single).collect::<Result<_, _>>().map(Sinks::Numbers)
    }
}

/// As it is written on a command line.
impl fmt::Display for Sinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sinks::Numbers(numbers) => {
                f.write_str(&numbers.iter().map(f32::to_string).collect::<Vec<_>>().join(","))
            }
            Sinks::File(path) => path.display().fmt(f),
        }
    }
}

impl SinksOption {
    /// The sinks of `heads` query heads, for tensors behind `prefix`; none where the option is not given. That there is
    /// one for each head, and each is a number, the call's check says.
    ///
    /// # Errors
    /// When a file cannot be read, or has no such tensor of one dimension.
    pub fn of_heads(&self, heads: usize, prefix: &str) -> Result<Option<Vec<f32>>> {
        match &self.sinks {
            None => Ok(None),
            Some(Sinks::Numbers(numbers)) => match numbers[..] {
                [one] => Ok(Some(vec![one; heads])),
                _ => Ok(Some(numbers.clone())),
            },
            Some(Sinks::File(path)) => of_file(path, prefix).map(Some),
        }
    }

    /// An addition to a title.
    pub fn title(&self) -> &'static str {
        if self.sinks.is_some() { ", attention sinks" } else { "" }
    }

    /// The option as words of a command line.
    pub fn words(&self) -> Option<String> {
        self.sinks.as_ref().map(|sinks| format!("--sinks={sinks}"))
    }
}

/// Attention with these sinks, where there are some.
pub fn with_sinks<'a>(attention: Attention<'a>, sinks: Option<&'a [f32]>) -> Attention<'a> {
    match sinks {
        Some(sinks) => attention.sinks(sinks),
        None => attention,
    }
}

/// The tensor "sinks" behind a prefix, or else that without one.
fn of_file(path: &Path, prefix: &str) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).map_err(|error| {
        let wanted = "expected numbers, or a file that can be read";
        Failure::Failed(format!("sinks: value is {}, {wanted}: {error}", path.display()))
    })?;
    let file = inputs::parse(path, &bytes)?;
    let named = [format!("{prefix}sinks"), "sinks".to_owned()];
    let held = named.iter().find(|name| file.names().contains(&name.as_str())).unwrap_or(&named[1]);
    let tensor = file.tensor(held).map_err(|error| Failure::file(path, &error))?;
    if tensor.shape().len() != 1 {
        let found = format!("tensor \"sinks\": shape is {:?}", tensor.shape());
        return Err(Failure::Failed(format!("{}: {found}, expected [num_q_heads]", path.display())));
    }
    Ok(tensor.to_f32_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_numbers_and_all_else_is_a_file() {
        let option = |text: &str| SinksOption { sinks: Some(text.parse().unwrap()) };
        assert_eq!(option("1,-2.5,-inf").of_heads(9, "").unwrap(), Some(vec![1.0, -2.5, f32::NEG_INFINITY]));
        assert_eq!(option("-1").of_heads(3, "").unwrap(), Some(vec![-1.0; 3]));
        assert_eq!(option("sinks.safetensors").sinks, Some(Sinks::File("sinks.safetensors".into())));
        assert_eq!(option("1,x").sinks, Some(Sinks::File("1,x".into())));
        let error = option("1,x").of_heads(2, "").unwrap_err().to_string();
        assert!(
            error.starts_with("sinks: value is 1,x, expected numbers, or a file that can be read"),
            "{error}"
        );
        assert!("1e60".parse::<Sinks>().is_err(), "no infinity is made of a number");
        assert_eq!(option("1,-2.5").words().unwrap(), "--sinks=1,-2.5");
        assert_eq!(SinksOption::default().of_heads(2, "").unwrap(), None);
    }
}
