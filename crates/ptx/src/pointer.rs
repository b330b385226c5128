//! Typed addresses in device and shared memory.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::code::Code;
use crate::isa::{AtomicOp, Control, Lane, LoadMode, Memory, Space, StoreMode, Ty, Word};
use crate::program::Operand;
use crate::scalar::{Phantom, Scalar};
use crate::value::{Use, Val};
use crate::var::Var;

/// Types of elements in memory.
pub trait Stored: Copy + 'static {
    /// What a register holds of it.
    type Value: Scalar;
    /// What an access moves.
    const WORD: Word;
}

macro_rules! stored {
    ($($ty:ty => $value:ty, $word:ident;)*) => {$(
        impl Stored for $ty {
            type Value = $value;
            const WORD: Word = Word::$word;
        }
    )*};
}

stored! {
    u8 => u32, U8;
    u16 => u32, U16;
    i8 => i32, S8;
    f16 => f16, B16;
    bf16 => bf16, B16;
    i32 => i32, B32;
    u32 => u32, B32;
    f32 => f32, B32;
    i64 => i64, B64;
    u64 => u64, B64;
}

/// A state space, as a type.
pub trait AddressSpace: Copy + 'static {
    /// Type of an address.
    type Address: Scalar;
    /// The space.
    const SPACE: Space;
    /// `address + index · scale`.
    #[doc(hidden)]
    fn advance<'k>(address: Val<'k, Self::Address>, index: Index<'k>, scale: i32) -> Val<'k, Self::Address>;
}

/// Device memory.
#[derive(Clone, Copy, Debug)]
pub struct GlobalSpace;

/// The block's shared memory.
#[derive(Clone, Copy, Debug)]
pub struct SharedSpace;

/// An index of 32 or 64 bits.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub enum Index<'k> {
    Narrow(Val<'k, i32>),
    Wide(Val<'k, i64>),
}

impl<'k> From<Val<'k, i32>> for Index<'k> {
    fn from(index: Val<'k, i32>) -> Self {
        Index::Narrow(index)
    }
}

impl<'k> From<Val<'k, i64>> for Index<'k> {
    fn from(index: Val<'k, i64>) -> Self {
        Index::Wide(index)
    }
}

impl AddressSpace for GlobalSpace {
    type Address = u64;
    const SPACE: Space = Space::Global;

    #[track_caller]
    fn advance<'k>(address: Val<'k, u64>, index: Index<'k>, scale: i32) -> Val<'k, u64> {
        let code = address.code();
        let scale = code.constant(scale);
        match index {
            Index::Narrow(index) => {
                let src = [index.operand(), scale.operand(), address.operand()];
                code.lane(Lane::MadWide(Ty::S32), &src)
            }
            Index::Wide(index) => address + (index * scale.widen()).reinterpret::<u64>(),
        }
    }
}

impl AddressSpace for SharedSpace {
    type Address = u32;
    const SPACE: Space = Space::Shared;

    #[track_caller]
    fn advance<'k>(address: Val<'k, u32>, index: Index<'k>, scale: i32) -> Val<'k, u32> {
        let index = match index {
            Index::Narrow(index) => index,
            Index::Wide(index) => index.narrow(),
        };
        index.reinterpret::<u32>().mul_add(scale as u32, address)
    }
}

/// An address of elements of type `T`.
#[derive(Debug)]
pub struct Pointer<'k, S: AddressSpace, T> {
    address: Val<'k, S::Address>,
    /// Bytes that accesses add for nothing.
    offset: i32,
    ty: Phantom<T>,
}

/// An address in device memory.
pub type Global<'k, T> = Pointer<'k, GlobalSpace, T>;

/// An address in shared memory.
pub type Shared<'k, T> = Pointer<'k, SharedSpace, T>;

impl<S: AddressSpace, T> Clone for Pointer<'_, S, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: AddressSpace, T> Copy for Pointer<'_, S, T> {}

impl<'k, S: AddressSpace, T: Stored> Pointer<'k, S, T> {
    pub(crate) fn new(address: Val<'k, S::Address>) -> Self {
        Pointer { address, offset: 0, ty: PhantomData }
    }

    /// At an address that was computed.
    pub fn at_address(address: Val<'k, S::Address>) -> Self {
        Pointer::new(address)
    }

