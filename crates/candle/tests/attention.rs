//! `sage_attention` against exact attention in double precision.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Question, assert_close, exact, list, normal};
use sage_core::metrics::Accuracy;
use sage_core::{Alignment, Band, Layout, Lengths, Options as Exact};
use sageattention_candle::sparse::Predictor;
use sageattention_candle::{Options, Preset, sage_attention, sage_attention_with_lse};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

/// Relative L1 error of full precision: that of the kernels (see the tests of `sage-cpu`), and half a unit in the last
/// place of the output's 11 or 8 bits, of which the mean over a binade is a third below the largest.
fn full_precision(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-12),
        DType::BF16 => 2f64.powi(-9),
        _ => 5e-6,
    }
}

/// Relative L1 error of INT8 per token on these inputs: measured worst 0.0105, doubled.
const INT8: f64 = 0.021;

fn check(what: &str, [q, k, v]: [&Tensor; 3], options: &Options, question: &Question<'_>) {
    let (expected, expected_lse) = exact(q, k, v, question);
    for (preset, limit) in [(Preset::FULL, full_precision(q.dtype())), (Preset::INT8_PER_TOKEN, INT8)] {
        let what = format!("{what}, {preset}, {:?} {:?}", q.dtype(), q.dims());
        let options = options.clone().scheme(preset);
        let out = sage_attention(q, k, v, &options).unwrap();
        let (rows, channels) = (&q.dims()[..q.rank() - 1], &v.dims()[v.rank() - 1..]);
        assert_eq!((out.dims(), out.dtype()), (&[rows, channels].concat()[..], q.dtype()), "{what}");
        assert_close(&out, &expected, limit, &what);

        let (again, lse) = sage_attention_with_lse(q, k, v, &options).unwrap();
        assert_eq!(common::to_vec(&again), common::to_vec(&out), "{what}");
        assert_eq!(lse.dtype(), DType::F32, "{what}");
        // Measured worst 1.2e-6 and 0.024 (of scores up to about 15); doubled or more.
        let accuracy = Accuracy::of(&common::to_vec(&lse), &expected_lse);
        let limit = if preset == Preset::FULL { 1e-5 } else { 0.05 };
        assert!(accuracy.max_abs_error <= limit, "log-sum-exp of {what}: {accuracy}, limit {limit}");
    }
}

#[test]
fn dtypes_layouts_and_grouped_heads_agree() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (layout, q_shape, kv_shape) in [
            (Layout::Hnd, [2, 6, 131, 64], [2, 2, 200, 64]),
            (Layout::Nhd, [2, 131, 6, 64], [2, 200, 2, 64]),
            (Layout::Nhd, [1, 5, 3, 40], [1, 33, 3, 40]),
            (Layout::Hnd, [1, 9, 1, 64], [1, 3, 300, 64]),
        ] {
            let (q, k, v) =
                (normal(1, &q_shape, dtype), normal(2, &kv_shape, dtype), normal(3, &kv_shape, dtype));
            let exact = Exact::default().layout(layout).band(CAUSAL);
            let options = Options::new().layout(layout).causal(true);
            check("causal", [&q, &k, &v], &options, &Question { options: exact, ..Question::default() });
        }
    }
}

#[test]
fn sinks_join_every_heads_denominator() {
    let sinks = [-1.0, 2.0, f32::NEG_INFINITY, 6.0];
    let (q, k, v) = (
        normal(1, &[2, 4, 60, 64], DType::F32),
        normal(2, &[2, 2, 90, 64], DType::F32),
        normal(3, &[2, 2, 90, 64], DType::F32),
    );
    let options = Options::new().sinks(&Tensor::new(&sinks, &Device::Cpu).unwrap());
    check("sinks", [&q, &k, &v], &options, &Question { sinks: Some(&sinks), ..Question::default() });
}

#[test]
fn values_have_channels_of_their_own_and_one_batch_of_keys_serves_many() {
    for (layout, q_shape, k_shape, value_dim) in [
        (Layout::Hnd, [2, 4, 60, 192], [2, 2, 90, 192], 128),
        (Layout::Nhd, [3, 60, 4, 64], [1, 90, 2, 64], 64),
        (Layout::Hnd, [2, 2, 1, 576], [1, 1, 200, 576], 512),
    ] {
        let v_shape = [k_shape[0], k_shape[1], k_shape[2], value_dim];
        let (q, k, v) = (
            normal(1, &q_shape, DType::F32),
            normal(2, &k_shape, DType::F32),
            normal(3, &v_shape, DType::F32),
        );
        let exact = Exact::default().layout(layout).band(CAUSAL);
        let options = Options::new().layout(layout).causal(true);
        check("channels", [&q, &k, &v], &options, &Question { options: exact, ..Question::default() });
    }
}

