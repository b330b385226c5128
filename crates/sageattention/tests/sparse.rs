//! Attention over predicted blocks through the front door.

use sageattention::sparse::{Predictor, Select};
use sageattention::{Alignment, Attention, DType, KvCacheOptions, Result, Tensor};

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
