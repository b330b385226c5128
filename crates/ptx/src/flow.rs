//! Control flow: conditionals and loops.

use std::ops::Range;
use std::panic::Location;

use crate::code::Code;
use crate::isa::Control;
use crate::program::{Operand, Stmt};
use crate::value::{Use, Val};

impl Code {
    /// Executes `then` in the lanes where `cond` holds.
    #[track_caller]
    pub fn when(&self, cond: Val<'_, bool>, then: impl FnOnce()) {
        self.if_else(cond, then, || {});
    }

    /// Executes `then` in the lanes where `cond` holds, `otherwise` in the others.
    #[track_caller]
    pub fn if_else(&self, cond: Val<'_, bool>, then: impl FnOnce(), otherwise: impl FnOnce()) {
        match cond.operand() {
            Operand::Const(known) if known.bits() == 1 => then(),
            Operand::Const(_) => otherwise(),
            Operand::Reg(cond) => {
                let at = Location::caller();
                let (then, otherwise) = (self.block(then), self.block(otherwise));
                self.push(Stmt::If { cond, then, otherwise, at });
            }
        }
    }

    /// Executes `body` as long as `test` holds.
    #[track_caller]
    pub fn while_loop<'k>(&'k self, test: impl FnOnce() -> Val<'k, bool>, body: impl FnOnce()) {
        let at = Location::caller();
        let mut cond = None;
        let test = self.block(|| cond = Some(test().in_register()));
        let body = self.block(body);
        if let Some(cond) = cond {
            self.push(Stmt::While { test, cond, body, at });
        }
    }

    /// Executes `body` for each index from `start` on, below `end`.
    #[track_caller]
    pub fn range<'k>(
        &'k self,
        start: impl Use<'k, i32>,
        end: impl Use<'k, i32>,
        body: impl FnOnce(Val<'k, i32>),
    ) {
        self.range_by(start, end, 1, body);
    }

    /// Executes `body` for every `step`-th index from `start` on, below `end`.
    #[track_caller]
    pub fn range_by<'k>(
        &'k self,
        start: impl Use<'k, i32>,
        end: impl Use<'k, i32>,
        step: impl Use<'k, i32>,
        body: impl FnOnce(Val<'k, i32>),
    ) {
        let (end, step) = (end.value(self), step.value(self));
        let index = self.var(start).named("i");
        self.while_loop(
            || index.get().lt(end),
            || {
                let i = index.get();
                body(i);
                index.set(i + step);
            },
        );
    }

    /// Executes `body` with every index of a range that is known now: the code is repeated.
    pub fn unrolled(&self, range: Range<usize>, body: impl FnMut(usize)) {
        range.for_each(body);
    }

    /// The thread ends where `cond` holds.
    #[track_caller]
    pub fn exit_when(&self, cond: Val<'_, bool>) {
        self.when(cond, || self.emit(Control::Exit, &[], &[]));
    }
}
