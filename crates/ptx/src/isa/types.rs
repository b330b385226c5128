//! Types that instructions name.

use crate::program::Width;

/// Type of an instruction's operands, as PTX writes it after the instruction's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Ty {
    Pred,
    B16,
    B32,
    B64,
    S32,
    U32,
    S64,
    U64,
    F16,
    BF16,
    F16x2,
    BF16x2,
    F32,
    F64,
}

impl Ty {
    /// With its dot.
    pub const fn ptx(self) -> &'static str {
        match self {
            Ty::Pred => ".pred",
            Ty::B16 => ".b16",
            Ty::B32 => ".b32",
            Ty::B64 => ".b64",
            Ty::S32 => ".s32",
            Ty::U32 => ".u32",
            Ty::S64 => ".s64",
            Ty::U64 => ".u64",
            Ty::F16 => ".f16",
            Ty::BF16 => ".bf16",
            Ty::F16x2 => ".f16x2",
            Ty::BF16x2 => ".bf16x2",
            Ty::F32 => ".f32",
            Ty::F64 => ".f64",
        }
    }

    /// Width of the register that holds it.
    pub const fn width(self) -> Width {
        match self {
            Ty::Pred => Width::Pred,
            Ty::B16 | Ty::F16 | Ty::BF16 => Width::B16,
            Ty::B32 | Ty::S32 | Ty::U32 | Ty::F16x2 | Ty::BF16x2 | Ty::F32 => Width::B32,
            Ty::B64 | Ty::S64 | Ty::U64 | Ty::F64 => Width::B64,
        }
    }

    pub(crate) const fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2 | Ty::F32 | Ty::F64)
    }
}

/// Element type of a tensor-core operand or accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum MmaTy {
    F16,
    BF16,
    S8,
    U8,
    S4,
    E4M3,
    E5M2,
    E2M1,
    F32,
    S32,
}

impl MmaTy {
    /// With its dot.
    pub const fn ptx(self) -> &'static str {
        match self {
            MmaTy::F16 => ".f16",
            MmaTy::BF16 => ".bf16",
            MmaTy::S8 => ".s8",
            MmaTy::U8 => ".u8",
            MmaTy::S4 => ".s4",
            MmaTy::E4M3 => ".e4m3",
            MmaTy::E5M2 => ".e5m2",
            MmaTy::E2M1 => ".e2m1",
            MmaTy::F32 => ".f32",
            MmaTy::S32 => ".s32",
        }
    }

    /// Bits of an element.
    pub const fn bits(self) -> usize {
        match self {
            MmaTy::S4 | MmaTy::E2M1 => 4,
            MmaTy::S8 | MmaTy::U8 | MmaTy::E4M3 | MmaTy::E5M2 => 8,
            MmaTy::F16 | MmaTy::BF16 => 16,
            MmaTy::F32 | MmaTy::S32 => 32,
        }
    }
}
