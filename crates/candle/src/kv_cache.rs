//! The quantised KV cache, for candle's tensors.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};
use sageattention::{Error, KvCacheOptions};

use crate::Options;
use crate::cpu::{output, with_attention};
use crate::error::wrap;
use crate::op::{dense_heads, no_backward};
use crate::view;

/// Keys and values of past tokens, quantised, in this process's memory: see [`sageattention::KvCache`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use sageattention_candle::{KvCache, KvCacheOptions, Options};
///
/// let mut cache = KvCache::new(KvCacheOptions::new(3, 64))?; // heads of K and V, head_dim
/// let prompt = Tensor::randn(0f32, 1., (1, 3, 100, 64), &Device::Cpu)?; // [batch, heads, tokens, head_dim]
/// cache.append(&prompt, &prompt)?;
/// let q = Tensor::randn(0f32, 1., (1, 9, 1, 64), &Device::Cpu)?; // the last token's queries
/// let out = cache.attend(&q, &Options::new())?;
/// assert_eq!(out.dims(), [1, 9, 1, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KvCache {
    cache: sageattention::KvCache,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// Names the option that is outside its range.
    pub fn new(options: KvCacheOptions) -> Result<Self> {
        Ok(KvCache { cache: options.build().map_err(wrap)? })
    }

    /// Appends new tokens to every sequence: `k` and `v` are `[sequences, num_kv_heads, tokens, head_dim]`, or as
    /// [`KvCacheOptions::layout`] says, on the CPU, of any strides.
    ///
    /// # Errors
    /// When a tensor does not fit the cache, or its pool has too few pages: the cache is then as it was.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let all: Vec<usize> = (0..self.cache.sequences()).collect();
        self.append_to(&all, k, v)
    }

    /// Appends new tokens to some sequences: an entry of the tensors' batch for each of `sequences`.
    ///
    /// # Errors
    /// As [`KvCache::append`], and when a sequence does not exist or is named twice.
    pub fn append_to(&mut self, sequences: &[usize], k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = (dense_heads(k)?, dense_heads(v)?);
        let ((k, k_layout), (v, v_layout)) = (k.storage_and_layout(), v.storage_and_layout());
        let k = view::tensor("k", host("k", &k)?, k_layout).map_err(wrap)?;
        let v = view::tensor("v", host("v", &v)?, v_layout).map_err(wrap)?;
        self.cache.append_to(sequences, k, v).map_err(wrap)
    }

    /// Attention of `q`, in `options`' layout, over everything cached. The last query is that of the last cached token,
    /// so append first; [`Options::causal`] matters when there is more than one. Lengths and scheme are the cache's.
    ///
    /// # Errors
    /// When q or an option does not fit the cache.
    pub fn attend(&self, q: &Tensor, options: &Options) -> Result<Tensor> {
        let all: Vec<usize> = (0..self.cache.sequences()).collect();
        self.attend_to(&all, q, options)
    }

    /// Attention over some sequences: an entry of q's batch for each of `sequences`, which may repeat.
    ///
    /// # Errors
    /// As [`KvCache::attend`], and when a sequence does not exist.
    pub fn attend_to(&self, sequences: &[usize], q: &Tensor, options: &Options) -> Result<Tensor> {
        let q = dense_heads(q)?;
        let out = {
            let (storage, layout) = q.storage_and_layout();
            let view = view::tensor("q", host("q", &storage)?, layout).map_err(wrap)?;
            with_attention(options, |attention| {
                output(view.dtype(), layout.dims(), |out| {
                    self.cache.attend_into(sequences, view, attention, out, None)
                })
            })?
        };
        // In candle's graph, so that a backward pass is an error and no gradient is lost silently.
        q.apply_op1(Computed { out: Mutex::new(Some(out)) })
    }

    /// The cache itself: sharing of prefixes, block tables, memory.
    pub fn plain(&self) -> &sageattention::KvCache {
        &self.cache
    }

    /// The cache itself, to fork, truncate or clear.
    pub fn plain_mut(&mut self) -> &mut sageattention::KvCache {
        &mut self.cache
    }
}

/// A tensor's memory, if it is this process's.
fn host<'a>(name: &'static str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        other => {
            let found = format!("{:?}", other.device().location());
            Err(wrap(Error::value(format!("{name} device"), found, "cpu, where the cache is")))
        }
    }
}

/// Attention that was computed already.
struct Computed {
    out: Mutex<Option<CpuStorage>>,
}

impl CustomOp1 for Computed {
    fn name(&self) -> &'static str {
        "sage-attention over a KV cache"
    }

    fn cpu_fwd(&self, _: &CpuStorage, q: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.out.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(out) => Ok((out, q.shape().clone())),
            None => candle_core::bail!("{}: run twice", self.name()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        no_backward()
    }
}
