//! What can be wrong with a file from a stranger, in words that are safe to show.

use std::borrow::Cow;

/// Result of reading a file.
pub type Result<T, E = FileError> = std::result::Result<T, E>;

/// What can be wrong with a file. The messages lack the file's name, which its reader knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// Not a safetensors file, or one cut short or damaged.
    #[error("not a valid safetensors file: {what}: found {found}, expected {wanted}")]
    Malformed {
        /// Part of the file.
        what: String,
        /// What it is.
        found: String,
        /// What would do.
        wanted: String,
    },
    /// A tensor that was asked for is not there.
    #[error("no tensor named \"{name}\"; found {found}")]
    Missing {
        /// Its name.
        name: String,
        /// The names that are there.
        found: String,
    },
    /// Nothing to compute attention from.
    #[error("no tensors \"q\", \"k\" and \"v\" behind one prefix; found {found}")]
    NoQkv {
        /// The names that are there.
        found: String,
    },
    /// A tensor is there, but cannot be used.
    #[error("tensor \"{name}\": {what} is {found}, expected {wanted}")]
    Unusable {
        /// Its name.
        name: String,
        /// What cannot be used.
        what: &'static str,
        /// What it is.
        found: String,
        /// What would do.
        wanted: Cow<'static, str>,
    },
}

/// A name from a file as it may be shown: control characters and great length, which a hostile file may use to
/// disturb a terminal, made harmless.
pub fn printable(text: &str) -> String {
    const LONGEST: usize = 120;
    let mut line: String = text.chars().take(LONGEST).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() {
        line.push('…');
    }
    line
}
