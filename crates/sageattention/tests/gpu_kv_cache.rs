//! The KV cache in a real GPU's memory, against the one in this machine's: both store the same. Without a driver each
//! test prints that it is skipped.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

use half::f16;
use sage_core::metrics::Accuracy;
use sage_testkit::{gpu, normal};
use sageattention::cuda::{Buffer, CudaTensor, DeviceLse, DeviceMask};
use sageattention::{
    Alignment, Attention, DType, Device, Error, KvCacheOptions, Mask, Tensor, TensorView, ValueFormat, View,
};

/// N(0, 1), every fourth channel shifted by `bias`.
fn random(seed: u64, shape: &[usize], bias: f32, dtype: DType) -> Tensor {
    let dim = *shape.last().unwrap();
    let shift = |at: usize| if (at % dim).is_multiple_of(4) { bias } else { 0.0 };
    let data = normal(seed, shape.iter().product()).into_iter().enumerate().map(|(at, x)| x + shift(at));
    Tensor::new(data.collect::<Vec<f32>>(), shape).unwrap().to_dtype(dtype)
}

/// The oldest architecture that converts to the values' format, 80 for sm_80.
fn first_that_stores(values: ValueFormat) -> u16 {
    match values {
        ValueFormat::Fp8E4M3 => 89,
        ValueFormat::BF16 => 80,
        ValueFormat::F16 | ValueFormat::Int8 => 75,
    }
}

#[test]
fn decoding_and_chunks_are_those_of_the_cache_in_this_machine() {
    let Some(cuda) = gpu::first("decoding_and_chunks") else { return };
    let stream = cuda.stream().unwrap();
    for values in ValueFormat::ALL {
        for (head_dim, group, dtype, softcap) in
            [(64, 3, DType::F16, None), (128, 4, DType::BF16, None), (80, 1, DType::F16, Some(20.0))]
        {
            let options = KvCacheOptions::new(2, head_dim).sequences(2).values(values).max_pages(64);
            let mut expected = options.build().unwrap();
            let mut found = match options.build_on(cuda.clone(), &stream) {
                Err(Error::Unsupported { .. }) if cuda.machine().target.sm() < first_that_stores(values) => {
                    continue;
                }
                result => result.unwrap(),
            };
            let mut attention = Attention::new().causal(true).return_lse(true);
            if let Some(cap) = softcap {
                attention = attention.logit_softcap(cap);
            }
            for (i, tokens) in [700, 1, 1, 64, 5].into_iter().enumerate() {
                let label = format!("{values} d{head_dim} {dtype} chunk {i}");
                let seed = 10 * i as u64;
                let shape = [2, 2, tokens, head_dim];
                let (k, v) = (random(seed, &shape, 4.0, dtype), random(seed + 1, &shape, 0.0, dtype));
                let q = random(seed + 2, &[2, 2 * group, tokens, head_dim], 0.0, dtype);
                expected.append(&k, &v).unwrap();
                let [k, v, q_there] = [&k, &v, &q].map(|x| CudaTensor::upload(&stream, &x.view()).unwrap());
                found.append(k.view(), v.view()).unwrap();
                let out = CudaTensor::uninitialized(&stream, dtype, q.shape()).unwrap();
                let lse = Buffer::new(&stream, 4 * 2 * 2 * group * tokens).unwrap();
                let rows = Some(DeviceLse::of(&lse));
                found.attend_into(&[0, 1], q_there.view(), &attention, out.view(), rows).unwrap();
                let expected = expected.attend(&q, &attention).unwrap();
                let bits: Vec<u16> = out.buffer().to_vec().unwrap();
                let wide = |bits: &u16| match dtype {
                    DType::BF16 => half::bf16::from_bits(*bits).to_f32(),
                    _ => f16::from_bits(*bits).to_f32(),
                };
                let out: Vec<f32> = bits.iter().map(wide).collect();
                // The emulated kernels' tolerances (crates/kernels/tests/cache.rs), doubled.
                let tolerance = if dtype == DType::BF16 { 1.2e-2 } else { 2.8e-3 };
                let accuracy = Accuracy::of(&out, &expected.out.to_f32_vec());
                assert!(accuracy.relative_l1 <= tolerance, "{label}: {accuracy}");
                let lse: Vec<f32> = lse.to_vec().unwrap();
                let lse = Accuracy::of(&lse, &expected.lse.unwrap().to_f32_vec());
                assert!(lse.max_abs_error <= 4e-3, "{label}: lse {lse}");
            }
        }
    }
}

