//! Causal attention over the blocks that a predictor keeps.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use sage_core::sparse::{Predictor, Select, pooled_tail};
use sage_core::{Alignment, Band, Call, Inputs, Options};
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

/// What the blocks left out are worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LeftOut {
    /// Nothing; the others are computed by our kernels, in a scheme.
    Nothing(Choice),
    /// A pooled term each, by definition in double precision. Slow.
    PooledTail,
}

/// Causal attention over predicted blocks.
#[derive(Clone, Debug)]
pub struct SparseAttention {
    predictor: Predictor,
    left_out: LeftOut,
    densities: Vec<f64>,
}

impl SparseAttention {
    /// Attention of `predictor`'s blocks.
    pub fn new(predictor: Predictor, left_out: LeftOut) -> Self {
        SparseAttention { predictor, left_out, densities: Vec::new() }
    }

    /// Mean share of the blocks that were computed, over all calls, among those that the causal mask shows.
    pub fn density(&self) -> f64 {
        self.densities.iter().sum::<f64>() / self.densities.len() as f64
    }

    /// The query heads of one key head, with pooled terms.
    fn group(&self, [q, k, v]: [&Tensor; 3]) -> Result<(Vec<f32>, f64)> {
        let (q, k, v) = (plain(q)?, plain(k)?, plain(v)?);
        let options = Options::default().band(CAUSAL);
        let call = Call::check_sparse(&Inputs::new(q.view(), k.view(), v.view()), &options, &self.predictor)?;
        let map = self.predictor.map(&call)?;
        let density = map.density(&CAUSAL, call.problem.q_len, call.problem.kv_len)?;
        Ok((pooled_tail(&call.over(&map)?).out.into_iter().map(|x| x as f32).collect(), density))
    }

    fn with_pooled_tail(&mut self, [q, k, v]: [&Tensor; 3]) -> Result<Vec<f32>> {
        let kv_heads = k.dim(1)?;
        let group = q.dim(1)? / kv_heads;
        let of_head = |head: usize| {
            let q = q.narrow(1, head * group, group)?;
            self.group([&q, &k.narrow(1, head, 1)?, &v.narrow(1, head, 1)?])
        };
        let found = (0..kv_heads).into_par_iter().map(of_head).collect::<Result<Vec<_>>>()?;
        self.densities.extend(found.iter().map(|(_, density)| density));
        Ok(found.into_iter().flat_map(|(out, _)| out).collect())
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
        let out = match self.left_out {
            LeftOut::PooledTail => self.with_pooled_tail(qkv)?,
            LeftOut::Nothing(choice) => {
                let (q, k, v) = (plain(q)?, plain(k)?, plain(v)?);
                let attention = Attention::new().causal(true).scheme(choice).sparse(self.predictor.clone());
                let output = attention.forward(&q, &k, &v)?;
                let map = output.map.ok_or("attention returned no map")?;
                self.densities.push(map.density(&CAUSAL, q.shape()[2], k.shape()[2])?);
                output.out.to_f32_vec()
            }
        };
        Ok(Tensor::from_vec(out, q.dims(), q.device())?.to_dtype(q.dtype())?)
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
        let full = Choice::Preset(sage_core::Preset::FULL);
        for left_out in [LeftOut::Nothing(full), LeftOut::PooledTail] {
            let mut all = SparseAttention::new(Predictor::sla(1.0), left_out);
            let out = all.attend(0, [&q, &k, &v], &Visible::Causal).unwrap();
            assert!(distance(&out, &exact) < 1e-5);
            assert_eq!(all.density(), 1.0);
            // Half of the blocks are another result.
            let mut half = SparseAttention::new(Predictor::sla(0.5), left_out);
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