    /// The kernel that the address belongs to.
    pub fn code(self) -> &'k Code {
        self.address.code()
    }

    /// The element `index` further.
    #[track_caller]
    pub fn at(self, index: impl Into<Index<'k>>) -> Self {
        let address = S::advance(self.address, index.into(), T::WORD.bytes() as i32);
        Pointer { address, ..self }
    }

    /// The element `elements` further, at no cost.
    pub fn plus(self, elements: i32) -> Self {
        Pointer { offset: self.offset + elements * T::WORD.bytes() as i32, ..self }
    }

    /// The same address of another type of element.
    pub fn cast<U: Stored>(self) -> Pointer<'k, S, U> {
        Pointer { address: self.address, offset: self.offset, ty: PhantomData }
    }

    /// The address itself.
    #[track_caller]
    pub fn address(self) -> Val<'k, S::Address> {
        match self.offset {
            0 => self.address,
            offset => S::advance(self.address, Index::Narrow(self.code().constant(offset)), 1),
        }
    }

    /// The register and the offset that an instruction names.
    #[track_caller]
    pub(crate) fn parts(self) -> (Operand, i32) {
        (self.address.in_register_operand(), self.offset)
    }

    #[track_caller]
    fn load_as(self, count: u8, mode: LoadMode) -> Vec<Val<'k, T::Value>> {
        let code = self.code();
        let registers: Vec<_> = (0..count).map(|_| code.register(T::Value::TY.width())).collect();
        let op = Memory::Load { space: S::SPACE, word: T::WORD, count, offset: self.offset, mode };
        code.emit(op, &registers, &[self.address.in_register_operand()]);
        registers.into_iter().map(|reg| Val::of_register(code, reg)).collect()
    }

    /// The element.
    #[track_caller]
    pub fn load(self) -> Val<'k, T::Value> {
        self.load_as(1, LoadMode::Plain)[0]
    }

    /// `N` elements in one access: 2 or 4, at most 16 bytes, at a multiple of their size.
    #[track_caller]
    pub fn load_vector<const N: usize>(self) -> [Val<'k, T::Value>; N] {
        let values = self.load_as(N as u8, LoadMode::Plain);
        std::array::from_fn(|i| values[i])
    }

    /// Stores the element.
    #[track_caller]
    pub fn store(self, value: impl Use<'k, T::Value>) {
        self.store_as([value.value(self.code())], StoreMode::Plain);
    }

    /// Stores `N` elements in one access: 2 or 4, at most 16 bytes, at a multiple of their size.
    #[track_caller]
    pub fn store_vector<const N: usize>(self, values: [Val<'k, T::Value>; N]) {
        self.store_as(values, StoreMode::Plain);
    }

    #[track_caller]
    fn store_as<const N: usize>(self, values: [Val<'k, T::Value>; N], mode: StoreMode) {
        let op = Memory::Store { space: S::SPACE, word: T::WORD, count: N as u8, offset: self.offset, mode };
        let mut src = vec![self.address.in_register_operand()];
        src.extend(values.map(Val::in_register_operand));
        self.code().emit(op, &[], &src);
    }

    /// Replaces the element by `op` of it and `value`; returns what it was.
    #[track_caller]
    pub fn atomic(self, op: AtomicOp, value: impl Use<'k, T::Value>) -> Val<'k, T::Value> {
        let op = Memory::Atomic { space: S::SPACE, op, ty: T::Value::TY, offset: self.offset };
        let value = value.value(self.code());
        self.code().value(op, &[self.address.in_register_operand(), value.operand()])
    }
}

impl<'k, T: Stored> Global<'k, T> {
    /// `N` elements that nothing writes during the kernel's life and that are read once.
    #[track_caller]
    pub fn load_streaming<const N: usize>(self) -> [Val<'k, T::Value>; N] {
        let values = self.load_as(N as u8, LoadMode::Streaming);
        std::array::from_fn(|i| values[i])
    }

    /// The same, into variables: where that is all that a condition decides, it becomes the load's own.
    #[track_caller]
    pub fn load_streaming_into<const N: usize>(self, to: [Var<'k, T::Value>; N]) {
        let mode = LoadMode::Streaming;
        let op =
            Memory::Load { space: Space::Global, word: T::WORD, count: N as u8, offset: self.offset, mode };
        self.code().emit(op, &to.map(Var::register), &[self.address.in_register_operand()]);
    }

    /// The element, as other blocks released it.
    #[track_caller]
    pub fn load_acquire(self) -> Val<'k, T::Value> {
        self.load_as(1, LoadMode::Acquire)[0]
    }

    /// Stores the element; who acquires it sees all that this thread wrote before.
    #[track_caller]
    pub fn store_release(self, value: impl Use<'k, T::Value>) {
        self.store_as([value.value(self.code())], StoreMode::Release);
    }
}

impl<'k, T: Stored> Shared<'k, T> {
    /// Starts copying `bytes` (4, 8 or 16) from device memory to here; from byte `valid` on, zeros.
    #[track_caller]
    pub fn copy_async<U: Stored>(self, from: Global<'k, U>, bytes: u8, valid: impl Use<'k, i32>) {
        let code = self.code();
        let src = [
            self.address().in_register_operand(),
            from.address().in_register_operand(),
            valid.value(code).operand(),
        ];
        code.emit(Control::CopyAsync { bytes }, &[], &src);
    }
}
