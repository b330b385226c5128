//! Every GPU kernel of SageAttention, as functions from a configuration to a program.

#![forbid(unsafe_code)]

pub mod attention;
pub mod cache;
pub mod catalog;
mod choice;
pub mod combine;
pub mod forward;
mod grid;
mod integer;
mod params;
pub mod preprocess;
mod rotation;
mod sequence;
pub mod tuning;

pub use sequence::{KEY_TILE, Lengths, total_key_tiles};
