//! A block: its warps, and in which order they take turns.

use crate::decode::Step;
use crate::diagnosis::{at_statement, deadlock, fault, runaway};
use crate::execute::Context;
use crate::fault::{Fault, FaultKind, Outcome, Trouble};
use crate::machine::{Barriers, Clocks, Flow, Launch, Mbarriers, Shared, State, Status, Warp};
use crate::stats::Stats;

/// How a block's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Ran,
    /// All its warps wait, some for global memory to change.
    Stalled,
    Done,
}

/// A block.
#[derive(Debug)]
pub(crate) struct Block {
    pub linear: u64,
    pub warps: Vec<Warp>,
    pub state: State,
    order: Vec<usize>,
    random: u64,
}

/// Rounds over the warps in one turn of a block.
const ROUNDS: usize = 64;
/// Steps of one warp in one round.
const SLICE: u64 = 1024;

impl Block {
    pub fn new(cx: &Launch<'_>, linear: u64) -> Block {
        let threads = cx.code.program.threads();
        let count = threads.div_ceil(32) as usize;
        let warps = (0..count as u32).map(|index| {
            let lanes = (threads - 32 * index).min(32);
            Warp::new(index, if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 }, &cx.code)
        });
        let clocks = Clocks::new(count);
        let [x, y, _] = cx.grid.map(u64::from);
        let index = [linear % x, linear / x % y, linear / x / y].map(|i| i as u32);
        let per_thread =
            (65536 / threads.max(1) / cx.code.program.min_blocks.unwrap_or(1).max(1)).min(255) & !7;
        let mut block = Block {
            linear,
            warps: warps.collect(),
            order: (0..count).collect(),
            random: cx.options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ linear.wrapping_add(1),
            state: State {
                index,
                shared: Shared::new(cx.layout.bytes, clocks.readers()),
                clocks,
                barriers: Barriers::default(),
                mbarriers: Mbarriers::default(),
                status: vec![Status::Ready; count],
                bulk_loads: Vec::new(),
                turn: 0,
                register_limits: vec![per_thread; count],
                register_pool: 32 * per_thread * count as u32,
            },
        };
        block.shuffle(cx);
        block
    }

    /// A random number, the same in every run with this seed.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// With a seed, another order of the warps.
    fn shuffle(&mut self, cx: &Launch<'_>) {
        if cx.options.seed != 0 {
            for i in (1..self.order.len()).rev() {
                let j = (self.random() % (i as u64 + 1)) as usize;
                self.order.swap(i, j);
            }
        }
    }

    /// Lets the warps take turns for a while.
    pub fn run(&mut self, cx: &Launch<'_>, stats: &mut Stats) -> Result<Turn, Box<Fault>> {
        for _ in 0..ROUNDS {
            let mut ran = false;
            self.shuffle(cx);
            for i in 0..self.order.len() {
                let warp = self.order[i];
                if !matches!(self.state.status[warp], Status::Ready | Status::Polling | Status::Registers) {
                    continue;
                }
                let slice = if cx.options.seed == 0 { SLICE } else { 1 + self.random() % SLICE };
                let before = self.warps[warp].steps;
                let outcome = self.run_warp(cx, stats, warp, slice).and_then(|()| self.deliver(cx));
                outcome.map_err(|trouble| fault(cx, &self.state, &self.warps[warp], *trouble))?;
                let waits = matches!(self.state.status[warp], Status::Polling | Status::Registers);
                ran |= self.warps[warp].steps > before && !waits;
            }
            if self.state.status.iter().all(|&status| status == Status::Done) {
                self.leaves_nothing_behind()
                    .map_err(|(warp, trouble)| fault(cx, &self.state, &self.warps[warp], *trouble))?;
                stats.shared_bytes = stats.shared_bytes.max(cx.layout.bytes);
                return Ok(Turn::Done);
            }
            if ran {
                continue;
            }
            if let Some(first) = self.state.bulk_loads.iter().map(|load| load.lands_at).min() {
                self.state.turn = self.state.turn.max(first);
                self.deliver(cx).map_err(|trouble| fault(cx, &self.state, &self.warps[0], *trouble))?;
                continue;
            }
            if self.time_out() {
                continue;
            }
            if self.state.status.contains(&Status::Polling) {
                return Ok(Turn::Stalled);
            }
            return Err(self.deadlock(cx, "no warp of the block can go on"));
        }
        Ok(Turn::Ran)
    }

    /// Everything waits.
    pub fn deadlock(&self, cx: &Launch<'_>, why: &str) -> Box<Fault> {
        deadlock(cx, &self.state, &self.warps, why)
    }

    /// Bulk loads whose time has come arrive.
    fn deliver(&mut self, cx: &Launch<'_>) -> Outcome<()> {
        self.state.turn += 1;
        while let Some(i) = self.state.bulk_loads.iter().position(|load| load.lands_at <= self.state.turn) {
            let load = self.state.bulk_loads.remove(i);
            self.state.land(cx, load)?;
        }
        Ok(())
    }

    /// Bulk loads that outlive the block would touch the shared memory of the next one.
    fn leaves_nothing_behind(&self) -> Result<(), (usize, Box<Trouble>)> {
        if let Some(load) = self.state.bulk_loads.first() {
            let detail = "the block ends while a bulk load to its shared memory is in flight";
            let trouble = Trouble::new(FaultKind::MissingWait, detail).other(load.at);
            return Err((load.warp, trouble));
        }
        Ok(())
    }

    /// A `try_wait` may give up and say `false`: whoever has not done so since it last did something does so now.
    fn time_out(&mut self) -> bool {
        let mut any = false;
        for (warp, status) in self.warps.iter_mut().zip(&mut self.state.status) {
            if matches!(status, Status::Mbarrier { .. }) && !warp.timed_out_at(warp.pc) {
                warp.note_time_out(warp.pc);
                *status = Status::Ready;
                any = true;
            }
        }
        any
    }

    /// Runs a warp until it waits, or for so many steps.
    fn run_warp(&mut self, cx: &Launch<'_>, stats: &mut Stats, index: usize, slice: u64) -> Outcome<()> {
        self.state.status[index] = Status::Ready;
        let end = self.warps[index].steps + slice;
        while self.warps[index].steps < end {
            let warp = &mut self.warps[index];
            let step = cx.code.steps[warp.pc as usize];
            warp.steps += 1;
            if warp.steps > cx.options.step_limit {
                return Err(runaway(warp, step, cx.options.step_limit));
            }
            let Step::Instr(instr) = step else {
                warp.control(&cx.code, step).map_err(|trouble| at_statement(trouble, step))?;
                if warp.finished() {
                    self.retire(index);
                    return Ok(());
                }
                continue;
            };
            warp.instr = instr;
            warp.pc += 1;
            let mut context = Context { cx, state: &mut self.state, warp, stats };
            let flow = context.execute(&cx.code.instrs[instr as usize])?;
            let status = match flow {
                Flow::Next => {
                    stats.executed[instr as usize] += 1;
                    if self.warps[index].finished() {
                        self.retire(index);
                        return Ok(());
                    }
                    continue;
                }
                Flow::Wait(status) => {
                    stats.executed[instr as usize] += 1;
                    status
                }
                Flow::Yield => {
                    stats.executed[instr as usize] += 1;
                    return Ok(());
                }
                Flow::Retry(status) => {
                    let warp = &mut self.warps[index];
                    warp.pc -= 1;
                    warp.steps -= u64::from(status == Status::Registers);
                    status
                }
            };
            self.state.status[index] = status;
            if status == Status::Wgmma && !self.wgmma(cx, stats, index)? {
                return Ok(());
            }
            if self.state.status[index] != Status::Ready {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Issues the `wgmma` at which a warp stands, if all four of its group stand there.
    fn wgmma(&mut self, cx: &Launch<'_>, stats: &mut Stats, index: usize) -> Outcome<bool> {
        let first = index & !3;
        let Some(group) = self.warps.get_mut(first..first + 4) else {
            let detail =
                format!("wgmma by a block of {} warps, whose last group is not whole", self.warps.len());
            return Err(Trouble::new(FaultKind::Divergent, detail));
        };
        if self.state.status[first..first + 4].iter().any(|&status| status != Status::Wgmma) {
            return Ok(false);
        }
        let pc = group[0].pc;
        if let Some(other) = group.iter().find(|warp| warp.pc != pc) {
            let detail = format!("the warps of warpgroup {} are at different wgmmas", first / 4);
            return Err(Trouble::new(FaultKind::Divergent, detail).other(other.instr));
        }
        let instr = group[0].instr as usize;
        self.state.issue_wgmma(cx, group, &cx.code.instrs[instr])?;
        for warp in group.iter_mut() {
            warp.pc += 1;
            stats.executed[instr] += 1;
        }
        self.state.status[first..first + 4].fill(Status::Ready);
        Ok(true)
    }

    /// A warp has ended: barriers of the whole block wait for it no more.
    fn retire(&mut self, index: usize) {
        self.state.status[index] = Status::Done;
        let live = self.state.live_warps();
        self.state.barriers.warp_ended(live, &mut self.state.clocks, &mut self.state.status);
    }
}
