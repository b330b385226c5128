//! Ours beside burn's own function.

use burn_ndarray::NdArray;
use burn_tensor::{Bool, Distribution, Int, Tensor, module};
use sageattention::Attention;
use sageattention_burn::{attention, attention_with};

type Backend = NdArray<f32>;

/// What quantising may cost: the default scheme's relative L1 on normally distributed tensors is 0.0135 at most.
const TOLERANCE: f32 = 0.0135;

fn normal(shape: [usize; 4]) -> Tensor<Backend, 4> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Default::default())
}

/// Σ|x − y| / Σ|y|.
fn relative_l1(x: Tensor<Backend, 4>, y: Tensor<Backend, 4>) -> f32 {
    let difference = (x - y.clone()).abs().sum().into_scalar();
    difference / y.abs().sum().into_scalar()
}

#[test]
fn it_is_burns_own_attention() {
    for (queries, keys, head_dim) in [(200, 200, 64), (1, 333, 128), (77, 500, 40)] {
        let (q, k) = (normal([2, 3, queries, head_dim]), normal([2, 3, keys, head_dim]));
        let v = normal([2, 3, keys, head_dim]);
        let theirs = module::attention(q.clone(), k.clone(), v.clone(), None);
        let ours = attention(q, k, v, None).expect("attention");
        let error = relative_l1(ours, theirs);
        assert!(error < TOLERANCE, "{queries} × {keys}, head_dim {head_dim}: {error}");
    }
}

#[test]
fn true_hides_a_key_as_in_burn() {
    let (q, k, v) = (normal([2, 2, 90, 64]), normal([2, 2, 120, 64]), normal([2, 2, 120, 64]));
    // Every third key of the first sequence, every key behind the 50th of the second; one mask for all heads and queries.
    let keys = Tensor::<Backend, 1, Int>::arange(0..120, &q.device());
    let third = keys.clone().remainder_scalar(3).equal_elem(0).reshape([1, 1, 1, 120]);
    let behind = keys.greater_equal_elem(50).reshape([1, 1, 1, 120]);
    let mask: Tensor<Backend, 4, Bool> = Tensor::cat(vec![third, behind], 0);

    let whole = mask.clone().expand([2, 2, 90, 120]);
    let theirs = module::attention(q.clone(), k.clone(), v.clone(), Some(whole));
    let ours = attention(q, k, v, Some(mask)).expect("attention");
    let error = relative_l1(ours, theirs);
    assert!(error < TOLERANCE, "{error}");
}

#[test]
fn options_and_grouped_queries() {
    let (q, k, v) = (normal([1, 4, 100, 64]), normal([1, 2, 100, 64]), normal([1, 2, 100, 64]));
    let repeated =
        |t: Tensor<Backend, 4>| t.reshape([1, 2, 1, 100 * 64]).repeat_dim(2, 2).reshape([1, 4, 100, 64]);
    let later = Tensor::<Backend, 2, Bool>::tril_mask([100, 100], 0, &q.device());
    let mask = later.reshape([1, 1, 100, 100]).expand([1, 4, 100, 100]);
    let theirs = module::attention(q.clone(), repeated(k.clone()), repeated(v.clone()), Some(mask));
    let ours = attention_with(&Attention::new().causal(true), q, k, v, None).expect("attention");
    let error = relative_l1(ours, theirs);
    assert!(error < TOLERANCE, "{error}");
}

#[test]
fn shapes_that_do_not_go_together_are_an_error() {
    let error = attention(normal([1, 2, 8, 64]), normal([1, 2, 8, 32]), normal([1, 2, 8, 64]), None)
        .expect_err("keys of 32 channels");
    assert!(error.to_string().contains("32"), "{error}");
}
