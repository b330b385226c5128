//! On a real GPU: every scheme and option against the oracle, streams, graphs, and what a call costs the host. Without
//! a driver each test prints that it is skipped.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Instant;

use half::f16;
use sage_core::metrics::Accuracy;
use sage_core::oracle;
use sage_testkit::{gpu, normal};
use sageattention::cuda::{Cuda, CudaTensor, Stream};
use sageattention::{
    Alignment, Attention, DType, Device, Geometry, Inputs, Mask, Options, Preset, Scheme, Tensor, TensorView,
    View,
};

/// N(0, 1), each channel shifted by `bias` times an N(0, 1) of its own.
fn random(seed: u64, shape: &[usize], dtype: DType, bias: f32) -> Tensor {
    let dim = *shape.last().unwrap();
    let channel = normal(seed + 1000, dim);
    let x = normal(seed, shape.iter().product())
        .into_iter()
        .enumerate()
        .map(|(i, x)| x + bias * channel[i % dim]);
    Tensor::new(x.collect::<Vec<f32>>(), shape).unwrap().to_dtype(dtype)
}

/// The scheme that the GPU computes for such a call.
fn scheme_of(attention: &Attention<'_>, q: &Tensor, k: &Tensor) -> Scheme {
    *attention.clone().device(Device::Cuda(0)).plan(q, k, k).unwrap().scheme()
}

/// Computes on the GPU and compares with the oracle of the same scheme.
fn check(label: &str, attention: &Attention<'_>, inputs: Inputs<'_>, scheme: Scheme, tolerance: f64) {
    let attention = attention.clone().device(Device::Cuda(0)).scheme(scheme).return_lse(true);
    let found =
        attention.forward(inputs.q, inputs.k, inputs.v).unwrap_or_else(|error| panic!("{label}: {error}"));
    let call = sage_core::Call::check(&inputs, &attention.options()).unwrap();
    let wanted = oracle::scheme(&call, &scheme);
    // The oracle's order is [batch, heads, seq, head_dim]; packed outputs are [total, heads, head_dim].
    let out = found.out.to_f32_vec();
    let out = match inputs.lengths.packed() {
        false => out,
        true => {
            let (rows, heads, dim) = (found.out.shape()[0], found.out.shape()[1], found.out.shape()[2]);
            let at = |i: usize| (i / dim % rows * heads + i / dim / rows) * dim + i % dim;
            (0..out.len()).map(|i| out[at(i)]).collect()
        }
    };
    let accuracy = Accuracy::of(&out, &wanted.out);
    assert!(out.iter().all(|x| x.is_finite()), "{label}: not finite");
    assert!(accuracy.relative_l1 <= tolerance, "{label}: {accuracy:?}");
    let lse = found.lse.unwrap().to_f32_vec();
    for (row, (&found, &wanted)) in lse.iter().zip(&wanted.lse).enumerate() {
        // Twice that of the emulated kernels (crates/kernels/tests/log_sum_exp.rs), as with outputs.
        let near = (f64::from(found) - wanted).abs() <= 1e-3 * wanted.abs().max(1.0);
        assert!(
            near || f64::from(found) == wanted,
            "{label}: lse of row {row} is {found}, expected {wanted}"
        );
    }
}

// The tolerances of the emulated kernels (crates/kernels/tests/attention.rs), doubled: the unit's own exponential and
// accumulators are a little coarser than the emulator's.
const F16: f64 = 2e-3;
const BF16: f64 = 8e-3;
const FP8: f64 = 3e-2;

fn tolerance(dtype: DType, scheme: &Scheme) -> f64 {
    let own = if dtype == DType::BF16 { BF16 } else { F16 };
    let text = scheme.to_string();
    if text.contains("FP8") {
        FP8
    } else if text.contains("(f16") {
        own.max(8e-3)
    } else {
        own
    }
}

