//! Reading of files that hold queries, keys and values: the part of the command `sageattn` that meets bytes from
//! strangers, as a library so that a fuzzer can call it.

#![forbid(unsafe_code)]

mod file_error;
mod header;
pub mod qkv_file;
