//! SmolLM2 (the Llama architecture) from a GGUF file, with attention as a parameter.

use std::fs::File;
use std::path::Path;

use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor, gguf_file};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::rotary_emb::rope_i;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

use crate::Result;
use crate::attend::{Attend, Visible};
use crate::place::Place;

/// Rows from which on a product with widened weights is faster than one with quantised ones.
const DENSE_ROWS: usize = 16;

/// The model.
pub struct Llama {
    config: Config,
    device: Device,
    dtype: DType,
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: Linear,
    cos: Tensor,
    sin: Tensor,
}

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Longest context that it was trained for.
    pub context: usize,
    rms_eps: f32,
}

struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    ffn_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// The file's weights widened, for many rows; and on a CPU in Q8_0 for a few, which are bound by reading weights:
/// candle's products with Q4_1 itself are scalar.
struct Linear {
    quantised: Option<QMatMul>,
    dense: Tensor,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dims()[..x.rank() - 1].iter().product::<usize>();
        match &self.quantised {
            Some(quantised) if rows < DENSE_ROWS => Ok(quantised.forward(x)?),
            _ => Ok(x.broadcast_matmul(&self.dense.t()?)?),
        }
    }
}

/// A GGUF file's tensors, and where they go.
struct Weights {
    content: gguf_file::Content,
    file: File,
    device: Device,
    dtype: DType,
}

impl Weights {
    fn widened(&mut self, name: &str) -> Result<Tensor> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu)?;
        Ok(tensor.dequantize(&Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    fn linear(&mut self, name: &str) -> Result<Linear> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu)?;
        let dense = tensor.dequantize(&Device::Cpu)?;
        let quantised = match (&self.device, tensor.dtype()) {
            (Device::Cpu, GgmlDType::Q8_0) => Some(tensor),
            (Device::Cpu, _) => Some(QTensor::quantize(&dense, GgmlDType::Q8_0)?),
            _ => None,
        };
        let quantised = quantised.map(QMatMul::from_qtensor).transpose()?;
        Ok(Linear { quantised, dense: dense.to_dtype(self.dtype)?.to_device(&self.device)? })
    }

    fn number(&self, key: &str) -> Result<usize> {
        let value = self.content.metadata.get(key).ok_or_else(|| format!("the model lacks {key}"))?;
        Ok(value.to_u32()? as usize)
    }

    fn real(&self, key: &str) -> Result<f32> {
        let value = self.content.metadata.get(key).ok_or_else(|| format!("the model lacks {key}"))?;
        Ok(value.to_f32()?)
    }
}

impl Llama {
    /// Reads the model and its tokeniser.
    ///
    /// # Errors
    /// When the file is not there, or not of this architecture; when there is no such device.
    pub fn load(path: &Path, place: Place) -> Result<(Self, Tokenizer)> {
        let (device, dtype) = (place.open()?, place.dtype());
        let mut file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let content = gguf_file::Content::read(&mut file)?;
        let tokenizer = tokenizer(&content)?;
        let mut weights = Weights { content, file, device, dtype };
        let (heads, width) =
            (weights.number("llama.attention.head_count")?, weights.number("llama.embedding_length")?);
        let config = Config {
            layers: weights.number("llama.block_count")?,
            heads,
            kv_heads: weights.number("llama.attention.head_count_kv")?,
            head_dim: width / heads,
            context: weights.number("llama.context_length")?,
            rms_eps: weights.real("llama.attention.layer_norm_rms_epsilon")?,
        };
        let (cos, sin) = rotations(&config, weights.real("llama.rope.freq_base")?)?;
        let there = |tensor: Tensor| tensor.to_dtype(dtype)?.to_device(&weights.device);
        let (cos, sin) = (there(cos)?, there(sin)?);
        let layers = (0..config.layers)
            .map(|layer| {
                let name = |part: &str| format!("blk.{layer}.{part}.weight");
                Ok(Layer {
                    attention_norm: weights.widened(&name("attn_norm"))?,
                    q: weights.linear(&name("attn_q"))?,
                    k: weights.linear(&name("attn_k"))?,
                    v: weights.linear(&name("attn_v"))?,
                    out: weights.linear(&name("attn_output"))?,
                    ffn_norm: weights.widened(&name("ffn_norm"))?,
                    gate: weights.linear(&name("ffn_gate"))?,
                    up: weights.linear(&name("ffn_up"))?,
                    down: weights.linear(&name("ffn_down"))?,
                })
            })
            .collect::<Result<_>>()?;
        // Embedding and output share their weights.
        let output = weights.linear("token_embd.weight")?;
        let model = Llama {
            config,
            device: weights.device.clone(),
            dtype,
            embedding: output.dense.clone(),
            layers,
            output_norm: weights.widened("output_norm.weight")?,
            output,
            cos,
            sin,
        };
        Ok((model, tokenizer))
    }

