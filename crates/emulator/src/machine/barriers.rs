//! The sixteen named barriers of a block.

use std::collections::BTreeMap;

use super::clocks::{Clocks, Stamp};
use super::status::Status;

/// Barriers in use.
#[derive(Debug, Default)]
pub(crate) struct Barriers(pub BTreeMap<u32, Barrier>);

/// A barrier at which somebody has arrived.
#[derive(Debug)]
pub(crate) struct Barrier {
    /// Threads wanted; the whole block where absent.
    pub threads: Option<u32>,
    /// Warps arrived.
    pub arrived: u32,
    pub waiting: Vec<usize>,
    pub stamp: Stamp,
    /// The instruction that arrived first.
    pub at: u32,
}

impl Barrier {
    pub fn wanted(&self, live: u32) -> u32 {
        self.threads.unwrap_or(32 * live)
    }
}

impl Barriers {
    /// Lets the waiting warps go if all have arrived.
    pub fn settle(&mut self, id: u32, live: u32, clocks: &mut Clocks, status: &mut [Status]) {
        if self.0.get(&id).is_some_and(|barrier| 32 * barrier.arrived >= barrier.wanted(live))
            && let Some(barrier) = self.0.remove(&id)
        {
            for warp in barrier.waiting {
                clocks.acquire(warp, &barrier.stamp);
                status[warp] = Status::Ready;
            }
        }
    }

    pub fn warp_ended(&mut self, live: u32, clocks: &mut Clocks, status: &mut [Status]) {
        let whole: Vec<u32> =
            self.0.iter().filter(|(_, barrier)| barrier.threads.is_none()).map(|(&id, _)| id).collect();
        for id in whole {
            self.settle(id, live, clocks, status);
        }
    }

    pub fn describe(&self, id: u32, live: u32) -> String {
        match self.0.get(&id) {
            Some(barrier) => format!(
                "waits at barrier {id}, where {} of {} threads have arrived",
                32 * barrier.arrived,
                barrier.wanted(live)
            ),
            None => format!("waits at barrier {id}"),
        }
    }
}
