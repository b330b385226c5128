//! Attention as the models ask for it, and the ways to compute it that are compared.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::attention::AttnMask;
use sage_core::Scheme;
use sageattention_candle::{Choice, KvCache, KvCacheOptions, Layout, Options, Preset, sage_attention};

use crate::Result;

/// Attention of one layer. A model hands over the new tokens' Q, K and V; what came before is the implementor's to
/// keep.
pub trait Attend {
    /// `q` is `[batch, heads, seq, head_dim]`, `k` and `v` have fewer heads maybe; the result is as `q`.
    ///
    /// # Errors
    /// What the computation says.
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        visible: &Visible,
    ) -> Result<Tensor>;
}

impl<A: Attend + ?Sized> Attend for &mut A {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        visible: &Visible,
    ) -> Result<Tensor> {
        (**self).attend(layer, q, k, v, visible)
    }
}

/// Attention that keeps earlier tokens' keys and values.
pub trait Cache: Attend {
    /// Adds the next tokens of a layer without computing attention.
    ///
    /// # Errors
    /// When they do not fit.
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Bytes of all layers' keys and values.
    ///
    /// # Errors
    /// When candle does not hand them out.
    fn bytes(&self) -> Result<usize>;
}

/// Which keys a query sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Visible {
    /// None that is later; the last query sees the last key.
    Causal,
    /// The first `lens[b]` of batch entry `b`.
    Padded(Vec<u32>),
}

/// A way to compute attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Two matrix products and a softmax in single precision, as candle's Llama writes it: exact.
    Exact,
    /// The same in the tensors' own element type.
    Candle,
    /// Candle's fused attention on CPUs.
    CandleFlash,
    /// Ours.
    Sage(Choice),
    /// A scheme as the oracle computes it, number by number. Slow.
    Oracle(Scheme),
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Exact => f.pad("exact"),
            Method::Candle => f.pad("candle"),
            Method::CandleFlash => f.pad("candle-flash"),
            Method::Sage(Choice::Automatic) => f.pad("sage"),
            Method::Sage(Choice::Within(error)) => f.pad(&format!("sage within {error}")),
            Method::Sage(Choice::Preset(preset)) => f.pad(preset.name()),
            Method::Sage(Choice::Scheme(scheme)) | Method::Oracle(scheme) => f.pad(&scheme.to_string()),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "exact" => Ok(Method::Exact),
            "candle" => Ok(Method::Candle),
            "candle-flash" => Ok(Method::CandleFlash),
            "sage" => Ok(Method::Sage(Choice::Automatic)),
            name => match name.parse::<Preset>() {
                Ok(preset) => Ok(Method::Sage(preset.into())),
                Err(error) => Err(format!("exact, candle, candle-flash, sage, or a scheme; {error}")),
            },
        }
    }
}

impl Method {
    /// Ours, as a language model should have it. On CPUs rotation halves the error for a twentieth of attention's time
    /// (docs/performance/models.md#quality); on GPUs nobody has measured its speed yet, and the choice is their own.
    pub fn of_language(device: &Device) -> Self {
        match device {
            Device::Cpu => Method::Sage(Preset::INT8_PER_TOKEN_ROTATED.into()),
            _ => Method::Sage(Choice::Automatic),
        }
    }

    /// Attention of whole sequences.
    ///
    /// # Errors
    /// What the computation says.
    pub fn compute(&self, q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible) -> Result<Tensor> {
        match self {
            Method::Exact => {
                let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
                Ok(step_by_step(&wide(q)?, &wide(k)?, &wide(v)?, visible)?.to_dtype(q.dtype())?)
            }
            Method::Candle => step_by_step(q, k, v, visible),
            Method::CandleFlash => flash(q, k, v, visible),
            Method::Sage(choice) => {
                let options = Options::new().layout(Layout::Hnd).scheme(*choice);
                let options = match visible {
                    Visible::Causal => options.causal(true),
                    Visible::Padded(lens) => options.kv_lens(&Tensor::new(lens.as_slice(), q.device())?),
                };
                Ok(sage_attention(q, k, v, &options)?)
            }
            Method::Oracle(scheme) => crate::oracle::scheme(q, k, v, visible, scheme),
        }
    }
}

/// Softmax(QKᵀ)V, step by step.
fn step_by_step(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible) -> Result<Tensor> {
    let (batch, heads, q_len, head_dim) = q.dims4()?;
    let (_, kv_heads, kv_len, _) = k.dims4()?;
    let group = heads / kv_heads;
    // Queries that share a key head are rows of one product, so that keys are not repeated.
    let q = q.contiguous()?.reshape((batch, kv_heads, group * q_len, head_dim))?;
    let scores = q.matmul(&k.contiguous()?.t()?)?.affine(1.0 / (head_dim as f64).sqrt(), 0.0)?;
    let scores = scores.reshape((batch, kv_heads, group, q_len, kv_len))?;
    let scores = match bias(visible, q_len, kv_len, &q)? {
        Some(bias) => scores.broadcast_add(&bias)?,
        None => scores,
    };
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    let weights = weights.reshape((batch, kv_heads, group * q_len, kv_len))?;
    Ok(weights.matmul(&v.contiguous()?)?.reshape((batch, heads, q_len, head_dim))?)
}

