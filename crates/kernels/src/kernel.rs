//! What every kernel is: a configuration that names itself and writes its program.

use std::any::Any;
use std::fmt;

use sage_ptx::{Program, Target};

/// A kernel, specialised by the fields of the type that implements this.
pub trait Kernel: Any + fmt::Debug + Send + Sync {
    /// Its name: unique for the configuration, and the same in every version of the library that builds the same
    /// program from it.
    fn name(&self) -> String;

    /// What it does, in one line.
    fn description(&self) -> String;

    /// The oldest target that has its instructions, or others to put them together from.
    fn oldest_target(&self) -> Target {
        Target::SM_75
    }

    /// Channels of the heads that it is for; none where it is for heads of any number.
    fn head_dim(&self) -> Option<usize>;

    /// Writes the program.
    fn program(&self) -> Program;
}

impl dyn Kernel {
    /// The configuration, where it is of type `K`.
    pub fn downcast_ref<K: Kernel>(&self) -> Option<&K> {
        (self as &dyn Any).downcast_ref()
    }
}
