//! What an attention kernel is called, and what it needs.

use sage_core::{Accumulator, Granularity, IntBits, PLevels};
use sage_ptx::{Program, Target};

use super::attention;
use super::config::{AttentionConfig, MaskForm, TileSource, dims_description, dims_suffix};
use crate::kernel::Kernel;
use crate::operand::{Element, OperandSource};
use crate::tiling::{Copies, Engine};

impl AttentionConfig {
    /// The format of values in 4 bits and, where there are more than one, the levels in which P is scaled.
    fn fp4_values(&self, two_levels: &str) -> String {
        let format = self.operands.v.fp4().map_or("", |format| format.name());
        match self.operands.levels {
            Some(PLevels::Two) => format!("{format}{two_levels}"),
            _ => format.to_owned(),
        }
    }
}

impl Kernel for AttentionConfig {
    fn name(&self) -> String {
        let scores = match self.operands.quantizer {
            None => self.operands.q.fp4().map_or("full".to_owned(), |format| format.name().to_lowercase()),
            Some(quantizer) => {
                let bits = match quantizer.bits {
                    IntBits::Eight => "int8",
                    IntBits::Four => "int4",
                };
                let granularity = match quantizer.granularity {
                    Granularity::PerTensor => "tensor".to_owned(),
                    // Of the queries' blocks only one of 128 rows has no number.
                    Granularity::PerBlock if quantizer.tile.block_q == 128 => "block".to_owned(),
                    Granularity::PerBlock => format!("block{}", quantizer.tile.block_q),
                    Granularity::PerWarp => format!("warp{}", quantizer.tile.warp_q),
                    Granularity::PerThread => format!("thread{}", quantizer.tile.warp_q),
                    Granularity::PerToken => "token".to_owned(),
                };
                let first = if quantizer.scale_q_first { "_scaled" } else { "" };
                let rounding = format!("{:?}{:?}", quantizer.rounding, quantizer.zero_group);
                let rounding: String = rounding.chars().filter(char::is_ascii_uppercase).collect();
                format!("{bits}_{granularity}{first}_{}", rounding.to_lowercase())
            }
        };
        let accumulator = |accumulator: Accumulator| accumulator.name().replace('+', "_");
        let values = match self.operands.v.element {
            Element::BF16 => "bf16".to_owned(),
            Element::E4M3 => format!("fp8_{}", accumulator(self.operands.sums)),
            Element::E2M1 => self.fp4_values("_2levels").to_lowercase(),
            _ => format!("f16_{}", accumulator(self.operands.sums)),
        };
        let dims = dims_suffix(self.head_dim, self.value_dim);
        let mut name = format!("attention_{}_{scores}_{values}_{dims}", self.dtype);
        if self.mask != MaskForm::None {
            name += &format!("_{}", self.mask.name());
        }
        for (on, part) in [
            (self.given_biases, "_given"),
            (self.block_edges, "_edges"),
            (self.softcap, "_softcap"),
            (self.sinks, "_sinks"),
            (self.lse, "_lse"),
            (self.smooth_k, "_sk"),
            (self.smooth_v, "_sv"),
            (self.rotate, "_rot"),
            (self.operands.v.source == OperandSource::Workspace, "_vws"),
            (!self.aligned, "_unaligned"),
            (self.values_in_keys, "_vk"),
            (self.split, "_split"),
            (self.heads_as_rows, "_heads"),
            (self.idle_warps, "_idle"),
            (self.queries_by_tma, "_qtma"),
            (self.tiles == TileSource::List, "_list"),
        ] {
            if on {
                name += part;
            }
        }
        if let Some(rows) = self.smooth_q {
            name += &format!("_sq{rows}");
        }
        name += self.lengths.suffix();
        format!("{name}_{}", self.tiling)
    }

    fn description(&self) -> String {
        let scores = match self.operands.quantizer {
            None => format!("{} QK", self.operands.q.fp4().map_or("full", |format| format.name())),
            Some(quantizer) => {
                format!("{} QK {}", quantizer.bits.name(), quantizer.granularity.name())
            }
        };
        let format = match self.operands.v.element {
            Element::BF16 => "BF16",
            Element::E4M3 => "FP8",
            _ => "FP16",
        };
        let values = match self.operands.v.element {
            Element::E2M1 => format!("{} PV", self.fp4_values(" in two levels")),
            _ => format!("{format} PV ({})", self.operands.sums.name()),
        };
        let dims = dims_description(self.head_dim, self.value_dim);
        let mut text = format!("attention: {scores}, {values}; {}, {dims}", self.dtype);
        match self.mask {
            MaskForm::None => {}
            MaskForm::Bool => text += ", boolean mask",
            MaskForm::Bias(dtype) => text += &format!(", additive mask in {dtype}"),
        }
        for (on, what) in [
            (self.given_biases, " as given"),
            (self.block_edges, ", blocks that end within tiles"),
            (self.softcap, ", softcap"),
            (self.sinks, ", sinks"),
            (self.lse && !self.split, ", with LSE"),
            (self.smooth_q.is_some(), ", smooth Q"),
            (self.smooth_v, ", smooth V"),
            (self.rotate, ", rotated Q"),
            (self.values_in_keys, ", values in keys"),
            (self.split, ", keys split"),
            (self.heads_as_rows, ", heads as rows"),
            (self.tiles == TileSource::List, ", listed tiles of keys"),
        ] {
            if on {
                text += what;
            }
        }
        text + self.lengths.description() + if self.aligned { "" } else { ", unaligned rows" }
    }

    fn oldest_target(&self) -> Target {
        let bf16 = [self.operands.k, self.operands.v].iter().any(|operand| operand.element == Element::BF16);
        match (self.tiling.engine(), self.operands.v.element) {
            _ if self.operands.q.element == Element::E2M1 => Target::SM_120A,
            (Engine::Warpgroups, _) => Target::SM_90A,
            (Engine::Warps, Element::E4M3) => Target::SM_89,
            (Engine::Warps, _) if bf16 || self.tiling.copies() != Copies::Registers => Target::SM_80,
            (Engine::Warps, _) => Target::SM_75,
        }
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.head_dim.max(self.value_dim))
    }

    fn program(&self) -> Program {
        attention(self)
    }
}
