//! How the CPU carries out a problem.

use std::fmt;

use sage_core::{Accumulator, DType, Error, Preset, Problem, Pv, Qk, Result, Scheme, SmoothQ};

use crate::isa::InstructionSet;
use crate::kernels::Kernels;
use crate::machine::Machine;
use crate::nearest::{BY_NAME, nearest_scheme};
use crate::tile::{PvForm, QkForm, Rounded, TILE_KEYS, TileLayout};

/// Query rows that share a key head up to which keys are read as they lie in memory: packing them would cost more
/// than it saves.
const DIRECT_ROWS_MAX: usize = 8;

/// Keys of a unit of work when keys are read directly. A constant, so that results do not depend on the threads.
pub(crate) const SPLIT_KEYS: usize = 4 * TILE_KEYS;

/// Packed keys and values in memory at once, unless one head needs more.
pub(crate) const PACKED_BYTES_MAX: usize = 24 << 20;

/// Query rows of a unit of work: more would not save memory traffic that matters.
const BLOCK_Q_MAX: usize = 192;

/// Query rows of a unit of work below which packed keys are read too often.
const BLOCK_Q_MIN: usize = 48;

/// Units of work for each thread that keep the last ones from leaving threads idle.
const UNITS_PER_THREAD: usize = 6;

/// How the CPU carries out a problem. Prints itself.
#[derive(Clone, Debug)]
pub struct CpuPlan {
    pub(crate) problem: Problem,
    pub(crate) scheme: Scheme,
    pub(crate) instruction_set: InstructionSet,
    pub(crate) strategy: Strategy,
    threads: usize,
    workspace_bytes: usize,
    reasons: Vec<String>,
}

/// The two ways through the keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Strategy {
    /// Pack keys and values once, then let each block of queries pass over them.
    Tiled { block_q: usize, layout: TileLayout },
    /// Few queries: read keys as they lie, split between units of work, and merge by log-sum-exp.
    Split,
}

impl CpuPlan {
    pub(crate) fn new(
        problem: &Problem,
        scheme: Option<Scheme>,
        machine: &Machine,
        threads: usize,
        instruction_set: InstructionSet,
        kernels: &Kernels,
    ) -> Result<Self> {
        let rows_per_head = problem.q_len.saturating_mul(problem.group_size());
        let few_rows = rows_per_head <= DIRECT_ROWS_MAX;
        let mut reasons = Vec::new();
        let scheme = match scheme {
            Some(scheme) => scheme,
            None => {
                let (scheme, reason) = choose(problem, instruction_set, kernels, few_rows);
                let name =
                    scheme.preset(problem.head_dim).map_or_else(|| scheme.to_string(), |p| p.to_string());
                reasons.push(format!("scheme {name}: {reason}"));
                scheme
            }
        };
        let (qk, pv) = forms(&scheme, problem, kernels.bf16.is_some())?;
        // Pooled terms are computed with packed queries.
        let split = few_rows && !problem.pooled_tail && (qk, pv) == (QkForm::Float, PvForm::Float);
        let strategy = if split {
            reasons.push(format!(
                "split over keys: {rows_per_head} query rows for each key head leave nothing to reuse, so keys and \
                 values are read once, where they lie"
            ));
            Strategy::Split
        } else {
            let dims = [problem.head_dim, problem.value_dim];
            let layout = TileLayout::new(kernels.packing, dims, qk, pv, scheme.rotate, scheme.smooth.q);
            let (block_q, reason) = block_q(problem, machine, threads, kernels, &layout);
            reasons.push(reason);
            Strategy::Tiled { block_q, layout }
        };
        let workspace_bytes = workspace_bytes(problem, threads, &strategy);
        Ok(CpuPlan {
            problem: *problem,
            scheme,
            instruction_set,
            strategy,
            threads,
            workspace_bytes,
            reasons,
        })
    }

    /// The scheme that the plan computes.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// The instruction set whose kernels run.
    pub fn instruction_set(&self) -> InstructionSet {
        self.instruction_set
    }

    /// Bytes of scratch memory: packed keys and values, and each thread's block of queries.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Why the plan is what it is, a sentence for each choice.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }
}

