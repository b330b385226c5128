//! Pooled terms for the blocks that a block mask leaves out, after attention over the others.

use super::attention::lse_address;
use super::call::{ForwardCall, ForwardPass, slot};
use crate::pass::Slot;
use crate::predict::{LengthLists, PoolBlocksArgs, PoolBlocksConfig, TokenBlocks, TokensArgs};
use crate::preprocess::Source;
use crate::tail::{PooledTailArgs, PooledTailConfig};

/// Adds the launches that pool K and V, and that add what the means of the blocks are worth to the output of `blocks` of
/// so many queries and keys; `lse` is whether the caller wants it.
pub(super) fn add(call: ForwardCall, [block_q, block_k]: [usize; 2], lse: bool, pass: &mut ForwardPass) {
    let (problem, request) = (call.problem, call.request);
    if problem.kv_len == 0 {
        return;
    }
    // A longer block has the same rows.
    let (block_q, block_k) = (block_q.min(problem.q_len.max(1)), block_k.min(problem.kv_len));
    let k_blocks = problem.kv_len.div_ceil(block_k);
    let (kv_heads, batch) = (problem.num_kv_heads, problem.batch);
    let k_mean = pass.find(slot::K_MEAN);
    let smooth_k = k_mean != Slot::NONE;
    let sources = [call.source(), call.value_source()];
    let mut of_means =
        |name, source: &Source| pass.slot(name, 2 * batch * kv_heads * k_blocks * source.padded_dim());
    let means = [of_means(slot::K_BLOCK_MEANS, &sources[0]), of_means(slot::V_BLOCK_MEANS, &sources[1])];
    for (of_values, (source, means)) in sources.into_iter().zip(means).enumerate() {
        let smooth = smooth_k && of_values == 0;
        let blocks = TokenBlocks { source, tokens: block_k };
        let pool = PoolBlocksConfig { blocks, smooth, similarity: false, narrow: true };
        pass.launch(pool, move |at, launch| {
            let lists = LengthLists { queries: at.tensors.cu_seqlens_q, keys: at.tensors.cu_seqlens_k };
            let args = PoolBlocksArgs {
                x: if of_values == 1 { at.tensors.v } else { at.tensors.k },
                tokens: TokensArgs::of_keys(&problem, block_k, lists),
                heads: kv_heads as i32,
                all_heads: (batch * kv_heads) as i32,
                subtracted: if smooth { at.of(k_mean) } else { 0 },
                means: at.of(means),
                ..PoolBlocksArgs::default()
            };
            launch(pool.blocks.grid(problem.kv_len, kv_heads, batch), &args.args(), &[]);
        });
    }
    let config = PooledTailConfig {
        dtype: problem.dtype,
        head_dim: problem.head_dim,
        value_dim: problem.value_dim,
        aligned: request.aligned,
        softcap: problem.logit_softcap.is_some(),
        smooth_k,
        band: !problem.band.is_full(),
        lse,
        lengths: request.lengths,
    };
    let kept_lse = pass.find(slot::LSE);
    let all_heads = batch * problem.num_q_heads;
    pass.launch(config, move |at, launch| {
        let args = PooledTailArgs {
            q: at.tensors.q,
            k: at.tensors.k,
            v: at.tensors.v,
            out: at.tensors.out,
            lse: lse_address(kept_lse, at),
            k_means: at.of(means[0]),
            k_mean: at.of(k_mean),
            v_means: at.of(means[1]),
            blocks: at.tensors.blocks,
            block_q: block_q as i32,
            block_k: block_k as i32,
            k_blocks: k_blocks as i32,
            lengths: call.lengths(at.tensors),
            heads: problem.num_q_heads as i32,
            all_heads: all_heads as i32,
            group: problem.group_size() as i32,
            sm_scale: problem.sm_scale,
            softcap: problem.logit_softcap.unwrap_or(0.0),
        };
        launch(config.grid(problem.q_len, all_heads), &args.args(), &[]);
    });
}
