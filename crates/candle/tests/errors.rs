//! Calls that cannot be carried out: each is refused with one message that names what is wrong.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{list, message as message_of, normal};
use sageattention_candle::{Options, sage_attention, sage_attention_with_lse};

fn message(shapes: [&[usize]; 3], options: &Options) -> String {
    let [q, k, v] = shapes.map(|shape| normal(1, shape, DType::F32));
    message_of(sage_attention(&q, &k, &v, options))
}

const Q: &[usize] = &[2, 4, 8, 16];
const KV: &[usize] = &[2, 2, 6, 16];

#[test]
fn shapes() {
    let with = |k: &[usize], v: &[usize]| message([Q, k, v], &Options::new());
    assert_eq!(
        with(&[2, 3, 6, 16], KV),
        "k: shape is [2, 3, 6, 16], expected a number of heads that divides q's 4"
    );
    assert_eq!(with(KV, &[2, 2, 5, 16]), "v: shape is [2, 2, 5, 16], expected [2, 2, 6, head_dim], as k");
    assert_eq!(
        message([&[1, 1, 1, 1, 1], KV, KV], &Options::new()),
        "q: shape is [1, 1, 1, 1, 1], expected at most 4 dimensions"
    );
    assert_eq!(
        message([&[1, 1, 1, 600], KV, KV], &Options::new()),
        "head_dim: value is 600, expected 1 to 576"
    );
}

#[test]
fn dtypes() {
    let f32s = normal(1, KV, DType::F32);
    let refused = |q: &Tensor, k: &Tensor| message_of(sage_attention(q, k, &f32s, &Options::new()));
    let q = normal(1, Q, DType::F32);
    assert_eq!(
        refused(&q.to_dtype(DType::F64).unwrap(), &f32s),
        "q: dtype is f64, expected f32, f16 or bf16"
    );
    assert_eq!(refused(&q, &f32s.to_dtype(DType::F16).unwrap()), "k: dtype is f16, expected f32, as q");
    let mask = Tensor::zeros((8, 6), DType::I64, &Device::Cpu).unwrap();
    assert_eq!(
        message_of(sage_attention(&q, &f32s, &f32s, &Options::new().mask(&mask))),
        "mask: dtype is i64, expected u8, f32, f16 or bf16"
    );
}

#[test]
fn sinks() {
    let refused = |sinks: &Tensor| message([Q, KV, KV], &Options::new().sinks(sinks));
    assert_eq!(
        refused(&Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap()),
        "sinks: shape is [2], expected [4], one for each query head"
    );
    assert_eq!(
        refused(&Tensor::zeros(4, DType::F16, &Device::Cpu).unwrap()),
        "sinks: dtype is f16, expected f32"
    );
}

#[test]
fn block_masks() {
    let refused = |flags: &Tensor| message([Q, KV, KV], &Options::new().block_mask(flags, 4, 4));
    assert_eq!(
        refused(&Tensor::zeros((2, 4, 2, 3), DType::U8, &Device::Cpu).unwrap()),
        "block_mask: shape is [2, 4, 2, 3], expected broadcastable to [2, 4, 2, 2]"
    );
    assert_eq!(
        refused(&Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap()),
        "block_mask: dtype is f32, expected u8"
    );
}

#[test]
fn options() {
    let refused = |options: Options| message([Q, KV, KV], &options);
    assert_eq!(
        refused(Options::new().sm_scale(-1.0)),
        "sm_scale: value is -1, expected a finite number above 0"
    );
    let mask = Tensor::zeros((8, 5), DType::U8, &Device::Cpu).unwrap();
    assert_eq!(
        refused(Options::new().mask(&mask)),
        "mask: shape is [8, 5], expected broadcastable to [2, 4, 8, 6]"
    );
    assert_eq!(
        refused(Options::new().kv_lens(&list(&[6, 7]))),
        "kv_lens[1]: value is 7, expected 0 to 6, k's length"
    );
    assert_eq!(
        refused(Options::new().kv_lens(&normal(1, &[2], DType::F32))),
        "kv_lens: value is [2] of f32, expected one dimension of integers"
    );
    let large = Tensor::new(&[1i64, 1 << 40], &Device::Cpu).unwrap();
    assert_eq!(
        refused(Options::new().kv_lens(&large)),
        "kv_lens: value is 1099511627776, expected 0 to 2147483647"
    );
}

#[test]
fn a_backward_pass_is_an_error_and_never_a_wrong_gradient() {
    let q = Var::from_tensor(&normal(1, Q, DType::F32)).unwrap();
    let kv = normal(2, KV, DType::F32);
    let (out, lse) = sage_attention_with_lse(&q, &kv, &kv, &Options::new()).unwrap();
    for result in [out, lse] {
        let error = message_of(result.sum_all().unwrap().backward());
        assert!(error.starts_with("backward through sage_attention is not supported"), "{error}");
    }
    // Without gradients to track there is nothing to refuse.
    assert!(sage_attention(&q.detach(), &kv, &kv, &Options::new()).is_ok());
}
