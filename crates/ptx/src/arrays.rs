//! What a kernel is given: parameters, and arrays in device and shared memory.

use crate::code::Code;
use crate::isa::Memory;
use crate::launch::{Param, ParamType};
use crate::pointer::{GlobalSpace, Pointer, SharedSpace, Stored};
use crate::scalar::Scalar;
use crate::value::Val;

impl Code {
    fn parameter<T: Scalar>(&self, name: &str, ty: ParamType) -> Val<'_, T> {
        let index = self.add_param(Param { name: name.to_owned(), ty });
        self.value::<T>(Memory::Param { index, ty: T::TY }, &[]).named(name)
    }

    /// A parameter: a number.
    pub fn param<T: ParamScalar>(&self, name: &str) -> Val<'_, T> {
        self.parameter(name, T::PARAM)
    }

    /// A parameter: the address of an array in device memory.
    pub fn global<T: Stored>(&self, name: &str) -> Pointer<'_, GlobalSpace, T> {
        Pointer::new(self.parameter::<u64>(name, ParamType::Pointer))
    }

    /// A parameter: a tensor map; its address.
    pub fn tensor_map(&self, name: &str) -> Val<'_, u64> {
        let index = self.add_param(Param { name: name.to_owned(), ty: ParamType::TensorMap });
        self.value::<u64>(Memory::ParamAddress { index }, &[]).named(name)
    }

    /// An array of `len` elements in shared memory, aligned for every access and swizzle that fits it.
    pub fn shared<T: Stored>(&self, name: &str, len: usize) -> Pointer<'_, SharedSpace, T> {
        const MOST: u32 = 1024;
        let bytes = len as u32 * T::WORD.bytes();
        let align = bytes.next_power_of_two().clamp(16, MOST);
        let (array, offset) = self.add_shared(name, bytes, align);
        Pointer::new(self.value::<u32>(Memory::SharedAddress { array, offset }, &[]).named(name))
    }
}

/// Numbers that a kernel takes as parameters.
pub trait ParamScalar: Scalar {
    /// The parameter's type.
    const PARAM: ParamType;
}

impl ParamScalar for i32 {
    const PARAM: ParamType = ParamType::I32;
}
impl ParamScalar for u32 {
    const PARAM: ParamType = ParamType::U32;
}
impl ParamScalar for i64 {
    const PARAM: ParamType = ParamType::I64;
}
impl ParamScalar for f32 {
    const PARAM: ParamType = ParamType::F32;
}
