//! What is the same for all blocks of a launch.

use sage_ptx::Arg;

use super::global::Global;
use super::layout::Layout;
use crate::decode::Code;
use crate::options::EmulatorOptions;

/// Where kernel parameters lie, which only a bulk copy can look at.
pub(crate) const PARAM_BASE: u64 = 0x6000_0000_0000;
/// What each of them takes.
pub(crate) const PARAM_BYTES: u64 = 128;

/// What all blocks of a launch share.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub code: Code<'a>,
    pub layout: Layout<'a>,
    pub global: &'a Global,
    pub args: &'a [Arg],
    pub grid: [u32; 3],
    pub options: &'a EmulatorOptions,
}
