//! What a caller asks for beside Q, K and V.

use candle_core::Tensor;
use sageattention::sparse::Predictor;
use sageattention::{Alignment, Attention, Band, Choice, Layout};

/// Options of [`crate::sage_attention`]. One value serves any number of calls.
///
/// Without options: dense `[batch, heads, seq, head_dim]` tensors, no mask, scores scaled by `1 / √head_dim`, and the
/// fastest scheme that is accurate on the device.
#[derive(Clone, Debug, Default)]
#[must_use = "options compute nothing until they are given to `sage_attention`"]
pub struct Options {
    layout: Layout,
    causal: bool,
    window: Band,
    sm_scale: Option<f32>,
    logit_softcap: Option<f32>,
    pub(crate) mask: Option<Tensor>,
    pub(crate) blocks: Option<Blocks>,
    pub(crate) sinks: Option<Tensor>,
    predictor: Option<Predictor>,
    pub(crate) lengths: Lengths,
    pub(crate) scheme: Choice,
}

/// The blocks of the score matrix to compute.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    pub(crate) flags: Tensor,
    pub(crate) block_q: usize,
    pub(crate) block_k: usize,
}

/// Lengths of the sequences of a call.
#[derive(Clone, Debug, Default)]
pub(crate) enum Lengths {
    #[default]
    Dense,
    KvLens(Tensor),
    Packed {
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        // Only a GPU's plan needs them: there the lengths are not read back.
        #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
        max_q_len: usize,
        #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
        max_kv_len: usize,
    },
}

impl Lengths {
    /// The tensors that hold lengths, by name.
    #[cfg(feature = "cuda")]
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Lengths::Dense => Vec::new(),
            Lengths::KvLens(kv_lens) => vec![("kv_lens", kv_lens)],
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k, .. } => {
                vec![("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)]
            }
        }
    }
}

impl Options {
    /// No option set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Order of the dimensions of dense tensors, the output included: `[batch, heads, seq, head_dim]` or, as
    /// `candle-flash-attn` has it, `[batch, seq, heads, head_dim]`.
    pub fn layout(self, layout: Layout) -> Self {
        Options { layout, ..self }
    }

    /// Whether a query sees no later key. Where `q_len != kv_len` the last query sees the last key, unless
    /// [`Options::causal_alignment`] says otherwise.
    pub fn causal(self, causal: bool) -> Self {
        Options { causal, ..self }
    }

    /// A causal mask whose diagonal lies as `alignment` says.
    pub fn causal_alignment(self, alignment: Alignment) -> Self {
        Options { causal: true, window: Band { alignment, ..self.window }, ..self }
    }

    /// A sliding window: keys further than `left` before the diagonal or `right` after it are hidden; `None` is no
    /// limit. With a causal mask, none after the diagonal is visible whatever `right` says.
    pub fn window(self, left: impl Into<Option<usize>>, right: impl Into<Option<usize>>) -> Self {
        Options { window: Band { left: left.into(), right: right.into(), ..self.window }, ..self }
    }

    /// Factor on Q·Kᵀ, instead of `1 / √head_dim`.
    pub fn sm_scale(self, sm_scale: f32) -> Self {
        Options { sm_scale: Some(sm_scale), ..self }
    }

    /// Scaled scores `s` become `softcap · tanh(s / softcap)`, before any mask is added.
    pub fn logit_softcap(self, softcap: f32) -> Self {
        Options { logit_softcap: Some(softcap), ..self }
    }

    /// An explicit mask on Q's device, broadcastable to `[batch, num_q_heads, q_len, kv_len]`, on top of causal mask
    /// and window: u8 (0 hides a key), or f32, f16 or bf16 (added to the scaled scores; −∞ hides a key).
    pub fn mask(self, mask: &Tensor) -> Self {
        Options { mask: Some(mask.clone()), ..self }
    }

    /// Attention sinks, a logit for each query head: see [`Attention::sinks`]. f32 `[num_q_heads]` without gaps, on Q's
    /// device.
    pub fn sinks(self, sinks: &Tensor) -> Self {
        Options { sinks: Some(sinks.clone()), ..self }
    }

