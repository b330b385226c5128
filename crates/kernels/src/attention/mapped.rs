//! Operands that come to shared memory through tensor maps: which they are, and what their maps describe.

use sage_ptx::BoxedTensor;

use super::config::AttentionConfig;
use super::{warpgroups, warps};
use crate::tiling::{Copies, Engine};

/// What comes through TMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedOperand {
    /// K.
    Keys,
    /// V.
    Values,
    /// Q, where [`AttentionConfig::queries_by_tma`] says so.
    Queries,
}

impl MappedOperand {
    /// The name of its tensor map.
    pub(super) fn map_name(self) -> &'static str {
        match self {
            MappedOperand::Keys => "k_map",
            MappedOperand::Values => "v_map",
            MappedOperand::Queries => "q_map",
        }
    }
}

impl AttentionConfig {
    /// The operands whose tensor maps the kernel takes after its other parameters, in their order.
    pub fn mapped(&self) -> &'static [MappedOperand] {
        match self.tiling.engine() {
            Engine::Warpgroups if self.queries_by_tma => {
                &[MappedOperand::Keys, MappedOperand::Values, MappedOperand::Queries]
            }
            Engine::Warpgroups => &[MappedOperand::Keys, MappedOperand::Values],
            Engine::Warps if self.tiling.copies() == Copies::Tma => {
                &[MappedOperand::Keys, MappedOperand::Values]
            }
            Engine::Warps => &[],
        }
    }
}

/// What the tensor map of an operand describes: its shape and the strides of batch, heads and rows, in elements, as given,
/// and its address as given or in the workspace.
pub fn boxed_tensor(
    config: &AttentionConfig,
    operand: MappedOperand,
    given: ([u64; 4], [i64; 3]),
    address: u64,
    workspace_tiles: usize,
) -> BoxedTensor {
    match config.tiling.engine() {
        Engine::Warps => warps::boxed_tiles(config, operand, address, workspace_tiles),
        Engine::Warpgroups => warpgroups::boxed_tensor(config, operand, given, address, workspace_tiles),
    }
}