#[test]
fn sequences_take_turns_with_the_pool() {
    let Some(cuda) = gpu::first("sequences_take_turns") else { return };
    let stream = cuda.stream().unwrap();
    let options = KvCacheOptions::new(1, 64).sequences(2).page_size(16).max_pages(4);
    let mut cache = options.build_on(cuda.clone(), &stream).unwrap();
    let mut expected = options.build().unwrap();
    let k = random(1, &[1, 1, 40, 64], 2.0, DType::F16);
    let there = CudaTensor::upload(&stream, &k.view()).unwrap();
    cache.append_to(&[0], there.view(), there.view()).unwrap();
    let error = cache.append_to(&[1], there.view(), there.view()).unwrap_err().to_string();
    assert_eq!(error, "max_pages: value is 4, expected 6 for 40 more tokens (free pages: 1)");
    assert_eq!((cache.len(0), cache.len(1)), (Ok(40), Ok(0)));
    cache.truncate(0, 10).unwrap();
    cache.append_to(&[1], there.view(), there.view()).unwrap();
    expected.append_to(&[0], &k, &k).unwrap();
    expected.truncate(0, 10).unwrap();
    expected.append_to(&[1], &k, &k).unwrap();
    let q = random(2, &[2, 2, 1, 64], 0.0, DType::F16);
    let q_there = CudaTensor::upload(&stream, &q.view()).unwrap();
    let out = CudaTensor::uninitialized(&stream, DType::F16, q.shape()).unwrap();
    cache.attend_into(&[0, 1], q_there.view(), &Attention::new(), out.view(), None).unwrap();
    let expected = expected.attend(&q, &Attention::new()).unwrap().out;
    let bits: Vec<u16> = out.buffer().to_vec().unwrap();
    let found: Vec<f32> = bits.iter().map(|&bits| f16::from_bits(bits).to_f32()).collect();
    let accuracy = Accuracy::of(&found, &expected.to_f32_vec());
    assert!(accuracy.relative_l1 <= 2.8e-3, "{accuracy}");
}

#[test]
fn what_is_wrong_is_named() {
    let Some(cuda) = gpu::first("what_is_wrong") else { return };
    let stream = cuda.stream().unwrap();
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    let options = KvCacheOptions::new(1, 64);
    assert_eq!(
        text(options.build_on(cuda.clone(), &stream).map(|_| ())),
        "max_pages: value is none, expected a number: the pool of a GPU has a fixed size"
    );
    let mut cache = options.max_pages(4).build_on(cuda.clone(), &stream).unwrap();
    let upload = |x: TensorView<'_>| CudaTensor::upload(&stream, &x).unwrap();
    let single = upload(random(1, &[1, 1, 3, 64], 0.0, DType::F32).view());
    assert_eq!(
        text(cache.append(single.view(), single.view())),
        "k: dtype is f32, expected f16 or bf16, of which the GPU's kernels are"
    );
    let narrow = upload(random(1, &[1, 1, 3, 32], 0.0, DType::F16).view());
    assert_eq!(
        text(cache.append(narrow.view(), narrow.view())),
        "k: shape is [1, 1, 3, 32], expected [batch, heads, seq, head_dim] with head_dim = 64, as the cache"
    );
    assert!(cache.is_empty());

    let q = upload(random(2, &[1, 2, 1, 64], 0.0, DType::F16).view());
    let out = CudaTensor::uninitialized(&stream, DType::F16, &[1, 2, 1, 64]).unwrap();
    let attend =
        |attention: &Attention<'_>| text(cache.attend_into(&[0], q.view(), attention, out.view(), None));
    let visible = [true];
    let mask = View::contiguous("mask", &visible, &[1]).unwrap();
    let device_mask = upload(random(3, &[1, 1], 0.0, DType::F16).view());
    let new = Attention::new;
    for (attention, wanted) in [
        (
            new().mask(Mask::Bool(mask)),
            "mask: value is in this machine's memory, expected in the GPU's, as q",
        ),
        (new().device(Device::Cpu), "device: value is cpu, expected cuda:0, where the memory is"),
        (
            new().mask(DeviceMask::Additive(device_mask.view())),
            "mask over a KV cache on a GPU is not supported: causal masks and windows are what its kernels have",
        ),
        (
            new().return_lse(true),
            "return_lse without memory for the log-sum-exp is not supported: give some, or leave the option out",
        ),
        (
            new().causal_alignment(Alignment::TopLeft),
            "a mask that is not aligned bottom-right over a KV cache on a GPU is not supported: align it \
             bottom-right: the last query is that of the last cached token",
        ),
    ] {
        assert_eq!(attend(&attention), wanted);
    }
    let error = text(cache.fork(0, 0));
    assert_eq!(error, "fork of a KV cache on cuda:0 is not supported: append the tokens to each sequence");
}
