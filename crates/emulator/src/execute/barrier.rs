//! `bar.sync` and `bar.arrive`.

use super::context::Context;
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::machine::{Barrier, Flow, Stamp, Status};

impl Context<'_, '_> {
    /// `bar.sync` and, with `wait` off, `bar.arrive`.
    pub fn barrier(&mut self, id: u32, threads: Option<u32>, wait: bool) -> Outcome<Flow> {
        self.together("a barrier")?;
        let lane = self.warp.active.trailing_zeros() as usize;
        let ids = self.warp.read(&self.cx.code, id, self.warp.active)?;
        let id = ids[lane & 31] as u32;
        let alike = (0..32).all(|lane| self.warp.active >> lane & 1 == 0 || ids[lane] as u32 == id);
        if id > 15 || !alike {
            let detail = format!("barrier {id}, expected the same of 0 to 15 in all lanes");
            return Err(Trouble::new(FaultKind::Barrier, detail));
        }
        let block = self.state.status.len() as u32 * 32;
        if let Some(threads) = threads.filter(|&n| n == 0 || n % 32 != 0 || n > block) {
            let detail = format!("barrier {id}: {threads} threads, expected a multiple of 32 up to {block}");
            return Err(Trouble::new(FaultKind::Barrier, detail));
        }
        let live = self.state.live_warps();
        let index = self.index();
        let at = self.warp.instr;
        let barrier = self.state.barriers.0.entry(id).or_insert_with(|| Barrier {
            threads,
            arrived: 0,
            waiting: Vec::new(),
            stamp: Stamp::default(),
            at,
        });
        if barrier.threads != threads && barrier.wanted(live) != threads.unwrap_or(32 * live) {
            let (found, wanted) = (threads.unwrap_or(32 * live), barrier.wanted(live));
            let detail = format!("barrier {id}: {found} threads, but {wanted} where others arrived");
            return Err(Trouble::new(FaultKind::Barrier, detail).other(barrier.at));
        }
        if barrier.waiting.contains(&index) {
            let detail = format!("barrier {id}: a warp arrives twice");
            return Err(Trouble::new(FaultKind::Barrier, detail).other(barrier.at));
        }
        barrier.arrived += 1;
        self.state.clocks.release(index, &mut barrier.stamp);
        if wait {
            barrier.waiting.push(index);
            self.state.status[index] = Status::Barrier(id);
        }
        self.warp.progressed();
        self.state.barriers.settle(id, live, &mut self.state.clocks, &mut self.state.status);
        match self.state.status[index] {
            Status::Barrier(id) if wait => Ok(Flow::Wait(Status::Barrier(id))),
            _ => Ok(Flow::Next),
        }
    }
}