impl fmt::Display for CpuPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scheme      {}", self.scheme)?;
        writeln!(f, "kernels     cpu, {}, {} threads", self.instruction_set, self.threads)?;
        match self.strategy {
            Strategy::Tiled { block_q, .. } => {
                writeln!(f, "tiles       {block_q} queries × {TILE_KEYS} keys, online softmax in base 2")?;
            }
            Strategy::Split => {
                writeln!(f, "tiles       all queries × {TILE_KEYS} keys, units of {SPLIT_KEYS} keys")?
            }
        }
        write!(f, "workspace   {:.1} MiB", self.workspace_bytes as f64 / (1 << 20) as f64)?;
        for reason in &self.reasons {
            write!(f, "\nbecause     {reason}")?;
        }
        Ok(())
    }
}

/// The scheme when the caller leaves it open.
fn choose(
    problem: &Problem,
    instruction_set: InstructionSet,
    kernels: &Kernels,
    few_rows: bool,
) -> (Scheme, &'static str) {
    let [full, int8] = [Preset::FULL, Preset::INT8_PER_TOKEN].map(|preset| preset.scheme(problem.head_dim));
    let bf16_values = |scheme| Scheme { pv: Pv::BF16(Accumulator::F32), ..scheme };
    if few_rows {
        (full, "so few queries are bound by reading K and V once; quantising would read K twice")
    } else if kernels.bf16.is_some() && problem.dtype == DType::BF16 {
        (
            bf16_values(full),
            "tensors in bfloat16 are multiplied as they are, as fast as integers, which would have to be packed",
        )
    } else if instruction_set == InstructionSet::Portable {
        (full, "without an integer dot product there is nothing to gain from integers")
    } else if kernels.bf16.is_some() && problem.q_len.max(problem.kv_len) >= TILE_KEYS {
        (
            bf16_values(int8),
            "integer dot products are faster, and a scale for each row costs no time; so are products of bfloat16",
        )
    } else if problem.q_len < TILE_KEYS {
        (full, "packing integers does not pay for fewer than 128 queries")
    } else {
        (int8, "integer dot products are faster, and a scale for each row costs no time")
    }
}

/// The kernels that compute a scheme; `bf16` is whether there are any of bfloat16 operands.
fn forms(scheme: &Scheme, problem: &Problem, bf16: bool) -> Result<(QkForm, PvForm)> {
    scheme.check()?;
    // Q and K that are still as they were given are bfloat16. Its kernels take the smallest numbers for zero, and so they do
    // not serve schemes in single precision.
    let given = problem.dtype == DType::BF16
        && !scheme.rotate
        && !scheme.smooth.k.is_on()
        && scheme.smooth.q == SmoothQ::Off;
    let qk = match scheme.qk {
        Qk::Full if bf16 && given && matches!(scheme.pv, Pv::BF16(_)) => QkForm::Bf16,
        Qk::Full => QkForm::Float,
        Qk::Fp4(format) => QkForm::Fp4(format),
        Qk::Int(quantizer) => QkForm::Int(quantizer),
    };
    let pv = match scheme.pv {
        Pv::F32 => PvForm::Float,
        Pv::F16(_) => PvForm::Rounded(Rounded::F16),
        Pv::BF16(_) if bf16 => PvForm::Bf16,
        Pv::BF16(_) => PvForm::Rounded(Rounded::BF16),
        Pv::Fp8 { v_max, rows, .. } => PvForm::Rounded(Rounded::Fp8 { v_max, rows }),
        Pv::Int8 => PvForm::Rounded(Rounded::Int8),
        Pv::Fp4 { format, levels } => PvForm::Fp4(format, levels),
        Pv::Fixed12 { block: TILE_KEYS } => PvForm::Fixed12,
        Pv::Fixed12 { block } => {
            return Err(Error::unsupported(
                format!("12-bit P·V of {block} keys in the CPU kernels"),
                format!(
                    "of 128 they have it; the nearest that they compute is {}",
                    nearest_scheme(*scheme).named_or(problem.head_dim, BY_NAME)
                ),
            ));
        }
    };
    Ok((qk, pv))
}

