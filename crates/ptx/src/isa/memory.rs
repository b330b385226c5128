//! Loads, stores, atomics, and what a thread knows of itself.

use super::types::Ty;
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

/// How an access is ordered, and what the caches are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Access {
    /// Ordinary.
    #[default]
    Plain,
    /// Read only for the life of the kernel, and not kept in the first-level cache.
    Streaming,
    /// Seen by all of the device, before every later access of this thread (`acquire.gpu`).
    Acquire,
    /// After every earlier access of this thread, seen by all of the device (`release.gpu`).
    Release,
}

/// Read-modify-write operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    Exchange,
    /// To `a + 1`, or to 0 where the old value is at least the operand.
    IncrementWrap,
}

/// Memory instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
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
        access: Access,
    },
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
        access: Access,
    },
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
    },
    /// `dst[0]` = a kernel parameter.
    Param {
        /// Index of the parameter.
        index: u32,
        /// Its type.
        ty: Ty,
    },
    /// `dst[0]` = the generic address of a parameter: of a tensor map.
    ParamAddress {
        /// Index of the parameter.
        index: u32,
    },
    /// `dst[0]` = the address of a shared array.
    SharedAddress {
        /// Index of the array.
        array: u32,
        /// Its offset in the block's shared memory.
        offset: u32,
    },
    /// `dst[0]` = what a thread knows of itself.
    Special(Special),
}

/// Special registers, 32 bits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Special {
    TidX,
    TidY,
    TidZ,
    CtaIdX,
    CtaIdY,
    CtaIdZ,
    NumCtaX,
    NumCtaY,
    NumCtaZ,
    LaneId,
}

impl Special {
    const fn ptx(self) -> &'static str {
        match self {
            Special::TidX => "%tid.x",
            Special::TidY => "%tid.y",
            Special::TidZ => "%tid.z",
            Special::CtaIdX => "%ctaid.x",
            Special::CtaIdY => "%ctaid.y",
            Special::CtaIdZ => "%ctaid.z",
            Special::NumCtaX => "%nctaid.x",
            Special::NumCtaY => "%nctaid.y",
            Special::NumCtaZ => "%nctaid.z",
            Special::LaneId => "%laneid",
        }
    }
}

/// Name of the array that all shared memory lies in.
pub(crate) const SHARED_SYMBOL: &str = "shared_memory";

pub(super) fn address(base: &str, offset: i32) -> String {
    match offset {
        0 => format!("[{base}]"),
        offset => format!("[{base}{offset:+}]"),
    }
}

fn vector(registers: &[String]) -> String {
    match registers {
        [one] => one.clone(),
        many => format!("{{{}}}", many.join(", ")),
    }
}

impl Memory {
    pub(super) fn text(self, d: &[String], s: &[String], param: impl Fn(u32) -> String) -> String {
        let width = |count: u8| match count {
            1 => String::new(),
            n => format!(".v{n}"),
        };
        match self {
            Memory::Load { space, word, count, offset, access } => {
                let how = match access {
                    Access::Plain => space.ptx().to_owned(),
                    Access::Streaming => format!("{}.nc.L1::no_allocate", space.ptx()),
                    Access::Acquire => format!(".acquire.gpu{}", space.ptx()),
                    // A load has nothing to release, nor a store to acquire: the nearest that exists.
                    Access::Release => format!(".relaxed.gpu{}", space.ptx()),
                };
                let (count, word) = (width(count), word.ptx());
                format!("ld{how}{count}{word} {}, {}", vector(d), address(&s[0], offset))
            }
            Memory::Store { space, word, count, offset, access } => {
                let how = match access {
                    Access::Plain => space.ptx().to_owned(),
                    Access::Streaming => format!("{}.cs", space.ptx()),
                    Access::Release => format!(".release.gpu{}", space.ptx()),
                    Access::Acquire => format!(".relaxed.gpu{}", space.ptx()),
                };
                let (count, word) = (width(count), word.ptx());
                format!("st{how}{count}{word} {}, {}", address(&s[0], offset), vector(&s[1..]))
            }
            Memory::Atomic { space, op, ty, offset } => {
                let op = match op {
                    AtomicOp::Add => "add",
                    AtomicOp::Min => "min",
                    AtomicOp::Max => "max",
                    AtomicOp::Exchange => "exch",
                    AtomicOp::IncrementWrap => "inc",
                };
                let scope = match space {
                    Space::Global => ".acq_rel.gpu",
                    Space::Shared => "",
                };
                let (space, ty) = (space.ptx(), ty.ptx());
                format!("atom{scope}{space}.{op}{ty} {}, {}, {}", d[0], address(&s[0], offset), s[1])
            }
            Memory::Param { index, ty } => format!("ld.param{} {}, [{}]", ty.ptx(), d[0], param(index)),
            Memory::ParamAddress { index } => {
                format!("mov.b64 {0}, {1}; cvta.param.u64 {0}, {0}", d[0], param(index))
            }
            Memory::SharedAddress { offset, .. } => match offset {
                0 => format!("mov.b32 {}, {SHARED_SYMBOL}", d[0]),
                offset => format!("mov.b32 {}, {SHARED_SYMBOL}+{offset}", d[0]),
            },
            Memory::Special(special) => format!("mov.b32 {}, {}", d[0], special.ptx()),
        }
    }

    pub(super) fn needs(self) -> Needs {
        match self {
            Memory::Load { access: Access::Streaming, .. } => Needs::since(Target::SM_75, 7, 4),
            _ => Needs::since(Target::SM_75, 6, 3),
        }
    }
}
