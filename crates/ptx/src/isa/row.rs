//! The row of an instruction: all that there is to say of it, in one place.
//!
//! A row of [`instructions!`] reads
//!
//! ```text
//! Name(fields): [results] <- [operands] if it exists, what it needs, its text;
//! ```
//!
//! Results and operands are widths, or types, which stand for their widths. The text is the line of PTX, in which `$d`
//! is the results, `$0` to `$7` the groups of operands, `$*` all of them after one another, and `$p` the name of the
//! parameter that the instruction reads. A row of [`computed!`] has its meaning besides, as a function of the operands'
//! bits. From a row come the instruction's variant and its [`Instruction`].

use super::types::{Ty, Width};
use crate::target::Needs;

/// Registers, or constants, of one width, which PTX writes next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Width of each.
    pub width: Width,
    /// How many there are; any number where absent.
    pub count: Option<usize>,
    /// Whether constants cannot take their place.
    pub registers_only: bool,
}

/// Most groups of an instruction's operands, and most operands of one that a lane computes by itself.
pub const MOST_OPERANDS: usize = 8;

/// Groups of an instruction's operands, in PTX's order; those that it does not have are empty.
pub type Groups = [Group; MOST_OPERANDS];

impl Group {
    pub(super) const EMPTY: Group = Width::B32.times(0);

    pub(super) const fn registers_only(self) -> Group {
        Group { registers_only: true, ..self }
    }
}

impl Width {
    pub(super) const fn times(self, count: usize) -> Group {
        Group { width: self, count: Some(count), registers_only: false }
    }

    pub(super) const fn any_number(self) -> Group {
        Group { width: self, count: None, registers_only: false }
    }
}

impl From<Width> for Group {
    fn from(width: Width) -> Group {
        width.times(1)
    }
}

impl From<Ty> for Group {
    fn from(ty: Ty) -> Group {
        ty.width().into()
    }
}

/// What a row says of its instruction, but for what it means.
pub trait Instruction {
    /// Whether PTX has the instruction with these types and of this shape, for any GPU.
    fn exists(&self) -> bool;

    /// The registers that it writes.
    fn results(&self) -> Group;

    /// What it reads.
    fn operands(&self) -> Groups;

    /// Who has it.
    fn needs(&self) -> Needs;

    /// Its line of PTX, with places for results and operands.
    fn template(&self) -> String;
}

/// Fills the places of a template.
pub(super) fn fill(
    template: &str,
    results: &[String],
    operands: &[String],
    groups: Groups,
    param: &str,
) -> String {
    let list = |names: &[String]| names.join(", ");
    let group = |index: usize| {
        let count = |group: &Group| group.count.unwrap_or(0);
        let first = groups.iter().take(index).map(count).sum::<usize>();
        let len = groups.get(index).map_or(0, count);
        list(operands.get(first..first + len).unwrap_or_default())
    };
    let mut parts = template.split('$');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut rest = part.chars();
        text += &match rest.next() {
            Some('d') => list(results),
            Some('*') => list(&[results, operands].concat()),
            Some('p') => param.to_owned(),
            digit => group(digit.and_then(|digit| digit.to_digit(10)).map_or(groups.len(), |i| i as usize)),
        };
        text += rest.as_str();
    }
    text
}

/// Declares a family of instructions, a row for each: see the module.
macro_rules! instructions {
    (
        $(#[$meta:meta])*
        $family:ident {
            $(
                $(#[$doc:meta])*
                $name:ident
                $(($($unnamed:ident: $unnamed_ty:ty),+))?
                $({ $($(#[$field_doc:meta])* $field:ident: $field_ty:ty),+ $(,)? })?:
                [$($result:expr)?] <- [$($operand:expr),*] $(if $exists:expr)?, $needs:expr, $text:expr;
            )+
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $family {
            $(
                $(#[$doc])*
                $name $(($($unnamed_ty),+))? $({ $($(#[$field_doc])* $field: $field_ty),+ })?,
            )+
        }

        impl $crate::isa::row::Instruction for $family {
            fn exists(&self) -> bool {
                match *self {
                    $($family::$name $(($($unnamed),+))? $({ $($field),+ })? => {
                        // A column need not look at every field.
                        $(_ = ($($unnamed,)+);)? $(_ = ($($field,)+);)?
                        true $(& $exists)?
                    })+
                }
            }

            fn results(&self) -> $crate::isa::row::Group {
                match *self {
                    $($family::$name $(($($unnamed),+))? $({ $($field),+ })? => {
                        $(_ = ($($unnamed,)+);)? $(_ = ($($field,)+);)?
                        [$($crate::isa::row::Group::from($result),)? $crate::isa::row::Group::EMPTY][0]
                    })+
                }
            }

            fn operands(&self) -> $crate::isa::row::Groups {
                let mut groups = [$crate::isa::row::Group::EMPTY; $crate::isa::MOST_OPERANDS];
                match *self {
                    $($family::$name $(($($unnamed),+))? $({ $($field),+ })? => {
                        $(_ = ($($unnamed,)+);)? $(_ = ($($field,)+);)?
                        let own: &[$crate::isa::row::Group] = &[$($operand.into()),*];
                        groups[..own.len()].copy_from_slice(own);
                    })+
                }
                groups
            }

            fn needs(&self) -> $crate::target::Needs {
                match *self {
                    $($family::$name $(($($unnamed),+))? $({ $($field),+ })? => {
                        $(_ = ($($unnamed,)+);)? $(_ = ($($field,)+);)?
                        $needs
                    })+
                }
            }

            fn template(&self) -> String {
                match *self {
                    $($family::$name $(($($unnamed),+))? $({ $($field),+ })? => {
                        $(_ = ($($unnamed,)+);)? $(_ = ($($field,)+);)?
                        String::from($text)
                    })+
                }
            }
        }
    };
}

/// Declares a family of instructions that each lane computes by itself: rows as those of [`instructions!`], with the
/// meaning behind the text, a function from the operands' bits to the result's.
macro_rules! computed {
    (
        $(#[$meta:meta])*
        $family:ident {
            $(
                $(#[$doc:meta])*
                $name:ident
                $(($($unnamed:ident: $unnamed_ty:ty),+))?
                $({ $($(#[$field_doc:meta])* $field:ident: $field_ty:ty),+ $(,)? })?:
                [$result:expr] <- [$($operand:expr),*] $(if $exists:expr)?, $needs:expr, $text:expr,
                |$($bits:ident),+| $meaning:expr;
            )+
        }
    ) => {
        $crate::isa::row::instructions! {
            $(#[$meta])*
            $family {
                $(
                    $(#[$doc])*
                    $name
                    $(($($unnamed: $unnamed_ty),+))?
                    $({ $($(#[$field_doc])* $field: $field_ty),+ })?:
                    [$result] <- [$($operand),*] $(if $exists)?, $needs, $text;
                )+
            }
        }

        impl $family {
            /// The result's bits, from the operands'; those that the instruction does not have are of no account.
            pub fn eval<const N: usize>(self, operands: [u64; N]) -> u64 {
                let mut all = [0; $crate::isa::MOST_OPERANDS];
                all.iter_mut().zip(operands).for_each(|(operand, bits)| *operand = bits);
                match self {
                    $($family::$name $(($($unnamed),+))? $({ $($field),+ })? => {
                        $(_ = ($($unnamed,)+);)? $(_ = ($($field,)+);)?
                        let [$($bits),+, ..] = all;
                        $meaning
                    })+
                }
            }
        }
    };
}

pub(super) use {computed, instructions};
