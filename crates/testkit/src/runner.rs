//! Backends, and cases on them.

use std::io::Write;

use sage_core::oracle::{self, Output};
use sage_core::{Call, DType, Preset, Scheme};

use crate::{Case, Computed, OwnedCall, Tolerance};

/// A backend, as tests see it.
pub trait Runner {
    /// A name for messages.
    fn name(&self) -> String;

    /// Whether the backend computes such a call by this scheme, or by one of its own choice.
    ///
    /// # Errors
    /// Says why not.
    fn supports(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Result<(), String>;

    /// Computes the call by this scheme, or by one of the backend's choice.
    ///
    /// # Panics
    /// When the backend does not support the call, fails, or writes beside its output.
    fn run(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Computed;

    /// Computes the call by a preset.
    ///
    /// # Panics
    /// As [`Runner::run`].
    fn run_preset(&self, call: &OwnedCall, preset: Preset) -> Computed {
        self.run(call, Some(preset.scheme(call.call().problem.head_dim)))
    }

    /// What the result is compared with, given the scheme that was computed.
    fn expected(&self, call: &Call<'_>, scheme: &Scheme) -> Output {
        oracle::scheme(call, scheme)
    }

    /// How far the result may be from that, for tensors of this type and the scheme that was computed.
    fn tolerance(&self, dtype: DType, scheme: &Scheme) -> Tolerance;
}

/// Runs a case and compares it with what is expected, within the backend's tolerance.
#[track_caller]
pub fn check(runner: &dyn Runner, case: &Case) -> Computed {
    compare(runner, case, None).unwrap_or_else(|error| panic!("{error}"))
}

/// The same within another tolerance.
#[track_caller]
pub fn check_within(runner: &dyn Runner, case: &Case, tolerance: &Tolerance) -> Computed {
    compare(runner, case, Some(tolerance)).unwrap_or_else(|error| panic!("{error}"))
}

fn compare(runner: &dyn Runner, case: &Case, tolerance: Option<&Tolerance>) -> Result<Computed, String> {
    let call = case.build();
    let computed = match case.spoil {
        None => runner.run(&call, case.scheme),
        Some(value) => runner.run(&call.with_hidden_rows(value), case.scheme),
    };
    let expected = runner.expected(&call.call(), &computed.scheme);
    let own = runner.tolerance(case.dtype, &computed.scheme);
    computed.check(&expected, tolerance.unwrap_or(&own)).map_err(|error| {
        let Computed { scheme, kernels, .. } = &computed;
        format!("{error}\nby {}, {scheme}, {kernels:?}, of {case:?}", runner.name())
    })?;
    if case.lse && computed.lse.is_empty() && !computed.out.is_empty() {
        return Err(format!("no log-sum-exp by {} of {case:?}", runner.name()));
    }
    Ok(computed)
}

/// Runs all cases that a backend supports, says which it does not and why, and tells all failures together.
///
/// # Panics
/// When a case fails, or when more than `most_skipped` are not supported.
#[track_caller]
pub fn check_table(runner: &dyn Runner, cases: &[Case], most_skipped: usize) {
    let (mut skipped, mut failures) = (0, Vec::new());
    for case in cases {
        match runner.supports(&case.build(), case.scheme) {
            Ok(()) => failures.extend(compare(runner, case, None).err()),
            Err(reason) => {
                skipped += 1;
                // Past the test harness, which would swallow the words of a test that passes.
                let _ = writeln!(std::io::stderr(), "{}: skipped: {reason}: {case:?}", runner.name());
            }
        }
    }
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n\n"));
    assert!(skipped <= most_skipped, "{skipped} of {} cases skipped, {most_skipped} may be", cases.len());
}
