//! What a quantised KV cache holds, page by page, and a call that attends to one.
//!
//! A cache keeps, for every head and token, INT8 keys with one scale and values in 16 or 8 bits. Tokens lie in pages of
//! [`CacheLayout::page_size`]; [`BlockTables`] say which page holds which tokens of which sequence. Each page has one
//! constant a head and channel that was subtracted from its keys: see [`crate::oracle::CachedHead`] for why, and for
//! exactly what is stored.

mod tables;

use std::fmt;

use crate::call::{Omitted, canonical};
use crate::{
    BlockMask, Call, Error, Geometry, Inputs, Layout, Lengths, MAX_HEADS, Operand, Options, Result,
    TensorView,
};

pub use tables::{BlockTables, PageCopy};

/// How a cache stores values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ValueFormat {
    /// Half precision; magnitudes above 65504 become infinite.
    #[default]
    F16,
    /// bfloat16.
    BF16,
    /// E4M3 with a scale for each token and head. Relative error of a value: up to 1/16.
    Fp8E4M3,
    /// INT8 with a scale for each token and head. Error of a value: up to 1/254 of its row's largest magnitude, which
    /// is less than E4M3's unless a few channels are much larger than the others.
    Int8,
}

impl ValueFormat {
    /// All formats, in the order of this enum.
    pub const ALL: [ValueFormat; 4] =
        [ValueFormat::F16, ValueFormat::BF16, ValueFormat::Fp8E4M3, ValueFormat::Int8];

    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            ValueFormat::F16 | ValueFormat::BF16 => 2,
            ValueFormat::Fp8E4M3 | ValueFormat::Int8 => 1,
        }
    }

    /// Whether each row has a scale, a single.
    pub const fn is_scaled(self) -> bool {
        matches!(self, ValueFormat::Fp8E4M3 | ValueFormat::Int8)
    }

    /// The name used in messages, in JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            ValueFormat::F16 => "f16",
            ValueFormat::BF16 => "bf16",
            ValueFormat::Fp8E4M3 => "fp8-e4m3",
            ValueFormat::Int8 => "int8",
        }
    }
}

impl fmt::Display for ValueFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a page of a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of a page: a power of two from 16 to 1024.
    pub page_size: usize,
    /// How values are stored.
    pub values: ValueFormat,
}

/// Largest head dimension of a cache, whose keys and values have the same.
pub const MAX_CACHED_HEAD_DIM: usize = 256;

/// Most bytes of a page.
const PAGE_BYTES_MAX: usize = 1 << 30;

impl CacheLayout {
    /// Checks every size.
    ///
    /// # Errors
    /// Names the size that is outside its range.
    pub fn check(&self) -> Result<()> {
        if !(1..=MAX_HEADS).contains(&self.num_kv_heads) {
            return Err(Error::value("num_kv_heads", self.num_kv_heads, format!("1 to {MAX_HEADS}")));
        }
        if !(1..=MAX_CACHED_HEAD_DIM).contains(&self.head_dim) {
            let wanted = format!("1 to {MAX_CACHED_HEAD_DIM} in a KV cache");
            return Err(Error::value("head_dim", self.head_dim, wanted));
        }
        if !self.page_size.is_power_of_two() || !(16..=1024).contains(&self.page_size) {
            return Err(Error::value("page_size", self.page_size, "a power of two from 16 to 1024"));
        }
        if self.page_bytes() > PAGE_BYTES_MAX {
            let wanted = format!("pages of at most {PAGE_BYTES_MAX} bytes; these have {}", self.page_bytes());
            return Err(Error::value("page_size", self.page_size, wanted));
        }
        Ok(())
    }

    /// Bytes of a page's keys, values, scales and constants.
    pub fn page_bytes(&self) -> usize {
        let scales = if self.values.is_scaled() { 8 } else { 4 };
        let token = self.head_dim * (1 + self.values.bytes()) + scales;
        self.num_kv_heads * (self.page_size * token + 4 * self.head_dim)
    }

    /// Checks new keys or values, `[batch, num_kv_heads, tokens, head_dim]` in the caller's layout, and gives them in
    /// that order.
    ///
    /// # Errors
    /// When the shape is another, or channels are not neighbours in memory.
    pub fn check_new<T: Operand>(
        &self,
        name: &'static str,
        tensor: T,
        layout: Layout,
        batch: usize,
    ) -> Result<T> {
        let new = canonical(name, tensor, layout, false)?;
        let &[found_batch, heads, _, head_dim] = new.geometry().shape() else {
            return Err(Error::shape(name, tensor.geometry().shape(), layout.dimensions()));
        };
        for (what, found, wanted) in [
            ("batch", found_batch, batch),
            ("heads", heads, self.num_kv_heads),
            ("head_dim", head_dim, self.head_dim),
        ] {
            if found != wanted {
                let wanted = format!("{} with {what} = {wanted}, as the cache", layout.dimensions());
                return Err(Error::shape(name, tensor.geometry().shape(), wanted));
            }
        }
        Ok(new)
    }
}

