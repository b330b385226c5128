//! On a real GPU: calls at the edges of what may be asked for. Without a driver each test prints that it is skipped.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

use sage_core::metrics::Accuracy;
use sage_core::{Call, oracle};
use sage_testkit::{gpu, uniform_tensor};
use sageattention::{Attention, DType, Device, Inputs, Options, Preset, Tensor};

fn numbers(shape: &[usize], seed: u64) -> Tensor {
    uniform_tensor(seed, shape, DType::F16)
}

/// More heads than a grid has blocks along y or z, by every kind of kernel.
#[test]
fn more_heads_than_an_axis_of_a_grid() {
    if gpu::first("more_heads_than_an_axis_of_a_grid").is_none() {
        return;
    }
    let presets = [
        Preset::FULL,
        Preset::SAGE1_INT8_FP16,
        Preset::SAGE2_INT8_FP16_PER_THREAD,
        Preset::INT8_FP8,
        Preset::SAGE2_INT8_FP8_PER_THREAD,
        Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD,
        Preset::SAGE2_INT4_FP8,
    ];
    let shapes = [([65_541, 1], [2, 3]), ([1, 65_541], [2, 3]), ([65_541, 1], [70, 5])];
    let mut computed = 0;
    for ([batch, heads], [q_len, kv_len]) in shapes {
        let q = numbers(&[batch, heads, q_len, 8], 1);
        let [k, v] = [2, 3].map(|seed| numbers(&[batch, heads, kv_len, 8], seed));
        let inputs: Inputs<'_> = Inputs::new(q.view(), k.view(), v.view());
        let exact = oracle::exact(&Call::check(&inputs, &Options::default()).unwrap());
        for preset in presets {
            let attention = Attention::new().device(Device::Cuda(0)).scheme(preset);
            if let Err(refused) = attention.plan(&q, &k, &v) {
                eprintln!("{preset}: not on this GPU: {refused}");
                continue;
            }
            let out = attention.forward(&q, &k, &v).unwrap().out;
            let accuracy = Accuracy::of(&out.to_f32_vec(), &exact.out);
            // The schemes' own errors are 0.038 at most on such tensors, that of INT4 with FP8.
            assert!(accuracy.relative_l1 < 0.06, "{preset} {batch} x {heads} x {q_len}: {accuracy}");
            computed += 1;
        }
    }
    assert!(computed >= 9, "{computed}");
}

/// Zeros and log-sum-exps of −∞, whatever the number of queries and the scheme.
#[test]
fn no_keys_at_all() {
    if gpu::first("no_keys_at_all").is_none() {
        return;
    }
    let mut computed = 0;
    for preset in Preset::ALL {
        for q_len in [1, 64, 65, 300] {
            let (q, k) = (numbers(&[2, 4, q_len, 64], 1), numbers(&[2, 2, 0, 64], 2));
            let attention = Attention::new().device(Device::Cuda(0)).scheme(*preset).return_lse(true);
            if attention.plan(&q, &k, &k).is_err() {
                continue;
            }
            let packed = |x: &Tensor, rows: usize, heads: usize| {
                Tensor::new(x.to_f32_vec()[..rows * heads * 64].to_vec(), &[rows, heads, 64])
                    .unwrap()
                    .to_dtype(DType::F16)
            };
            let (packed_q, packed_k) = (packed(&q, q_len, 4), packed(&k, 0, 2));
            let (cu_q, cu_k) = ([0, q_len as i32, q_len as i32], [0; 3]);
            let of_packed = attention.clone().packed(&cu_q, &cu_k);
            for found in [attention.forward(&q, &k, &k), of_packed.forward(&packed_q, &packed_k, &packed_k)] {
                let found = found.unwrap_or_else(|error| panic!("{preset} {q_len}: {error}"));
                assert!(found.out.to_f32_vec().iter().all(|&x| x == 0.0), "{preset} {q_len}");
                let lse = found.lse.unwrap().to_f32_vec();
                assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY), "{preset} {q_len}");
                computed += 1;
            }
        }
    }
    assert!(computed >= 60, "{computed}");
}
