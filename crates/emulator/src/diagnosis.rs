//! From what went wrong to a fault that names its place.

use crate::decode::Step;
use crate::fault::{Fault, FaultKind, Trouble};
use crate::machine::{Launch, State, Status, Warp};

/// The fault of a warp.
pub(crate) fn fault(cx: &Launch<'_>, state: &State, warp: &Warp, trouble: Trouble) -> Box<Fault> {
    let (at, instruction) = match (trouble.statement, cx.code.instrs.get(warp.instr as usize)) {
        (Some(at), _) => (Some(at), "a condition or loop".to_owned()),
        (None, Some(instr)) => (Some(instr.at), cx.code.text(warp.instr)),
        (None, None) => (None, String::new()),
    };
    Box::new(Fault {
        kind: trouble.kind,
        block: state.index,
        warp: warp.index,
        lanes: if trouble.lanes == 0 { warp.active } else { trouble.lanes },
        at,
        instruction,
        object: trouble.object.filter(|name| !name.is_empty()),
        other: trouble.other.and_then(|instr| cx.code.instrs.get(instr as usize)).map(|instr| instr.at),
        detail: trouble.detail,
    })
}

/// Everything waits: says where each warp stands.
pub(crate) fn deadlock(cx: &Launch<'_>, state: &State, warps: &[Warp], why: &str) -> Box<Fault> {
    let mut detail = why.to_owned();
    let mut first = None;
    let mut kind = FaultKind::Deadlock;
    for (warp, status) in warps.iter().zip(&state.status) {
        let what = match status {
            Status::Done => continue,
            Status::Ready | Status::Polling => "polls global memory".to_owned(),
            Status::Barrier(id) => state.barriers.describe(*id, state.live_warps()),
            Status::Mbarrier { address, parity } => {
                let (place, _) = cx.layout.place(*address);
                state.mbarriers.describe(*address, *parity, &place)
            }
            Status::Wgmma => "waits at a wgmma for the other warps of its group".to_owned(),
            Status::Registers => {
                kind = FaultKind::RegisterBudget;
                let sum: u32 = state.register_limits.iter().map(|limit| 32 * limit).sum();
                let pool = state.register_pool;
                format!("waits at setmaxnreg for registers; the block's warps hold {sum} of its {pool}")
            }
        };
        first = first.or(Some(warp));
        let at =
            cx.code.instrs.get(warp.instr as usize).map(|instr| instr.at.to_string()).unwrap_or_default();
        detail += &format!("\n      warp {} {what}, at {at}", warp.index);
    }
    let (at, instruction) = match first {
        Some(warp) => {
            (cx.code.instrs.get(warp.instr as usize).map(|instr| instr.at), cx.code.text(warp.instr))
        }
        None => (None, String::new()),
    };
    Box::new(Fault {
        kind,
        block: state.index,
        warp: first.map_or(0, |warp| warp.index),
        lanes: first.map_or(0, |warp| warp.active),
        at,
        instruction,
        object: None,
        other: None,
        detail,
    })
}

/// Lanes that are missing at an instruction, and why.
#[cold]
pub(crate) fn diverges(warp: &Warp, what: &str, wanted: u32) -> Box<Trouble> {
    let missing = wanted & !warp.active;
    let exited = if missing & !warp.live != 0 { ", of which some have exited or never were" } else { "" };
    let branches: Vec<String> = warp.branches().map(|at| at.to_string()).collect();
    let inside = match branches.as_slice() {
        [] => String::new(),
        branches => format!("; inside the branches and loops at {}", branches.join(", ")),
    };
    let detail = format!("{what} without lanes {missing:#010x}{exited}{inside}");
    Trouble::new(FaultKind::Divergent, detail).lanes(warp.active)
}

#[cold]
pub(crate) fn runaway(warp: &Warp, step: Step, limit: u64) -> Box<Trouble> {
    let loops: Vec<String> = warp.loops().map(|at| at.to_string()).collect();
    let place = match loops.as_slice() {
        [] => "outside of loops".to_owned(),
        loops => format!("in the loops at {}", loops.join(", ")),
    };
    let detail = format!("warp {} took more than {limit} steps, {place}", warp.index);
    let trouble = Trouble::new(FaultKind::Runaway, detail);
    match warp.loops().last() {
        Some(at) => trouble.statement(at),
        None => at_statement(trouble, step),
    }
}

/// A fault in a condition belongs to the statement, not to the instruction before it.
#[cold]
pub(crate) fn at_statement(trouble: Box<Trouble>, step: Step) -> Box<Trouble> {
    match step {
        Step::If { at, .. } | Step::Test { at, .. } => trouble.statement(at),
        _ => trouble,
    }
}