impl CacheLayout {
    /// Checks new keys and values for `batch` sequences, in the caller's layout, and gives them as
    /// `[batch, num_kv_heads, tokens, head_dim]`.
    ///
    /// # Errors
    /// When a tensor does not fit the cache, or they do not go together.
    pub fn check_tokens<T: Operand>(&self, k: T, v: T, layout: Layout, batch: usize) -> Result<[T; 2]> {
        let new_k = self.check_new("k", k, layout, batch)?;
        let new_v = self.check_new("v", v, layout, batch)?;
        if v.dtype() != k.dtype() {
            return Err(Error::DType {
                name: "v".into(),
                found: v.dtype().to_string(),
                wanted: format!("{}, as k", k.dtype()),
            });
        }
        if new_v.geometry().shape() != new_k.geometry().shape() {
            let wanted = format!("{:?}, as k", k.geometry().shape());
            return Err(Error::shape("v", v.geometry().shape(), wanted));
        }
        Ok([new_k, new_v])
    }
}

/// Queries over a cache.
#[derive(Clone, Copy, Debug)]
pub struct CachedInputs<'a, T: Operand = TensorView<'a>> {
    /// Queries of each sequence: the last query is that of the last cached token.
    pub q: T,
    /// Explicit mask, broadcastable to `[batch, num_q_heads, q_len, max kv_lens]`.
    pub mask: Option<T::Mask>,
    /// Blocks to compute.
    pub block_mask: Option<BlockMask<T::Blocks>>,
    /// Cached tokens of each sequence.
    pub kv_lens: &'a [i32],
    /// Attention sinks, as those of [`Inputs`].
    pub sinks: Option<T>,
}

impl<'a, T: Operand> CachedInputs<'a, T> {
    /// Queries over so many tokens of each sequence, without masks and sinks.
    pub fn new(q: T, kv_lens: &'a [i32]) -> Self {
        CachedInputs { q, mask: None, block_mask: None, kv_lens, sinks: None }
    }
}

impl<'a, T: Operand> Call<'a, T> {
    /// Checks queries over cached keys and values. In the call that returns, `k` and `v` have the cache's shape, but no
    /// content that means anything: the cache holds the true ones.
    ///
    /// # Errors
    /// As [`Call::check`], and when q does not fit the cache.
    pub fn check_cached(
        inputs: &CachedInputs<'a, T>,
        layout: &CacheLayout,
        options: &Options,
    ) -> Result<Self> {
        if options.pooled_tail {
            let nearest = "attention over a cache computes the blocks that its block mask keeps";
            return Err(Error::unsupported("pooled_tail with a KV cache", nearest));
        }
        let q = canonical("q", inputs.q, options.layout, false)?;
        let wrong = |wanted: String| {
            Error::shape("q", inputs.q.geometry().shape(), format!("{wanted}, as the cache"))
        };
        let &[batch, heads, _, head_dim] = q.geometry().shape() else {
            return Err(wrong(options.layout.dimensions().to_owned()));
        };
        if head_dim != layout.head_dim {
            return Err(wrong(format!("head_dim {}", layout.head_dim)));
        }
        if batch != inputs.kv_lens.len() {
            return Err(wrong(format!("batch {}", inputs.kv_lens.len())));
        }
        if heads == 0 || !heads.is_multiple_of(layout.num_kv_heads) {
            return Err(wrong(format!("a multiple of {} heads", layout.num_kv_heads)));
        }
        let len = inputs.kv_lens.iter().copied().max().unwrap_or(0);
        let len = usize::try_from(len).map_err(|_| Error::value("kv_lens", len, "at least 0"))?;
        let canonical = [batch, layout.num_kv_heads, len, head_dim];
        let shape = match options.layout {
            Layout::Hnd => canonical,
            Layout::Nhd => [0, 2, 1, 3].map(|at| canonical[at]),
        };
        // Every row of the stand-in is q's first.
        let stand_in =
            inputs.q.with_geometry(Geometry::strided("k", &shape, &[0, 0, 0, 1], q.geometry().offset())?);
        let inputs = Inputs {
            mask: inputs.mask,
            block_mask: inputs.block_mask,
            lengths: Lengths::KvLens(inputs.kv_lens),
            sinks: inputs.sinks,
            ..Inputs::new(inputs.q, stand_in, stand_in)
        };
        // Pages hold all keys of a sequence, whatever the band lets its queries see.
        Call::check_keys(&inputs, options, Omitted::None)
    }
}
