//! The library in a forked process, after it has computed in the parent.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sageattention::{Attention, Device, KvCacheOptions, Tensor};

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn _exit(code: i32) -> !;
}

fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let data: Vec<f32> = (0..shape.iter().product()).map(|_| StandardNormal.sample(&mut rng)).collect();
    Tensor::new(data, shape).unwrap()
}

/// Bits of a long call, a short one, and one over a cache.
fn results() -> Vec<u32> {
    let [q, k, v] = [1, 2, 3].map(|seed| normal(seed, &[1, 4, 300, 64]));
    let row = normal(4, &[1, 4, 1, 64]);
    let attention = Attention::new().causal(true);
    let mut cache = KvCacheOptions::new(4, 64).build().unwrap();
    cache.append(&k, &v).unwrap();
    let outputs = [
        attention.forward(&q, &k, &v).unwrap(),
        attention.forward(&row, &k, &v).unwrap(),
        cache.attend(&row, &attention).unwrap(),
    ];
    outputs.iter().flat_map(|output| output.out.to_f32_vec()).map(f32::to_bits).collect()
}

#[test]
fn a_forked_process_computes_the_same_bits() {
    let on_gpu = || {
        let x = normal(1, &[1, 1, 8, 64]);
        Attention::new().device(Device::Cuda(0)).forward(&x, &x, &x).map(|_| ()).map_err(|e| e.to_string())
    };
    let (wanted, on_gpu_here) = (results(), on_gpu());
    // SAFETY: the child leaves by `_exit`, and waits for no other thread.
    let pid = unsafe { fork() };
    if pid == 0 {
        let good = catch_unwind(|| {
            // Without a GPU the same error as in the parent; with one, what to do.
            let there = match (on_gpu_here, on_gpu()) {
                (Ok(()), Err(error)) => error.contains("spawn"),
                (here, there) => here == there && here.is_err(),
            };
            there && results() == wanted && results() == wanted
        });
        // SAFETY: ends the process and runs nothing of the parent's.
        unsafe { _exit(if matches!(good, Ok(true)) { 0 } else { 1 }) }
    }
    let (start, mut status) = (Instant::now(), -1);
    // SAFETY: waits for our own child without blocking; the pointer is to a local.
    while unsafe { waitpid(pid, &mut status, 1) } == 0 {
        if start.elapsed() > Duration::from_secs(60) {
            // SAFETY: our own child, which is still there.
            unsafe { kill(pid, 9) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(status, 0, "the child failed");
}
