//! A number that query heads may have of their own.

use sage_ptx::{Arg, Code, Global, Val};

/// What a launch passes: one number for all query heads, or an array with one for each.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PerHeadArg {
    /// Address of singles, `[q_heads]`; 0 where all heads have the same number.
    pub each: u64,
    /// The number of all heads, where `each` is 0.
    pub all: f32,
}

impl PerHeadArg {
    /// Number of parameters.
    pub(crate) const COUNT: usize = 2;

    /// The values in the kernel's order.
    pub(crate) fn args(&self) -> [Arg; Self::COUNT] {
        [Arg::Pointer(self.each), Arg::F32(self.all)]
    }
}

/// The same inside a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PerHeadParam<'k> {
    each: Global<'k, f32>,
    all: Val<'k, f32>,
}

impl<'k> PerHeadParam<'k> {
    /// Declares both parameters.
    pub fn declare(code: &'k Code, name: &str) -> Self {
        PerHeadParam { each: code.global(&format!("{name}_each")), all: code.param(name) }
    }

    /// The number of a query head.
    #[track_caller]
    pub fn of(&self, head: Val<'k, i32>) -> Val<'k, f32> {
        let code = head.code();
        let number = code.var(self.all);
        code.when(self.each.address().ne(0u64), || number.set(self.each.at(head).load()));
        number.get()
    }
}
