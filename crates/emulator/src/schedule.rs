//! Many blocks on several workers, and when to stop.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use crate::block::{Block, Turn};
use crate::fault::{Fault, FaultKind};
use crate::machine::Launch;
use crate::stats::Stats;

/// What the workers share.
#[derive(Debug, Default)]
struct Board {
    /// The next block to start.
    next: u64,
    /// Blocks that have started and not ended.
    resident: u64,
    /// Changes of global memory, and blocks ended: what those wait for who are stalled.
    changes: u64,
    /// Workers all of whose blocks were stalled after the latest change.
    stalled: BTreeSet<usize>,
    /// Workers that have left.
    left: usize,
    deadlock: bool,
    faults: Vec<(u64, Fault)>,
}

/// Runs all blocks; the counts, and the faults by block.
pub(crate) fn run(cx: &Launch<'_>) -> (Stats, Vec<Fault>) {
    let blocks: u64 = cx.grid.iter().map(|&n| u64::from(n)).product();
    let wanted = if cx.options.workers == 0 {
        thread::available_parallelism().map_or(1, usize::from)
    } else {
        cx.options.workers
    };
    let workers = wanted.min(usize::try_from(blocks).unwrap_or(wanted)).max(1);
    let shared = Shared { cx, blocks, workers, board: Mutex::default(), news: Condvar::new() };
    let mut total = Stats::new(cx.code.instrs.len());
    if workers == 1 {
        total.merge(&shared.work(0));
    } else {
        thread::scope(|scope| {
            let handles: Vec<_> = (0..workers)
                .map(|worker| {
                    scope.spawn({
                        let shared = &shared;
                        move || shared.work(worker)
                    })
                })
                .collect();
            for stats in handles.into_iter().filter_map(|handle| handle.join().ok()) {
                total.merge(&stats);
            }
        });
    }
    let mut faults = shared.board.into_inner().unwrap_or_else(PoisonError::into_inner).faults;
    faults.sort_by_key(|(block, _)| *block);
    faults.truncate(cx.options.max_faults.max(1));
    (total, faults.into_iter().map(|(_, fault)| fault).collect())
}

impl Board {
    fn faults_but_deadlocks(&self) -> Vec<&Fault> {
        let faults = self.faults.iter().map(|(_, fault)| fault);
        faults.filter(|fault| fault.kind != FaultKind::Deadlock).collect()
    }
}

struct Shared<'l, 'a> {
    cx: &'l Launch<'a>,
    blocks: u64,
    workers: usize,
    board: Mutex<Board>,
    news: Condvar,
}

/// What a worker does next.
enum Next {
    /// Go round its blocks again.
    Again,
    Start(u64),
    Leave,
    Deadlock,
}

impl Shared<'_, '_> {
    fn board(&self) -> std::sync::MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds blocks and lets them take turns. A further block is started only when all that are held are stalled, so
    /// that few are in memory at once.
    fn work(&self, worker: usize) -> Stats {
        let mut stats = Stats::new(self.cx.code.instrs.len());
        let mut blocks: Vec<Block> = Vec::new();
        let mut known = 0;
        loop {
            let mut ran = false;
            let mut i = 0;
            while i < blocks.len() {
                if self.unwanted(blocks[i].linear) {
                    blocks.swap_remove(i);
                    self.ended();
                    continue;
                }
                let before = stats.global_changes;
                let turn = blocks[i].run(self.cx, &mut stats);
                if stats.global_changes != before {
                    self.changed();
                }
                match turn {
                    Ok(Turn::Ran) => ran = true,
                    Ok(Turn::Stalled) => {}
                    Ok(Turn::Done) => {
                        ran = true;
                        blocks.remove(i);
                        self.ended();
                        continue;
                    }
                    Err(fault) => {
                        ran = true;
                        let block = blocks.remove(i);
                        self.board().faults.push((block.linear, *fault));
                        self.ended();
                        continue;
                    }
                }
                i += 1;
            }
            if ran && !blocks.is_empty() {
                continue;
            }
            match self.next(worker, &blocks, &mut known) {
                Next::Again => {}
                Next::Start(linear) => blocks.push(Block::new(self.cx, linear)),
                Next::Leave => return stats,
                Next::Deadlock => {
                    // Those who wait for a block that ended by a fault are not to blame.
                    let blameless = !self.board().faults_but_deadlocks().is_empty();
                    let first = blocks.iter().min_by_key(|block| block.linear);
                    if let Some(block) = first.filter(|_| !blameless) {
                        let why = "blocks wait for global memory that nobody will change";
                        let fault = block.deadlock(self.cx, why);
                        self.board().faults.push((block.linear, *fault));
                    }
                    let mut board = self.board();
                    board.left += 1;
                    self.news.notify_all();
                    return stats;
                }
            }
        }
    }

    /// Whether enough faults are known in blocks before this one.
    fn unwanted(&self, linear: u64) -> bool {
        let board = self.board();
        let earlier = board.faults.iter().filter(|(block, _)| *block < linear).count();
        earlier >= self.cx.options.max_faults.max(1)
    }

    fn changed(&self) {
        let mut board = self.board();
        board.changes += 1;
        board.stalled.clear();
        self.news.notify_all();
    }

    fn ended(&self) {
        let mut board = self.board();
        board.resident -= 1;
        board.changes += 1;
        board.stalled.clear();
        self.news.notify_all();
    }

    /// Called by a worker whose blocks have all ended or are stalled.
    fn next(&self, worker: usize, blocks: &[Block], known: &mut u64) -> Next {
        let mut board = self.board();
        loop {
            if board.deadlock {
                return Next::Deadlock;
            }
            let enough = board.faults.len() >= self.cx.options.max_faults.max(1);
            if board.changes != *known && !blocks.is_empty() {
                // Somebody changed something since the blocks were last run: they may go on.
                *known = board.changes;
                return Next::Again;
            }
            if board.next < self.blocks && !enough && board.resident < self.cx.options.resident_blocks.max(1)
            {
                board.next += 1;
                board.resident += 1;
                return Next::Start(board.next - 1);
            }
            if blocks.is_empty() && (board.next >= self.blocks || enough) {
                board.left += 1;
                // Those who are stalled may now be alone.
                self.news.notify_all();
                return Next::Leave;
            }
            board.stalled.insert(worker);
            if board.stalled.len() + board.left >= self.workers {
                board.deadlock = true;
                self.news.notify_all();
                return Next::Deadlock;
            }
            board = self.news.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
