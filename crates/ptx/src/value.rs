//! Values of a kernel, with the types of Rust.

use std::fmt;
use std::marker::PhantomData;

use crate::code::Code;
use crate::isa::{Cmp, Lane, MOST_OPERANDS, Op, Ty, Width};
use crate::program::{Const, Operand, Reg};
use crate::scalar::{Phantom, Scalar};

/// A value that a kernel computes: it never changes.
pub struct Val<'k, T> {
    code: &'k Code,
    operand: Operand,
    ty: Phantom<T>,
}

impl<T> Clone for Val<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Val<'_, T> {}

impl<T> fmt::Debug for Val<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.operand.fmt(f)
    }
}

/// What an operator or method takes beside a value: another value, a variable's, or a constant.
pub trait Use<'k, T> {
    /// The value.
    fn value(self, code: &'k Code) -> Val<'k, T>;
}

impl<'k, T: Scalar> Use<'k, T> for Val<'k, T> {
    fn value(self, _: &'k Code) -> Val<'k, T> {
        self
    }
}

impl<'k, T: Scalar> Use<'k, T> for T {
    fn value(self, code: &'k Code) -> Val<'k, T> {
        Val::of_bits(code, self.bits())
    }
}

impl<'k, T: Scalar> Val<'k, T> {
    pub(crate) fn of_register(code: &'k Code, reg: Reg) -> Self {
        Val { code, operand: Operand::Reg(reg), ty: PhantomData }
    }

    pub(crate) fn of_bits(code: &'k Code, bits: u64) -> Self {
        let constant = match T::TY {
            Ty::F32 => Const::F32(f32::from_bits(bits as u32)),
            ty => match ty.width() {
                Width::Pred => Const::Pred(bits & 1 == 1),
                Width::B16 => Const::B16(bits as u16),
                Width::B32 => Const::I32(bits as u32 as i32),
                Width::B64 => Const::I64(bits as i64),
            },
        };
        Val { code, operand: Operand::Const(constant), ty: PhantomData }
    }

    /// The kernel that the value belongs to.
    pub fn code(self) -> &'k Code {
        self.code
    }

    /// The operand of an instruction.
    pub(crate) fn operand(self) -> Operand {
        self.operand
    }

    /// The value in a register, also where it is a constant.
    #[track_caller]
    pub(crate) fn in_register(self) -> Reg {
        match self.operand {
            Operand::Reg(reg) => reg,
            Operand::Const(_) => {
                let reg = self.code.register(T::TY.width());
                self.code.emit(Lane::Mov(T::TY), &[reg], &[self.operand]);
                reg
            }
        }
    }

    #[track_caller]
    pub(crate) fn in_register_operand(self) -> Operand {
        Operand::Reg(self.in_register())
    }

    /// The constant, where the value is one.
    pub fn known(self) -> Option<u64> {
        self.operand.constant_bits()
    }

    /// Names the value in the printed kernel and in the emulator's reports.
    pub fn named(self, name: &str) -> Self {
        if let Operand::Reg(reg) = self.operand {
            self.code.name_register(reg, name);
        }
        self
    }

    #[track_caller]
    pub(crate) fn unary<R: Scalar>(self, op: Lane) -> Val<'k, R> {
        self.code.lane(op, &[self.operand])
    }

    #[track_caller]
    pub(crate) fn binary<U: Scalar, R: Scalar>(self, op: Lane, other: impl Use<'k, U>) -> Val<'k, R> {
        self.code.lane(op, &[self.operand, other.value(self.code).operand])
    }

    /// The smaller; of a number and NaN, the number.
    #[track_caller]
    pub fn min(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::Min(T::TY), other)
    }

    /// The larger; of a number and NaN, the number.
    #[track_caller]
    pub fn max(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::Max(T::TY), other)
    }

    /// The smaller; of a number and NaN, NaN (floats; sm_80).
    #[track_caller]
    pub fn min_nan(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::MinNan(T::TY), other)
    }

    /// The larger; of a number and NaN, NaN (floats; sm_80).
    #[track_caller]
    pub fn max_nan(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::MaxNan(T::TY), other)
    }

    /// The magnitude.
    #[track_caller]
    pub fn abs(self) -> Self {
        self.unary(Lane::Abs(T::TY))
    }

    /// `self · factor + addend`: rounded once for floats.
    #[track_caller]
    pub fn mul_add(self, factor: impl Use<'k, T>, addend: impl Use<'k, T>) -> Self {
        let src = [self.operand, factor.value(self.code).operand, addend.value(self.code).operand];
        self.code.lane(Lane::Fma(T::TY), &src)
    }

    #[track_caller]
    fn compare(self, cmp: Cmp, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.binary(Lane::Set(cmp, T::TY), other)
    }

    /// Whether equal.
    #[track_caller]
    pub fn eq(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Eq, other)
    }

    /// Whether different; true for NaN.
    #[track_caller]
    pub fn ne(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        let cmp = if T::TY.is_float() { Cmp::NeU } else { Cmp::Ne };
        self.compare(cmp, other)
    }

    /// Whether smaller.
    #[track_caller]
    pub fn lt(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Lt, other)
    }

    /// Whether smaller or equal.
    #[track_caller]
    pub fn le(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Le, other)
    }

    /// Whether larger.
    #[track_caller]
    pub fn gt(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Gt, other)
    }

    /// Whether larger or equal.
    #[track_caller]
    pub fn ge(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Ge, other)
    }

    /// The same bits as another type of the same width.
    ///
    /// # Panics
    /// When the widths differ: the kernel cannot be written.
    #[track_caller]
    pub fn reinterpret<R: Scalar>(self) -> Val<'k, R> {
        assert_eq!(T::TY.width(), R::TY.width(), "reinterpreting {:?} as {:?}", T::TY, R::TY);
        match self.operand {
            Operand::Reg(reg) => Val::of_register(self.code, reg),
            Operand::Const(constant) => Val::of_bits(self.code, constant.bits()),
        }
    }
}

impl Code {
    /// A constant.
    pub fn constant<T: Scalar>(&self, x: T) -> Val<'_, T> {
        Val::of_bits(self, x.bits())
    }

    /// The result of an instruction of one result.
    #[track_caller]
    pub(crate) fn value<T: Scalar>(&self, op: impl Into<Op>, src: &[Operand]) -> Val<'_, T> {
        let reg = self.register(T::TY.width());
        self.emit(op, &[reg], src);
        Val::of_register(self, reg)
    }

    /// The result of a lane instruction, computed at once where all its operands are constants.
    #[track_caller]
    pub(crate) fn lane<T: Scalar>(&self, op: Lane, src: &[Operand]) -> Val<'_, T> {
        let mut constants = [0; MOST_OPERANDS];
        for (constant, operand) in constants.iter_mut().zip(src) {
            match operand.constant_bits() {
                Some(bits) => *constant = bits,
                None => return self.value(op, src),
            }
        }
        Val::of_bits(self, op.eval(constants))
    }
}
