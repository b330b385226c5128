//! Attention that keeps earlier tokens' keys and values, in candle's cache and in ours.

use candle_core::Tensor;
use sageattention_candle::{KvCache, KvCacheOptions, Options, sage_attention};

use crate::Result;
use crate::attend::{Attend, Cache, Visible};
use crate::method::Method;

/// Keys and values of earlier tokens in candle's own cache, in the model's element type.
pub struct CandleCache {
    method: Method,
    layers: Vec<candle_nn::kv_cache::KvCache>,
}

impl CandleCache {
    /// Room for `max_len` tokens in each layer.
    pub fn new(method: Method, layers: usize, max_len: usize) -> Self {
        let cache = || candle_nn::kv_cache::KvCache::new(2, max_len);
        CandleCache { method, layers: (0..layers).map(|_| cache()).collect() }
    }
}

impl Attend for CandleCache {
    fn attend(&mut self, layer: usize, [q, k, v]: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        let (k, v) = self.layers[layer].append(&k.contiguous()?, &v.contiguous()?)?;
        self.method.compute(q, &k, &v, visible)
    }
}

impl Cache for CandleCache {
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.layers[layer].append(&k.contiguous()?, &v.contiguous()?)?;
        Ok(())
    }

    fn bytes(&self) -> Result<usize> {
        let bytes = |tensor: Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let one = |layer: &candle_nn::kv_cache::KvCache| -> Result<usize> {
            Ok(layer.k()?.map_or(0, bytes) + layer.v()?.map_or(0, bytes))
        };
        self.layers.iter().map(one).sum()
    }
}

/// Keys and values of earlier tokens in our quantised cache: prompts by [`sage_attention`], decoding from the codes.
pub struct SageCache {
    layers: Vec<KvCache>,
}

impl SageCache {
    /// An empty cache for each layer.
    ///
    /// # Errors
    /// When an option is outside its range.
    pub fn new(options: KvCacheOptions, layers: usize) -> Result<Self> {
        Ok(SageCache { layers: (0..layers).map(|_| KvCache::new(options)).collect::<Result<_, _>>()? })
    }
}

impl Cache for SageCache {
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        Ok(self.layers[layer].append(k, v)?)
    }

    fn bytes(&self) -> Result<usize> {
        Ok(self.layers.iter().map(|layer| layer.plain().bytes()).sum())
    }
}

impl Attend for SageCache {
    fn attend(&mut self, layer: usize, [q, k, v]: [&Tensor; 3], _: &Visible) -> Result<Tensor> {
        let cache = &mut self.layers[layer];
        let prompt = cache.plain().is_empty();
        cache.append(k, v)?;
        let options = Options::new().causal(true);
        // A prompt's own keys are at hand in full precision still.
        Ok(if prompt { sage_attention(q, k, v, &options)? } else { cache.attend(q, &options)? })
    }
}
