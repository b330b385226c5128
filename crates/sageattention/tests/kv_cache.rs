//! The quantised KV cache as users meet it.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use half::f16;
use sage_core::metrics::Accuracy;
use sage_testkit::normal_tensor;
use sageattention::{
    Attention, DType, Device, Geometry, KvCache, KvCacheOptions, Layout, Preset, Tensor, TensorView,
    ValueFormat, View,
};

fn normal(seed: u64, shape: &[usize]) -> Tensor {
    normal_tensor(seed, shape, DType::F32)
}

/// Tokens `start..end` of a tensor `[batch, heads, tokens, head_dim]`.
fn tokens(x: &Tensor, start: usize, end: usize) -> Tensor {
    let &[batch, heads, len, head_dim] = x.shape() else { panic!("{:?}", x.shape()) };
    let all = x.to_f32_vec();
    let rows = |head: usize| &all[(head * len + start) * head_dim..(head * len + end) * head_dim];
    let part: Vec<f32> = (0..batch * heads).flat_map(|head| rows(head).iter().copied()).collect();
    Tensor::new(part, &[batch, heads, end - start, head_dim]).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    Accuracy::of(&a.to_f32_vec(), &b.to_f32_vec()).relative_l1
}

#[test]
fn decoding_step_by_step_is_attention_over_all_tokens() {
    let (k, v, q) = (normal(1, &[2, 3, 150, 64]), normal(2, &[2, 3, 150, 64]), normal(3, &[2, 9, 150, 64]));
    let attention = Attention::new().causal(true).return_lse(true);
    let expected = attention.clone().scheme(Preset::FULL).forward(&q, &k, &v).unwrap();
    let mut cache = KvCacheOptions::new(3, 64).sequences(2).build().unwrap();
    let mut start = 0;
    for end in [100, 101, 102, 130, 150] {
        cache.append(&tokens(&k, start, end), &tokens(&v, start, end)).unwrap();
        let step = cache.attend(&tokens(&q, start, end), &attention).unwrap();
        let relative_l1 = distance(&step.out, &tokens(&expected.out, start, end));
        assert!(relative_l1 < 0.02, "tokens {start}..{end}: {relative_l1}");
        let lse = Tensor::new(step.lse.unwrap().to_f32_vec(), &[2, 9, end - start, 1]).unwrap();
        let all = Tensor::new(expected.lse.as_ref().unwrap().to_f32_vec(), &[2, 9, 150, 1]).unwrap();
        let error = Accuracy::of(&lse.to_f32_vec(), &tokens(&all, start, end).to_f32_vec()).max_abs_error;
        assert!(error < 0.03, "tokens {start}..{end}: lse {error}");
        start = end;
    }
    assert_eq!((cache.len(0), cache.len(1)), (Ok(150), Ok(150)));
}

#[test]
fn it_takes_at_most_55_percent_of_a_cache_in_half_precision() {
    let token =
        |heads, head_dim| Tensor::new(vec![f16::ONE; heads * 8192 * head_dim], &[1, heads, 8192, head_dim]);
    for (heads, head_dim, values, bound) in [
        (3, 64, ValueFormat::Fp8E4M3, 0.55),
        (3, 64, ValueFormat::Int8, 0.55),
        (8, 128, ValueFormat::Fp8E4M3, 0.532),
        (3, 64, ValueFormat::F16, 0.79),
    ] {
        let mut cache = KvCacheOptions::new(heads, head_dim).values(values).build().unwrap();
        let x = token(heads, head_dim).unwrap();
        cache.append(&x, &x).unwrap();
        let half_precision = 2 * 2 * heads * 8192 * head_dim;
        let ratio = cache.bytes() as f64 / half_precision as f64;
        println!(
            "{heads} heads of {head_dim}, {values}: {} bytes, {ratio:.3} of half precision",
            cache.bytes()
        );
        assert!(ratio <= bound, "{values}: {ratio}");
    }
}

