//! What a worker counts while it runs blocks.

use crate::banks::Wavefronts;

/// Costs of one instruction's accesses to shared memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SharedCost {
    pub requests: u64,
    pub taken: u64,
    pub ideal: u64,
    pub worst: u32,
}

/// Costs of one instruction's accesses to global memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GlobalCost {
    pub requests: u64,
    pub sectors: u64,
    pub ideal: u64,
}

/// Counts of one worker.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    /// Executions of each instruction by a warp.
    pub executed: Vec<u64>,
    pub shared: Vec<SharedCost>,
    pub global: Vec<GlobalCost>,
    pub shared_bytes: u32,
    pub bulk_bytes: u64,
    /// Stores and atomics that could let somebody go on who polls.
    pub global_changes: u64,
}

impl Stats {
    pub fn new(instructions: usize) -> Stats {
        Stats {
            executed: vec![0; instructions],
            shared: vec![SharedCost::default(); instructions],
            global: vec![GlobalCost::default(); instructions],
            ..Stats::default()
        }
    }

    /// Counts an access to shared memory.
    pub fn count_shared(&mut self, instr: u32, cost: Wavefronts) {
        let total = &mut self.shared[instr as usize];
        total.requests += 1;
        total.taken += u64::from(cost.taken);
        total.ideal += u64::from(cost.ideal);
        total.worst = total.worst.max(cost.taken - cost.ideal);
    }

    /// Counts an access to global memory.
    pub fn count_global(&mut self, instr: u32, (sectors, ideal): (u32, u32)) {
        let total = &mut self.global[instr as usize];
        total.requests += 1;
        total.sectors += u64::from(sectors);
        total.ideal += u64::from(ideal);
    }

    pub fn merge(&mut self, other: &Stats) {
        self.executed.iter_mut().zip(&other.executed).for_each(|(a, b)| *a += b);
        for (a, b) in self.shared.iter_mut().zip(&other.shared) {
            a.requests += b.requests;
            a.taken += b.taken;
            a.ideal += b.ideal;
            a.worst = a.worst.max(b.worst);
        }
        for (a, b) in self.global.iter_mut().zip(&other.global) {
            a.requests += b.requests;
            a.sectors += b.sectors;
            a.ideal += b.ideal;
        }
        self.shared_bytes = self.shared_bytes.max(other.shared_bytes);
        self.bulk_bytes += other.bulk_bytes;
    }
}
