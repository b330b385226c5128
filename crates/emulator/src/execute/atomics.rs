//! Read-modify-write instructions.

use sage_ptx::isa::{AtomicOp, Lane, Space, Ty};

use super::context::Context;
use crate::banks;
use crate::fault::Outcome;
use crate::lanes::lanes;
use crate::machine::{AccessKind, Flow, Status};

impl Context<'_, '_> {
    pub fn atomic(
        &mut self,
        space: Space,
        op: AtomicOp,
        ty: Ty,
        offset: i32,
        dst: u32,
        src: &[u32],
    ) -> Outcome<Flow> {
        let active = self.warp.active;
        let bytes = ty.width().bits() / 8;
        let op = match op {
            AtomicOp::Add => Lane::Add(ty),
            AtomicOp::Min => Lane::Min(ty),
            AtomicOp::Max => Lane::Max(ty),
            AtomicOp::Or => Lane::Or(ty),
        };
        let operands = *self.warp.read(&self.cx.code, src[1], active)?;
        let mut old = [0; 32];
        let mut seen = 0u64;
        let mut changed = false;
        match space {
            Space::Shared => {
                let addresses = self.shared_addresses(src[0], active, offset)?;
                let access = self.access(AccessKind::Atomic);
                let index = self.index();
                for lane in lanes(active) {
                    let change = |old| op.eval([old, operands[lane], 0]);
                    let (layout, clocks) = (&self.cx.layout, &self.state.clocks);
                    let update =
                        self.state.shared.update(layout, clocks, &access, addresses[lane], bytes, change);
                    old[lane] = update.map_err(|trouble| trouble.lane(lane))?;
                }
                self.state.clocks.stored(index, active);
                let cost = banks::wavefronts(&addresses, active, bytes);
                self.stats.count_shared(self.warp.instr, cost);
                changed = true;
            }
            Space::Global => {
                let addresses = self.global_addresses(src[0], offset)?;
                for lane in lanes(active) {
                    let change = |old| op.eval([old, operands[lane], 0]);
                    let update = self.cx.global.update(addresses[lane], bytes, change);
                    old[lane] = update.map_err(|trouble| trouble.lane(lane))?;
                    changed |= change(old[lane]) != old[lane];
                    seen = (seen ^ old[lane] ^ addresses[lane])
                        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                        .rotate_left(23);
                }
                self.stats.count_global(self.warp.instr, banks::sectors(&addresses, active, bytes));
                self.stats.global_changes += u64::from(changed);
            }
        }
        self.warp.write(&self.cx.code, dst, active, &old)?;
        if changed {
            self.warp.progressed();
            return Ok(Flow::Next);
        }
        Ok(if self.warp.polls_in_vain(seen) { Flow::Wait(Status::Polling) } else { Flow::Yield })
    }
}
