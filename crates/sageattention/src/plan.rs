//! How a call would be carried out, in words.

use std::fmt;
use std::sync::Arc;

use sage_core::{BackendPlan, Problem, Scheme};

/// How a call is carried out: the backend's kernels, tiles, threads and workspace, and why. Prints itself. It is what
/// runs when such a call is computed.
#[derive(Clone, Debug)]
pub struct Plan {
    problem: Problem,
    backend: Arc<dyn BackendPlan>,
}

impl Plan {
    pub(crate) fn new(problem: Problem, backend: Arc<dyn BackendPlan>) -> Self {
        Plan { problem, backend }
    }

    /// The problem that the plan is for.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The scheme that is computed.
    pub fn scheme(&self) -> &Scheme {
        self.backend.scheme()
    }

    /// Bytes of scratch memory.
    pub fn workspace_bytes(&self) -> usize {
        self.backend.workspace_bytes()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        // The backend's plan has rows of the same form.
        self.backend.fmt(f)
    }
}
