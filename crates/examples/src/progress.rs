//! Progress on standard error, where a person looks at it.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar of `len` steps.
pub fn bar(len: usize, what: impl Into<String>) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<28} {bar:30} {pos}/{len} {elapsed} (eta {eta})");
    ProgressBar::new(len as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what.into())
}
