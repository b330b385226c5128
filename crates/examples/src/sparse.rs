//! Causal attention over the blocks that a predictor keeps.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Tensor};
use sage_core::sparse::{Predictor, Select};
use sage_core::{Alignment, Band};
use sageattention::{Attention, Choice};

use crate::Result;
use crate::attend::{Attend, Visible};

/// A predictor, and how many blocks it keeps: `sla:0.25`, `sparge:0.25`, `sparge-cdf:0.98`, `sparge2:0.1`, `vsa:16` or
/// `sol:1`.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    name: String,
    /// The predictor.
    pub predictor: Predictor,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "blocks is {text:?}, expected sla:SHARE, sparge:SHARE, sparge-cdf:SHARE, sparge2:SHARE, vsa:BLOCKS \
                 or sol:SIGMAS"
            )
        };
        let (system, amount) = text.split_once(':').ok_or_else(wrong)?;
        let x: f32 = amount.parse().map_err(|_| wrong())?;
        // The thresholds of similarity and the share of weight are the systems' own.
        let predictor = match system {
            "sla" => Predictor::sla(x),
            "sparge" => Predictor::sparge_attn(Select::TopK(x.into()), -0.1),
            "sparge-cdf" => Predictor::sparge_attn(Select::Cdf(x.into()), 0.6),
            "sparge2" => Predictor::sparge_attn2(x, 0.2),
            "vsa" if x >= 1.0 && x.fract() == 0.0 => Predictor::vsa(x as usize),
            "sol" => Predictor::sol_attn(x),
            _ => return Err(wrong()),
        };
        Ok(Setting { name: text.to_owned(), predictor })
    }
}

/// Causal attention over predicted blocks, computed in a scheme.
#[derive(Clone, Debug)]
pub struct SparseAttention {
    attention: Attention<'static>,
    densities: Vec<f64>,
}

impl SparseAttention {
    /// Attention of `predictor`'s blocks; with `pooled_tail` those left out count with their means.
    pub fn new(predictor: Predictor, choice: Choice, pooled_tail: bool) -> Self {
        let attention = Attention::new().causal(true).scheme(choice).sparse(predictor);
        SparseAttention { attention: attention.pooled_tail(pooled_tail), densities: Vec::new() }
    }

    /// Mean share of the blocks that were computed, over all calls, among those that the causal mask shows.
    pub fn density(&self) -> f64 {
        self.densities.iter().sum::<f64>() / self.densities.len() as f64
    }
}

/// Queries and keys of a language model are equally many, and so either alignment is the same.
const CAUSAL: Band = Band::causal(Alignment::TopLeft);

impl Attend for SparseAttention {
    fn attend(&mut self, _: usize, qkv: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        let [q, k, v] = qkv;
        if *visible != Visible::Causal || q.dims()[2] != k.dims()[2] || q.dims()[0] != 1 {
            return Err("blocks: found a batch or earlier tokens, expected one whole causal sequence".into());
        }
        let (q, k, v) = (plain(q)?, plain(k)?, plain(v)?);
        let output = self.attention.forward(&q, &k, &v)?;
        let map = output.map.ok_or("attention returned no map")?;
        self.densities.push(map.density(&CAUSAL, q.shape()[2], k.shape()[2])?);
        let [like, ..] = qkv;
        let out = Tensor::from_vec(output.out.to_f32_vec(), like.dims(), like.device())?;
        Ok(out.to_dtype(like.dtype())?)
    }
}

/// A tensor in single precision and in this process's memory.
fn plain(tensor: &Tensor) -> Result<sage_core::Tensor> {
    let elements = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(sage_core::Tensor::new(elements, tensor.dims())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use sage_core::Preset;

    use super::*;
    use crate::method::Method;

    fn random(heads: usize) -> Tensor {
        Tensor::randn(0f32, 1.0, (1, heads, 300, 16), &Device::Cpu).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn all_blocks_are_exact_attention_with_and_without_a_tail() {
        let (q, k, v) = (random(4), random(2), random(2));
        let exact = Method::Exact.compute(&q, &k, &v, &Visible::Causal).unwrap();
        for pooled_tail in [false, true] {
            let blocks = |share| {
                SparseAttention::new(Predictor::sla(share), Choice::Preset(Preset::FULL), pooled_tail)
            };
            let mut all = blocks(1.0);
            let out = all.attend(0, [&q, &k, &v], &Visible::Causal).unwrap();
            assert!(distance(&out, &exact) < 1e-5);
            assert_eq!(all.density(), 1.0);
            // Half of the blocks are another result.
            let mut half = blocks(0.5);
            let out = half.attend(0, [&q, &k, &v], &Visible::Causal).unwrap();
            assert!(distance(&out, &exact) > 1e-3);
            assert!((0.4..0.8).contains(&half.density()), "{}", half.density());
        }
    }

    #[test]
    fn settings_have_the_names_that_they_print() {
        for name in ["sla:0.25", "sparge:0.5", "sparge-cdf:0.98", "sparge2:0.1", "vsa:16", "sol:1.5"] {
            assert_eq!(name.parse::<Setting>().unwrap().to_string(), name);
        }
        for wrong in ["sla", "sla:x", "vsa:0.5", "flash:1"] {
            assert!(wrong.parse::<Setting>().unwrap_err().contains("expected sla:SHARE"), "{wrong}");
        }
    }
}
