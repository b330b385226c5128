//! Options of a call whose tensors are made up.

use clap::Args;
use sage_core::Error;
use sageattention::{Attention, Layout, Lengths, MAX_HEAD_DIM, MAX_VALUE_DIM, Result};

use super::{CacheOptions, DTypeOption, ForwardOptions, MaskName};

/// Sizes of tensors that are made up.
#[derive(Clone, Copy, Debug, Args)]
pub struct SizeOptions {
    /// Sequences
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub heads: usize,
    /// Key and value heads [default: as many as query heads]
    #[arg(long, value_name = "N")]
    pub kv_heads: Option<usize>,
    /// Queries of a sequence
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub seq: usize,
    /// Keys of a sequence [default: as many as queries]
    #[arg(long, value_name = "N")]
    pub kv_len: Option<usize>,
}

impl SizeOptions {
    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Keys of a sequence.
    pub fn kv_len(&self) -> usize {
        self.kv_len.unwrap_or(self.seq)
    }
}

/// A call whose tensors are made up: what `explain` plans is what `emulate` runs.
#[derive(Clone, Debug, Args)]
pub struct ProblemOptions {
    #[command(flatten)]
    pub sizes: SizeOptions,
    /// Channels of a head of queries and keys
    #[arg(
        long, value_name = "N", default_value_t = 64,
        value_parser = clap::value_parser!(u16).range(1..=MAX_HEAD_DIM as i64),
    )]
    pub head_dim: u16,
    /// Channels of a head of values and of the output [default: as many as of queries and keys]
    #[arg(
        long, value_name = "N", conflicts_with = "kv_cache",
        value_parser = clap::value_parser!(u16).range(1..=MAX_VALUE_DIM as i64),
    )]
    pub value_dim: Option<u16>,
    #[command(flatten)]
    pub dtype: DTypeOption,
    #[command(flatten)]
    pub forward: ForwardOptions,
    /// An explicit mask of random numbers, [batch, 1, seq, kv_len], that hides about every fifth key
    #[arg(long, value_enum, value_name = "DTYPE", conflicts_with_all = ["padding", "kv_cache"])]
    pub mask: Option<MaskName>,
    /// The last N keys are padding, which a boolean mask hides
    #[arg(long, value_name = "N", conflicts_with = "kv_cache")]
    pub padding: Option<usize>,
    /// Packed sequences: boundaries of their queries, from 0 to the total
    #[arg(
        long, value_name = "N,…", value_delimiter = ',', allow_hyphen_values = true,
        conflicts_with_all = ["batch", "seq", "kv_len", "kv_lens", "layout", "mask", "padding", "kv_cache"],
    )]
    pub cu_seqlens: Option<Vec<i32>>,
    /// Boundaries of the packed sequences' keys [default: those of their queries]
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        allow_hyphen_values = true,
        requires = "cu_seqlens"
    )]
    pub cu_seqlens_k: Option<Vec<i32>>,
    #[command(flatten)]
    pub cache: Option<CacheOptions>,
}

impl ProblemOptions {
    /// Attention with these options, but for a mask and sinks.
    pub fn attention(&self) -> Attention<'_> {
        let attention = self.forward.attention();
        match self.lengths() {
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => attention.packed(cu_seqlens_q, cu_seqlens_k),
            _ => attention,
        }
    }

    /// The lengths of the sequences.
    pub fn lengths(&self) -> Lengths<'_> {
        match (&self.cu_seqlens, &self.forward.kv_lens) {
            (Some(queries), _) => Lengths::Packed {
                cu_seqlens_q: queries,
                cu_seqlens_k: self.cu_seqlens_k.as_ref().unwrap_or(queries),
            },
            (None, Some(kv_lens)) => Lengths::KvLens(kv_lens),
            (None, None) => Lengths::Dense,
        }
    }

    /// Shapes of Q, K and V.
    ///
    /// # Errors
    /// When the boundaries of packed sequences end below 0.
    pub fn shapes(&self) -> Result<[Vec<usize>; 3]> {
        let SizeOptions { batch, heads, seq, .. } = self.sizes;
        let (kv_heads, head_dim) = (self.sizes.kv_heads(), usize::from(self.head_dim));
        let value_dim = usize::from(self.value_dim.unwrap_or(self.head_dim));
        if let Lengths::Packed { cu_seqlens_q, cu_seqlens_k } = self.lengths() {
            let (queries, keys) =
                (total("cu_seqlens_q", cu_seqlens_q)?, total("cu_seqlens_k", cu_seqlens_k)?);
            return Ok([
                vec![queries, heads, head_dim],
                vec![keys, kv_heads, head_dim],
                vec![keys, kv_heads, value_dim],
            ]);
        }
        let shape = |heads, rows, channels| match Layout::from(self.forward.layout.layout) {
            Layout::Hnd => vec![batch, heads, rows, channels],
            Layout::Nhd => vec![batch, rows, heads, channels],
        };
        let kv_len = self.sizes.kv_len();
        Ok([
            shape(heads, seq, head_dim),
            shape(kv_heads, kv_len, head_dim),
            shape(kv_heads, kv_len, value_dim),
        ])
    }
}

/// Rows of a packed tensor.
fn total(name: &'static str, boundaries: &[i32]) -> Result<usize> {
    let last = boundaries.last().copied().unwrap_or(0);
    usize::try_from(last).map_err(|_| Error::value(name, last, "at least 0"))
}
