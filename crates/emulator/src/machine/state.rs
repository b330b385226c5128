//! What the warps of a block share.

use super::barriers::Barriers;
use super::clocks::Clocks;
use super::in_flight::BulkLoad;
use super::mbarriers::{Mbarrier, Mbarriers};
use super::shared::Shared;
use super::status::Status;

/// What the warps of a block share.
#[derive(Debug)]
pub(crate) struct State {
    pub index: [u32; 3],
    pub shared: Shared,
    pub clocks: Clocks,
    pub barriers: Barriers,
    pub mbarriers: Mbarriers,
    pub status: Vec<Status>,
    /// Bulk loads under way.
    pub bulk_loads: Vec<BulkLoad>,
    /// Turns taken, the clock of the bulk copies.
    pub turn: u64,
    /// Registers that each thread of a warp may use.
    pub register_limits: Vec<u32>,
    /// Registers that the block was started with, which its warps share out: what others of the multiprocessor's are
    /// free is not theirs.
    pub register_pool: u32,
}

impl State {
    pub fn live_warps(&self) -> u32 {
        self.status.iter().filter(|&&status| status != Status::Done).count() as u32
    }

    /// Ends the phase of an `mbarrier` if nothing is outstanding, and wakes who waits for it.
    pub fn settle_mbarrier(&mut self, address: u32) {
        let Some(barrier) = self.mbarriers.get(address) else { return };
        if barrier.pending != 0 || barrier.bytes != 0 {
            return;
        }
        barrier.phase += 1;
        barrier.pending = barrier.expected;
        let Mbarrier { stamp, completed, .. } = barrier;
        completed.join(stamp);
        stamp.clear();
        for status in &mut self.status {
            if matches!(status, Status::Mbarrier { address: at, .. } if *at == address) {
                *status = Status::Ready;
            }
        }
    }
}
