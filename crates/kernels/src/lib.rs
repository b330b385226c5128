//! Every GPU kernel of SageAttention, as functions from a configuration to a program.

#![forbid(unsafe_code)]

pub mod attention;
mod integer;
mod params;
pub mod preprocess;
mod sequence;

pub use sequence::{KEY_TILE, Lengths, total_key_tiles};
