//! The functions of the crate `candle-flash-attn` 0.11, by the same names: change the import, and nothing else.
//!
//! Dense tensors are `[batch, seq, heads, head_dim]`, packed ones `[total, heads, head_dim]` with u32 boundaries.
//! Beyond the original they take f32, any strides and any head_dim from 1 to 576, values of another head_dim, 1 to 512,
//! and one batch of keys and values for many of queries, and run on CPUs; a GPU takes a head_dim to 256, V's the same. Causal masks and windows are aligned bottom-right, as there.
//!
//! Not here: `flash_attn_varlen_alibi` and `flash_attn_varlen_alibi_windowed` (an ALiBi bias needs a mask, which packed
//! sequences do not take yet) and `flash_attn_varlen_paged_windowed` (its pages are not quantised).

use candle_core::{DType, Device, Result, Tensor};
use sageattention::{Error, Layout};

use crate::error::wrap;
use crate::view::wrong_dtype;
use crate::{Options, sage_attention};

/// The right limit that a causal mask is.
fn right_of(causal: bool) -> Option<usize> {
    causal.then_some(0)
}

fn dense(softmax_scale: f32, left: Option<usize>, right: Option<usize>, softcap: Option<f32>) -> Options {
    let options = Options::new().layout(Layout::Nhd).sm_scale(softmax_scale).window(left, right);
    // 0 turns it off in FlashAttention.
    match softcap {
        Some(cap) if cap != 0.0 => options.logit_softcap(cap),
        _ => options,
    }
}

/// Attention, causal or not. `[batch, seq, heads, head_dim]`.
///
/// # Errors
/// As [`sage_attention`].
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    flash_attn_windowed(q, k, v, softmax_scale, None, right_of(causal))
}

/// Attention in a sliding window: `None` is no limit, `window_size_right = Some(0)` is causal.
///
/// # Errors
/// As [`sage_attention`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    sage_attention(q, k, v, &dense(softmax_scale, window_size_left, window_size_right, None))
}

/// Attention with an ALiBi bias: `alibi_slopes` is `[heads]`, f32.
///
/// # Errors
/// As [`sage_attention`].
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    flash_attn_alibi_windowed(q, k, v, alibi_slopes, softmax_scale, None, right_of(causal))
}

/// Attention in a sliding window with an ALiBi bias.
///
/// # Errors
/// As [`sage_attention`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let (left, right) = (window_size_left, window_size_right);
    flash_attn_alibi_windowed_softcap(q, k, v, Some(alibi_slopes), softmax_scale, left, right, 0.0)
}

/// Attention in a sliding window with soft-capped scores (0 is no cap) and, maybe, an ALiBi bias.
///
/// # Errors
/// As [`sage_attention`].
#[allow(clippy::too_many_arguments)] // the original's
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let mut options = dense(softmax_scale, window_size_left, window_size_right, Some(softcap));
    if let Some(slopes) = alibi_slopes {
        options = options.mask(&alibi_bias(slopes, q, k, window_size_right == Some(0))?);
    }
    sage_attention(q, k, v, &options)
}

/// Attention of packed sequences, causal or not. `[total, heads, head_dim]`; `seqlens` are `[batch + 1]` boundaries.
///
/// # Errors
/// As [`sage_attention`].
#[allow(clippy::too_many_arguments)] // the original's
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let options = dense(softmax_scale, None, right_of(causal), None);
    sage_attention(q, k, v, &options.packed(seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k))
}

/// Attention of packed sequences in a sliding window.
///
/// # Errors
/// As [`sage_attention`].
#[allow(clippy::too_many_arguments)] // the original's
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let options = dense(softmax_scale, window_size_left, window_size_right, None);
    sage_attention(q, k, v, &options.packed(seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k))
}

/// Attention of packed sequences in a sliding window with soft-capped scores (0 is no cap).
///
/// # Errors
/// As [`sage_attention`]; and with `alibi_slopes`, which packed sequences do not take yet.
#[allow(clippy::too_many_arguments)] // the original's
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    if alibi_slopes.is_some() {
        let instead = "call flash_attn_alibi with padded tensors";
        return Err(wrap(Error::unsupported("alibi_slopes with packed sequences", instead)));
    }
    let options = dense(softmax_scale, window_size_left, window_size_right, Some(softcap));
    sage_attention(q, k, v, &options.packed(seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k))
}

/// `−slope · |i + kv_len − q_len − j|` for query `i` and key `j`, as an additive mask.
fn alibi_bias(slopes: &Tensor, q: &Tensor, k: &Tensor, causal: bool) -> Result<Tensor> {
    let (&[_, q_len, heads, _], &[_, kv_len, _, _]) = (q.dims(), k.dims()) else {
        let found = format!("q {:?}, k {:?}", q.dims(), k.dims());
        return Err(wrap(Error::value("shape", found, Layout::Nhd.dimensions())));
    };
    if slopes.dtype() != DType::F32 {
        return Err(wrap(wrong_dtype("alibi_slopes", slopes.dtype(), "f32")));
    }
    if slopes.dims() != [heads] {
        let found = format!("{:?}", slopes.dims());
        return Err(wrap(Error::value("alibi_slopes shape", found, format!("[{heads}], the heads of q"))));
    }
    let device = q.device();
    let steps = |len: usize, device: &Device| -> Result<Tensor> {
        Tensor::arange(0, len as u32, device)?.to_dtype(DType::F32)
    };
    let keys = steps(kv_len, device)?.reshape((1, 1, 1, kv_len))?;
    let distance = if causal {
        // Only earlier keys are seen, and softmax does not see what all keys of a row share: one row serves all.
        keys.affine(-1.0, kv_len as f64 - 1.0)?
    } else {
        let diagonal = steps(q_len, device)?.affine(1.0, kv_len as f64 - q_len as f64)?;
        diagonal.reshape((1, 1, q_len, 1))?.broadcast_sub(&keys)?.abs()?
    };
    slopes.reshape((1, heads, 1, 1))?.broadcast_mul(&distance)?.neg()
}
