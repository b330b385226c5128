//! A pass on a GPU in words, for people and for JSON.

use sage_kernels::pass::Pass;
use serde::Serialize;

/// A pass in words.
#[derive(Clone, Debug, Serialize)]
pub struct PassSummary {
    /// What it does.
    pub pass: &'static str,
    /// Names of its kernels, in the order of their launches.
    pub kernels: Vec<String>,
    /// The parts of its workspace.
    pub workspace: Vec<Slot>,
    /// Bytes of the whole workspace.
    pub workspace_bytes: usize,
}

/// A part of a pass's workspace, which one kernel writes and later ones read.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Slot {
    /// Its name.
    pub slot: &'static str,
    /// Its bytes.
    pub bytes: usize,
}

impl PassSummary {
    /// A pass that is called so.
    pub fn new<T>(name: &'static str, pass: &Pass<T>) -> Self {
        PassSummary {
            pass: name,
            kernels: pass.kernel_names(),
            workspace: pass.slots().map(|(slot, bytes)| Slot { slot, bytes }).collect(),
            workspace_bytes: pass.workspace_bytes(),
        }
    }
}
