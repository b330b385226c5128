//! A call to attention: what the caller hands over, and what a plan depends on.

use std::fmt;

use crate::{Alignment, Band, BlockMask, DType, Lengths, Operand, TensorView};

/// Largest head dimension of queries and keys.
///
/// An INT8 score of so many channels is at most `127² · 576 = 9_290_304` in magnitude, and `127² · 1024 = 16_516_096`
/// where rotation pads them: below 2²⁴, so single precision holds each exactly. Above 260 channels a score may exceed
/// 2²², so that its bits and those of 1.5 · 2²³ (`0x4B400000`) do not add up to it as a number: a kernel that converts
/// integers in this way needs another for such heads.
pub const MAX_HEAD_DIM: usize = 576;

/// Largest head dimension of values, and so of the output.
pub const MAX_VALUE_DIM: usize = 512;

/// Most query heads of a call, all batch entries together.
pub const MAX_HEADS: usize = 1 << 24;

/// Order of the dimensions of dense query, key, value and output tensors. `head_dim` is the number of a head's channels:
/// one for queries and keys, and one, which may be another, for values and the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[batch, heads, seq, head_dim]`.
    #[default]
    Hnd,
    /// `[batch, seq, heads, head_dim]`.
    Nhd,
}

impl Layout {
    /// The name used in messages and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::Hnd => "HND",
            Layout::Nhd => "NHD",
        }
    }

    /// The dimensions, for messages.
    pub const fn dimensions(self) -> &'static str {
        match self {
            Layout::Hnd => "[batch, heads, seq, head_dim]",
            Layout::Nhd => "[batch, seq, heads, head_dim]",
        }
    }
}

/// Everything a caller hands over, unchecked. `T` says whose memory it lies in.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Inputs<'a, T: Operand = TensorView<'a>> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// Explicit mask.
    pub mask: Option<T::Mask>,
    /// Blocks of the score matrix to compute; all when absent.
    pub block_mask: Option<BlockMask<T::Blocks>>,
    /// Lengths of the sequences.
    pub lengths: Lengths<'a, T::List>,
    /// Attention sinks, f32 `[num_q_heads]` without gaps: each head's is a logit in natural units that joins the
    /// softmax's denominator and has no value. `sm_scale` and the soft cap do not touch it. −∞ is none.
    pub sinks: Option<T>,
}

impl<'a, T: Operand> Inputs<'a, T> {
    /// Dense queries, keys and values without an explicit mask.
    pub fn new(q: T, k: T, v: T) -> Self {
        Inputs { q, k, v, mask: None, block_mask: None, lengths: Lengths::Dense, sinks: None }
    }

    /// The same with an explicit mask, or without.
    #[must_use]
    pub fn mask(self, mask: impl Into<Option<T::Mask>>) -> Self {
        Inputs { mask: mask.into(), ..self }
    }

    /// The same with a block mask, or without.
    #[must_use]
    pub fn block_mask(self, block_mask: impl Into<Option<BlockMask<T::Blocks>>>) -> Self {
        Inputs { block_mask: block_mask.into(), ..self }
    }

    /// The same with these lengths.
    #[must_use]
    pub fn lengths(self, lengths: Lengths<'a, T::List>) -> Self {
        Inputs { lengths, ..self }
    }

    /// The same with attention sinks, or without.
    #[must_use]
    pub fn sinks(self, sinks: impl Into<Option<T>>) -> Self {
        Inputs { sinks: sinks.into(), ..self }
    }
}

/// What a caller asks for beside the tensors.
///
/// ```
/// use sage_core::{Alignment, Band, Options};
///
/// let options = Options::default().band(Band::causal(Alignment::TopLeft)).logit_softcap(20.0);
/// assert_eq!(options.sm_scale, None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// Order of the dimensions of dense tensors.
    pub layout: Layout,
    /// Factor on Q·Kᵀ; `1 / √head_dim` when absent.
    pub sm_scale: Option<f32>,
    /// Causal masks and sliding windows.
    pub band: Band,
    /// Scaled scores `s` become `softcap · tanh(s / softcap)`, before any mask is added.
    pub logit_softcap: Option<f32>,
    /// Whether each block that a block mask or a predictor leaves out counts with the means of its keys and values:
    /// [`sparse::pooled_tail`](crate::sparse::pooled_tail()).
    pub pooled_tail: bool,
}

impl Options {
    /// The same with this order of the dimensions.
    #[must_use]
    pub const fn layout(self, layout: Layout) -> Self {
        Options { layout, ..self }
    }

    /// The same with this factor on Q·Kᵀ.
    #[must_use]
    pub fn sm_scale(self, sm_scale: impl Into<Option<f32>>) -> Self {
        Options { sm_scale: sm_scale.into(), ..self }
    }

    /// The same with this causal mask or sliding window.
    #[must_use]
    pub const fn band(self, band: Band) -> Self {
        Options { band, ..self }
    }

    /// The same with this soft cap.
    #[must_use]
    pub fn logit_softcap(self, cap: impl Into<Option<f32>>) -> Self {
        Options { logit_softcap: cap.into(), ..self }
    }

    /// The same with pooled terms for the blocks left out, or without.
    #[must_use]
    pub const fn pooled_tail(self, pooled_tail: bool) -> Self {
        Options { pooled_tail, ..self }
    }
}

