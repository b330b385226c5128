//! Speed of decoding over a quantised KV cache against full precision over plain tensors, all contestants taking turns
//! in one run: `cargo run --release -p sageattention --example bench_kv_cache [KV_LEN…]`.

use std::time::{Duration, Instant};

use sage_core::metrics::Accuracy;
use sage_testkit::normal_tensor;
use sageattention::{Attention, DType, Error, KvCache, KvCacheOptions, Preset, Result, Tensor, ValueFormat};

/// Rounds of which the median counts.
const ROUNDS: usize = 15;

/// Calls of a round take about this long.
const ROUND: Duration = Duration::from_millis(20);

/// What is timed.
enum Contestant {
    Tensors(Box<[Tensor; 2]>),
    Cache(Box<KvCache>),
}

fn main() -> Result<()> {
    let parse = |arg: String| arg.parse().map_err(|_| Error::value("KV_LEN", arg, "a number of tokens"));
    let lens: Vec<usize> = std::env::args().skip(1).map(parse).collect::<Result<_>>()?;
    let lens = if lens.is_empty() { vec![512, 2048, 8192] } else { lens };
    println!("threads: {}", std::thread::available_parallelism().map_or(1, usize::from));
    println!(
        "{:<26} {:<14} {:>9} {:>8} {:>8} {:>9}",
        "batch,heads,kv,q,kv_len,d", "keys/values", "µs", "vs f16", "vs f32", "rel. L1"
    );
    for kv_len in lens {
        for (batch, heads, kv_heads, q_len, head_dim) in
            [(1, 9, 3, 1, 64), (1, 8, 8, 1, 64), (1, 32, 8, 1, 128), (4, 32, 8, 1, 128), (1, 9, 3, 64, 64)]
        {
            bench([batch, heads, kv_heads, q_len, kv_len, head_dim])?;
        }
    }
    Ok(())
}

fn bench([batch, heads, kv_heads, q_len, kv_len, head_dim]: [usize; 6]) -> Result<()> {
    let shape = [batch, kv_heads, kv_len, head_dim];
    let (k, v) = (normal_tensor(1, &shape, DType::F32), normal_tensor(2, &shape, DType::F32));
    let q = normal_tensor(3, &[batch, heads, q_len, head_dim], DType::F32);
    let mut contestants = vec![
        ("f16", Contestant::Tensors(Box::new([&k, &v].map(|x| x.to_dtype(DType::F16))))),
        ("f32", Contestant::Tensors(Box::new([k.clone(), v.clone()]))),
    ];
    let mut append = Vec::new();
    for values in ValueFormat::ALL {
        let mut cache = KvCacheOptions::new(kv_heads, head_dim).sequences(batch).values(values).build()?;
        let start = Instant::now();
        cache.append(&k, &v)?;
        append.push(start.elapsed());
        contestants.push((values.name(), Contestant::Cache(Box::new(cache))));
    }
    let attention = Attention::new().causal(true);
    let call = |contestant: &Contestant| match contestant {
        Contestant::Tensors(tensors) => {
            let [k, v] = &**tensors;
            let choice = if q_len == 1 { attention.clone().scheme(Preset::FULL) } else { attention.clone() };
            choice.forward(&q.to_dtype(k.dtype()), k, v).map(|result| result.out)
        }
        Contestant::Cache(cache) => cache.attend(&q, &attention).map(|result| result.out),
    };
    let expected = call(&contestants[1].1)?.to_f32_vec();
    let mut times = vec![Vec::new(); contestants.len()];
    for _ in 0..ROUNDS {
        for ((_, contestant), times) in contestants.iter().zip(&mut times) {
            let start = Instant::now();
            let mut calls = 0;
            while start.elapsed() < ROUND {
                call(contestant)?;
                calls += 1;
            }
            times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(calls));
        }
    }
    let median = |times: &Vec<f64>| {
        let mut times = times.clone();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let medians: Vec<f64> = times.iter().map(median).collect();
    for (i, (name, contestant)) in contestants.iter().enumerate() {
        let kind = match contestant {
            Contestant::Tensors(..) => name.to_string(),
            Contestant::Cache(_) => format!("int8/{name}"),
        };
        let accuracy = Accuracy::of(&call(contestant)?.to_f32_vec(), &expected);
        println!(
            "{:<26} {kind:<14} {:>9.1} {:>7.2}× {:>7.2}× {:>9.4}",
            format!("{batch},{heads},{kv_heads},{q_len},{kv_len},{head_dim}"),
            medians[i],
            medians[0] / medians[i],
            medians[1] / medians[i],
            accuracy.relative_l1,
        );
    }
    println!("{:<26} appending all tokens: {append:.1?}", "");
    Ok(())
}
