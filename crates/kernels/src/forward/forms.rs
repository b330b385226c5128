//! What a scheme's operands are for a call, and what its attention kernel's tile shape is chosen by.

use sage_core::{Accumulator, Granularity, IntQuantizer, Result, Scheme};

use super::call::ForwardCall;
use super::choice::FEW_QUERIES;
use super::request::Extent;
use super::{scores, values};
use crate::attention::{MaskForm, key_columns, value_columns};
use crate::key_order::KeyOrder;
use crate::operand::{Element, OperandSource, Operands};
use crate::preprocess::MOST_CHANNELS;
use crate::sequence::KEY_TILE;
use crate::tiling::{Engine, Tiling};
use crate::tuning::{Key, holds_biases};

/// The forms that a scheme's operands have in a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forms {
    /// The operands.
    pub operands: Operands,
    /// Rows of Q that share a subtracted mean.
    pub smooth_q: Option<usize>,
    /// What the attention kernel's tile shape is chosen by.
    pub key: Key,
}

impl Forms {
    /// # Errors
    /// When no kernel computes the scheme.
    pub fn of(call: &ForwardCall, scheme: &Scheme) -> Result<Self> {
        let qk = scores::form(call, scheme)?;
        let smooth_q = scores::smooth_q_rows(scheme, call.problem.q_len)?;
        let operands = Operands::new(call.problem.dtype, qk, values::form(call, scheme)?);
        Ok(Forms { operands, smooth_q, key: key(call, scheme, &operands, smooth_q) })
    }
}

/// Whether an additive mask is packed where the kernel can read its words: one for all heads, and for all sequences or
/// all queries, as a copy of more would take as much memory as scores.
pub(super) fn packs_biases(call: &ForwardCall) -> bool {
    let Extent { batches, heads, rows } = call.request.mask_extent;
    matches!(call.request.mask, MaskForm::Bias(_)) && !heads && !(batches && rows)
}

/// Whether a kernel reads the words of packed biases.
pub(super) fn has_words(tiling: &Tiling, key: &Key, operands: &Operands) -> bool {
    match tiling.engine() {
        // Biases lie in the natural order of keys.
        Engine::Warps => tiling.tile_keys() == KEY_TILE && operands.key_order() == KeyOrder::Natural,
        Engine::Warpgroups => key.bias_bytes > 0,
    }
}

/// What the tile shape is chosen for.
fn key(call: &ForwardCall, scheme: &Scheme, operands: &Operands, smooth_q: Option<usize>) -> Key {
    let key = key_without_biases(call, scheme, operands, smooth_q);
    let MaskForm::Bias(dtype) = call.request.mask else { return key };
    let staged = Key { bias_bytes: dtype.bytes(), ..key };
    if key.warpgroups && packs_biases(call) && holds_biases(&call.machine, &staged) {
        return staged;
    }
    Key { plain: true, ..key }
}

fn key_without_biases(
    call: &ForwardCall,
    scheme: &Scheme,
    operands: &Operands,
    smooth_q: Option<usize>,
) -> Key {
    let granularity = operands.quantizer.map(|quantizer| quantizer.granularity);
    Key {
        integer: granularity.is_some(),
        fp4_scores: operands.k.element == Element::E2M1,
        fp8: operands.v.element == Element::E4M3,
        fp4_values: operands.v.element == Element::E2M1,
        two_level: operands.sums_tiles_first(),
        padded_dim: key_columns(operands, call.problem.head_dim, scheme.rotate),
        padded_value_dim: value_columns(operands, call.problem.value_dim),
        values_in_keys: finds_values_in_keys(call, operands),
        plain: call.problem.logit_softcap.is_some()
            || smooth_q.is_some()
            || granularity == Some(Granularity::PerToken),
        unaligned: !call.request.aligned,
        max_rows_per_warp: max_rows_per_warp(operands),
        warpgroups: suits_warpgroups(call, operands),
        per_block: granularity == Some(Granularity::PerBlock),
        few_rows: call.heads_and_rows()[1] <= 128,
        bias_bytes: 0,
    }
}

/// Whether the kernel reads values in the tiles of keys: of large heads, whose tiles fill shared memory.
fn finds_values_in_keys(call: &ForwardCall, operands: &Operands) -> bool {
    let given = [operands.k, operands.v].iter().all(|operand| operand.source == OperandSource::Given);
    let is_large = call.problem.head_dim > MOST_CHANNELS;
    // A block's channels start where a swizzle of the rows does.
    let blocks_align = call.problem.value_dim <= MOST_CHANNELS || call.problem.value_dim == 2 * MOST_CHANNELS;
    call.request.values_in_keys && given && is_large && blocks_align
}

/// Most query rows of a warp: the groups of smaller warps would be mixed in one lane.
fn max_rows_per_warp(operands: &Operands) -> usize {
    match operands.quantizer {
        Some(IntQuantizer { granularity: Granularity::PerWarp | Granularity::PerThread, tile, .. }) => {
            tile.warp_q
        }
        _ => 32,
    }
}

/// Whether there is a kernel of warpgroups for such operands, and work for it: it takes 128 query rows and more at
/// once, and keys.
fn suits_warpgroups(call: &ForwardCall, operands: &Operands) -> bool {
    let (problem, request) = (&call.problem, &call.request);
    let [_, rows] = call.heads_and_rows();
    // Tiles of the workspace always have a map, wherever they came from.
    let in_workspace = [operands.k, operands.v].iter().all(|o| o.source == OperandSource::Workspace);
    let mapped = if in_workspace { request.aligned } else { request.has_tensor_map };
    let multiplied = !matches!(operands.k.element, Element::I4 | Element::E2M1);
    let summed = match (operands.v.element, operands.sums) {
        (_, Accumulator::F32) => true,
        // A tile's own sums beside all tiles' would take 256 registers of wider heads: 2.4 KB of spills in the loop.
        (Element::E4M3, Accumulator::F32ThenF32) => problem.value_dim <= 128,
        _ => false,
    };
    // There is no tensor map of nothing, and the other kernels need none to write zeros.
    let work = rows > FEW_QUERIES && problem.kv_len > 0;
    // Their sums and queries are those of a whole head.
    let held = problem.head_dim <= MOST_CHANNELS && problem.value_dim <= MOST_CHANNELS;
    call.machine.has_wgmma() && held && multiplied && summed && mapped && work && counts_pieces(call)
}

/// Whether a counter of 32 bits holds the pieces of work of all warpgroups, of which the least has 64 query rows:
/// not with very many packed sequences of which one is long.
fn counts_pieces(call: &ForwardCall) -> bool {
    let [heads, rows] = call.heads_and_rows();
    (call.problem.batch * heads)
        .checked_mul(rows.div_ceil(64))
        .is_some_and(|count| i32::try_from(count).is_ok())
}
