//! Tensors in a GPU's memory, against exact attention in double precision. Without a GPU each test prints that it is
//! skipped.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Question, assert_close, exact, list, message, normal};
use sage_core::metrics::Accuracy;
use sage_core::{Alignment, Band, Layout, Lengths, Options as Exact};
use sageattention_candle::{Options, Preset, flash, sage_attention, sage_attention_with_lse};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

/// Relative L1 error of INT8 Q·Kᵀ with FP16 P·V on N(0, 1), as `sageattention`'s GPU tests measure it, doubled; and of
/// full precision with P in 16 bits and a rounded output.
const LIMITS: [(Preset, f64, f64); 2] =
    [(Preset::SAGE2_INT8_FP16_PER_THREAD, 0.025, 0.03), (Preset::FULL, 1e-3, 8e-3)];

fn gpu(test: &str) -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        refused => {
            sage_testkit::skip(test, message(refused));
            None
        }
    }
}

/// The tensors on the GPU, against the oracle of the same ones in this process's memory.
fn check(gpu: &Device, what: &str, [q, k, v]: [&Tensor; 3], options: &Options, question: &Question<'_>) {
    let (expected, expected_lse) = exact(q, k, v, question);
    let there = |tensor: &Tensor| tensor.to_device(gpu).unwrap();
    let (q, k, v) = (there(q), there(k), there(v));
    for (preset, half, bfloat) in LIMITS {
        let what = format!("{what}, {preset}, {:?} {:?}", q.dtype(), q.dims());
        let options = options.clone().scheme(preset);
        let (out, lse) = sage_attention_with_lse(&q, &k, &v, &options).unwrap();
        assert!(out.device().same_device(gpu) && lse.device().same_device(gpu), "{what}");
        let limit = if q.dtype() == DType::F16 { half } else { bfloat };
        assert_close(&out.to_device(&Device::Cpu).unwrap(), &expected, limit, &what);
        let lse = common::to_vec(&lse.to_device(&Device::Cpu).unwrap());
        let accuracy = Accuracy::of(&lse, &expected_lse);
        assert!(accuracy.max_abs_error <= 0.06, "log-sum-exp of {what}: {accuracy}");
    }
}

/// On a machine without a driver too, as long as a stub of it lets the program start.
#[test]
fn a_gpu_that_is_not_there_is_an_error() {
    let refused = message(Device::new_cuda(1 << 20));
    assert!(refused.contains("CUDA_ERROR"), "{refused}");
}

#[test]
fn dtypes_layouts_and_grouped_heads_agree() {
    let Some(gpu) = gpu("dtypes_layouts_and_grouped_heads_agree") else { return };
    for dtype in [DType::F16, DType::BF16] {
        for (layout, q_shape, kv_shape) in [
            (Layout::Hnd, [2, 6, 131, 64], [2, 2, 200, 64]),
            (Layout::Nhd, [2, 131, 6, 128], [2, 200, 2, 128]),
            (Layout::Hnd, [1, 9, 1, 64], [1, 3, 300, 64]),
        ] {
            let (q, k, v) =
                (normal(1, &q_shape, dtype), normal(2, &kv_shape, dtype), normal(3, &kv_shape, dtype));
            let exact = Exact { layout, band: CAUSAL, ..Exact::default() };
            let question = Question { options: exact, ..Question::default() };
            check(&gpu, "causal", [&q, &k, &v], &Options::new().layout(layout).causal(true), &question);
        }
    }
}

