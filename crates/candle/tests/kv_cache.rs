//! The quantised KV cache against exact attention in double precision, step by step as a model decodes.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor, Var};
use common::{Question, assert_close, exact, message, normal};
use sage_core::{Alignment, Band, Options as Exact};
use sageattention_candle::{KvCache, KvCacheOptions, Options, ValueFormat};

/// Relative L1 error of INT8 keys per token and of each format of values, on these inputs: measured worst 0.0071,
/// 0.0071, 0.0276 and 0.0095, doubled.
const LIMITS: [(ValueFormat, f64); 4] = [
    (ValueFormat::F16, 0.0143),
    (ValueFormat::BF16, 0.0143),
    (ValueFormat::Fp8E4M3, 0.055),
    (ValueFormat::Int8, 0.019),
];

#[test]
fn decoding_is_attention_over_all_tokens_so_far() {
    let (tokens, prompt) = (150, 131);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (values, limit) in LIMITS {
            let q = normal(1, &[2, 6, tokens, 64], dtype);
            let (k, v) = (normal(2, &[2, 2, tokens, 64], dtype), normal(3, &[2, 2, tokens, 64], dtype));
            let mut cache = KvCache::new(KvCacheOptions::new(2, 64).sequences(2).values(values)).unwrap();
            let part = |tensor: &Tensor, from: usize, len: usize| tensor.narrow(2, from, len).unwrap();
            let mut from = 0;
            for len in [prompt, 1, 1, 17] {
                cache.append(&part(&k, from, len), &part(&v, from, len)).unwrap();
                let new = part(&q, from, len);
                from += len;
                let out = cache.attend(&new, &Options::new().causal(true)).unwrap();
                assert_eq!((out.dims(), out.dtype()), (new.dims(), dtype));
                let band = Band::causal(Alignment::BottomRight);
                let question = Question { options: Exact::default().band(band), ..Question::default() };
                let (expected, _) = exact(&new, &part(&k, 0, from), &part(&v, 0, from), &question);
                assert_close(&out, &expected, limit, &format!("{dtype:?}, {values:?}, {from} tokens"));
            }
            assert_eq!(cache.plain().len(1).unwrap(), tokens);
        }
    }
}

#[test]
fn a_prefix_is_shared_through_the_plain_cache() {
    let mut cache = KvCache::new(KvCacheOptions::new(1, 16).sequences(2)).unwrap();
    let prompt = normal(4, &[1, 1, 40, 16], DType::F32);
    cache.append_to(&[0], &prompt, &prompt).unwrap();
    cache.plain_mut().fork(0, 1).unwrap();
    let q = normal(5, &[1, 2, 1, 16], DType::F32);
    let [first, second] = [0, 1].map(|sequence| cache.attend_to(&[sequence], &q, &Options::new()).unwrap());
    assert_eq!(common::to_vec(&first), common::to_vec(&second));
}

#[test]
fn what_does_not_fit_is_said() {
    let mut cache = KvCache::new(KvCacheOptions::new(2, 16)).unwrap();
    let kv = normal(6, &[1, 2, 3, 16], DType::F32);
    cache.append(&kv, &kv).unwrap();
    let q = Var::from_tensor(&normal(7, &[1, 4, 1, 16], DType::F32)).unwrap();
    let lens = common::list(&[3]);
    let error = message(cache.attend(&q, &Options::new().kv_lens(&lens)));
    assert!(error.contains("kv_lens or cu_seqlens over a KV cache is not supported"), "{error}");
    let error = message(cache.append(&kv, &normal(8, &[1, 2, 4, 16], DType::F32)));
    assert_eq!(error, "v: shape is [1, 2, 4, 16], expected [1, 2, 3, 16], as k");
    let out = cache.attend(&q, &Options::new()).unwrap();
    let error = message(out.sum_all().unwrap().backward());
    assert!(error.starts_with("backward through sage_attention is not supported"), "{error}");
}
