//! Barriers, fences, asynchronous copies, and the life of a thread.

use super::row::instructions;
use super::types::Width;
use crate::target::{Needs, Target};

instructions! {
    /// Synchronisation and asynchronous copies. Barriers, `mbarrier`s and copies address shared memory by 32 bits.
    Control {
        /// Waits at barrier `src[0]` (0–15) until `threads` threads, or all of the block, have arrived at it, and sees
        /// what they wrote to shared memory before.
        Barrier {
            /// Threads that take part, a multiple of 32; the block's where absent.
            threads: Option<u32>,
        }: [] <- [Width::B32], Needs::BASE,
            threads.map_or_else(|| "bar.sync $*".to_owned(), |threads| format!("bar.sync $*, {threads}"));
        /// Arrives at barrier `src[0]` without waiting.
        BarrierArrive {
            /// Threads that take part, a multiple of 32.
            threads: u32,
        }: [] <- [Width::B32], Needs::BASE, format!("bar.arrive $*, {threads}");
        /// Makes this thread's writes to shared memory visible to the copy engine and to `wgmma`.
        FenceAsyncProxy: [] <- [], HOPPER, "fence.proxy.async.shared::cta";
        /// Makes initialised `mbarrier`s visible to the copy engine and other blocks of the cluster.
        FenceMbarrierInit: [] <- [], HOPPER, "fence.mbarrier_init.release.cluster";
        /// Makes the `mbarrier` at `src[0]` one of `src[1]` arrivals a phase.
        MbarrierInit: [] <- [Width::B32, Width::B32], Needs::since(Target::SM_80, 7, 8),
            "mbarrier.init.shared::cta.b64 [$0], $1";
        /// Arrives once at `src[0]`.
        MbarrierArrive: [] <- [Width::B32], Needs::since(Target::SM_80, 7, 8),
            "mbarrier.arrive.shared::cta.b64 _, [$0]";
        /// Arrives once at `src[0]`, whose phase then also waits for `src[1]` bytes of copies.
        MbarrierArriveExpect: [] <- [Width::B32, Width::B32], HOPPER,
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1";
        /// `dst[0]` = whether the phase of parity `src[1]` of the `mbarrier` at `src[0]` is complete; may wait a while.
        MbarrierTryWait: [Width::Pred] <- [Width::B32, Width::B32], HOPPER,
            "mbarrier.try_wait.parity.shared::cta.b64 $d, [$0], $1";
        /// Starts copying `bytes` from global `src[1]` to shared `src[0]`; bytes from `src[2]` on are zeros instead.
        CopyAsync {
            /// 4, 8 or 16; both addresses are multiples.
            bytes: u8,
        }: [] <- [Width::B32, Width::B64, Width::B32] if matches!(bytes, 4 | 8 | 16), AMPERE,
            format!("cp.async.{}.shared.global [$0], [$1], {bytes}, $2", if bytes == 16 { "cg" } else { "ca" });
        /// Puts the copies that this thread started since the last commit into a group.
        CopyAsyncCommit: [] <- [], AMPERE, "cp.async.commit_group";
        /// Waits until at most this many of the thread's latest groups are in flight.
        CopyAsyncWait(pending: u32): [] <- [], AMPERE, format!("cp.async.wait_group {pending}");
        /// Starts copying the box at coordinates `src[3..]` of the tensor map at `src[1]` to shared `src[0]`, counting
        /// its bytes at the `mbarrier` at `src[2]`. Elements outside the tensor are zeros.
        BulkTensorLoad {
            /// 1 to 5.
            dims: u8,
            /// Whose shared memory the address is in.
            window: SharedWindow,
        }: [] <- [Width::B32, Width::B64, Width::B32, Width::B32.times(dims.into())] if matches!(dims, 1..=5),
            window.needs(),
            format!(
                "cp.async.bulk.tensor.{dims}d.{}.global.mbarrier::complete_tx::bytes [$0], [$1, {{$3}}], [$2]",
                window.ptx()
            );
        /// Starts copying `src[2]` bytes from global `src[1]` to shared `src[0]`, all multiples of 16, counting them at
        /// the `mbarrier` at `src[3]`.
        BulkLoad: [] <- [Width::B32, Width::B64, Width::B32, Width::B32], HOPPER,
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3]";
        /// Sets how many registers each thread of this warpgroup may use: to more, waiting until there are that many.
        RegistersIncrease(count: u32): [] <- [], Needs::since(Target::SM_90A, 8, 0),
            format!("setmaxnreg.inc.sync.aligned.u32 {count}");
        /// To fewer.
        RegistersDecrease(count: u32): [] <- [], Needs::since(Target::SM_90A, 8, 0),
            format!("setmaxnreg.dec.sync.aligned.u32 {count}");
        /// Sleeps about `src[0]` nanoseconds.
        Sleep: [] <- [Width::B32], Needs::BASE, "nanosleep.u32 $*";
        /// The thread ends.
        Exit: [] <- [], Needs::BASE, "exit";
    }
}

/// Whose shared memory a copy may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SharedWindow {
    /// The block's own. On GPUs without clusters anything else is compared with it first, and a function called where it
    /// differs, for which registers are spilled.
    Block,
    /// That of any block of the cluster.
    Cluster,
}

impl SharedWindow {
    const fn ptx(self) -> &'static str {
        match self {
            SharedWindow::Block => "shared::cta",
            SharedWindow::Cluster => "shared::cluster",
        }
    }

    const fn needs(self) -> Needs {
        match self {
            SharedWindow::Block => Needs::since(Target::SM_90, 8, 6),
            SharedWindow::Cluster => HOPPER,
        }
    }
}

const AMPERE: Needs = Needs::since(Target::SM_80, 7, 0);
const HOPPER: Needs = Needs::since(Target::SM_90, 8, 0);
