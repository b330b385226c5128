//! How a call would be carried out, in words.

use std::fmt;

use sage_core::{Alignment, Band, Choice, Problem, Result, Scheme};
use sage_cpu::CpuPlan;

use crate::attention::scheme_on_cpu;
use crate::backend::{self, Device};

/// How a call is carried out: the backend's kernels, tiles, threads and workspace, and why. Prints itself.
#[derive(Debug)]
pub struct Plan {
    problem: Problem,
    backend: BackendPlan,
}

#[derive(Debug)]
enum BackendPlan {
    Cpu(Box<CpuPlan>),
    #[cfg(feature = "cuda")]
    Cuda(Box<sage_gpu::CudaPlan>),
}

impl Plan {
    /// The plan for a problem, without tensors at hand, on this machine's processor.
    ///
    /// # Errors
    /// When it cannot carry the problem out.
    pub fn new(problem: &Problem, choice: Choice) -> Result<Self> {
        Plan::on(Device::Cpu, problem, choice)
    }

    /// The plan for a problem on a device; no kernel is compiled for it.
    ///
    /// # Errors
    /// When there is no such device, or it cannot carry the problem out.
    pub fn on(device: Device, problem: &Problem, choice: Choice) -> Result<Self> {
        let backend = match device {
            Device::Cpu => {
                let scheme = scheme_on_cpu(choice, problem.head_dim)?;
                BackendPlan::Cpu(Box::new(backend::cpu().plan(problem, scheme)?))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                BackendPlan::Cuda(Box::new(sage_gpu::Cuda::shared(ordinal)?.explain(problem, choice)?))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(ordinal) => return Err(backend::no_cuda(ordinal)),
        };
        Ok(Plan { problem: *problem, backend })
    }

    /// The problem that the plan is for.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The scheme that is computed.
    pub fn scheme(&self) -> &Scheme {
        match &self.backend {
            BackendPlan::Cpu(plan) => plan.scheme(),
            #[cfg(feature = "cuda")]
            BackendPlan::Cuda(plan) => plan.scheme(),
        }
    }

    /// Bytes of scratch memory.
    pub fn workspace_bytes(&self) -> usize {
        match &self.backend {
            BackendPlan::Cpu(plan) => plan.workspace_bytes(),
            #[cfg(feature = "cuda")]
            BackendPlan::Cuda(plan) => plan.workspace_bytes(),
        }
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
        match &self.backend {
            BackendPlan::Cpu(plan) => plan.fmt(f),
            #[cfg(feature = "cuda")]
            BackendPlan::Cuda(plan) => plan.fmt(f),
        }
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
