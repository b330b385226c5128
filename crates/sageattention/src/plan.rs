//! How a call would be carried out, in words.

use std::fmt;
use std::sync::Arc;

use sage_core::{Alignment, BackendPlan, Band, Problem, Scheme};

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
        let p = &self.problem;
        row(
            f,
            "problem",
            &format!(
                "{}, batch {}, {} query heads, {} key heads, {} queries × {} keys, head_dim {}{}",
                p.dtype,
                p.batch,
                p.num_q_heads,
                p.num_kv_heads,
                p.q_len,
                p.kv_len,
                p.head_dim,
                if p.packed { ", packed sequences" } else { "" }
            ),
        )?;
        row(f, "visible", &visible(p))?;
        let softcap = p.logit_softcap.map(|cap| format!(", soft cap {cap}")).unwrap_or_default();
        row(f, "scores", &format!("sm_scale {}{softcap}", p.sm_scale))?;
        // The backend's plan has rows of the same form.
        self.backend.fmt(f)
    }
}

/// One aligned entry.
fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "{name:<11} {value}")
}

/// The masks of a problem, in words.
fn visible(problem: &Problem) -> String {
    let Band { left, right, alignment } = problem.band;
    let mut parts = Vec::new();
    if !problem.band.is_full() {
        let limit = |side: Option<usize>| side.map_or("any".to_owned(), |n| n.to_string());
        let name = match (left, right) {
            (None, Some(0)) => "causal".to_owned(),
            _ => format!("window of {} before and {} after the diagonal", limit(left), limit(right)),
        };
        let diagonal = match alignment {
            Alignment::BottomRight => "the last query sees the last key".to_owned(),
            Alignment::TopLeft => "the first query sees the first key".to_owned(),
            Alignment::Offset(key) => format!("the first query's diagonal lies at key {key}"),
        };
        parts.push(format!("{name} ({diagonal})"));
    }
    parts.extend(problem.masked.then(|| "explicit mask".to_owned()));
    parts.extend(problem.block_masked.then(|| "block mask".to_owned()));
    if parts.is_empty() { "all keys".to_owned() } else { parts.join(", ") }
}
