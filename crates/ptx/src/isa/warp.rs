//! Instructions that the lanes of a warp execute together.

use super::memory::address;
use super::row::instructions;
use super::types::{Ty, Width};
use crate::target::{Needs, Target};

/// Which lane a shuffle reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shuffle {
    /// `lane ^ b`.
    Xor,
    /// Lane `b`.
    Index,
}

impl Shuffle {
    const fn ptx(self) -> &'static str {
        match self {
            Shuffle::Xor => "bfly",
            Shuffle::Index => "idx",
        }
    }

    /// The lane that `lane` reads.
    pub const fn source(self, lane: u32, b: u32) -> u32 {
        match self {
            Shuffle::Xor => (lane ^ b) & 31,
            Shuffle::Index => b & 31,
        }
    }
}

/// Votes on a predicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vote {
    /// A predicate: true in every lane.
    All,
    /// A predicate: true in some lane.
    Any,
    /// 32 bits, one for each lane.
    Ballot,
}

impl Vote {
    const fn ptx(self) -> &'static str {
        match self {
            Vote::All => "all.pred",
            Vote::Any => "any.pred",
            Vote::Ballot => "ballot.b32",
        }
    }

    const fn result(self) -> Width {
        match self {
            Vote::All | Vote::Any => Width::Pred,
            Vote::Ballot => Width::B32,
        }
    }
}

/// Reductions of integers over the warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Redux {
    Add,
    Min,
    Max,
}

impl Redux {
    const fn ptx(self) -> &'static str {
        match self {
            Redux::Add => "add",
            Redux::Min => "min",
            Redux::Max => "max",
        }
    }
}

instructions! {
    /// Warp instructions: all 32 lanes must execute them together.
    Warp {
        /// `dst[0] = src[0]` of another lane, picked by `src[1]`.
        Shuffle(shuffle: Shuffle): [Width::B32] <- [Width::B32, Width::B32], Needs::BASE,
            format!("shfl.sync.{}.b32 $*, 0x1f, {ALL}", shuffle.ptx());
        /// `dst[0]` = votes on `src[0]`.
        Vote(vote: Vote): [vote.result()] <- [Width::Pred.times(1).registers_only()], Needs::BASE,
            format!("vote.sync.{} $*, {ALL}", vote.ptx());
        /// `dst[0]` = all lanes' `src[0]` together.
        Redux(redux: Redux, ty: Ty): [ty] <- [ty] if ty.is_int32(), Needs::since(Target::SM_80, 7, 0),
            format!("redux.sync.{}{} $*, {ALL}", redux.ptx(), ty.ptx());
        /// Waits for the other lanes of the warp; orders their accesses to memory.
        Sync: [] <- [], Needs::BASE, format!("bar.warp.sync {ALL}");
        /// Loads `count` 8×8 matrices of 16-bit elements, whose rows' shared addresses are `src[0] + offset` of lanes
        /// `8i..8i + 8` for matrix `i`. Lane `l` receives in `dst[i]` elements `2(l mod 4)` and the next of row
        /// `l / 4`; transposed, row and element change places.
        LoadMatrix {
            /// 1, 2 or 4.
            count: u8,
            /// Whether each matrix is transposed.
            transposed: bool,
            /// Bytes added to the address.
            offset: i32,
        }: [Width::B32.times(count.into())] <- [Width::B32] if matches!(count, 1 | 2 | 4),
            Needs::since(Target::SM_75, 6, 5),
            {
                let transposed = if transposed { ".trans" } else { "" };
                format!("ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{$d}}, {}", address(offset))
            };
    }
}

/// All lanes.
const ALL: &str = "0xffffffff";
