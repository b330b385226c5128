//! Types that instructions name, and the widths of registers that hold them.

/// Width of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Width {
    /// A predicate.
    Pred,
    /// 16 bits.
    B16,
    /// 32 bits.
    B32,
    /// 64 bits.
    B64,
}

impl Width {
    /// Declaration in PTX.
    pub const fn ptx(self) -> &'static str {
        match self {
            Width::Pred => ".pred",
            Width::B16 => ".b16",
            Width::B32 => ".b32",
            Width::B64 => ".b64",
        }
    }

    /// Number of bits.
    pub const fn bits(self) -> u32 {
        match self {
            Width::Pred => 1,
            Width::B16 => 16,
            Width::B32 => 32,
            Width::B64 => 64,
        }
    }
}

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
        }
    }

    /// Width of the register that holds it.
    pub const fn width(self) -> Width {
        match self {
            Ty::Pred => Width::Pred,
            Ty::B16 | Ty::F16 | Ty::BF16 => Width::B16,
            Ty::B32 | Ty::S32 | Ty::U32 | Ty::F16x2 | Ty::BF16x2 | Ty::F32 => Width::B32,
            Ty::B64 | Ty::S64 | Ty::U64 => Width::B64,
        }
    }

    pub(crate) const fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2 | Ty::F32)
    }

    pub(super) const fn is_bfloat(self) -> bool {
        matches!(self, Ty::BF16 | Ty::BF16x2)
    }

    pub(super) const fn is_signed(self) -> bool {
        matches!(self, Ty::S32 | Ty::S64)
    }

    pub(super) const fn is_integer(self) -> bool {
        matches!(self, Ty::S32 | Ty::U32 | Ty::S64 | Ty::U64)
    }

    /// An integer of 32 bits.
    pub(super) const fn is_int32(self) -> bool {
        matches!(self, Ty::S32 | Ty::U32)
    }

    /// A type that arithmetic is done in.
    pub(super) const fn is_number(self) -> bool {
        self.is_integer() || self.is_float()
    }

    /// The integer of the same sign and twice the 32 bits.
    pub(super) const fn widened(self) -> Ty {
        if self.is_signed() { Ty::S64 } else { Ty::U64 }
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

    /// Whether products with it are exact in integers.
    pub const fn is_integer(self) -> bool {
        matches!(self, MmaTy::S8 | MmaTy::U8 | MmaTy::S4 | MmaTy::S32)
    }
}
