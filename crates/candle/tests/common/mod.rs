//! Random candle tensors, and the oracle's answer for them.

#![allow(dead_code, clippy::unwrap_used)] // each test uses some of it

use candle_core::{DType, Device, Tensor};
use sage_core::metrics::Accuracy;
use sage_core::{Call, Geometry, Inputs, Lengths, Mask, Options, View, oracle};

/// N(0, 1) in a dtype, row-major.
pub fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let values = sage_testkit::normal(seed, shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Boundaries or lengths.
pub fn list(values: &[u32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// An error's message, without the backtrace that candle adds when it is told to.
pub fn message<T: std::fmt::Debug>(result: candle_core::Result<T>) -> String {
    result.unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
}

pub fn to_vec(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The same values in the oracle's words.
fn plain(tensor: &Tensor) -> sage_core::Tensor {
    let dtype = match tensor.dtype() {
        DType::F32 => sage_core::DType::F32,
        DType::F16 => sage_core::DType::F16,
        DType::BF16 => sage_core::DType::BF16,
        other => panic!("{other:?} is no dtype of attention"),
    };
    sage_core::Tensor::new(to_vec(tensor), tensor.dims()).unwrap().to_dtype(dtype)
}

/// What the oracle is asked beside Q, K and V.
#[derive(Default)]
pub struct Question<'a> {
    pub options: Options,
    pub mask: Option<&'a Tensor>,
    pub lengths: Lengths<'a>,
    pub sinks: Option<&'a [f32]>,
}

/// Exact attention: output in Q's layout, and log-sum-exp.
pub fn exact(q: &Tensor, k: &Tensor, v: &Tensor, question: &Question<'_>) -> (Vec<f64>, Vec<f64>) {
    let (q, k, v) = (plain(q), plain(k), plain(v));
    let flags: Vec<bool>;
    let bias;
    let mask = match question.mask {
        None => None,
        Some(mask) if mask.dtype() == DType::U8 => {
            flags = to_vec(mask).iter().map(|&flag| flag != 0.0).collect();
            Some(Mask::Bool(View::contiguous("mask", &flags, mask.dims()).unwrap()))
        }
        Some(mask) => {
            bias = plain(mask);
            Some(Mask::Additive(bias.view()))
        }
    };
    let inputs = Inputs::new(q.view(), k.view(), v.view()).mask(mask).lengths(question.lengths).sinks(
        question.sinks.map(|sinks| {
            sage_core::TensorView::F32(View::contiguous("sinks", sinks, &[sinks.len()]).unwrap())
        }),
    );
    let call = Call::check(&inputs, &question.options).unwrap();
    let output = oracle::exact(&call);
    // The oracle's order is [batch, heads, seq, channels]; the output's is Q's.
    let out = Geometry::contiguous("out", &call.out_shape()).unwrap();
    let geometry = call.check_output(call.problem.dtype, &out).unwrap();
    let canonical = geometry.shape().to_vec();
    let mut values = vec![0f64; geometry.len()];
    let mut at = output.out.iter();
    for b in 0..canonical[0] {
        for h in 0..canonical[1] {
            for i in 0..canonical[2] {
                for c in 0..canonical[3] {
                    values[geometry.index([b, h, i, c]) as usize] = *at.next().unwrap();
                }
            }
        }
    }
    (values, output.lse)
}

/// Fails with the numbers where the relative L1 error is above `limit`.
pub fn assert_close(actual: &Tensor, expected: &[f64], limit: f64, what: &str) {
    let accuracy = Accuracy::of(&to_vec(actual), expected);
    assert!(accuracy.relative_l1 <= limit, "{what}: {accuracy}, limit {limit}");
}
