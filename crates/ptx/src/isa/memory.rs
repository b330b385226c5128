//! Loads, stores, atomics, and what a thread knows of itself.

use super::row::instructions;
use super::types::{Ty, Width};
use crate::target::{Needs, Target};

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Device memory: 64-bit addresses.
    Global,
    /// The block's shared memory: 32-bit addresses.
    Shared,
}

impl Space {
    pub(super) const fn ptx(self) -> &'static str {
        match self {
            Space::Global => ".global",
            Space::Shared => ".shared",
        }
    }

    /// Width of an address.
    const fn address(self) -> Width {
        match self {
            Space::Global => Width::B64,
            Space::Shared => Width::B32,
        }
    }
}

/// What one access moves to or from one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Word {
    /// A byte, extended with zeros to 32 bits.
    U8,
    /// A byte, extended with its sign to 32 bits.
    S8,
    /// Two bytes, extended with zeros to 32 bits.
    U16,
    B16,
    B32,
    B64,
}

impl Word {
    /// Size in memory.
    pub const fn bytes(self) -> u32 {
        match self {
            Word::U8 | Word::S8 => 1,
            Word::U16 | Word::B16 => 2,
            Word::B32 => 4,
            Word::B64 => 8,
        }
    }

    /// Width of its register.
    const fn width(self) -> Width {
        match self {
            Word::U8 | Word::S8 | Word::U16 | Word::B32 => Width::B32,
            Word::B16 => Width::B16,
            Word::B64 => Width::B64,
        }
    }

    /// Whether one access can move so many.
    const fn fits(self, count: u8) -> bool {
        matches!(count, 1 | 2 | 4) && self.bytes() * count as u32 <= 16
    }

    const fn ptx(self) -> &'static str {
        match self {
            Word::U8 => ".u8",
            Word::S8 => ".s8",
            Word::U16 => ".u16",
            Word::B16 => ".b16",
            Word::B32 => ".b32",
            Word::B64 => ".b64",
        }
    }
}

/// How a load is ordered, and what the caches are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LoadMode {
    /// Ordinary.
    #[default]
    Plain,
    /// Read only for the life of the kernel, and not kept in the first-level cache. Global memory only.
    Streaming,
    /// As all of the device sees it, before every later access of this thread (`acquire.gpu`). Global memory only.
    Acquire,
}

/// How a store is ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StoreMode {
    /// Ordinary.
    #[default]
    Plain,
    /// After every earlier access of this thread, seen by all of the device (`release.gpu`). Global memory only.
    Release,
}

/// Read-modify-write operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    Or,
}

impl AtomicOp {
    const fn ptx(self) -> &'static str {
        match self {
            AtomicOp::Add => "add",
            AtomicOp::Min => "min",
            AtomicOp::Max => "max",
            AtomicOp::Or => "or",
        }
    }

    const fn has(self, ty: Ty) -> bool {
        match self {
            AtomicOp::Add => matches!(ty, Ty::S32 | Ty::U32 | Ty::U64 | Ty::F32),
            AtomicOp::Min | AtomicOp::Max => ty.is_integer(),
            AtomicOp::Or => matches!(ty, Ty::U32),
        }
    }
}

