//! What an instruction can touch.

use crate::diagnosis::diverges;
use crate::fault::Outcome;
use crate::machine::{Access, AccessKind, Launch, State, Warp};
use crate::stats::Stats;

/// One warp about to execute an instruction, with all it can touch.
pub(crate) struct Context<'c, 'a> {
    pub cx: &'c Launch<'a>,
    pub state: &'c mut State,
    pub warp: &'c mut Warp,
    pub stats: &'c mut Stats,
}

impl Context<'_, '_> {
    /// This warp's access to shared memory by the current instruction.
    pub fn access(&self, kind: AccessKind) -> Access {
        Access::of_warp(self.warp.index as usize, &self.state.clocks, self.warp.instr, kind)
    }

    pub fn index(&self) -> usize {
        self.warp.index as usize
    }

    /// An instruction that the whole warp must execute together.
    pub fn together(&self, what: &str) -> Outcome<()> {
        if self.warp.active == self.warp.live {
            return Ok(());
        }
        Err(diverges(self.warp, what, self.warp.live))
    }

    /// An instruction that needs all 32 lanes.
    pub fn all_lanes(&self, what: &str) -> Outcome<()> {
        if self.warp.active == u32::MAX {
            return Ok(());
        }
        Err(diverges(self.warp, what, u32::MAX))
    }
}
