//! Attention over predicted blocks through the front door.

use sage_core::metrics::Accuracy;
use sageattention::sparse::{Predictor, Select, pooled_tail};
use sageattention::{
    Alignment, Attention, Call, DType, Inputs, KvCacheOptions, Mask, Preset, Result, Tensor,
};

/// Rows of which neighbours are alike.
fn local(shape: &[usize], seed: u64) -> Tensor {
    let [_, _, tokens, head_dim] = [0, 1, 2, 3].map(|at| shape[at]);
    let noise = sage_testkit::normal(seed, shape.iter().product());
    let wave = |at: usize| (at / head_dim % tokens) as f32 * 0.2 / (1 + at % head_dim) as f32;
    let elements: Vec<f32> = noise.iter().enumerate().map(|(at, x)| 2.0 * wave(at).sin() + 0.2 * x).collect();
    Tensor::new(elements, shape).expect("elements of that shape").to_dtype(DType::F16)
}

fn sparge() -> Predictor {
    Predictor::sparge_attn(Select::Cdf(0.9.into()), 0.2)
}

#[test]
fn a_call_returns_the_map_that_it_computed() -> Result<()> {
    let [q, k, v] = [1, 2, 3].map(|seed| local(&[1, 4, 400, 32], seed));
    let attention = Attention::new().causal_alignment(Alignment::TopLeft);
    let sparse = attention.clone().sparse(sparge()).return_lse(true);
    let result = sparse.forward(&q, &k, &v)?;
    let map = result.map.expect("a predictor was given");
    assert_eq!(map, sparse.predict(&q, &k)?);
    assert_eq!(map, sparge().predict(q.view(), k.view(), &attention.options())?);
    assert!(map.kept() < 4 * (2 + 4 + 6 + 7), "what causal attention sees are 19 blocks a head");
    let given = attention.clone().block_mask(map.mask()).return_lse(true).forward(&q, &k, &v)?;
    assert_eq!((result.out, result.lse), (given.out, given.lse));
    assert_eq!(given.map, None);

    let plan = sparse.plan(&q, &k, &v)?.to_string();
    assert!(plan.contains("block mask of 128 queries × 64 keys"), "{plan}");
    let exact = sparse.smooth_k(false).forward(&q, &k, &v)?;
    assert_eq!(exact.map.as_ref(), Some(&map), "what quantising subtracts from K changes no map");
    Ok(())
}

#[test]
fn a_pooled_tail_is_the_definition_and_nearer_to_dense_attention() -> Result<()> {
    let [q, k, v] = [1, 2, 3].map(|seed| local(&[1, 4, 400, 32], seed));
    for attention in [Attention::new(), Attention::new().causal(true)] {
        let attention = attention.scheme(Preset::FULL);
        let sparse = attention.clone().sparse(Predictor::sla(0.3));
        let result = sparse.clone().pooled_tail(true).return_lse(true).forward(&q, &k, &v)?;
        let map = result.map.expect("a predictor was given");
        let given = attention.clone().block_mask(map.mask()).pooled_tail(true).forward(&q, &k, &v)?;
        assert_eq!(given.out, result.out, "a map that is given is as good");
        let inputs = Inputs::new(q.view(), k.view(), v.view()).block_mask(map.mask());
        let call = Call::check(&inputs, &attention.options())?;
        let expected = pooled_tail(&call);
        let distance = |out: &Tensor, from: &[f64]| Accuracy::of(&out.to_f32_vec(), from).relative_l1;
        // Outputs are rounded to 11 bits.
        assert!(distance(&result.out, &expected.out) < 3e-4);
        let lse = result.lse.expect("asked for").to_f32_vec();
        assert!(lse.iter().zip(&expected.lse).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
        let dense = attention.forward(&q, &k, &v)?.out.to_f32_vec();
        let dense: Vec<f64> = dense.into_iter().map(f64::from).collect();
        let without = sparse.clone().forward(&q, &k, &v)?.out;
        assert!(distance(&result.out, &dense) < 0.7 * distance(&without, &dense));
        let plan = sparse.pooled_tail(true).plan(&q, &k, &v)?.to_string();
        assert!(plan.contains("64 queries × 64 keys, the others by their means"), "{plan}");
    }
    Ok(())
}

#[test]
fn what_has_no_pooled_tail_is_refused_by_name() {
    let x = local(&[1, 2, 200, 32], 1);
    let error = |attention: Attention<'_>| attention.forward(&x, &x, &x).unwrap_err().to_string();
    let tail = Attention::new().pooled_tail(true);
    assert_eq!(
        error(tail.clone()),
        "pooled_tail without a block mask is not supported: give the blocks that are computed, or a predictor of them"
    );
    let hidden = Tensor::new(vec![0.0; 200], &[200]).unwrap();
    let masked = tail.clone().sparse(Predictor::sla(0.5)).mask(Mask::Additive(hidden.view()));
    assert_eq!(
        error(masked),
        "pooled_tail with an explicit mask is not supported: \
         the keys of a block would not be one mean; use causal, window and length options"
    );
    let mut cache = KvCacheOptions::new(2, 32).build().unwrap();
    cache.append(&x, &x).unwrap();
    assert_eq!(
        cache.attend(&x, &tail).unwrap_err().to_string(),
        "pooled_tail with a KV cache is not supported: \
         attention over a cache computes the blocks that its block mask keeps"
    );
}

#[test]
fn what_does_not_go_with_a_predictor_is_refused() {
    let x = local(&[1, 2, 200, 32], 1);
    let error = |attention: Attention<'_>| attention.forward(&x, &x, &x).unwrap_err().to_string();
    let map = sparge().predict(x.view(), x.view(), &Attention::new().options()).unwrap();
    assert_eq!(
        error(Attention::new().sparse(sparge()).block_mask(map.mask())),
        "block_mask with a predictor is not supported: give one of them"
    );
    assert_eq!(error(Attention::new().sparse(Predictor::sla(1.5))), "topk: value is 1.5, expected 0 to 1");
    assert_eq!(
        error(Attention::new().sparse(Predictor::sparge_attn2(vec![0.5; 3], 0.2))),
        "topk: shape is [3], expected [2], one for each query head"
    );
    assert_eq!(
        Attention::new().predict(&x, &x).unwrap_err().to_string(),
        "a prediction without a predictor is not supported: choose one by `sparse`"
    );
    let mut cache = KvCacheOptions::new(2, 32).build().unwrap();
    cache.append(&x, &x).unwrap();
    assert_eq!(
        cache.attend(&x, &Attention::new().sparse(sparge())).unwrap_err().to_string(),
        "a predictor over a KV cache is not supported: give a block_mask"
    );
}
