//! all-MiniLM-L6-v2 (the BERT architecture): sentence embeddings, with attention as a parameter.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module};
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

use crate::Result;
use crate::attend::{Attend, Visible};
use crate::place::Place;

/// Heads of all-MiniLM-L6-v2.
pub const HEADS: usize = 12;
/// Layers of all-MiniLM-L6-v2.
pub const LAYERS: usize = 6;

/// The model and its tokeniser.
pub struct MiniLm {
    tokenizer: Tokenizer,
    words: Embedding,
    positions: Tensor,
    /// The first of the two token types, the only one that a sentence by itself has.
    token_type: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    out_norm: LayerNorm,
    up: Linear,
    down: Linear,
    down_norm: LayerNorm,
}

/// Sentences as the model takes them, padded to the longest.
pub struct Batch {
    /// `[batch, seq]`, u32.
    pub ids: Tensor,
    /// Tokens of each sentence.
    pub lens: Vec<u32>,
}

struct Weights(HashMap<String, Tensor>, DType);

impl Weights {
    fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = self.0.get(name).ok_or_else(|| format!("the model lacks {name}"))?;
        Ok(tensor.to_dtype(self.1)?)
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        Ok(Linear::new(self.get(&format!("{name}.weight"))?, Some(self.get(&format!("{name}.bias"))?)))
    }

    fn norm(&self, name: &str) -> Result<LayerNorm> {
        let (weight, bias) = (self.get(&format!("{name}.weight"))?, self.get(&format!("{name}.bias"))?);
        Ok(LayerNorm::new(weight, bias, 1e-12))
    }
}

impl MiniLm {
    /// Reads the model from its folder.
    ///
    /// # Errors
    /// When files are missing, or of another model; when there is no such device.
    pub fn load(folder: &Path, place: Place) -> Result<Self> {
        let device = place.open()?;
        let file = folder.join("model.safetensors");
        let weights = Weights(candle_core::safetensors::load(file, &device)?, place.dtype());
        let mut tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
        // The length that its sentence-transformers configuration has.
        tokenizer
            .with_truncation(Some(TruncationParams { max_length: 256, ..TruncationParams::default() }))?;
        tokenizer.with_padding(Some(PaddingParams::default()));
        let words = weights.get("embeddings.word_embeddings.weight")?;
        let width = words.dim(1)?;
        let layers = (0..LAYERS)
            .map(|layer| {
                let name = |part: &str| format!("encoder.layer.{layer}.{part}");
                Ok(Layer {
                    q: weights.linear(&name("attention.self.query"))?,
                    k: weights.linear(&name("attention.self.key"))?,
                    v: weights.linear(&name("attention.self.value"))?,
                    out: weights.linear(&name("attention.output.dense"))?,
                    out_norm: weights.norm(&name("attention.output.LayerNorm"))?,
                    up: weights.linear(&name("intermediate.dense"))?,
                    down: weights.linear(&name("output.dense"))?,
                    down_norm: weights.norm(&name("output.LayerNorm"))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(MiniLm {
            tokenizer,
            words: Embedding::new(words, width),
            positions: weights.get("embeddings.position_embeddings.weight")?,
            token_type: weights.get("embeddings.token_type_embeddings.weight")?.narrow(0, 0, 1)?,
            norm: weights.norm("embeddings.LayerNorm")?,
            layers,
        })
    }

    /// Tokens of sentences, the longest of which sets the padding.
    ///
    /// # Errors
    /// What the tokeniser says.
    pub fn tokenize(&self, sentences: &[impl AsRef<str>]) -> Result<Batch> {
        let texts: Vec<&str> = sentences.iter().map(AsRef::as_ref).collect();
        let encodings = self.tokenizer.encode_batch(texts, true)?;
        let lens = encodings.iter().map(|encoding| encoding.get_attention_mask().iter().sum()).collect();
        let ids: Vec<&[u32]> = encodings.iter().map(tokenizers::Encoding::get_ids).collect();
        Ok(Batch { ids: Tensor::new(ids, self.positions.device())?, lens })
    }

    /// Embeddings of length 1, `[batch, 384]`, in f32.
    ///
    /// # Errors
    /// What `attend` says.
    pub fn embed(&self, batch: &Batch, attend: &mut impl Attend) -> Result<Tensor> {
        let (size, seq) = batch.ids.dims2()?;
        let visible = Visible::Padded(batch.lens.clone());
        let mut x = self.words.forward(&batch.ids)?;
        x = x.broadcast_add(&self.positions.narrow(0, 0, seq)?)?.broadcast_add(&self.token_type)?;
        x = self.norm.forward(&x)?;
        let split =
            |x: Tensor| -> candle_core::Result<Tensor> { x.reshape((size, seq, HEADS, ()))?.transpose(1, 2) };
        for (at, layer) in self.layers.iter().enumerate() {
            let (q, k, v) = (layer.q.forward(&x)?, layer.k.forward(&x)?, layer.v.forward(&x)?);
            let out = attend.attend(at, [&split(q)?, &split(k)?, &split(v)?], &visible)?;
            let out = out.transpose(1, 2)?.flatten_from(2)?;
            x = layer.out_norm.forward(&(layer.out.forward(&out)? + x)?)?;
            let h = layer.down.forward(&layer.up.forward(&x)?.gelu_erf()?)?;
            x = layer.down_norm.forward(&(h + x)?)?;
        }
        let flags = |len: &u32| (0..seq).map(|i| f32::from(u8::from(i < *len as usize))).collect::<Vec<_>>();
        let mask: Vec<f32> = batch.lens.iter().flat_map(flags).collect();
        let mask = Tensor::from_vec(mask, (size, seq, 1), x.device())?;
        // The mean's divisor does not matter: lengths become 1.
        let sum = x.to_dtype(DType::F32)?.broadcast_mul(&mask)?.sum(1)?;
        Ok(sum.broadcast_div(&sum.sqr()?.sum_keepdim(1)?.sqrt()?)?)
    }
}
