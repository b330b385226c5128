//! Times attention on a GPU, end to end and kernel by kernel, on random data that lies there already.
//!
//! `bench_gpu SCHEME,… HEAD_DIM CAUSAL BATCH HEADS[/KV_HEADS] LENGTH…` prints a line of JSON for each length and scheme.

use std::error::Error;

use half::f16;
use sageattention::cuda::{Cuda, CudaTensor};
use sageattention::{Band, Choice, DType, Inputs, Options, Preset, Tensor};

/// Runs before times are taken, and runs that are timed.
const WARM_UP: usize = 3;
const RUNS: usize = 15;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [schemes, head_dim, causal, batch, heads, lengths @ ..] = arguments.as_slice() else {
        return Err("bench_gpu SCHEME,… HEAD_DIM CAUSAL BATCH HEADS[/KV_HEADS] LENGTH…".into());
    };
    let (head_dim, causal, batch): (usize, bool, usize) =
        (head_dim.parse()?, causal.parse()?, batch.parse()?);
    let (heads, kv_heads) = heads.split_once('/').unwrap_or((heads, heads));
    let (heads, kv_heads): (usize, usize) = (heads.parse()?, kv_heads.parse()?);

    let gpu = Cuda::new(0)?;
    let stream = gpu.stream()?;
    for length in lengths {
        let length: usize = length.parse()?;
        let upload = |seed, heads| -> Result<CudaTensor, Box<dyn Error>> {
            let shape = [batch, heads, length, head_dim];
            let values = normal(seed, shape.iter().product());
            Ok(CudaTensor::upload(&stream, &Tensor::new(values, &shape)?.view())?)
        };
        let (q, k, v) = (upload(1, heads)?, upload(2, kv_heads)?, upload(3, kv_heads)?);
        let out = CudaTensor::uninitialized(&stream, DType::F16, &[batch, heads, length, head_dim])?;
        let inputs = Inputs::dense(q.view(), k.view(), v.view());
        let band = Band { right: causal.then_some(0), ..Band::FULL };
        let options = Options { band, ..Options::default() };
        let out = out.view();
        for scheme in schemes.split(',') {
            let choice = match scheme {
                "auto" => Choice::Automatic,
                name => Choice::Preset(name.parse::<Preset>()?),
            };
            let run = || gpu.forward_into(&stream, &inputs, &options, choice, &out, None);
            for _ in 0..WARM_UP {
                run()?;
            }
            let mut times = Vec::new();
            for _ in 0..RUNS {
                times.push(gpu.time(&stream, run)?.as_secs_f64() * 1e3);
            }
            times.sort_by(f64::total_cmp);
            let stages = gpu.time_kernels(&stream, &inputs, &options, choice, &out, RUNS)?;
            let stages: Vec<String> = stages
                .iter()
                .map(|(name, time)| {
                    format!("{{\"kernel\":\"{name}\",\"ms\":{:.4}}}", time.as_secs_f64() * 1e3)
                })
                .collect();
            println!(
                "{{\"scheme\":\"{scheme}\",\"length\":{length},\"ms\":{:.4},\"kernels\":[{}]}}",
                times[RUNS / 2],
                stages.join(",")
            );
        }
    }
    Ok(())
}

/// About N(0, 1): sums of uniform numbers, from a generator that fills gigabytes in no time.
fn normal(seed: u64, len: usize) -> Vec<f16> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let uniform = |shift: u32| (state >> shift & 0xffff) as f32 / 65536.0;
        // Four uniform numbers have the variance 1/3.
        f16::from_f32((uniform(0) + uniform(16) + uniform(32) + uniform(48) - 2.0) * 3f32.sqrt())
    };
    let pattern: Vec<f16> = (0..len.min(1 << 22)).map(|_| next()).collect();
    pattern.iter().copied().cycle().take(len).collect()
}