    /// Sizes of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it is computed, and in which element type.
    pub fn place(&self) -> (&Device, DType) {
        (&self.device, self.dtype)
    }

    /// Hidden states `[seq, width]` of `tokens`, the first of which has position `start`; [`Llama::logits`] takes them.
    ///
    /// # Errors
    /// When there are more positions than the model was trained for, or what `attend` says.
    pub fn forward(&self, tokens: &[u32], start: usize, attend: &mut impl Attend) -> Result<Tensor> {
        let Config { heads, kv_heads, head_dim, context, rms_eps, .. } = self.config;
        let seq = tokens.len();
        if start + seq > context {
            return Err(
                format!("context: {} tokens, the model was trained for {context}", start + seq).into()
            );
        }
        let (cos, sin) = (self.cos.narrow(0, start, seq)?, self.sin.narrow(0, start, seq)?);
        let norm = |x: &Tensor, weight: &Tensor| candle_nn::ops::rms_norm(x, weight, rms_eps);
        let split = |x: &Tensor, heads: usize| x.reshape((1, seq, heads, head_dim))?.transpose(1, 2);
        let mut x = self.embedding.index_select(&Tensor::new(tokens, &self.device)?, 0)?;
        for (at, layer) in self.layers.iter().enumerate() {
            let h = norm(&x, &layer.attention_norm)?;
            let q = rope_i(&split(&layer.q.forward(&h)?, heads)?.contiguous()?, &cos, &sin)?;
            let k = rope_i(&split(&layer.k.forward(&h)?, kv_heads)?.contiguous()?, &cos, &sin)?;
            let v = split(&layer.v.forward(&h)?, kv_heads)?;
            let out = attend.attend(at, [&q, &k, &v], &Visible::Causal)?;
            let out = out.transpose(1, 2)?.reshape((seq, heads * head_dim))?;
            x = (x + layer.out.forward(&out)?)?;
            let h = norm(&x, &layer.ffn_norm)?;
            let gated = (candle_nn::ops::silu(&layer.gate.forward(&h)?)? * layer.up.forward(&h)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        Ok(norm(&x, &self.output_norm)?)
    }

    /// Scores of every next token, `[seq, vocabulary]`, in f32.
    ///
    /// # Errors
    /// When `hidden` is not of the model's width.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.output.forward(hidden)?.to_dtype(DType::F32)?)
    }
}

/// Cosines and sines of every position, `[context, head_dim / 2]`.
fn rotations(config: &Config, base: f32) -> Result<(Tensor, Tensor)> {
    let exponent = |channel: usize| 2.0 * channel as f32 / config.head_dim as f32;
    let frequencies: Vec<f32> = (0..config.head_dim / 2).map(|c| base.powf(-exponent(c))).collect();
    let frequencies = Tensor::new(frequencies, &Device::Cpu)?.unsqueeze(0)?;
    let positions = Tensor::arange(0, config.context as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
    let angles = positions.unsqueeze(1)?.matmul(&frequencies)?;
    Ok((angles.cos()?, angles.sin()?))
}

/// The file's tokeniser. Candle reads vocabulary and merges; it does not know how `smollm` splits text beforehand.
fn tokenizer(content: &gguf_file::Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    let splits = vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(splits)));
    Ok(tokenizer)
}

/// One question to the model, in the form that it was trained with.
pub fn chat_prompt(question: &str) -> String {
    format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
}