#[test]
fn every_scheme() {
    let Some(cuda) = gpu::first("every_scheme") else { return };
    // Before sm_89 there is no FP8, and before sm_80 no bf16.
    let least = if cuda.machine().has_fp8() { 60 } else { 20 };
    let mut computed = 0;
    for preset in Preset::ALL {
        for (head_dim, dtype) in [(64, DType::F16), (64, DType::BF16), (128, DType::F16), (128, DType::BF16)]
        {
            let q = random(1, &[1, 4, 333, head_dim], dtype, 0.0);
            let k = random(2, &[1, 2, 397, head_dim], dtype, 4.0);
            let v = random(3, &[1, 2, 397, head_dim], dtype, 0.5);
            let scheme = preset.scheme(head_dim);
            let attention = Attention::new().scheme(scheme);
            match attention.clone().device(Device::Cuda(0)).plan(&q, &k, &v) {
                Ok(plan) => {
                    let scheme = *plan.scheme();
                    let inputs = Inputs::new(q.view(), k.view(), v.view());
                    check(
                        &format!("{preset} d{head_dim} {dtype}"),
                        &attention,
                        inputs,
                        scheme,
                        tolerance(dtype, &scheme),
                    );
                    computed += 1;
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("; the nearest that this GPU computes is "), "{preset}: {error}");
                    eprintln!("{preset} d{head_dim} {dtype}: not on this GPU: {error}");
                }
            }
        }
    }
    eprintln!("{computed} combinations of scheme, head_dim and dtype computed");
    assert!(computed >= least, "{computed}");
}

#[test]
fn shapes_and_options() {
    let Some(cuda) = gpu::first("shapes_and_options") else { return };
    let mut count = 0;
    for (dtype, full) in [(DType::F16, false), (DType::BF16, false), (DType::F16, true), (DType::BF16, true)]
    {
        if full && cuda.machine().product_dtype(dtype) != dtype {
            eprintln!("full precision of {dtype}: not on this GPU");
            continue;
        }
        let base = match full {
            true => Attention::new().scheme(Preset::FULL),
            false => Attention::new(),
        };
        for head_dim in [1, 7, 40, 64, 72, 80, 96, 128, 160, 200, 256] {
            for (q_len, kv_len) in [(1, 1), (100, 77), (257, 64), (130, 511), (5, 1500)] {
                let q = random(1, &[2, 4, q_len, head_dim], dtype, 0.0);
                let k = random(2, &[2, 2, kv_len, head_dim], dtype, 3.0);
                let v = random(3, &[2, 2, kv_len, head_dim], dtype, 0.0);
                let inputs = Inputs::new(q.view(), k.view(), v.view());
                let scheme = scheme_of(&base, &q, &k);
                check(
                    &format!("d{head_dim} {q_len}x{kv_len}"),
                    &base,
                    inputs,
                    scheme,
                    tolerance(dtype, &scheme),
                );
                count += 1;
            }
        }
        let (q_len, kv_len) = (190, 260);
        let q = random(1, &[2, 4, q_len, 64], dtype, 0.0);
        let k = random(2, &[2, 2, kv_len, 64], dtype, 3.0);
        let v = random(3, &[2, 2, kv_len, 64], dtype, 0.0);
        let scheme = scheme_of(&base, &q, &k);
        let limit = tolerance(dtype, &scheme);
        let inputs = || Inputs::new(q.view(), k.view(), v.view());
        for alignment in [Alignment::BottomRight, Alignment::TopLeft] {
            let causal = base.clone().causal_alignment(alignment);
            check("causal", &causal, inputs(), scheme, limit);
            check("window", &causal.clone().window(50, 0), inputs(), scheme, limit);
            check("two-sided window", &base.clone().window(50, 20), inputs(), scheme, limit);
        }
        check("soft cap", &base.clone().logit_softcap(20.0), inputs(), scheme, 2.0 * limit);
        check("scale", &base.clone().sm_scale(0.3), inputs(), scheme, 2.0 * limit);
        let shape = [2, 4, q_len, kv_len];
        let visible: Vec<bool> = normal(9, shape.iter().product()).iter().map(|&x| x < 0.5).collect();
        let mask = Mask::Bool(View::contiguous("mask", &visible, &shape).unwrap());
        let masked = base.clone().mask(mask).causal(true);
        check("mask", &masked, inputs().mask(mask), scheme, limit);
        for bias_dtype in [DType::F32, DType::F16, DType::BF16] {
            let bias = random(10, &[1, 4, 1, kv_len], bias_dtype, 0.0);
            let mask = Mask::Additive(bias.view());
            let inputs = Inputs::new(q.view(), k.view(), v.view()).mask(mask);
            check("bias", &base.clone().mask(mask), inputs, scheme, limit);
        }
        let kv_lens = [200, 0];
        let lengths = sageattention::Lengths::KvLens(&kv_lens);
        check("kv_lens", &base.clone().kv_lens(&kv_lens), inputs().lengths(lengths), scheme, limit);
        let (cu_q, cu_k) = ([0, 100, 100, 190], [0, 64, 130, 260]);
        let packed = |x: &Tensor, heads: usize, rows: usize| {
            let x = x.to_f32_vec();
            Tensor::new(x[..rows * heads * 64].to_vec(), &[rows, heads, 64]).unwrap().to_dtype(dtype)
        };
        let (pq, pk, pv) = (packed(&q, 4, q_len), packed(&k, 2, kv_len), packed(&v, 2, kv_len));
        let lengths = sageattention::Lengths::Packed { cu_seqlens_q: &cu_q, cu_seqlens_k: &cu_k };
        let inputs = Inputs::new(pq.view(), pk.view(), pv.view()).lengths(lengths);
        check("packed", &base.clone().packed(&cu_q, &cu_k).causal(true), inputs, scheme, limit);
        count += 16;
    }
    // Views into one fused [batch, seq, 3, heads, head_dim] tensor, rows far apart, once at an odd offset.
    for offset in [0usize, 1] {
        let (batch, seq, heads, dim) = (2usize, 150usize, 3usize, 64usize);
        let data: Vec<f16> =
            normal(5, batch * seq * 3 * heads * dim + 8).into_iter().map(f16::from_f32).collect();
        let part = |i: usize| {
            let strides = [(seq * 3 * heads * dim) as i64, dim as i64, (3 * heads * dim) as i64, 1];
            let start = (i * heads * dim + offset) as i64;
            let geometry = Geometry::strided("qkv", &[batch, heads, seq, dim], &strides, start).unwrap();
            TensorView::from(View::strided("qkv", &data, geometry).unwrap())
        };
        let inputs = Inputs::new(part(0), part(1), part(2));
        for attention in [Attention::new(), Attention::new().scheme(Preset::FULL)] {
            let scheme =
                *attention.clone().device(Device::Cuda(0)).plan(part(0), part(1), part(2)).unwrap().scheme();
            check("fused views", &attention, inputs, scheme, F16);
            count += 1;
        }
    }
    eprintln!("{count} calls compared with the oracle");
}