#[test]
fn a_pool_that_is_full_loses_nothing() {
    let (k, q) = (normal(1, &[1, 2, 40, 32]), normal(2, &[1, 2, 1, 32]));
    let mut cache = KvCacheOptions::new(2, 32).sequences(2).page_size(16).max_pages(4).build().unwrap();
    cache.append_to(&[0], &k, &k).unwrap();
    let before = cache.attend_to(&[0], &q, &Attention::new()).unwrap();
    let error = cache.append_to(&[1], &k, &k).unwrap_err().to_string();
    assert_eq!(error, "max_pages: value is 4, expected 6 for 40 more tokens (free pages: 1)");
    assert_eq!((cache.len(0), cache.len(1), cache.pages_in_use()), (Ok(40), Ok(0), 3));
    assert_eq!(cache.attend_to(&[0], &q, &Attention::new()).unwrap(), before);
    // Pages that were given back serve the other sequence.
    cache.truncate(0, 10).unwrap();
    cache.append_to(&[1], &k, &k).unwrap();
    assert_eq!(cache.pages_in_use(), 4);
    assert_eq!(cache.attend_to(&[1], &q, &Attention::new()).unwrap(), before);
}

/// What a lone sequence of these tokens gives.
fn alone(parts: &[&Tensor], q: &Tensor) -> Tensor {
    let mut cache = KvCacheOptions::new(2, 32).page_size(16).build().unwrap();
    parts.iter().for_each(|x| cache.append(*x, *x).unwrap());
    cache.attend(q, &Attention::new()).unwrap().out
}

#[test]
fn sequences_that_share_a_prefix_go_their_own_ways() {
    let [prefix, a, b, c] = [(1, 40), (2, 3), (3, 30), (4, 1)].map(|(seed, n)| normal(seed, &[1, 2, n, 32]));
    let q = normal(9, &[1, 2, 1, 32]);
    let mut cache = KvCacheOptions::new(2, 32).sequences(3).page_size(16).build().unwrap();
    cache.append_to(&[0], &prefix, &prefix).unwrap();
    cache.fork(0, 1).unwrap();
    cache.fork(0, 2).unwrap();
    assert_eq!((cache.pages_in_use(), cache.len(2)), (3, Ok(40)));
    assert_eq!(cache.block_table(0), cache.block_table(1));
    cache.append_to(&[0], &a, &a).unwrap();
    cache.append_to(&[1], &b, &b).unwrap();
    cache.append_to(&[2], &c, &c).unwrap();
    let out = |cache: &KvCache, sequence| cache.attend_to(&[sequence], &q, &Attention::new()).unwrap().out;
    assert_eq!(out(&cache, 0), alone(&[&prefix, &a], &q));
    assert_eq!(out(&cache, 1), alone(&[&prefix, &b], &q));
    assert_eq!(out(&cache, 2), alone(&[&prefix, &c], &q));
    // Two full pages are still shared.
    assert_eq!(cache.block_table(0).unwrap()[..2], cache.block_table(1).unwrap()[..2]);
    cache.clear().unwrap();
    assert!(cache.is_empty() && cache.pages_in_use() == 0);
    cache.append_to(&[1], &prefix, &prefix).unwrap();
    assert_eq!(out(&cache, 1), alone(&[&prefix], &q));
}

#[test]
fn layouts_and_strides_give_one_result() {
    let (k, v, q) = (normal(1, &[2, 3, 20, 16]), normal(2, &[2, 3, 20, 16]), normal(3, &[2, 6, 2, 16]));
    let attention = Attention::new().causal(true);
    let mut plain = KvCacheOptions::new(3, 16).sequences(2).build().unwrap();
    plain.append(&k, &v).unwrap();
    let expected = plain.attend(&q, &attention).unwrap().out.to_f32_vec();
    // The same elements in the memory of HND tensors, called [batch, seq, heads, head_dim].
    let mut nhd = KvCacheOptions::new(3, 16).sequences(2).layout(Layout::Nhd).build().unwrap();
    let (k_data, v_data) = (k.to_f32_vec(), v.to_f32_vec());
    let geometry = Geometry::strided("k", &[2, 20, 3, 16], &[960, 16, 320, 1], 0).unwrap();
    let view = |data| -> TensorView<'_> { View::strided("k", data, geometry).unwrap().into() };
    nhd.append(view(&k_data), view(&v_data)).unwrap();
    assert_eq!(nhd.attend(&q, &attention).unwrap().out.to_f32_vec(), expected);
    let mut out = Tensor::zeros(q.dtype(), q.shape()).unwrap();
    nhd.attend_into(&[0, 1], &q, &attention, out.view_mut(), None).unwrap();
    assert_eq!(out.to_f32_vec(), expected);
}

