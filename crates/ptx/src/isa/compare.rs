//! Comparisons.

use super::arithmetic::f32_of;
use super::types::Ty;

/// Comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Not equal, or either is NaN.
    NeU,
}

impl Cmp {
    pub(super) const fn ptx(self) -> &'static str {
        match self {
            Cmp::Eq => "eq",
            Cmp::Ne => "ne",
            Cmp::Lt => "lt",
            Cmp::Le => "le",
            Cmp::Gt => "gt",
            Cmp::Ge => "ge",
            Cmp::NeU => "neu",
        }
    }

    pub(super) fn holds(self, ty: Ty, a: u64, b: u64) -> bool {
        fn compare<T: PartialOrd>(cmp: Cmp, a: T, b: T) -> bool {
            match cmp {
                Cmp::Eq => a == b,
                // PTX's `ne` of floats is false for NaN.
                Cmp::Ne => a.partial_cmp(&b).is_some_and(|order| order.is_ne()),
                Cmp::Lt => a < b,
                Cmp::Le => a <= b,
                Cmp::Gt => a > b,
                Cmp::Ge => a >= b,
                Cmp::NeU => a != b,
            }
        }
        match ty {
            Ty::S32 => compare(self, a as i32, b as i32),
            Ty::S64 => compare(self, a as i64, b as i64),
            Ty::F32 => compare(self, f32_of(a), f32_of(b)),
            _ => compare(self, a, b),
        }
    }
}