#[test]
fn every_option_reaches_the_kernels() {
    let (q, k, v) = (
        normal(4, &[2, 4, 150, 32], DType::F32),
        normal(5, &[2, 2, 140, 32], DType::F32),
        normal(6, &[2, 2, 140, 32], DType::F32),
    );
    let tensors = [&q, &k, &v];
    let plain = Exact::default();
    let ask = |options| Question { options, ..Question::default() };
    check("nothing", tensors, &Options::new(), &ask(plain));
    check("scale", tensors, &Options::new().sm_scale(0.3), &ask(plain.sm_scale(0.3)));
    check(
        "soft cap",
        tensors,
        &Options::new().sm_scale(1.0).logit_softcap(4.0),
        &ask(plain.sm_scale(1.0).logit_softcap(4.0)),
    );
    let top_left = Band::causal(Alignment::TopLeft);
    check(
        "top left",
        tensors,
        &Options::new().causal_alignment(Alignment::TopLeft),
        &ask(plain.band(top_left)),
    );
    let window = Band { left: Some(20), right: Some(3), ..Band::FULL };
    check("window", tensors, &Options::new().window(20, 3), &ask(plain.band(window)));
    let causal_window = Band { left: Some(20), right: Some(0), ..Band::FULL };
    check(
        "causal window",
        tensors,
        &Options::new().causal(true).window(20, None),
        &ask(plain.band(causal_window)),
    );
}

#[test]
fn masks_of_every_dtype_broadcast() {
    let (q, k, v) = (
        normal(7, &[2, 4, 130, 32], DType::F32),
        normal(8, &[2, 2, 137, 32], DType::F32),
        normal(9, &[2, 2, 137, 32], DType::F32),
    );
    let flags = |shape: &[usize], ones: f64| {
        // 0 where the number is below −0.3, else `ones`: any value but 0 shows a key.
        let visible = normal(10, shape, DType::F32).ge(-0.3).unwrap();
        (visible.to_dtype(DType::F32).unwrap() * ones).unwrap().to_dtype(DType::U8).unwrap()
    };
    let masks = [
        flags(&[2, 1, 1, 137], 1.0),
        flags(&[2, 4, 130, 137], 1.0),
        flags(&[130, 137], 255.0),
        normal(11, &[1, 4, 130, 137], DType::F32),
        normal(12, &[4, 1, 137], DType::F16),
        normal(13, &[1, 1, 130, 137], DType::BF16),
        // A view: every second column of a wider mask, and one that was broadcast already.
        normal(14, &[137, 130], DType::F32).t().unwrap(),
        flags(&[2, 1, 1, 137], 1.0).broadcast_as((2, 4, 130, 137)).unwrap(),
    ];
    for mask in &masks {
        let what = format!("mask {:?} {:?}", mask.dtype(), mask.layout());
        for causal in [false, true] {
            let band = if causal { CAUSAL } else { Band::FULL };
            let question =
                Question { options: Exact::default().band(band), mask: Some(mask), ..Question::default() };
            check(&what, [&q, &k, &v], &Options::new().causal(causal).mask(mask), &question);
        }
    }
}

#[test]
fn padded_and_packed_batches_agree() {
    let (q, k, v) = (
        normal(15, &[3, 4, 140, 32], DType::F16),
        normal(16, &[3, 2, 140, 32], DType::F16),
        normal(17, &[3, 2, 140, 32], DType::F16),
    );
    for lens in [list(&[140, 1, 77]), list(&[140, 1, 77]).to_dtype(DType::I64).unwrap()] {
        let question = Question { lengths: Lengths::KvLens(&[140, 1, 77]), ..Question::default() };
        check("kv_lens", [&q, &k, &v], &Options::new().kv_lens(&lens), &question);
    }

    let (q, k, v) = (
        normal(18, &[171, 6, 64], DType::F32),
        normal(19, &[190, 3, 64], DType::F32),
        normal(20, &[190, 3, 64], DType::F32),
    );
    let (cu_q, cu_k) = ([0, 130, 131, 131, 171], [0, 140, 150, 150, 190]);
    let question = Question {
        options: Exact::default().band(CAUSAL),
        lengths: Lengths::Packed { cu_seqlens_q: &cu_q, cu_seqlens_k: &cu_k },
        ..Question::default()
    };
    let options = Options::new().causal(true).packed(
        &list(&cu_q.map(|x| x as u32)),
        &list(&cu_k.map(|x| x as u32)),
        130,
        140,
    );
    check("packed", [&q, &k, &v], &options, &question);
}