/// A few small calls of every kind, for the slow checkers of memory and races.
#[test]
fn sanitized() {
    if gpu::first("sanitized").is_none() {
        return;
    }
    let mut count = 0;
    let schemes = [
        Preset::FULL,
        Preset::SAGE1_INT8_FP16,
        Preset::SAGE2_INT8_FP16_PER_THREAD,
        Preset::SAGE2_INT8_FP16_F16F32_PER_WARP,
        Preset::SAGE2_INT8_FP8_PER_THREAD,
        Preset::SAGE2PP_INT4_FP8,
        Preset::INT8_FP8,
        Preset::INT8_PER_TOKEN_ROTATED,
    ];
    for preset in schemes {
        for (head_dim, q_len, kv_len) in [(64, 130, 200), (72, 65, 100), (128, 70, 190), (40, 3, 600)] {
            let dtype = if head_dim == 72 { DType::BF16 } else { DType::F16 };
            let q = random(1, &[1, 2, q_len, head_dim], dtype, 0.0);
            let k = random(2, &[1, 1, kv_len, head_dim], dtype, 3.0);
            let v = random(3, &[1, 1, kv_len, head_dim], dtype, 0.0);
            let attention = Attention::new().device(Device::Cuda(0)).scheme(preset).return_lse(true);
            if let Err(error) = attention.plan(&q, &k, &v) {
                eprintln!("{preset} d{head_dim} {dtype}: not on this GPU: {error}");
                continue;
            }
            for causal in [false, true] {
                attention.clone().causal(causal).forward(&q, &k, &v).unwrap();
                count += 1;
            }
            let bias = random(4, &[1, 1, q_len, kv_len], DType::F32, 0.0);
            let mask = Mask::Additive(bias.view());
            attention.clone().mask(mask).logit_softcap(30.0).forward(&q, &k, &v).unwrap();
            let visible: Vec<bool> = (0..kv_len).map(|j| j % 5 != 0 && j + 40 < kv_len).collect();
            let mask = Mask::Bool(View::contiguous("mask", &visible, &[kv_len]).unwrap());
            attention.clone().mask(mask).forward(&q, &k, &v).unwrap();
            let kv_lens = [kv_len as i32 - 10];
            attention.kv_lens(&kv_lens).forward(&q, &k, &v).unwrap();
            count += 3;
        }
    }
    eprintln!("{count} calls computed");
    assert!(count >= 60, "{count}");
}