#[test]
fn a_cache_without_tokens_gives_zeros() {
    let cache = KvCacheOptions::new(1, 8).build().unwrap();
    let result = cache.attend(&normal(1, &[1, 2, 3, 8]), &Attention::new().return_lse(true)).unwrap();
    assert!(result.out.to_f32_vec().iter().all(|&x| x == 0.0));
    assert!(result.lse.unwrap().to_f32_vec().iter().all(|&x| x == f32::NEG_INFINITY));
}

#[test]
fn what_is_wrong_is_named() {
    let text = |result: Result<(), sageattention::Error>| result.unwrap_err().to_string();
    let build = |options: KvCacheOptions| text(options.build().map(|_| ()));
    assert_eq!(build(KvCacheOptions::new(0, 64)), "num_kv_heads: value is 0, expected 1 to 16777216");
    assert_eq!(build(KvCacheOptions::new(1, 257)), "head_dim: value is 257, expected 1 to 256 in a KV cache");
    assert_eq!(
        build(KvCacheOptions::new(1, 64).page_size(48)),
        "page_size: value is 48, expected a power of two from 16 to 1024"
    );
    assert!(build(KvCacheOptions::new(1 << 24, 256)).contains("pages of at most"));
    assert!(build(KvCacheOptions::new(1, 64).sequences(usize::MAX)).contains("at most 16777216"));

    let mut cache = KvCacheOptions::new(2, 8).sequences(2).build().unwrap();
    let x = |shape: &[usize]| normal(1, shape);
    let good = x(&[2, 2, 3, 8]);
    for (k, v, wanted) in [
        (x(&[2, 2, 3]), good.clone(), "k: shape is [2, 2, 3], expected [batch, heads, seq, head_dim]"),
        (
            x(&[2, 1, 3, 8]),
            good.clone(),
            "k: shape is [2, 1, 3, 8], expected [batch, heads, seq, head_dim] with heads = 2, as the cache",
        ),
        (
            good.clone(),
            x(&[1, 2, 3, 8]),
            "v: shape is [1, 2, 3, 8], expected [batch, heads, seq, head_dim] with batch = 2, as the cache",
        ),
        (good.clone(), x(&[2, 2, 4, 8]), "v: shape is [2, 2, 4, 8], expected [2, 2, 3, 8], as k"),
        (good.clone(), good.to_dtype(sageattention::DType::F16), "v: dtype is f16, expected f32, as k"),
    ] {
        assert_eq!(text(cache.append(&k, &v)), wanted);
    }
    assert!(cache.is_empty() && cache.bytes() == 0);
    cache.append(&good, &good).unwrap();

    let attend = |q: &Tensor, attention: &Attention<'_>| text(cache.attend(q, attention).map(|_| ()));
    let q = x(&[2, 4, 1, 8]);
    let plain = Attention::new();
    for (q, attention, wanted) in [
        (x(&[2, 4, 1, 9]), plain.clone(), "q: shape is [2, 4, 1, 9], expected head_dim 8, as the cache"),
        (x(&[1, 4, 1, 8]), plain.clone(), "q: shape is [1, 4, 1, 8], expected batch 2, as the cache"),
        (
            x(&[2, 3, 1, 8]),
            plain.clone(),
            "q: shape is [2, 3, 1, 8], expected a multiple of 2 heads, as the cache",
        ),
        (
            q.clone(),
            plain.clone().kv_lens(&[1, 2]),
            "kv_lens or cu_seqlens over a KV cache is not supported: it has lengths of its own",
        ),
        (
            q.clone(),
            plain.clone().scheme(Preset::INT8),
            "a scheme over a KV cache is not supported: its scheme is that of what it stores",
        ),
        (
            q.clone(),
            plain.clone().device(Device::Cuda(0)),
            "device: value is cuda:0, expected cpu, where the memory is",
        ),
        (q.clone(), plain.sm_scale(0.0), "sm_scale: value is 0, expected a finite number above 0"),
    ] {
        assert_eq!(attend(&q, &attention), wanted);
    }
    let wanted = "sequence: value is 2, expected below 2, the sequences of the cache";
    assert_eq!(text(cache.attend_to(&[2], &q, &Attention::new()).map(|_| ())), wanted);
}
