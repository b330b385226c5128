//! Times candle's CPU flash attention and compares it with double precision.
//!
//! `candle-peer [--threads N] [--seconds S] SHAPE...`, a shape being `dtype:batch:heads:q_len:kv_len:head_dim`.
//! Prints one JSON object a line for each shape.

use std::time::Duration;

use candle_core::{Device, Tensor, WithDType};
use candle_nn::attention::{AttnMask, flash_attn};
use half::bf16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sage_peers::{DType, Result, Shape, Timing, take_option};

/// Rows of each head that are compared with double precision: enough to see a wrong kernel, cheap at any length.
const CHECKED_ROWS: usize = 4;

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let threads = take_option(&mut args, "--threads")?.unwrap_or(2);
    let seconds = take_option(&mut args, "--seconds")?.unwrap_or(1.0);
    if args.is_empty() {
        return Err(
            "usage: candle-peer [--threads N] [--seconds S] dtype:batch:heads:q_len:kv_len:head_dim ..."
                .into(),
        );
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    for arg in &args {
        let shape: Shape = arg.parse()?;
        let budget = Duration::from_secs_f64(seconds);
        let (timing, error) = match shape.dtype {
            DType::F32 => measure::<f32>(&shape, budget, |x| x)?,
            DType::BF16 => measure::<bf16>(&shape, budget, bf16::from_f32)?,
        };
        let Shape { dtype, batch, heads, q_len, kv_len, head_dim } = shape;
        println!(
            "{{\"peer\":\"candle\",\"dtype\":\"{dtype}\",\"batch\":{batch},\"heads\":{heads},\"q_len\":{q_len},\
             \"kv_len\":{kv_len},\"head_dim\":{head_dim},\"threads\":{threads},\"calls\":{},\"median_ms\":{:.6},\
             \"min_ms\":{:.6},\"relative_l1\":{error:e}}}",
            timing.ms.len(),
            timing.median_ms(),
            timing.min_ms(),
        );
    }
    Ok(())
}

fn measure<T>(shape: &Shape, budget: Duration, narrow: fn(f32) -> T) -> Result<(Timing, f64)>
where
    T: WithDType + num_traits::Float,
{
    let &Shape { batch, heads, q_len, kv_len, head_dim, .. } = shape;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    // [batch, seq, heads, head_dim], the order that candle's kernel takes.
    let mut normal = |len: usize| {
        let data: Vec<T> =
            (0..batch * len * heads * head_dim).map(|_| narrow(StandardNormal.sample(&mut rng))).collect();
        Tensor::from_vec(data, (batch, len, heads, head_dim), &Device::Cpu)
    };
    let (q, k, v) = (normal(q_len)?, normal(kv_len)?, normal(kv_len)?);
    let scale = 1.0 / (head_dim as f32).sqrt();

    let mut out = Err(candle_core::Error::Msg("no call was made".into()));
    let timing = Timing::of(budget, || {
        out = flash_attn::<T>(&q, &k, &v, scale, AttnMask::None, None, None);
    });
    let error = relative_l1(shape, &q, &k, &v, &out?)?;
    Ok((timing, error))
}

/// `Σ|out − exact| / Σ|exact|` over a few rows of every head, with `exact` in double precision.
fn relative_l1(shape: &Shape, q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor) -> Result<f64> {
    let &Shape { batch, heads, q_len, kv_len, head_dim, .. } = shape;
    let wide = |t: &Tensor| t.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (q, k, v, out) = (wide(q)?, wide(k)?, wide(v)?, wide(out)?);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let (mut difference, mut size) = (0.0, 0.0);
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let row = |data: &[f64], len: usize, i: usize| {
            let start = ((b * len + i) * heads + h) * head_dim;
            data[start..start + head_dim].to_vec()
        };
        for i in (0..q_len).step_by(q_len.div_ceil(CHECKED_ROWS).max(1)) {
            let query = row(&q, q_len, i);
            let dot = |key: Vec<f64>| query.iter().zip(key).map(|(x, y)| x * y).sum::<f64>() * scale;
            let scores: Vec<f64> = (0..kv_len).map(|j| dot(row(&k, kv_len, j))).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut exact = vec![0.0; head_dim];
            for (j, weight) in weights.iter().enumerate() {
                for (sum, value) in exact.iter_mut().zip(row(&v, kv_len, j)) {
                    *sum += weight / total * value;
                }
            }
            // The output is [batch, heads, seq, head_dim].
            let start = ((b * heads + h) * q_len + i) * head_dim;
            for (found, exact) in out[start..start + head_dim].iter().zip(&exact) {
                difference += (found - exact).abs();
                size += exact.abs();
            }
        }
    }
    Ok(difference / size)
}
