//! The commands, one file each.

pub mod accuracy;
pub mod bench;
pub mod demo;
pub mod emulate;
pub mod explain;
pub mod info;
pub mod ptx;
pub mod run;
pub mod sparse;
pub mod tune;
pub mod warm;
