//! Calls in every form that the builder offers, compared with exact attention.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use sage_core::metrics::Accuracy;
use sage_core::{Call, Inputs, oracle};
use sage_testkit::uniform_tensor;
use sageattention::{Alignment, Attention, DType, Geometry, Layout, Mask, Preset, Tensor, View, ViewMut};

/// A tensor of reproducible numbers in (−1, 1).
fn tensor(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    uniform_tensor(seed, shape, dtype)
}

/// Exact attention in `[batch, heads, seq, head_dim]`, and log-sum-exps.
fn exact(attention: &Attention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> oracle::Output {
    let inputs = Inputs::new(q.view(), k.view(), v.view());
    oracle::exact(&Call::check(&inputs, &attention.options()).unwrap())
}

#[test]
fn options_reach_the_backend() {
    let (q, k, v) = (
        tensor(DType::F32, &[2, 4, 33, 40], 1),
        tensor(DType::F32, &[2, 2, 47, 40], 2),
        tensor(DType::F32, &[2, 2, 47, 40], 3),
    );
    let new = || Attention::new().return_lse(true).scheme(Preset::FULL);
    for attention in [
        new(),
        new().causal(true),
        new().causal(true).causal(false),
        new().causal_alignment(Alignment::TopLeft),
        new().window(5, 3),
        new().window(5, None),
        new().window(9, 9).causal(true),
        new().causal(true).window(9, 9),
        new().sm_scale(0.5),
        new().logit_softcap(0.3),
    ] {
        let expected = exact(&attention, &q, &k, &v);
        let output = attention.forward(&q, &k, &v).unwrap();
        let accuracy = Accuracy::of(&output.out.to_f32_vec(), &expected.out);
        assert!(accuracy.max_abs_error < 1e-5, "{attention:?}: {accuracy}");
        let lse = output.lse.unwrap();
        assert_eq!(lse.shape(), [2, 4, 33]);
        let accuracy = Accuracy::of(&lse.to_f32_vec(), &expected.lse);
        assert!(accuracy.max_abs_error < 1e-4, "{attention:?}: LSE {accuracy}");
    }
}

/// MLA's heads, and one batch entry of keys and values for several of queries, in every layout.
#[test]
fn values_have_channels_of_their_own_and_one_batch_serves_many() {
    for layout in [Layout::Hnd, Layout::Nhd] {
        let shape = |[batch, heads, rows, dim]: [usize; 4]| match layout {
            Layout::Hnd => [batch, heads, rows, dim],
            Layout::Nhd => [batch, rows, heads, dim],
        };
        let q = tensor(DType::F16, &shape([3, 4, 33, 192]), 1);
        let (k, v) =
            (tensor(DType::F16, &shape([1, 2, 47, 192]), 2), tensor(DType::F16, &shape([1, 2, 47, 128]), 3));
        for preset in [Preset::FULL, Preset::INT8] {
            let attention = Attention::new().layout(layout).scheme(preset).return_lse(true).causal(true);
            let output = attention.forward(&q, &k, &v).unwrap();
            assert_eq!(output.out.shape(), shape([3, 4, 33, 128]));
            let plan = attention.plan(&q, &k, &v).unwrap().to_string();
            assert!(plan.contains("head_dim 192, value_dim 128"), "{plan}");
            let inputs = Inputs::new(q.view(), k.view(), v.view());
            let exact = oracle::exact(&Call::check(&inputs, &attention.options()).unwrap());
            let lse = Accuracy::of(&output.lse.unwrap().to_f32_vec(), &exact.lse);
            assert!(lse.max_abs_error < 0.02, "{preset}: {lse}");
            if layout == Layout::Hnd {
                let accuracy = Accuracy::of(&output.out.to_f32_vec(), &exact.out);
                assert!(accuracy.relative_l1 < 0.02, "{preset}: {accuracy}");
            }
        }
    }
}

#[test]
fn causal_and_window_combine_in_any_order() {
    let a = Attention::new().window(9, 9).causal(true).options();
    let b = Attention::new().causal(true).window(9, 9).options();
    assert_eq!(a, b);
    assert_eq!((a.band.left, a.band.right), (Some(9), Some(0)));
}

#[test]
fn the_default_is_accurate_in_every_dtype() {
    for dtype in DType::ALL {
        let (q, k, v) = (
            tensor(dtype, &[1, 3, 200, 64], 1),
            tensor(dtype, &[1, 3, 200, 64], 2),
            tensor(dtype, &[1, 3, 200, 64], 3),
        );
        let output = Attention::new().forward(&q, &k, &v).unwrap();
        assert_eq!((output.out.dtype(), output.out.shape(), output.lse), (dtype, q.shape(), None));
        let accuracy = Accuracy::of(&output.out.to_f32_vec(), &exact(&Attention::new(), &q, &k, &v).out);
        assert!(accuracy.cosine > 0.9999, "{dtype}: {accuracy}");
    }
}

/// The output has the caller's layout, also where its memory is part of something larger.
#[test]
fn outputs_go_where_the_caller_says() {
    let (batch, seq, heads, head_dim) = (2, 9, 3, 16);
    let shape = [batch, seq, heads, head_dim];
    let (q, k, v) =
        (tensor(DType::F32, &shape, 1), tensor(DType::F32, &shape, 2), tensor(DType::F32, &shape, 3));
    let attention = Attention::new().layout(Layout::Nhd).causal(true).scheme(Preset::FULL);
    let whole = attention.forward(&q, &k, &v).unwrap().out;
    assert_eq!(whole.shape(), shape);
    // Every second row of a larger buffer.
    let row = heads * head_dim;
    let strides = [(2 * seq * row) as i64, 2 * row as i64, head_dim as i64, 1];
    let geometry = Geometry::strided("out", &shape, &strides, row as i64).unwrap();
    let mut buffer = vec![7f32; batch * seq * row * 2];
    let mut lse = vec![0f32; batch * heads * seq];
    let out = ViewMut::strided("out", &mut buffer, geometry).unwrap();
    attention.forward_into(&q, &k, &v, out.into(), Some(&mut lse)).unwrap();
    let rows: Vec<f32> = buffer.chunks(row).skip(1).step_by(2).flatten().copied().collect();
    assert_eq!(rows, whole.to_f32_vec());
    assert!(buffer.chunks(row).step_by(2).flatten().all(|&x| x == 7.0));
    assert!(lse.iter().all(|x| x.is_finite()));
}

#[test]
fn masks_and_lengths_hide_keys() {
    let (q, k, v) = (
        tensor(DType::F32, &[2, 2, 5, 16], 1),
        tensor(DType::F32, &[2, 2, 8, 16], 2),
        tensor(DType::F32, &[2, 2, 8, 16], 3),
    );
    let attention = || Attention::new().scheme(Preset::FULL);
    let short = attention().kv_lens(&[3, 0]).return_lse(true).forward(&q, &k, &v).unwrap();
    // The same as a boolean mask, and as an additive one.
    let visible: Vec<bool> = (0..16).map(|i| i < 3).collect();
    let mask = Mask::Bool(View::contiguous("mask", &visible, &[2, 1, 1, 8]).unwrap());
    assert_eq!(attention().mask(mask).return_lse(true).forward(&q, &k, &v).unwrap(), short);
    let added: Vec<f32> = visible.iter().map(|&v| if v { 0.0 } else { f32::NEG_INFINITY }).collect();
    let mask = Mask::Additive(View::contiguous("mask", &added, &[2, 1, 1, 8]).unwrap().into());
    assert_eq!(attention().mask(mask).return_lse(true).forward(&q, &k, &v).unwrap(), short);
    // A row that sees nothing is zero, and its log-sum-exp −∞.
    assert!(short.out.to_f32_vec()[2 * 5 * 16..].iter().all(|&x| x == 0.0));
    assert!(short.lse.unwrap().to_f32_vec()[2 * 5..].iter().all(|&x| x == f32::NEG_INFINITY));
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let (q, k, v) = (
        tensor(DType::F32, &[7, 2, 16], 1),
        tensor(DType::F32, &[9, 2, 16], 2),
        tensor(DType::F32, &[9, 2, 16], 3),
    );
    let (cu_q, cu_k) = ([0, 3, 7], [0, 4, 9]);
    let attention = Attention::new().scheme(Preset::FULL);
    let whole = attention.clone().packed(&cu_q, &cu_k).return_lse(true).forward(&q, &k, &v).unwrap();
    assert_eq!(whole.lse.unwrap().shape(), [2, 7]);
    let rows = |tensor: &Tensor, from: usize, to: usize| {
        Tensor::new(tensor.to_f32_vec()[from * 32..to * 32].to_vec(), &[1, to - from, 2, 16]).unwrap()
    };
    let second =
        attention.layout(Layout::Nhd).forward(&rows(&q, 3, 7), &rows(&k, 4, 9), &rows(&v, 4, 9)).unwrap();
    let accuracy = Accuracy::of(&whole.out.to_f32_vec()[3 * 32..], &second.out.to_f32_vec());
    assert!(accuracy.max_abs_error < 1e-6, "{accuracy}");
}

#[test]
fn the_last_of_packed_sequences_may_have_no_tokens() {
    let x = |seed| tensor(DType::F16, &[9, 2, 16], seed);
    let (q, k, v) = (x(1), x(2), x(3));
    for preset in Preset::ALL {
        let packed = |boundaries: &[i32]| {
            let attention = Attention::new().scheme(*preset).packed(boundaries, boundaries);
            attention.forward(&q, &k, &v).unwrap().out
        };
        assert_eq!(packed(&[0, 4, 9, 9]), packed(&[0, 4, 9]), "{preset:?}");
    }
}

#[test]
fn a_plan_says_what_and_why() {
    let x = tensor(DType::F16, &[1, 4, 256, 64], 1);
    let plan = Attention::new().causal(true).scheme(Preset::INT8).plan(&x, &x, &x).unwrap();
    assert_eq!(*plan.scheme(), Preset::INT8.scheme(64));
    let text = plan.to_string();
    for line in [
        "problem     f16, batch 1, 4 query heads, 4 key heads, 256 queries × 256 keys, head_dim 64",
        "visible     causal (the last query sees the last key)",
        "scores      sm_scale 0.125",
        "scheme      INT8 QK per-block · smooth K · 12-bit PV (128)",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\nnot in\n{text}");
    }
    assert!(text.lines().all(|line| line.as_bytes().get(11) == Some(&b' ')), "{text}");
}
