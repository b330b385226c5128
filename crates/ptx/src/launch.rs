//! What a launch passes to a kernel.

use crate::isa::Ty;

/// Type of a kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamType {
    /// Address in global memory, 8 bytes.
    Pointer,
    /// Unsigned, 4 bytes.
    U32,
    /// Signed, 4 bytes.
    I32,
    /// Signed, 8 bytes: strides and offsets.
    I64,
    /// Single precision.
    F32,
    /// A `CUtensorMap`: 128 bytes, 64-byte aligned, passed by value.
    TensorMap,
}

impl ParamType {
    /// Size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            ParamType::U32 | ParamType::I32 | ParamType::F32 => 4,
            ParamType::Pointer | ParamType::I64 => 8,
            ParamType::TensorMap => 128,
        }
    }

    /// Type of the value that a kernel reads; a tensor map is not read but named.
    pub const fn ty(self) -> Option<Ty> {
        match self {
            ParamType::Pointer => Some(Ty::U64),
            ParamType::U32 => Some(Ty::U32),
            ParamType::I32 => Some(Ty::S32),
            ParamType::I64 => Some(Ty::S64),
            ParamType::F32 => Some(Ty::F32),
            ParamType::TensorMap => None,
        }
    }

    /// The declaration's type in PTX.
    pub const fn ptx(self) -> &'static str {
        match self.ty() {
            Some(ty) => ty.ptx(),
            None => ".align 64 .b8",
        }
    }
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Name in the kernel's source.
    pub name: String,
    /// Type.
    pub ty: ParamType,
}

/// A value for a kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// For [`ParamType::Pointer`].
    Pointer(u64),
    /// For [`ParamType::U32`].
    U32(u32),
    /// For [`ParamType::I32`].
    I32(i32),
    /// For [`ParamType::I64`].
    I64(i64),
    /// For [`ParamType::F32`].
    F32(f32),
    /// For [`ParamType::TensorMap`].
    TensorMap(TensorMapBytes),
}

/// The 128 bytes of a `CUtensorMap`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub struct TensorMapBytes(pub [u64; 16]);

/// A tensor and the box of it that a bulk copy moves, before whoever launches makes its tensor map. Dimensions go from
/// the innermost out; a tensor of fewer has ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoxedTensor {
    /// Name, for messages.
    pub name: &'static str,
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Bytes of an element: 1 or 2.
    pub element_bytes: usize,
    /// Elements of each dimension.
    pub shape: [u64; 4],
    /// Bytes from one element to the next of each dimension but the innermost: multiples of 16.
    pub strides: [u64; 3],
    /// Elements of a box.
    pub tile: [u32; 4],
    /// Bytes of a box's row, within which its chunks change places: 32, 64 or 128.
    pub swizzle: usize,
}

impl Arg {
    /// The parameter type that the value is for.
    pub const fn ty(&self) -> ParamType {
        match self {
            Arg::Pointer(_) => ParamType::Pointer,
            Arg::U32(_) => ParamType::U32,
            Arg::I32(_) => ParamType::I32,
            Arg::I64(_) => ParamType::I64,
            Arg::F32(_) => ParamType::F32,
            Arg::TensorMap(_) => ParamType::TensorMap,
        }
    }

    /// The bits of a number or address, extended with zeros.
    pub const fn bits(&self) -> Option<u64> {
        match *self {
            Arg::Pointer(x) => Some(x),
            Arg::I64(x) => Some(x as u64),
            Arg::U32(x) => Some(x as u64),
            Arg::I32(x) => Some(x as u32 as u64),
            Arg::F32(x) => Some(x.to_bits() as u64),
            Arg::TensorMap(_) => None,
        }
    }
}