/// The factor on Q·Kᵀ of a call that names none.
pub fn default_sm_scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// The shape of a checked call: what a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Problem {
    /// Element type of Q, K, V and the output.
    pub dtype: DType,
    /// Number of sequences.
    pub batch: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads; query head `h` reads head `h / (num_q_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    /// Queries of the longest sequence.
    pub q_len: usize,
    /// Keys of the longest sequence; of those that some query may see, see [`Call`](crate::Call).
    pub kv_len: usize,
    /// Channels of a head of queries and keys.
    pub head_dim: usize,
    /// Channels of a head of values and of the output.
    pub value_dim: usize,
    /// Factor on Q·Kᵀ.
    pub sm_scale: f32,
    /// Causal masks and sliding windows.
    pub band: Band,
    /// Soft cap of the scaled scores.
    pub logit_softcap: Option<f32>,
    /// Whether sequences are packed.
    pub packed: bool,
    /// Whether there is an explicit mask.
    pub masked: bool,
    /// Queries and keys of a block of a block mask, where there is one.
    pub blocks: Option<[usize; 2]>,
    /// Whether the blocks that it leaves out count with their means.
    pub pooled_tail: bool,
    /// Whether there are attention sinks.
    pub sinks: bool,
}

impl Problem {
    /// Dense tensors of `[batch, num_q_heads, num_kv_heads]` and `[q_len, kv_len]`: no mask, band or cap, the scale of
    /// a call that names none, and values of as many channels as keys.
    pub fn dense(
        dtype: DType,
        [batch, num_q_heads, num_kv_heads]: [usize; 3],
        [q_len, kv_len]: [usize; 2],
        head_dim: usize,
    ) -> Self {
        Problem {
            dtype,
            batch,
            num_q_heads,
            num_kv_heads,
            q_len,
            kv_len,
            head_dim,
            value_dim: head_dim,
            sm_scale: default_sm_scale(head_dim),
            band: Band::FULL,
            logit_softcap: None,
            packed: false,
            masked: false,
            blocks: None,
            pooled_tail: false,
            sinks: false,
        }
    }

    /// The same with values of so many channels.
    #[must_use]
    pub const fn value_dim(self, value_dim: usize) -> Self {
        Problem { value_dim, ..self }
    }

    /// The same with a band.
    #[must_use]
    pub const fn band(self, band: Band) -> Self {
        Problem { band, ..self }
    }

    /// The same with a block mask of blocks of so many queries and keys.
    #[must_use]
    pub fn blocks(self, blocks: impl Into<Option<[usize; 2]>>) -> Self {
        Problem { blocks: blocks.into(), ..self }
    }

    /// The same with pooled terms for the blocks left out, or without.
    #[must_use]
    pub const fn pooled_tail(self, pooled_tail: bool) -> Self {
        Problem { pooled_tail, ..self }
    }

    /// The same with attention sinks, or without.
    #[must_use]
    pub const fn sinks(self, sinks: bool) -> Self {
        Problem { sinks, ..self }
    }

    /// Query heads that share a key head.
    pub fn group_size(&self) -> usize {
        self.num_q_heads.checked_div(self.num_kv_heads).unwrap_or(0)
    }

    /// The masks, in words.
    fn visible(&self) -> String {
        let Band { left, right, alignment } = self.band;
        let mut parts = Vec::new();
        if !self.band.is_full() {
            let limit = |side: Option<usize>| side.map_or("any".to_owned(), |n| n.to_string());
            let name = match (left, right) {
                (None, Some(0)) => "causal".to_owned(),
                _ => format!("window of {} before and {} after the diagonal", limit(left), limit(right)),
            };
            let diagonal = match alignment {
                Alignment::BottomRight => "the last query sees the last key".to_owned(),
                Alignment::TopLeft => "the first query sees the first key".to_owned(),
                Alignment::Offset(key) => format!("the first query's diagonal lies at key {key}"),
            };
            parts.push(format!("{name} ({diagonal})"));
        }
        parts.extend(self.masked.then(|| "explicit mask".to_owned()));
        let tail = if self.pooled_tail { ", the others by their means" } else { "" };
        parts.extend(self.blocks.map(|[q, k]| format!("block mask of {q} queries × {k} keys{tail}")));
        if parts.is_empty() { "all keys".to_owned() } else { parts.join(", ") }
    }
}

/// Three rows `name value`: the sizes, what is visible, and how scores are scaled.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { dtype, batch, num_q_heads, num_kv_heads, q_len, kv_len, head_dim, .. } = *self;
        write!(
            f,
            "problem     {dtype}, batch {batch}, {num_q_heads} query heads, {num_kv_heads} key heads, \
             {q_len} queries × {kv_len} keys, head_dim {head_dim}"
        )?;
        if self.value_dim != head_dim {
            write!(f, ", value_dim {}", self.value_dim)?;
        }
        writeln!(f, "{}", if self.packed { ", packed sequences" } else { "" })?;
        writeln!(f, "visible     {}", self.visible())?;
        write!(f, "scores      sm_scale {}", self.sm_scale)?;
        self.logit_softcap.map_or(Ok(()), |cap| write!(f, ", soft cap {cap}"))?;
        f.write_str(if self.sinks { ", a sink for each head" } else { "" })
    }
}