#[test]
fn masks_and_lengths_lie_on_the_gpu() {
    let Some(gpu) = gpu("masks_and_lengths_lie_on_the_gpu") else { return };
    let there = |tensor: &Tensor| tensor.to_device(&gpu).unwrap();
    let shape = [2, 4, 140, 64];
    let [q, k, v] = [4, 5, 6].map(|seed| normal(seed, &shape, DType::F16));
    let visible = normal(7, &[2, 1, 1, 140], DType::F32).ge(-0.3).unwrap();
    for mask in [visible, normal(8, &[140, 140], DType::F32), normal(9, &[1, 4, 140, 140], DType::F16)] {
        let question = Question { mask: Some(&mask), ..Question::default() };
        let options = Options::new().mask(&there(&mask));
        check(&gpu, &format!("mask {:?}", mask.layout()), [&q, &k, &v], &options, &question);
    }
    let question = Question { lengths: Lengths::KvLens(&[140, 77]), ..Question::default() };
    let options = Options::new().kv_lens(&there(&list(&[140, 77])));
    check(&gpu, "kv_lens", [&q, &k, &v], &options, &question);

    let [q, k, v] = [10, 11, 12].map(|seed| normal(seed, &[171, 4, 64], DType::F16));
    let bounds = [0, 130, 131, 171];
    let question = Question {
        options: Exact { band: CAUSAL, ..Exact::default() },
        lengths: Lengths::Packed { cu_seqlens_q: &bounds, cu_seqlens_k: &bounds },
        ..Question::default()
    };
    let bounds = there(&list(&bounds.map(|x| x as u32)));
    let options = Options::new().causal(true).packed(&bounds, &bounds, 130, 130);
    check(&gpu, "packed", [&q, &k, &v], &options, &question);
    let options = Exact { sm_scale: Some(0.2), ..question.options };
    let (expected, _) = exact(&q, &k, &v, &Question { options, ..question });
    let out =
        flash::flash_attn_varlen(&there(&q), &there(&k), &there(&v), &bounds, &bounds, 130, 130, 0.2, true);
    assert_close(&out.unwrap().to_device(&Device::Cpu).unwrap(), &expected, 0.03, "flash_attn_varlen");
}

#[test]
fn views_give_the_same_bits_as_copies() {
    let Some(gpu) = gpu("views_give_the_same_bits_as_copies") else { return };
    let fused = normal(13, &[2, 140, 3, 4, 64], DType::F16).to_device(&gpu).unwrap();
    let part = |at: usize| fused.narrow(2, at, 1).unwrap().squeeze(2).unwrap();
    let options = Options::new().layout(Layout::Nhd).causal(true);
    let seen = sage_attention(&part(0), &part(1), &part(2), &options).unwrap();
    let copy = |at: usize| part(at).force_contiguous().unwrap();
    let copied = sage_attention(&copy(0), &copy(1), &copy(2), &options).unwrap();
    assert_eq!(common::to_vec(&seen), common::to_vec(&copied));
}

#[test]
fn results_are_in_order_with_candles_own_work() {
    let Some(gpu) = gpu("results_are_in_order_with_candles_own_work") else { return };
    let q = normal(14, &[1, 8, 1024, 64], DType::F16).to_device(&gpu).unwrap();
    let expected = common::to_vec(&sage_attention(&q, &q, &q, &Options::new()).unwrap());
    for _ in 0..20 {
        // Inputs that candle's kernels have just been asked for, and a result that they read at once.
        let fresh = (&q + &q.zeros_like().unwrap()).unwrap();
        let out = (sage_attention(&fresh, &fresh, &fresh, &Options::new()).unwrap() * 2.0).unwrap();
        drop(fresh);
        let halved = common::to_vec(&(out * 0.5).unwrap());
        assert_eq!(halved, expected);
    }
}

#[test]
fn what_is_wrong_is_said() {
    let Some(gpu) = gpu("what_is_wrong_is_said") else { return };
    let q = normal(15, &[1, 2, 8, 64], DType::F16);
    let there = q.to_device(&gpu).unwrap();
    let mask = Tensor::ones((8, 8), DType::U8, &Device::Cpu).unwrap();
    let refused = message(sage_attention(&there, &there, &there, &Options::new().mask(&mask)));
    assert_eq!(refused, "mask device: value is Cpu, expected the GPU that q is on");
    let lens = list(&[8, 8]).to_device(&gpu).unwrap();
    let refused = message(sage_attention(&there, &there, &there, &Options::new().kv_lens(&lens)));
    assert_eq!(refused, "kv_lens shape: value is [2], expected [1], a length for each batch entry of q");
    let long = lens.to_dtype(DType::I64).unwrap();
    let refused = message(sage_attention(&there, &there, &there, &Options::new().kv_lens(&long)));
    assert_eq!(refused, "kv_lens: dtype is i64, expected u32 or i32");
}
