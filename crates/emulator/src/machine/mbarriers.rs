//! `mbarrier`s: phases that end when all arrivals and all announced bytes are in.

use std::collections::BTreeMap;

use super::clocks::Stamp;

/// An `mbarrier`.
#[derive(Debug)]
pub(crate) struct Mbarrier {
    /// Number among the block's, which gives its copies a clock component of their own.
    pub index: usize,
    /// Arrivals of a phase.
    pub expected: u32,
    /// Arrivals outstanding.
    pub pending: u32,
    /// Bytes announced and not yet arrived; negative where copies were faster.
    pub bytes: i64,
    /// Phases completed.
    pub phase: u64,
    /// What this phase's arrivals pass on.
    pub stamp: Stamp,
    /// What completed phases pass on.
    pub completed: Stamp,
    /// The warp that initialised it, and whether it has fenced that for the copy engine.
    pub init_warp: usize,
    pub fenced: bool,
    pub init_at: u32,
}

/// The block's `mbarrier`s by address.
#[derive(Debug, Default)]
pub(crate) struct Mbarriers {
    pub table: BTreeMap<u32, Mbarrier>,
    pub count: usize,
}

impl Mbarriers {
    pub fn get(&mut self, address: u32) -> Option<&mut Mbarrier> {
        self.table.get_mut(&address)
    }

    /// A warp's fence makes its initialisations visible to the copy engine.
    pub fn fence(&mut self, warp: usize) {
        self.table
            .values_mut()
            .filter(|barrier| barrier.init_warp == warp)
            .for_each(|barrier| barrier.fenced = true);
    }

    pub fn describe(&self, address: u32, parity: u32, place: &str) -> String {
        match self.table.get(&address) {
            Some(barrier) => format!(
                "waits for the phase of parity {parity} of the mbarrier at {place} (in phase {}: {} of {} arrivals \
                 and {} bytes outstanding)",
                barrier.phase, barrier.pending, barrier.expected, barrier.bytes
            ),
            None => format!("waits at {place}"),
        }
    }
}
