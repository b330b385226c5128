//! Which keys a query sees, and what is added to their scores.

use crate::{Call, Mask, Sequence};

/// The keys that query `i` of `head` in `sequence` sees, in order, each with the bias that its score gets.
///
/// Keys and queries are counted from the start of their sequence. A key is visible when the band, the block mask
/// and the explicit mask all let it be seen; an additive mask hides a key by −∞.
pub fn visible_keys<'c>(
    call: &'c Call<'_>,
    sequence: &'c Sequence,
    head: usize,
    i: usize,
) -> impl Iterator<Item = (usize, f64)> + 'c {
    let batch = sequence.batch;
    let in_block = move |j: usize| {
        call.block_mask.is_none_or(|mask| mask.blocks.at([batch, head, i / mask.block_q, j / mask.block_k]))
    };
    let bias = move |j: usize| match &call.mask {
        None => Some(0.0),
        Some(Mask::Bool(mask)) => mask.at([batch, head, i, j]).then_some(0.0),
        Some(Mask::Additive(mask)) => {
            Some(f64::from(mask.at([batch, head, i, j]))).filter(|&b| b != f64::NEG_INFINITY)
        }
    };
    call.problem
        .band
        .keys(i, sequence.q_len, sequence.kv_len)
        .filter(move |&j| in_block(j))
        .filter_map(move |j| bias(j).map(|bias| (j, bias)))
}
