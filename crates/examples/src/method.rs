//! The ways to compute attention that are compared.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::attention::AttnMask;
use sage_core::Scheme;
use sageattention_candle::{Choice, Layout, Options, Preset, sage_attention};

use crate::Result;
use crate::attend::{Attend, Visible};

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
    fn attend(&mut self, _: usize, [q, k, v]: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        self.0.compute(q, k, v, visible)
    }
}

/// What a layer's attention was asked, and the exact answer is passed on: for measuring errors layer by layer.
#[derive(Default)]
pub struct Recorded {
    /// Q, K and V of each layer.
    pub layers: Vec<[Tensor; 3]>,
}

impl Attend for Recorded {
    fn attend(&mut self, _: usize, qkv: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        self.layers.push(qkv.map(Tensor::clone));
        let [q, k, v] = qkv;
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
