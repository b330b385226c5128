//! The kernels that prepare K, V and Q, run in the emulator and compared with the oracle bit for bit.

mod fp4;
mod inputs;
mod keys;
mod masked;
mod queries;
mod value_passes;
mod values;
