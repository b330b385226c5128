//! Attention as mistral.rs's models ask for it, computed by SageAttention: the parameters of its `SdpaParams` and the
//! tensors of its `Sdpa::run_attention`, so that the body below is what would stand there.
//!
//! ```text
//! cargo run --release -p sageattention-candle --example mistral_rs
//! ```

use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor};
use sageattention_candle::{Options, sage_attention};

/// What a model says of its attention, as in mistral.rs. That key heads are fewer than query heads, its `n_kv_groups`, is
/// seen by the tensors' shapes.
#[derive(Clone, Default)]
struct SdpaParams {
    softmax_scale: f32,
    softcap: Option<f32>,
    /// How many keys before a query's own it sees.
    sliding_window: Option<usize>,
    /// A logit for each query head, f32 (GPT-OSS).
    sinks: Option<Tensor>,
}

/// Attention of `q`, `[batch, heads, queries, head_dim]`, over `k` and `v`, `[batch, key heads, keys, head_dim]`: over the
/// keys that `mask`, added to the scores, leaves visible, or without one over those up to a query's own.
fn run_attention(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    SdpaParams { softmax_scale, softcap, sliding_window, sinks }: &SdpaParams,
) -> Result<Tensor> {
    let mut options = Options::new().sm_scale(*softmax_scale);
    options = match mask {
        // mistral.rs's masks have the window in them.
        Some(mask) => options.mask(mask),
        None => options.causal(true).window(*sliding_window, None),
    };
    if let Some(softcap) = softcap {
        options = options.logit_softcap(*softcap);
    }
    if let Some(sinks) = sinks {
        options = options.sinks(sinks);
    }
    sage_attention(q, k, v, &options)
}

fn main() -> Result<()> {
    let plain = SdpaParams { softmax_scale: 0.125, ..SdpaParams::default() };
    let calls = [
        ("a prompt", 512, 512, plain.clone()),
        ("a token after 511", 1, 512, plain.clone()),
        (
            "Gemma 2's cap and window",
            512,
            512,
            SdpaParams { softcap: Some(50.0), sliding_window: Some(127), ..plain.clone() },
        ),
    ];
    for (what, queries, keys, params) in calls {
        let tensors = made_up(queries, keys)?;
        let start = Instant::now();
        let ours = run_attention(tensors.each_ref(), None, &params)?;
        let ms = 1e3 * start.elapsed().as_secs_f64();
        let mask = visible_mask(queries, keys, params.sliding_window)?;
        let exact = by_candle(tensors.each_ref(), &mask, &params)?;
        println!(
            "{what}: {ms:.1} ms, relative L1 {:.4} to candle's own operations",
            relative_l1(&ours, &exact)?
        );
    }
    Ok(())
}

/// Queries of 8 heads, keys and values of 2.
fn made_up(queries: usize, keys: usize) -> Result<[Tensor; 3]> {
    let normal = |heads, rows| Tensor::randn(0f32, 1.0, (1, heads, rows, 64), &Device::Cpu);
    Ok([normal(8, queries)?, normal(2, keys)?, normal(2, keys)?])
}

/// 0 where a query sees a key, −∞ elsewhere: the last query's own key is the last one.
fn visible_mask(queries: usize, keys: usize, window: Option<usize>) -> Result<Tensor> {
    let first = keys - queries;
    let entries = (0..queries).flat_map(|query| {
        let own = first + query;
        (0..keys).map(move |key| key <= own && window.is_none_or(|window| own - key <= window))
    });
    let entries: Vec<f32> = entries.map(|sees| if sees { 0.0 } else { f32::NEG_INFINITY }).collect();
    Tensor::from_vec(entries, (1, 1, queries, keys), &Device::Cpu)
}

/// The same attention by candle's own operations.
fn by_candle([q, k, v]: [&Tensor; 3], mask: &Tensor, params: &SdpaParams) -> Result<Tensor> {
    let (batch, heads, queries, head_dim) = q.dims4()?;
    let (_, kv_heads, keys, _) = k.dims4()?;
    let repeated = |x: &Tensor| {
        let x = x.unsqueeze(2)?.expand((batch, kv_heads, heads / kv_heads, keys, head_dim))?;
        x.contiguous()?.reshape((batch, heads, keys, head_dim))
    };
    let mut scores = (q.matmul(&repeated(k)?.t()?)? * f64::from(params.softmax_scale))?;
    if let Some(cap) = params.softcap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let scores = scores.broadcast_add(mask)?;
    let largest = scores.max_keepdim(D::Minus1)?;
    let (largest, sink) = match &params.sinks {
        None => (largest, None),
        Some(sinks) => {
            let sinks = sinks.reshape((1, heads, 1, 1))?.expand((batch, heads, queries, 1))?;
            (largest.maximum(&sinks)?, Some(sinks))
        }
    };
    let exponentials = scores.broadcast_sub(&largest)?.exp()?;
    let mut sums = exponentials.sum_keepdim(D::Minus1)?;
    if let Some(sink) = sink {
        sums = (sums + (sink - &largest)?.exp()?)?;
    }
    exponentials.broadcast_div(&sums)?.matmul(&repeated(v)?)
}

/// Σ|x − y| / Σ|y|.
fn relative_l1(x: &Tensor, y: &Tensor) -> Result<f32> {
    let sum = |x: Tensor| x.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>();
    Ok(sum((x - y)?)? / sum(y.clone())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The default scheme's relative L1 is 0.0135 at most on normally distributed tensors of any length; rows that see few
    /// keys have less.
    const TOLERANCE: f32 = 0.0135;

    fn agrees(what: &str, queries: usize, keys: usize, params: &SdpaParams) {
        let tensors = made_up(queries, keys).unwrap();
        let mask = visible_mask(queries, keys, params.sliding_window).unwrap();
        let exact = by_candle(tensors.each_ref(), &mask, params).unwrap();
        for mask in [None, Some(&mask)] {
            let ours = run_attention(tensors.each_ref(), mask, params).unwrap();
            let error = relative_l1(&ours, &exact).unwrap();
            assert!(error < TOLERANCE, "{what}, mask {}: {error}", mask.is_some());
        }
    }

    #[test]
    fn every_parameter_is_heeded() {
        let plain = SdpaParams { softmax_scale: 0.2, ..SdpaParams::default() };
        agrees("prompt", 200, 200, &plain);
        agrees("decoding", 1, 300, &plain);
        agrees("after a prefix", 40, 300, &plain);
        agrees("cap", 100, 100, &SdpaParams { softcap: Some(5.0), ..plain.clone() });
        agrees("window", 200, 200, &SdpaParams { sliding_window: Some(30), ..plain.clone() });
        let sinks = Tensor::randn(0f32, 2.0, 8, &Device::Cpu).unwrap();
        agrees("sinks", 100, 100, &SdpaParams { sinks: Some(sinks), ..plain.clone() });
    }
}
