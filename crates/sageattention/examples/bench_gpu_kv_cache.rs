//! Times decoding over a quantised KV cache on a GPU, against full precision over tensors in half precision, in turns:
//! calls of one kind follow one another on the stream, so that launching them costs nothing.
//!
//! `bench_gpu_kv_cache BATCH HEADS KV_HEADS HEAD_DIM KV_LEN…` prints a line of JSON for each length.

use std::error::Error;

use sageattention::cuda::{Cuda, CudaTensor};
use sageattention::{Attention, DType, KvCacheOptions, Preset, Tensor, ValueFormat};

mod noise;

use noise::normal;

/// Runs before times are taken, runs that are timed, and calls of each.
const WARM_UP: usize = 3;
const RUNS: usize = 31;
const CALLS: usize = 16;

/// Tokens of a page.
const PAGE_SIZE: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [batch, heads, kv_heads, head_dim, lengths @ ..] = arguments.as_slice() else {
        return Err("bench_gpu_kv_cache BATCH HEADS KV_HEADS HEAD_DIM KV_LEN…".into());
    };
    let (batch, heads, kv_heads): (usize, usize, usize) = (batch.parse()?, heads.parse()?, kv_heads.parse()?);
    let head_dim: usize = head_dim.parse()?;
    let gpu = Cuda::new(0)?;
    let stream = gpu.stream()?;
    for length in lengths {
        let length: usize = length.parse()?;
        let upload = |seed, shape: &[usize]| -> Result<CudaTensor, Box<dyn Error>> {
            let elements = shape.iter().product();
            Ok(CudaTensor::upload(&stream, &Tensor::new(normal(seed, elements), shape)?.view())?)
        };
        let kv_shape = [batch, kv_heads, length, head_dim];
        let (k, v) = (upload(1, &kv_shape)?, upload(2, &kv_shape)?);
        let q_shape = [batch, heads, 1, head_dim];
        let q = upload(3, &q_shape)?;
        let out = CudaTensor::uninitialized(&stream, DType::F16, &q_shape)?;
        let (q, out) = (q.view(), out.view());
        let attention = Attention::new();
        let in_full_precision = attention.clone().scheme(Preset::FULL);
        let all: Vec<usize> = (0..batch).collect();
        let mut caches = Vec::new();
        for values in ValueFormat::ALL {
            let max_pages = batch * length.div_ceil(PAGE_SIZE);
            let cache = KvCacheOptions::new(kv_heads, head_dim).sequences(batch).values(values);
            let mut cache = cache.page_size(PAGE_SIZE).max_pages(max_pages).build_on(gpu.clone(), &stream)?;
            let appended = gpu.time(&stream, || cache.append(k.view(), v.view()))?;
            caches.push((cache, appended));
        }
        let full =
            || in_full_precision.forward_on(&gpu, &stream, [q, k.view(), v.view()], out, None).map(drop);
        let timed = |call: &dyn Fn() -> sageattention::Result<()>| {
            gpu.time(&stream, || (0..CALLS).try_for_each(|_| call()))
        };
        let mut times = vec![Vec::new(); 1 + caches.len()];
        for run in 0..WARM_UP + RUNS {
            let full_time = timed(&full)?;
            let mut of_run = vec![full_time];
            for (cache, _) in &caches {
                of_run.push(timed(&|| cache.attend_into(&all, q, &attention, out, None))?);
            }
            if run >= WARM_UP {
                times
                    .iter_mut()
                    .zip(of_run)
                    .for_each(|(times, time)| times.push(time.as_secs_f64() * 1e6 / CALLS as f64));
            }
        }
        let medians: Vec<f64> = times
            .iter_mut()
            .map(|times| {
                times.sort_by(f64::total_cmp);
                times[RUNS / 2]
            })
            .collect();
        let forms: Vec<String> = caches
            .iter()
            .zip(&medians[1..])
            .map(|((cache, appended), us)| {
                format!(
                    "{{\"values\":\"{}\",\"us\":{us:.1},\"gb_per_s\":{:.0},\"vs_full\":{:.2},\"append_all_us\":{:.1}}}",
                    cache.layout().values,
                    cache.bytes() as f64 / us / 1e3,
                    medians[0] / us,
                    appended.as_secs_f64() * 1e6
                )
            })
            .collect();
        let full_bytes = 4 * batch * kv_heads * length * head_dim;
        println!(
            "{{\"batch\":{batch},\"heads\":{heads},\"kv_heads\":{kv_heads},\"head_dim\":{head_dim},\"kv_len\":{length},\
             \"full_us\":{:.1},\"full_gb_per_s\":{:.0},\"caches\":[{}]}}",
            medians[0],
            full_bytes as f64 / medians[0] / 1e3,
            forms.join(",")
        );
    }
    Ok(())
}