    /// The blocks of the score matrix to compute, of `block_q` queries and `block_k` keys each: u8 on Q's device (0
    /// leaves a block out), broadcastable to `[batch, num_q_heads, ⌈q_len / block_q⌉, ⌈kv_len / block_k⌉]`, where the
    /// batch is that of packed sequences and the lengths are those of the longest. Keys of the other blocks still count
    /// for what K and V are quantised by, so that they must be numbers.
    pub fn block_mask(self, flags: &Tensor, block_q: usize, block_k: usize) -> Self {
        Options { blocks: Some(Blocks { flags: flags.clone(), block_q, block_k }), ..self }
    }

    /// Computes only the blocks of the score matrix that a predictor, such as SpargeAttn's, finds worth it.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use sageattention_candle::sparse::{Predictor, Select};
    /// use sageattention_candle::{Options, sage_attention};
    ///
    /// let x = Tensor::randn(0f32, 1., (1, 4, 512, 64), &Device::Cpu)?;
    /// let sparge = Predictor::sparge_attn(Select::TopK(0.5.into()), -0.1);
    /// let out = sage_attention(&x, &x, &x, &Options::new().sparse(sparge))?;
    /// assert_eq!(out.dims(), x.dims());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn sparse(self, predictor: Predictor) -> Self {
        Options { predictor: Some(predictor), ..self }
    }

    /// Only the first `kv_lens[b]` keys of batch entry `b` are valid. `[batch]`, u32 or i32 (on a CPU any integers).
    pub fn kv_lens(self, kv_lens: &Tensor) -> Self {
        Options { lengths: Lengths::KvLens(kv_lens.clone()), ..self }
    }

    /// Packed tensors `[total, heads, head_dim]`: sequence `b` is rows `cu_seqlens[b]..cu_seqlens[b + 1]`.
    /// `[batch + 1]`, u32 or i32 (on a CPU any integers).
    ///
    /// `max_q_len` and `max_kv_len` are the longest sequence's lengths, or more: a GPU plans by them because the
    /// boundaries are not read back; shorter ones cut sequences off there. A CPU does not need them.
    pub fn packed(
        self,
        cu_seqlens_q: &Tensor,
        cu_seqlens_k: &Tensor,
        max_q_len: usize,
        max_kv_len: usize,
    ) -> Self {
        let (cu_seqlens_q, cu_seqlens_k) = (cu_seqlens_q.clone(), cu_seqlens_k.clone());
        Options { lengths: Lengths::Packed { cu_seqlens_q, cu_seqlens_k, max_q_len, max_kv_len }, ..self }
    }

    /// A [`crate::Preset`] or scheme, instead of the device's own choice.
    pub fn scheme(self, choice: impl Into<Choice>) -> Self {
        Options { scheme: choice.into(), ..self }
    }

    /// The same options for tensors of this process's memory, without those that hold tensors.
    pub(crate) fn attention<'a>(&self) -> Attention<'a> {
        let Band { left, right, alignment } = self.window;
        let attention = Attention::new().layout(self.layout).scheme(self.scheme);
        // The alignment is the window's as well, which only `causal_alignment` can set.
        let attention = attention.causal_alignment(alignment).causal(self.causal).window(left, right);
        let attention = self.predictor.clone().into_iter().fold(attention, Attention::sparse);
        let attention = self.sm_scale.into_iter().fold(attention, Attention::sm_scale);
        self.logit_softcap.into_iter().fold(attention, Attention::logit_softcap)
    }

    /// Shape of the log-sum-exp of queries of shape `q`, as far as that is a good one.
    pub(crate) fn lse_shape(&self, q: &[usize]) -> Vec<usize> {
        match (&self.lengths, self.layout, q) {
            (Lengths::Packed { .. }, _, &[total, heads, _]) => vec![heads, total],
            (_, Layout::Hnd, &[batch, heads, seq, _]) | (_, Layout::Nhd, &[batch, seq, heads, _]) => {
                vec![batch, heads, seq]
            }
            _ => Vec::new(),
        }
    }
}