/// Relative L1 of some query rows against exact attention.
fn error_of_rows(q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, rows: usize) -> f64 {
    let shape = q.shape();
    let (heads, len, dim) = (shape[1], shape[2], shape[3]);
    let step = len.div_ceil(rows);
    let pick = |x: &Tensor| {
        let x = x.to_f32_vec();
        let picked: Vec<f32> = (0..heads)
            .flat_map(|head| (0..len).step_by(step).map(move |row| (head * len + row) * dim))
            .flat_map(|at| x[at..at + dim].to_vec())
            .collect();
        let count = picked.len() / heads / dim;
        Tensor::new(picked, &[1, heads, count, dim]).unwrap()
    };
    let few = pick(q).to_dtype(q.dtype());
    let inputs: Inputs<'_> = Inputs::new(few.view(), k.view(), v.view());
    let exact = oracle::exact(&sage_core::Call::check(&inputs, &Options::default()).unwrap());
    Accuracy::of(&pick(out).to_f32_vec(), &exact.out).relative_l1
}

#[test]
fn accuracy_at_length() {
    if gpu::first("accuracy_at_length").is_none() {
        return;
    }
    eprintln!("relative L1 against exact attention, D = 128:");
    for len in [64, 1000, 4096, 16384] {
        for (name, preset, limit) in [
            ("INT8+FP16", None, 0.0135),
            ("INT8+FP8", Some(Preset::SAGE2_INT8_FP8_PER_THREAD), 0.039),
            ("INT8+FP8 2++", Some(Preset::SAGE2PP_INT8_FP8_PER_THREAD), 0.039),
            ("full", Some(Preset::FULL), 0.001),
        ] {
            for (data, k_bias) in [("N(0,1)", 0.0), ("K bias", 10.0)] {
                let q = random(1, &[1, 2, len, 128], DType::F16, 0.0);
                let k = random(2, &[1, 2, len, 128], DType::F16, k_bias);
                let v = random(3, &[1, 2, len, 128], DType::F16, 0.0);
                let attention = Attention::new().device(Device::Cuda(0));
                let attention = match preset {
                    // Few queries would be computed in full precision.
                    None => attention.scheme(scheme_of(
                        &Attention::new(),
                        &random(1, &[1, 2, 500, 128], DType::F16, 0.0),
                        &k,
                    )),
                    Some(preset) => attention.scheme(preset),
                };
                if let Err(error) = attention.plan(&q, &k, &v) {
                    eprintln!("  {name}: not on this GPU: {error}");
                    continue;
                }
                let out = attention.forward(&q, &k, &v).unwrap().out;
                let error = error_of_rows(&q, &k, &v, &out, 48);
                eprintln!("  {name:<13} S {len:>5} {data:<7} {error:.5}");
                assert!(error <= limit, "{name} {len} {data}: {error}");
            }
        }
    }
}

/// Queries, keys, values and output on the GPU.
struct OnGpu {
    inputs: [CudaTensor; 3],
    out: CudaTensor,
}

