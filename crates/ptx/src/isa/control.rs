//! Barriers, fences, asynchronous copies, and the life of a thread.

use crate::target::{Needs, Target};

/// Synchronisation and asynchronous copies. Barriers, `mbarrier`s and copies address shared memory by 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Control {
    /// Waits at barrier `src[0]` (0–15) until `threads` threads, or all of the block, have arrived at it, and sees
    /// what they wrote to shared memory before.
    Barrier {
        /// Threads that take part, a multiple of 32; the block's where absent.
        threads: Option<u32>,
    },
    /// Arrives at barrier `src[0]` without waiting.
    BarrierArrive {
        /// Threads that take part, a multiple of 32.
        threads: u32,
    },
    /// Orders this thread's accesses to global memory for the whole device.
    FenceDevice,
    /// Makes this thread's writes to shared memory visible to the copy engine and to `wgmma`.
    FenceAsyncProxy,
    /// Makes initialised `mbarrier`s visible to the copy engine and other blocks of the cluster.
    FenceMbarrierInit,
    /// Makes the `mbarrier` at `src[0]` one of `src[1]` arrivals a phase.
    MbarrierInit,
    /// Arrives once at `src[0]`.
    MbarrierArrive,
    /// Arrives once at `src[0]`, whose phase then also waits for `src[1]` bytes of copies.
    MbarrierArriveExpect,
    /// `dst[0]` = whether the phase of parity `src[1]` of the `mbarrier` at `src[0]` is complete; may wait a while.
    MbarrierTryWait,
    /// Starts copying `bytes` from global `src[1]` to shared `src[0]`; bytes from `src[2]` on are zeros instead.
    CopyAsync {
        /// 4, 8 or 16; both addresses are multiples.
        bytes: u8,
    },
    /// Puts the copies that this thread started since the last commit into a group.
    CopyAsyncCommit,
    /// Waits until at most this many of the thread's latest groups are in flight.
    CopyAsyncWait(u32),
    /// Starts copying the box at coordinates `src[3..]` of the tensor map at `src[1]` to shared `src[0]`, counting its
    /// bytes at the `mbarrier` at `src[2]`. Elements outside the tensor are zeros.
    BulkTensorLoad {
        /// 1 to 5.
        dims: u8,
    },
    /// Starts copying shared `src[1]` to the box at coordinates `src[2..]` of the tensor map at `src[0]`. Elements
    /// outside the tensor are dropped.
    BulkTensorStore {
        /// 1 to 5.
        dims: u8,
    },
    /// Puts the bulk stores that this thread started into a group.
    BulkCommit,
    /// Waits until at most this many of the thread's latest bulk groups have not read their source.
    BulkWaitRead(u32),
    /// Sets how many registers each thread of this warpgroup may use: to more, waiting until there are that many.
    RegistersIncrease(u32),
    /// To fewer.
    RegistersDecrease(u32),
    /// Sleeps about `src[0]` nanoseconds.
    Sleep,
    /// The thread ends.
    Exit,
    /// The kernel fails.
    Trap,
}

impl Control {
    pub(super) fn text(self, d: &[String], s: &[String]) -> String {
        let coordinates = |s: &[String]| format!("{{{}}}", s.join(", "));
        match self {
            Control::Barrier { threads: None } => format!("bar.sync {}", s[0]),
            Control::Barrier { threads: Some(threads) } => format!("bar.sync {}, {threads}", s[0]),
            Control::BarrierArrive { threads } => format!("bar.arrive {}, {threads}", s[0]),
            Control::FenceDevice => "fence.acq_rel.gpu".into(),
            Control::FenceAsyncProxy => "fence.proxy.async.shared::cta".into(),
            Control::FenceMbarrierInit => "fence.mbarrier_init.release.cluster".into(),
            Control::MbarrierInit => format!("mbarrier.init.shared::cta.b64 [{}], {}", s[0], s[1]),
            Control::MbarrierArrive => format!("mbarrier.arrive.shared::cta.b64 _, [{}]", s[0]),
            Control::MbarrierArriveExpect => {
                format!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {}", s[0], s[1])
            }
            Control::MbarrierTryWait => {
                format!("mbarrier.try_wait.parity.shared::cta.b64 {}, [{}], {}", d[0], s[0], s[1])
            }
            Control::CopyAsync { bytes } => {
                let cache = if bytes == 16 { "cg" } else { "ca" };
                format!("cp.async.{cache}.shared.global [{}], [{}], {bytes}, {}", s[0], s[1], s[2])
            }
            Control::CopyAsyncCommit => "cp.async.commit_group".into(),
            Control::CopyAsyncWait(pending) => format!("cp.async.wait_group {pending}"),
            Control::BulkTensorLoad { dims } => format!(
                "cp.async.bulk.tensor.{dims}d.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}, {}], [{}]",
                s[0],
                s[1],
                coordinates(&s[3..]),
                s[2]
            ),
            Control::BulkTensorStore { dims } => format!(
                "cp.async.bulk.tensor.{dims}d.global.shared::cta.bulk_group [{}, {}], [{}]",
                s[0],
                coordinates(&s[2..]),
                s[1]
            ),
            Control::BulkCommit => "cp.async.bulk.commit_group".into(),
            Control::BulkWaitRead(pending) => format!("cp.async.bulk.wait_group.read {pending}"),
            Control::RegistersIncrease(count) => format!("setmaxnreg.inc.sync.aligned.u32 {count}"),
            Control::RegistersDecrease(count) => format!("setmaxnreg.dec.sync.aligned.u32 {count}"),
            Control::Sleep => format!("nanosleep.u32 {}", s[0]),
            Control::Exit => "exit".into(),
            Control::Trap => "trap".into(),
        }
    }

    pub(super) fn needs(self) -> Needs {
        use Control::*;
        match self {
            CopyAsync { .. } | CopyAsyncCommit | CopyAsyncWait(_) => Needs::since(Target::SM_80, 7, 0),
            MbarrierInit | MbarrierArrive => Needs::since(Target::SM_80, 7, 8),
            MbarrierTryWait | FenceMbarrierInit => Needs::since(Target::SM_90, 8, 0),
            MbarrierArriveExpect
            | FenceAsyncProxy
            | BulkTensorLoad { .. }
            | BulkTensorStore { .. }
            | BulkCommit
            | BulkWaitRead(_) => Needs::since(Target::SM_90, 8, 0),
            RegistersIncrease(_) | RegistersDecrease(_) => Needs::since(Target::SM_90A, 8, 0),
            _ => Needs::since(Target::SM_75, 6, 3),
        }
    }
}
