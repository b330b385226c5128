//! Times the prediction of block maps on a GPU, kernel by kernel.
//!
//! `bench_gpu_predict BATCH HEADS KV_HEADS HEAD_DIM LEN…` prints, for each length and some predictors, the time of the
//! whole prediction and of each of its kernels in microseconds, and the share of blocks that is kept.

use std::error::Error;

use sageattention::cuda::{Cuda, CudaTensor};
use sageattention::sparse::{Predictor, Select};
use sageattention::{Attention, Call, DType, Inputs, Tensor};

mod noise;

use noise::normal;

/// Runs before times are taken, and runs that are timed.
const WARM_UP: usize = 3;
const RUNS: usize = 21;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [batch, heads, kv_heads, head_dim, lengths @ ..] = arguments.as_slice() else {
        return Err("bench_gpu_predict BATCH HEADS KV_HEADS HEAD_DIM LEN…".into());
    };
    let (batch, heads, kv_heads): (usize, usize, usize) = (batch.parse()?, heads.parse()?, kv_heads.parse()?);
    let head_dim: usize = head_dim.parse()?;
    let gpu = Cuda::new(0)?;
    let stream = gpu.stream()?;
    for length in lengths {
        let length: usize = length.parse()?;
        let upload = |seed, heads| -> Result<CudaTensor, Box<dyn Error>> {
            // One head's noise for all: what it holds changes nothing but the map.
            let head = normal(seed, length * head_dim);
            let shape = [batch, heads, length, head_dim];
            let tensor = Tensor::new(head.repeat(batch * heads), &shape)?.to_dtype(DType::BF16);
            Ok(CudaTensor::upload(&stream, &tensor.view())?)
        };
        let (q, k) = (upload(1, heads)?, upload(2, kv_heads)?);
        for (name, predictor) in [
            ("sparge cdf", Predictor::sparge_attn(Select::Cdf(0.5.into()), 0.0)),
            ("sparge top-k", Predictor::sparge_attn(Select::TopK(0.5.into()), 0.0)),
            ("sla", Predictor::sla(0.5)),
            ("sparge2", Predictor::sparge_attn2(0.1, 0.5)),
            ("vsa", Predictor::vsa(32)),
            ("sol", Predictor::sol_attn(1.0)),
        ] {
            let attention = Attention::new().sparse(predictor.clone());
            let map = attention.predict_on(&gpu, &stream, [q.view(), k.view()])?.to_host()?;
            let mut times = Vec::new();
            for run in 0..WARM_UP + RUNS {
                let predict = || attention.predict_on(&gpu, &stream, [q.view(), k.view()]).map(drop);
                let time = gpu.time(&stream, predict)?;
                times.extend((run >= WARM_UP).then_some(time.as_secs_f64() * 1e6));
            }
            times.sort_by(f64::total_cmp);
            let inputs = Inputs::new(q.view(), k.view(), k.view());
            let call = Call::check_sparse(&inputs, &attention.options(), &predictor)?;
            let kernels = gpu.time_prediction(&stream, &call, &predictor, RUNS)?;
            let kernels: Vec<String> = kernels
                .iter()
                .map(|(name, time)| format!("{name} {:.1}", time.as_secs_f64() * 1e6))
                .collect();
            let density = map.kept() as f64 / map.flags().len() as f64;
            println!(
                "{length} {name}: {:.1} us, density {density:.3}; {}",
                times[times.len() / 2],
                kernels.join(", ")
            );
        }
    }
    Ok(())
}