/// Query rows of a unit of work.
fn block_q(
    problem: &Problem,
    machine: &Machine,
    threads: usize,
    kernels: &Kernels,
    layout: &TileLayout,
) -> (usize, String) {
    let row_bytes = 4 * (layout.depth + TILE_KEYS + layout.padded_dim()) + 2 * TILE_KEYS;
    let fits = machine.caches.l2 / 2 / row_bytes;
    let rows = problem.q_len.saturating_mul(problem.num_q_heads).saturating_mul(problem.batch);
    let balanced = rows / (UNITS_PER_THREAD * threads);
    let block_q = fits.min(balanced).min(BLOCK_Q_MAX).min(problem.q_len).max(1);
    if let Some([blocks, _]) = problem.blocks {
        let block_q = within_blocks(blocks);
        return (
            block_q,
            format!("{block_q} queries a block: those of a block of the mask skip the same keys"),
        );
    }
    let block_q = block_q.div_ceil(kernels.rows) * kernels.rows;
    let limit = match block_q {
        n if n >= problem.q_len => "the whole sequence",
        n if n + kernels.rows > BLOCK_Q_MAX => "more saves no memory traffic that matters",
        n if n < fits => "enough units to keep every thread busy",
        _ => "as many as half of the L2 cache holds",
    };
    (block_q, format!("{block_q} queries a block ({} rows a register tile): {limit}", kernels.rows))
}

/// Blocks of a mask beyond which a unit of work across their borders costs nothing that matters.
const LONG_BLOCK: usize = 100 * BLOCK_Q_MAX;

/// Query rows of a unit of work where a mask has blocks of `blocks` queries: as large a part of one as may be, or
/// several where they are small. Neither threads nor caches have a say, as results depend on which rows share a tile.
fn within_blocks(blocks: usize) -> usize {
    if blocks > LONG_BLOCK {
        return BLOCK_Q_MAX;
    }
    if blocks < BLOCK_Q_MIN {
        return BLOCK_Q_MIN / blocks.max(1) * blocks.max(1);
    }
    let parts = blocks.div_ceil(BLOCK_Q_MAX)..=blocks / BLOCK_Q_MIN;
    parts.into_iter().find(|&parts| blocks.is_multiple_of(parts)).map_or(BLOCK_Q_MAX, |parts| blocks / parts)
}

/// Saturates: a problem that is only to be explained may be of any size.
fn workspace_bytes(problem: &Problem, threads: usize, strategy: &Strategy) -> usize {
    let product = |factors: &[usize]| factors.iter().fold(1usize, |product, &n| product.saturating_mul(n));
    let heads = [problem.num_kv_heads, problem.batch];
    match strategy {
        Strategy::Tiled { block_q, layout } => {
            let head = product(&[problem.kv_len.div_ceil(TILE_KEYS), layout.words(), 4]);
            let packed = product(&[head, heads[0], heads[1]]).min(head.max(PACKED_BYTES_MAX));
            // Where Q is smoothed, a mean for each row at most, and its scores.
            let means = if layout.smooths_q() { layout.head_dim + TILE_KEYS } else { 0 };
            let row = 2 * layout.qk_dim + 2 * TILE_KEYS + layout.padded_dim() + means;
            let scratch = product(&[*block_q, 4, row]);
            let tail = problem.blocks.filter(|_| problem.pooled_tail).map_or(0, |[_, block_k]| {
                let tiles = problem.kv_len.div_ceil(block_k.max(1)).div_ceil(TILE_KEYS);
                product(&[tiles, TILE_KEYS, layout.head_dim + layout.padded_dim(), 4, heads[0], heads[1]])
            });
            packed.saturating_add(scratch.saturating_mul(threads)).saturating_add(tail)
        }
        Strategy::Split => {
            let parts = product(&[problem.kv_len.div_ceil(SPLIT_KEYS), heads[0], heads[1]]);
            product(&[parts, problem.q_len, problem.group_size(), 4, problem.value_dim + 2])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_work_are_parts_of_blocks() {
        let of = |blocks: &[usize]| blocks.iter().map(|&blocks| within_blocks(blocks)).collect::<Vec<_>>();
        assert_eq!(of(&[64, 128, 192, 256, 384]), [64, 128, 192, 128, 192]);
        assert_eq!(of(&[1, 16, 33, 47]), [48, 48, 33, 47]);
        // No part of 48 to 192 rows divides a prime; and none is sought in a block of any length.
        assert_eq!(of(&[193, 1_000_003, usize::MAX]), [192, 192, 192]);
    }
}