/// 0 where a key is visible and −∞ elsewhere, where `like` is and in its element type: `[batch or 1, 1, 1, q_len or 1,
/// kv_len]`, or none where all are.
fn bias(visible: &Visible, q_len: usize, kv_len: usize, like: &Tensor) -> Result<Option<Tensor>> {
    // Made once for all layers, as candle's models do; the second is for a contestant in another element type.
    static LATEST: Mutex<Vec<(Visible, Tensor)>> = Mutex::new(Vec::new());
    let shape = match visible {
        Visible::Causal if q_len == 1 => return Ok(None),
        Visible::Causal => [1, 1, 1, q_len, kv_len],
        Visible::Padded(lens) => [lens.len(), 1, 1, 1, kv_len],
    };
    let mut latest = LATEST.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = |(of, bias): &&(Visible, Tensor)| {
        of == visible
            && bias.dims() == shape
            && bias.dtype() == like.dtype()
            && bias.device().same_device(like.device())
    };
    if let Some((_, bias)) = latest.iter().find(fits) {
        return Ok(Some(bias.clone()));
    }
    let hide = |hidden: bool| if hidden { f32::NEG_INFINITY } else { 0.0 };
    let bias = match visible {
        Visible::Causal => {
            let shift = kv_len - q_len;
            let rows = (0..q_len).flat_map(|i| (0..kv_len).map(move |j| hide(j > i + shift)));
            Tensor::from_iter(rows, &Device::Cpu)
        }
        Visible::Padded(lens) => {
            let rows = lens.iter().flat_map(|&len| (0..kv_len).map(move |j| hide(j >= len as usize)));
            Tensor::from_iter(rows, &Device::Cpu)
        }
    }?;
    let bias = bias.reshape(&shape[..])?.to_dtype(like.dtype())?.to_device(like.device())?;
    latest.insert(0, (visible.clone(), bias.clone()));
    latest.truncate(2);
    Ok(Some(bias))
}

/// Candle's fused attention, which takes sequences before heads.
fn flash(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible) -> Result<Tensor> {
    let Visible::Causal = visible else {
        return Err("candle-flash: candle's fused attention on CPUs takes no padded batch".into());
    };
    if !(q.device().is_cpu() && q.dtype() == DType::F32) {
        let found = format!("{:?} on {:?}", q.dtype(), q.device().location());
        return Err(format!("candle-flash: q is {found}, expected F32 on a CPU").into());
    }
    let scale = 1.0 / (q.dim(D::Minus1)? as f32).sqrt();
    let mask = AttnMask::causal_with_offset(k.dim(2)? - q.dim(2)?);
    let seq_first = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
    let (q, k, v) = (seq_first(q)?, seq_first(k)?, seq_first(v)?);
    Ok(candle_nn::attention::flash_attn::<f32>(&q, &k, &v, scale, mask, None, None)?)
}

/// Whole sequences at once: nothing came before.
#[derive(Clone, Copy, Debug)]
pub struct Stateless(pub Method);

impl Attend for Stateless {
    fn attend(&mut self, _: usize, q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible) -> Result<Tensor> {
        self.0.compute(q, k, v, visible)
    }
}

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
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        visible: &Visible,
    ) -> Result<Tensor> {
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

/// Adds up the time that another spends.
pub struct Timed<A> {
    /// What is timed.
    pub inner: A,
    /// The sum so far.
    pub spent: Duration,
}

impl<A> Timed<A> {
    /// Nothing spent yet.
    pub fn new(inner: A) -> Self {
        Timed { inner, spent: Duration::ZERO }
    }
}

impl<A: Attend> Attend for Timed<A> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        visible: &Visible,
    ) -> Result<Tensor> {
        // A GPU's work is asked for, and done some time later.
        q.device().synchronize()?;
        let start = Instant::now();
        let out = self.inner.attend(layer, q, k, v, visible)?;
        q.device().synchronize()?;
        self.spent += start.elapsed();
        Ok(out)
    }
}

/// What a layer's attention was asked, and the exact answer is passed on: for measuring errors layer by layer.
#[derive(Default)]
pub struct Recorded {
    /// Q, K and V of each layer.
    pub layers: Vec<[Tensor; 3]>,
}

impl Attend for Recorded {
    fn attend(&mut self, _: usize, q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible) -> Result<Tensor> {
        self.layers.push([q.clone(), k.clone(), v.clone()]);
        Method::Exact.compute(q, k, v, visible)
    }
}

/// Σ|a − e| / Σ|e| of each head, over all batch entries. `[batch, heads, seq, head_dim]`.
///
/// # Errors
/// When the shapes differ.
pub fn relative_l1_by_head(actual: &Tensor, expected: &Tensor) -> Result<Vec<f32>> {
    let (actual, expected) = (actual.to_dtype(DType::F32)?, expected.to_dtype(DType::F32)?);
    let sum = |tensor: &Tensor| tensor.abs()?.sum((0, 2, 3));
    let (error, magnitude) = (sum(&(actual - &expected)?)?, sum(&expected)?);
    Ok((error / magnitude)?.to_vec1()?)
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
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, _: &Visible) -> Result<Tensor> {
        let cache = &mut self.layers[layer];
        let prompt = cache.plain().is_empty();
        cache.append(k, v)?;
        let options = Options::new().causal(true);
        // A prompt's own keys are at hand in full precision still.
        Ok(if prompt { sage_attention(q, k, v, &options)? } else { cache.attend(q, &options)? })
    }
}