instructions! {
    /// Memory instructions.
    Memory {
        /// `dst[0..count] = [src[0] + offset]`.
        Load {
            /// State space.
            space: Space,
            /// Each register's part.
            word: Word,
            /// Registers: 1, 2 or 4, at most 16 bytes together.
            count: u8,
            /// Bytes added to the address.
            offset: i32,
            /// Ordering.
            mode: LoadMode,
        }: [word.width().times(count.into())] <- [space.address()]
            if word.fits(count) && (space == Space::Global || mode == LoadMode::Plain),
            if mode == LoadMode::Streaming { Needs::since(Target::SM_75, 7, 4) } else { Needs::BASE },
            {
                let (order, cache) = match mode {
                    LoadMode::Plain => ("", ""),
                    LoadMode::Streaming => ("", ".nc.L1::no_allocate"),
                    LoadMode::Acquire => (".acquire.gpu", ""),
                };
                let (vector, registers) = vector(count, "$d");
                let (space, word) = (space.ptx(), word.ptx());
                format!("ld{order}{space}{cache}{vector}{word} {registers}, {}", address(offset))
            };
        /// `[src[0] + offset] = src[1..=count]`.
        Store {
            /// State space.
            space: Space,
            /// Each register's part.
            word: Word,
            /// Registers: 1, 2 or 4, at most 16 bytes together.
            count: u8,
            /// Bytes added to the address.
            offset: i32,
            /// Ordering.
            mode: StoreMode,
        }: [] <- [space.address(), word.width().times(count.into())]
            if word.fits(count) && (space == Space::Global || mode == StoreMode::Plain), Needs::BASE,
            {
                let order = if mode == StoreMode::Release { ".release.gpu" } else { "" };
                let (vector, registers) = vector(count, "$1");
                format!("st{order}{}{vector}{} {}, {registers}", space.ptx(), word.ptx(), address(offset))
            };
        /// `dst[0] = [src[0] + offset]`, which becomes `op` of it and `src[1]`; acquires and releases.
        Atomic {
            /// State space.
            space: Space,
            /// Operation.
            op: AtomicOp,
            /// Operands' type.
            ty: Ty,
            /// Bytes added to the address.
            offset: i32,
        }: [ty] <- [space.address(), ty.width()] if op.has(ty), Needs::BASE,
            {
                let scope = if space == Space::Global { ".acq_rel.gpu" } else { "" };
                // Operations on bits have no signs.
                let ty = if op == AtomicOp::Or { Ty::B32 } else { ty };
                format!("atom{scope}{}.{}{} $d, {}, $1", space.ptx(), op.ptx(), ty.ptx(), address(offset))
            };
        /// `dst[0]` = a kernel parameter.
        Param {
            /// Index of the parameter.
            index: u32,
            /// Its type.
            ty: Ty,
        }: [ty] <- [], Needs::BASE, format!("ld.param{} $d, [$p]", ty.ptx());
        /// `dst[0]` = the generic address of a parameter: of a tensor map.
        ParamAddress {
            /// Index of the parameter.
            index: u32,
        }: [Width::B64] <- [], Needs::BASE, "mov.b64 $d, $p; cvta.param.u64 $d, $d";
        /// `dst[0]` = the address of a shared array.
        SharedAddress {
            /// Index of the array.
            array: u32,
            /// Its offset in the block's shared memory.
            offset: u32,
        }: [Width::B32] <- [], Needs::BASE,
            match offset {
                0 => format!("mov.b32 $d, {SHARED_SYMBOL}"),
                offset => format!("mov.b32 $d, {SHARED_SYMBOL}+{offset}"),
            };
        /// `dst[0]` = what a thread knows of itself.
        Special(special: Special): [Width::B32] <- [], Needs::BASE, format!("mov.b32 $d, {}", special.ptx());
    }
}

/// Special registers, 32 bits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Special {
    TidX,
    CtaIdX,
    CtaIdY,
    CtaIdZ,
    NumCtaX,
    NumCtaY,
    NumCtaZ,
}

impl Special {
    const fn ptx(self) -> &'static str {
        match self {
            Special::TidX => "%tid.x",
            Special::CtaIdX => "%ctaid.x",
            Special::CtaIdY => "%ctaid.y",
            Special::CtaIdZ => "%ctaid.z",
            Special::NumCtaX => "%nctaid.x",
            Special::NumCtaY => "%nctaid.y",
            Special::NumCtaZ => "%nctaid.z",
        }
    }
}

/// Name of the array that all shared memory lies in.
pub(crate) const SHARED_SYMBOL: &str = "shared_memory";

/// `[a]` or `[a+8]` of the address in the first group of operands.
pub(super) fn address(offset: i32) -> String {
    match offset {
        0 => "[$0]".to_owned(),
        offset => format!("[$0{offset:+}]"),
    }
}

/// What PTX writes of a vector of `count`: behind the space, and for its registers.
fn vector(count: u8, registers: &str) -> (String, String) {
    match count {
        1 => (String::new(), registers.to_owned()),
        count => (format!(".v{count}"), format!("{{{registers}}}")),
    }
}
