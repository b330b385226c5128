//! The pipeline between one producer and several consumers: stages of shared memory that go round, each with an
//! `mbarrier` that tells consumers that it is full, and one that tells the producer that it is empty again.

use sage_ptx::{Code, Mbarrier, Mbarriers, Val, Var};

/// Where a thread stands in a pipeline: the stage, and the parity of the round.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'k> {
    stage: Var<'k, i32>,
    parity: Var<'k, i32>,
    stages: usize,
}

impl<'k> Cursor<'k> {
    pub fn new(code: &'k Code, stages: usize, name: &str) -> Self {
        Cursor {
            stage: code.var(0).named(&format!("{name}_stage")),
            parity: code.var(0).named(&format!("{name}_parity")),
            stages,
        }
    }

    /// The stage.
    pub fn stage(&self) -> Val<'k, i32> {
        self.stage.get()
    }

    /// The parity of the round.
    pub fn parity(&self) -> Val<'k, i32> {
        self.parity.get()
    }

    /// Moves to where `other` stands.
    pub fn set(&self, other: &Self) {
        self.stage.set(other.stage.get());
        self.parity.set(other.parity.get());
    }

    /// Moves to the next stage.
    pub fn advance(&self) {
        let next = self.stage.get() + 1;
        let wraps = next.eq(self.stages as i32);
        self.stage.set(wraps.select(0, next));
        self.parity.set(self.parity.get() ^ wraps.select(1, 0));
    }
}

/// The barriers of a pipeline's stages.
#[derive(Clone, Copy)]
pub(super) struct Pipeline<'k> {
    /// A barrier for each stage that tells when it is full, then one for each that tells when it is empty.
    barriers: Mbarriers<'k>,
    stages: usize,
}

impl<'k> Pipeline<'k> {
    /// Barriers that a pipeline needs.
    pub const fn barriers(stages: usize) -> usize {
        2 * stages
    }

    /// On barriers that one thread initialises with [`Pipeline::init`] before anybody uses them.
    pub fn new(barriers: Mbarriers<'k>, stages: usize) -> Self {
        Pipeline { barriers, stages }
    }

    /// Initialises the barriers for one arrival of the producer a stage, and `consumers` to release it.
    pub fn init(&self, consumers: u32) {
        for stage in 0..self.stages {
            self.barriers.plus(stage).init(1);
            self.barriers.plus(self.stages + stage).init(consumers);
        }
    }

    /// The producer's part: waits until the stage at the cursor, which it returns, is empty.
    pub fn wait_empty(&self, cursor: &Cursor<'k>) -> Val<'k, i32> {
        let stage = cursor.stage.get();
        self.barriers.from(self.stages).at(stage).wait(cursor.parity() ^ 1);
        stage
    }

    /// The same of the stage before the one at the cursor, into which goes what comes `stages − 1` later: for a consumer
    /// that also produces, of its cursor.
    pub fn wait_empty_before(&self, cursor: &Cursor<'k>) -> Val<'k, i32> {
        let (stage, parity) = (cursor.stage.get(), cursor.parity.get());
        let first = stage.eq(0);
        let before = first.select(self.stages as i32 - 1, stage - 1);
        // What comes later is of the same round where the cursor is at its beginning, else of the next.
        let parity = first.select(parity ^ 1, parity);
        self.barriers.from(self.stages).at(before).wait(parity);
        before
    }

    /// What the producer, or copies that it announces, arrive at when a stage is full.
    pub fn full(&self, stage: Val<'k, i32>) -> Mbarrier<'k> {
        self.barriers.at(stage)
    }

    /// A consumer's part: waits until the stage at the cursor, which it returns, is full.
    pub fn wait_full(&self, cursor: &Cursor<'k>) -> Val<'k, i32> {
        let stage = cursor.stage.get();
        self.full(stage).wait(cursor.parity());
        stage
    }

    /// A consumer's part: it is done with a stage.
    pub fn release(&self, stage: Val<'k, i32>) {
        self.barriers.from(self.stages).at(stage).arrive();
    }
}
