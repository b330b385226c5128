//! Tests of hardware that is not everywhere.

use std::fmt::Display;
use std::io::Write;

/// Says that a test of a GPU is skipped, and why. With `SAGE_REQUIRE_GPU=1` that is a failure.
///
/// # Panics
/// With `SAGE_REQUIRE_GPU=1`.
#[track_caller]
pub fn skip(test: &str, reason: impl Display) {
    let required = std::env::var_os("SAGE_REQUIRE_GPU").is_some_and(|wanted| wanted == "1");
    assert!(!required, "{test}: {reason}");
    // Past the test harness, which would swallow the words of a test that passes.
    let _ = writeln!(std::io::stderr(), "{test}: skipped: {reason}");
}
