//! What the tests on a real GPU share.

use std::io::Write;

use sageattention::cuda::{Cuda, devices};

/// The GPU, or none with the reason printed: an error where `SAGE_REQUIRE_GPU` is `1`.
pub fn gpu(test: &str) -> Option<Cuda> {
    let reason = match devices() {
        Ok(found) if !found.is_empty() => return Some(Cuda::new(0).unwrap()),
        Ok(_) => "the driver finds no GPU".to_owned(),
        Err(reason) => reason.to_string(),
    };
    assert!(std::env::var_os("SAGE_REQUIRE_GPU").is_none_or(|wanted| wanted != "1"), "{test}: {reason}");
    // Past the test harness, which would swallow the words of a test that passes.
    let _ = writeln!(std::io::stderr(), "{test}: skipped: {reason}");
    None
}
