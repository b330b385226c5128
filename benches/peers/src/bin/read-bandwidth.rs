//! Measures how fast this machine reads memory: the bound of decode, which reads every key and value once.
//!
//! `read-bandwidth [--threads N] [--seconds S] BYTES...` reads a buffer of each size again and again and prints one
//! JSON object a line. The size matters: what fits a cache is read faster than memory, so a kernel must be compared
//! with a buffer as large as its own operands.

use std::time::Duration;

use rayon::prelude::*;
use sage_peers::{Result, Timing, take_option};

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let threads = take_option(&mut args, "--threads")?.unwrap_or(2);
    let seconds = take_option(&mut args, "--seconds")?.unwrap_or(1.0);
    if args.is_empty() {
        return Err("usage: read-bandwidth [--threads N] [--seconds S] BYTES ...".into());
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    for arg in &args {
        let bytes: usize = arg.parse().map_err(|_| format!("size is {arg:?}, expected a number of bytes"))?;
        let words: Vec<u64> = (0..bytes as u64 / 8).collect();
        // Every thread reads one part of its own, as the heads of a decode step are shared out.
        let part = words.len().div_ceil(threads).max(1);
        let timing = Timing::of(Duration::from_secs_f64(seconds), || {
            let sum = words.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add);
            std::hint::black_box(sum);
        });
        // The best call: a bound is what the machine can do when nothing disturbs it.
        let gb_per_s = (words.len() * 8) as f64 / timing.min_ms() / 1e6;
        let median_gb_per_s = (words.len() * 8) as f64 / timing.median_ms() / 1e6;
        println!(
            "{{\"bytes\":{bytes},\"threads\":{threads},\"calls\":{},\"gb_per_s\":{gb_per_s:.3},\
             \"median_gb_per_s\":{median_gb_per_s:.3}}}",
            timing.ms.len()
        );
    }
    Ok(())
}

/// Integer sums may be reordered, so the compiler makes them wide and independent: the loads are the limit.
fn sum(words: &[u64]) -> u64 {
    let (blocks, rest) = words.as_chunks::<32>();
    let mut sums = [0u64; 32];
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}
