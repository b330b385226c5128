//! Variables of a kernel.

use std::fmt;
use std::marker::PhantomData;

use crate::code::Code;
use crate::isa::Lane;
use crate::program::{Operand, Reg};
use crate::scalar::{Phantom, Scalar};
use crate::value::{Use, Val};

/// A variable: a register that is read and written.
pub struct Var<'k, T> {
    code: &'k Code,
    reg: Reg,
    ty: Phantom<T>,
}

impl<T> Clone for Var<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Var<'_, T> {}

impl<T> fmt::Debug for Var<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reg.fmt(f)
    }
}

impl<'k, T: Scalar> Var<'k, T> {
    /// Without a value as yet.
    pub fn new(code: &'k Code) -> Self {
        Var { code, reg: code.register(T::TY.width()), ty: PhantomData }
    }

    pub(crate) fn register(self) -> Reg {
        self.reg
    }

    /// The value at this point; later changes leave it as it is.
    #[track_caller]
    pub fn get(self) -> Val<'k, T> {
        self.code.value(Lane::Mov(T::TY), &[Operand::Reg(self.reg)])
    }

    /// Changes the value.
    #[track_caller]
    pub fn set(self, value: impl Use<'k, T>) {
        let value = value.value(self.code).operand();
        self.code.emit(Lane::Mov(T::TY), &[self.reg], &[value]);
    }

    /// The same register as a variable of another type of the same width.
    ///
    /// # Panics
    /// When the widths differ: the kernel cannot be written.
    pub fn reinterpret<R: Scalar>(self) -> Var<'k, R> {
        assert_eq!(T::TY.width(), R::TY.width(), "reinterpreting {:?} as {:?}", T::TY, R::TY);
        Var { code: self.code, reg: self.reg, ty: PhantomData }
    }

    /// Names the variable in the printed kernel and in the emulator's reports.
    pub fn named(self, name: &str) -> Self {
        self.code.name_register(self.reg, name);
        self
    }
}

impl<'k, T: Scalar> Use<'k, T> for Var<'k, T> {
    #[track_caller]
    fn value(self, _: &'k Code) -> Val<'k, T> {
        self.get()
    }
}

impl Code {
    /// A variable with a first value.
    #[track_caller]
    pub fn var<'k, T: Scalar>(&'k self, first: impl Use<'k, T>) -> Var<'k, T> {
        let var = Var::new(self);
        var.set(first);
        var
    }
}
