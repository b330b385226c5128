//! The library in a forked process, after it has computed in the parent.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

use sage_testkit::{in_child, normal_tensor};
use sageattention::{Attention, DType, Device, KvCacheOptions};

/// Bits of a long call, a short one, and one over a cache.
fn results() -> Vec<u32> {
    let [q, k, v] = [1, 2, 3].map(|seed| normal_tensor(seed, &[1, 4, 300, 64], DType::F32));
    let row = normal_tensor(4, &[1, 4, 1, 64], DType::F32);
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
        let x = normal_tensor(1, &[1, 1, 8, 64], DType::F32);
        Attention::new().device(Device::Cuda(0)).forward(&x, &x, &x).map(|_| ()).map_err(|e| e.to_string())
    };
    let (wanted, on_gpu_here) = (results(), on_gpu());
    in_child("calls after the parent's", || {
        // Without a GPU the same error as in the parent; with one, what to do.
        let there = match (on_gpu_here, on_gpu()) {
            (Ok(()), Err(error)) => error.contains("spawn"),
            (here, there) => here == there && here.is_err(),
        };
        there && results() == wanted && results() == wanted
    });
}
