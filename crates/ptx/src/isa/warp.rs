//! Instructions that the lanes of a warp execute together.

use super::memory::address;
use super::types::Ty;
use crate::target::{Needs, Target};

/// Which lane a shuffle reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shuffle {
    /// `lane ^ b`.
    Xor,
    /// Lane `b`.
    Index,
    /// `lane - b`; the lane itself below 0.
    Up,
    /// `lane + b`; the lane itself above 31.
    Down,
}

impl Shuffle {
    /// The lane that `lane` reads.
    pub const fn source(self, lane: u32, b: u32) -> u32 {
        let from = match self {
            Shuffle::Xor => lane ^ b,
            Shuffle::Index => b & 31,
            Shuffle::Up => lane.wrapping_sub(b),
            Shuffle::Down => lane.wrapping_add(b),
        };
        if from < 32 { from } else { lane }
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

/// Reductions of integers over the warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Redux {
    Add,
    Min,
    Max,
}

/// Warp instructions: all 32 lanes must execute them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Warp {
    /// `dst[0] = src[0]` of another lane, picked by `src[1]`.
    Shuffle(Shuffle),
    /// `dst[0]` = votes on `src[0]`.
    Vote(Vote),
    /// `dst[0]` = all lanes' `src[0]` together.
    Redux(Redux, Ty),
    /// `dst[0]` = whether this is the one elected lane (the lowest).
    Elect,
    /// Waits for the other lanes of the warp; orders their accesses to memory.
    Sync,
    /// Loads `count` 8×8 matrices of 16-bit elements, whose rows' shared addresses are `src[0] + offset` of lanes
    /// `8i..8i + 8` for matrix `i`. Lane `l` receives in `dst[i]` elements `2(l mod 4)` and the next of row `l / 4`;
    /// transposed, row and element change places.
    LoadMatrix {
        /// 1, 2 or 4.
        count: u8,
        /// Whether each matrix is transposed.
        transposed: bool,
        /// Bytes added to the address.
        offset: i32,
    },
    /// Stores what [`Warp::LoadMatrix`] loads: `src[0]` is the address, the registers follow.
    StoreMatrix {
        /// 1, 2 or 4.
        count: u8,
        /// Whether each matrix is transposed.
        transposed: bool,
        /// Bytes added to the address.
        offset: i32,
    },
}

impl Warp {
    pub(super) fn text(self, d: &[String], s: &[String]) -> String {
        const ALL: &str = "0xffffffff";
        let matrices = |count: u8, transposed: bool| {
            let transposed = if transposed { ".trans" } else { "" };
            format!("matrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16")
        };
        match self {
            Warp::Shuffle(mode) => {
                let (mode, clamp) = match mode {
                    Shuffle::Xor => ("bfly", "0x1f"),
                    Shuffle::Index => ("idx", "0x1f"),
                    Shuffle::Up => ("up", "0x0"),
                    Shuffle::Down => ("down", "0x1f"),
                };
                format!("shfl.sync.{mode}.b32 {}, {}, {}, {clamp}, {ALL}", d[0], s[0], s[1])
            }
            Warp::Vote(vote) => {
                let vote = match vote {
                    Vote::All => "all.pred",
                    Vote::Any => "any.pred",
                    Vote::Ballot => "ballot.b32",
                };
                format!("vote.sync.{vote} {}, {}, {ALL}", d[0], s[0])
            }
            Warp::Redux(op, ty) => {
                let op = match op {
                    Redux::Add => "add",
                    Redux::Min => "min",
                    Redux::Max => "max",
                };
                format!("redux.sync.{op}{} {}, {}, {ALL}", ty.ptx(), d[0], s[0])
            }
            Warp::Elect => format!("elect.sync _|{}, {ALL}", d[0]),
            Warp::Sync => format!("bar.warp.sync {ALL}"),
            Warp::LoadMatrix { count, transposed, offset } => {
                let to = d.join(", ");
                format!("ld{} {{{to}}}, {}", matrices(count, transposed), address(&s[0], offset))
            }
            Warp::StoreMatrix { count, transposed, offset } => {
                let from = s[1..].join(", ");
                format!("st{} {}, {{{from}}}", matrices(count, transposed), address(&s[0], offset))
            }
        }
    }

    pub(super) fn needs(self) -> Needs {
        match self {
            Warp::Redux(..) => Needs::since(Target::SM_80, 7, 0),
            Warp::Elect => Needs::since(Target::SM_90, 8, 0),
            Warp::LoadMatrix { .. } => Needs::since(Target::SM_75, 6, 5),
            Warp::StoreMatrix { .. } => Needs::since(Target::SM_90, 7, 8),
            _ => Needs::since(Target::SM_75, 6, 3),
        }
    }
}