#[test]
fn views_give_the_same_bits_as_copies() {
    let same = |q: &Tensor, k: &Tensor, v: &Tensor, options: &Options| {
        let copy = |tensor: &Tensor| {
            // `copy` forces row-major order, even where candle would call the view contiguous.
            tensor.force_contiguous().unwrap()
        };
        let seen = sage_attention(q, k, v, options).unwrap();
        let copied = sage_attention(&copy(q), &copy(k), &copy(v), options).unwrap();
        assert!(seen.is_contiguous());
        assert_eq!(
            common::to_vec(&seen),
            common::to_vec(&copied),
            "{:?} {:?} {:?}",
            q.layout(),
            k.layout(),
            v.layout()
        );
    };
    // A fused projection: [batch, seq, 3, heads, head_dim].
    let fused = normal(21, &[2, 140, 3, 4, 64], DType::F32);
    let part = |at: usize| fused.narrow(2, at, 1).unwrap().squeeze(2).unwrap();
    let (q, k, v) = (part(0), part(1), part(2));
    same(&q, &k, &v, &Options::new().layout(Layout::Nhd).causal(true));
    let heads_first = |tensor: &Tensor| tensor.transpose(1, 2).unwrap();
    same(&heads_first(&q), &heads_first(&k), &heads_first(&v), &Options::new().causal(true));
    // The last dimension with a gap, and one key head broadcast to all.
    let wide = normal(22, &[64, 2, 4, 140], DType::F32);
    let q = wide.permute((1, 2, 3, 0)).unwrap();
    let k = normal(23, &[2, 1, 140, 64], DType::F32).broadcast_as((2, 4, 140, 64)).unwrap();
    same(&q, &k, &q, &Options::new());
    // Rows of a cache that is longer than what it holds.
    let cache = normal(24, &[1, 3, 512, 64], DType::F16);
    let (k, v) = (cache.narrow(2, 3, 200).unwrap(), cache.narrow(2, 100, 200).unwrap());
    same(&normal(25, &[1, 9, 7, 64], DType::F16), &k, &v, &Options::new().causal(true));
}

#[test]
fn a_view_of_a_fused_projection_is_the_exact_answer() {
    let fused = normal(26, &[1, 133, 3 * 4 * 32], DType::F32);
    let part = |at: usize| {
        fused.narrow(2, at * 128, 128).unwrap().reshape((1, 133, 4, 32)).unwrap().transpose(1, 2).unwrap()
    };
    let (q, k, v) = (part(0), part(1), part(2));
    check("fused", [&q, &k, &v], &Options::new(), &Question::default());
}

#[test]
fn empty_tensors_give_empty_or_zero_outputs() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let out =
        sage_attention(&zeros(&[0, 2, 3, 8]), &zeros(&[0, 2, 3, 8]), &zeros(&[0, 2, 3, 8]), &Options::new());
    assert_eq!(out.unwrap().dims(), [0, 2, 3, 8]);
    let q = normal(27, &[1, 2, 3, 8], DType::F32);
    let (out, lse) =
        sage_attention_with_lse(&q, &zeros(&[1, 2, 0, 8]), &zeros(&[1, 2, 0, 8]), &Options::new()).unwrap();
    assert!(common::to_vec(&out).iter().all(|&x| x == 0.0));
    assert!(common::to_vec(&lse).iter().all(|&x| x == f32::NEG_INFINITY));
}

/// Flags of 16 × 32 blocks of 130 queries and 137 keys, and the same for each query and key.
fn blocks() -> (Tensor, Tensor) {
    let flags = normal(20, &[1, 4, 9, 5], DType::F32).ge(-0.3).unwrap();
    let rows = Tensor::from_iter((0..130u32).map(|i| i / 16), &Device::Cpu).unwrap();
    let keys = Tensor::from_iter((0..137u32).map(|j| j / 32), &Device::Cpu).unwrap();
    let each = flags.index_select(&rows, 2).unwrap().index_select(&keys, 3).unwrap();
    (flags, each)
}

#[test]
fn block_masks_hide_their_blocks() {
    let [q, k, v] = [(21, 4, 130), (22, 2, 137), (23, 2, 137)]
        .map(|(seed, heads, rows)| normal(seed, &[2, heads, rows, 32], DType::F32));
    let (flags, each) = blocks();
    // Any byte but 0 is a block that is computed.
    for flags in [flags.clone(), (flags * 7.0).unwrap()] {
        let question = Question { mask: Some(&each), ..Question::default() };
        check("blocks", [&q, &k, &v], &Options::new().block_mask(&flags, 16, 32), &question);
    }
}

#[test]
fn predicted_blocks_are_those_of_the_predictor() {
    let shape = [1, 2, 300, 32];
    let [q, k, v] = [24, 25, 26].map(|seed| normal(seed, &shape, DType::F32));
    let predictor = Predictor::sla(0.4);
    let plain = |tensor: &Tensor| sage_core::Tensor::new(common::to_vec(tensor), tensor.dims()).unwrap();
    let map = predictor.predict(plain(&q).view(), plain(&k).view(), &Exact::default()).unwrap();
    let bytes: Vec<u8> = map.flags().iter().map(|&kept| kept.into()).collect();
    let flags = Tensor::from_vec(bytes, &map.shape(), &Device::Cpu).unwrap();
    let given = sage_attention(&q, &k, &v, &Options::new().block_mask(&flags, 64, 64)).unwrap();
    let predicted = sage_attention(&q, &k, &v, &Options::new().sparse(predictor.clone())).unwrap();
    assert_eq!(common::to_vec(&predicted), common::to_vec(&given));
    let dense = sage_attention(&q, &k, &v, &Options::new()).unwrap();
    assert_ne!(common::to_vec(&predicted), common::to_vec(&dense));
}