impl OnGpu {
    fn new(stream: &Stream, shape: &[usize], seed: u64) -> Self {
        let upload =
            |i| CudaTensor::upload(stream, &random(seed + i, shape, DType::F16, 0.0).view()).unwrap();
        OnGpu {
            inputs: [0, 1, 2].map(upload),
            out: CudaTensor::uninitialized(stream, DType::F16, shape).unwrap(),
        }
    }

    fn run(&self, gpu: &Cuda, stream: &Stream) {
        let [q, k, v] = &self.inputs;
        let tensors = [q.view(), k.view(), v.view()];
        Attention::new().forward_on(gpu, stream, tensors, self.out.view(), None).unwrap();
    }

    fn result(&self) -> Vec<u16> {
        self.out.buffer().to_vec().unwrap()
    }
}

#[test]
fn runs_are_identical_on_any_stream_thread_and_graph() {
    let Some(gpu) = gpu::first("runs_are_identical_on_any_stream_thread_and_graph") else { return };
    let shape = [2, 8, 1500, 128];
    let stream = Stream::new(gpu.device()).unwrap();
    let tensors = OnGpu::new(&stream, &shape, 1);
    tensors.run(&gpu, &stream);
    let first = tensors.result();
    assert!(first.iter().any(|&x| x != 0));
    for _ in 0..3 {
        tensors.run(&gpu, &stream);
        assert!(tensors.result() == first, "two runs differ");
    }
    // SAFETY: 0 is the legacy default stream.
    let default_stream = unsafe { Stream::from_raw(gpu.device(), 0) };
    tensors.run(&gpu, &default_stream);
    default_stream.synchronize().unwrap();
    assert!(tensors.result() == first, "the default stream differs");

    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let stream = Stream::new(gpu.device()).unwrap();
                let own = OnGpu::new(&stream, &shape, 1);
                for _ in 0..3 {
                    own.run(&gpu, &stream);
                }
                assert!(own.result() == first, "a thread's result differs");
            });
        }
    });

    // Captured once, replayed with other queries in the same memory.
    let other = OnGpu::new(&stream, &shape, 7);
    other.run(&gpu, &stream);
    let expected = other.result();
    let mut changed = OnGpu::new(&stream, &shape, 1);
    stream.begin_capture().unwrap();
    changed.run(&gpu, &stream);
    let graph = stream.end_capture().unwrap().instantiate().unwrap();
    // SAFETY: `changed`, whose memory the graph uses, outlives its replays.
    unsafe { graph.launch(&stream) }.unwrap();
    assert!(changed.result() == first, "the graph's first replay differs");
    for (input, new) in changed.inputs.iter_mut().zip(&other.inputs) {
        let new: Vec<u16> = new.buffer().to_vec().unwrap();
        input.buffer_mut().copy_from_host(&new).unwrap();
    }
    // SAFETY: as above.
    unsafe { graph.launch(&stream) }.unwrap();
    assert!(changed.result() == expected, "a replay with changed inputs differs");
}

#[test]
fn costs_of_a_call_on_the_host() {
    let Some(gpu) = gpu::first("costs_of_a_call_on_the_host") else { return };
    let stream = Stream::new(gpu.device()).unwrap();
    let tensors = OnGpu::new(&stream, &[1, 2, 256, 128], 1);
    let cold = Instant::now();
    tensors.run(&gpu, &stream);
    stream.synchronize().unwrap();
    let cold = cold.elapsed();
    for _ in 0..100 {
        tensors.run(&gpu, &stream);
    }
    stream.synchronize().unwrap();
    // Few enough not to fill the queue, which would make the host wait.
    let (rounds, calls) = (20, 50);
    let mut best = f64::INFINITY;
    for _ in 0..rounds {
        let start = Instant::now();
        for _ in 0..calls {
            tensors.run(&gpu, &stream);
        }
        best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
        stream.synchronize().unwrap();
    }
    eprintln!(
        "first call {:.0} ms, warm call {:.1} µs of the host's time",
        cold.as_secs_f64() * 1e3,
        best * 1e6
    );
    assert!(best < 15e-6, "{best}");
}
