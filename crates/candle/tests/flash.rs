//! The functions named as in `candle-flash-attn`, against exact attention in double precision.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::{Question, assert_close, exact, list, message, normal};
use sage_core::{Band, Layout, Lengths, Options as Exact};
use sageattention_candle::flash::*;

/// Relative L1 error of INT8 per token, which is chosen from 128 queries on: measured worst 0.0083, doubled.
const LIMIT: f64 = 0.017;

const SCALE: f32 = 0.2;

fn dense() -> [Tensor; 3] {
    [(1, [2, 150, 4, 32]), (2, [2, 170, 2, 32]), (3, [2, 170, 2, 32])]
        .map(|(seed, shape)| normal(seed, &shape, DType::F16))
}

fn question(left: Option<usize>, right: Option<usize>, softcap: Option<f32>) -> Exact {
    Exact::default()
        .layout(Layout::Nhd)
        .sm_scale(SCALE)
        .band(Band { left, right, ..Band::FULL })
        .logit_softcap(softcap)
}

#[test]
fn dense_functions() {
    let [q, k, v] = dense();
    type Call<'a> = (&'a str, Result<Tensor>, Exact);
    let calls: [Call<'_>; 5] = [
        ("flash_attn", flash_attn(&q, &k, &v, SCALE, false), question(None, None, None)),
        ("causal", flash_attn(&q, &k, &v, SCALE, true), question(None, Some(0), None)),
        (
            "windowed",
            flash_attn_windowed(&q, &k, &v, SCALE, Some(30), Some(2)),
            question(Some(30), Some(2), None),
        ),
        (
            "soft cap",
            flash_attn_alibi_windowed_softcap(&q, &k, &v, None, SCALE, None, Some(0), 3.0),
            question(None, Some(0), Some(3.0)),
        ),
        (
            "soft cap of 0",
            flash_attn_alibi_windowed_softcap(&q, &k, &v, None, SCALE, Some(9), None, 0.0),
            question(Some(9), None, None),
        ),
    ];
    for (what, out, options) in calls {
        let (expected, _) = exact(&q, &k, &v, &Question { options, ..Question::default() });
        assert_close(&out.unwrap(), &expected, LIMIT, what);
    }
}

#[test]
fn alibi_is_a_bias_by_distance() {
    let [q, k, v] = dense();
    let slopes = Tensor::new(&[0.5f32, 0.25, 0.125, 0.0625], &Device::Cpu).unwrap();
    // The definition, number by number.
    let (q_len, kv_len) = (150, 170);
    let bias: Vec<f32> = [0.5f32, 0.25, 0.125, 0.0625]
        .iter()
        .flat_map(|slope| (0..q_len).flat_map(move |i| (0..kv_len).map(move |j| (slope, i, j))))
        .map(|(slope, i, j)| -slope * i32::abs(i + kv_len - q_len - j) as f32)
        .collect();
    let bias = Tensor::from_vec(bias, (1, 4, 150, 170), &Device::Cpu).unwrap();
    for causal in [false, true] {
        let options = question(None, causal.then_some(0), None);
        let (expected, _) =
            exact(&q, &k, &v, &Question { options, mask: Some(&bias), ..Question::default() });
        let out = flash_attn_alibi(&q, &k, &v, &slopes, SCALE, causal).unwrap();
        assert_close(&out, &expected, LIMIT, if causal { "causal ALiBi" } else { "ALiBi" });
    }
    let options = question(Some(40), Some(5), None);
    let (expected, _) = exact(&q, &k, &v, &Question { options, mask: Some(&bias), ..Question::default() });
    let out = flash_attn_alibi_windowed(&q, &k, &v, &slopes, SCALE, Some(40), Some(5)).unwrap();
    assert_close(&out, &expected, LIMIT, "ALiBi in a window");
}

#[test]
fn packed_functions() {
    let [q, k, v] = [(4, [171, 6, 32]), (5, [190, 3, 32]), (6, [190, 3, 32])]
        .map(|(seed, shape)| normal(seed, &shape, DType::BF16));
    let (cu_q, cu_k) = ([0, 130, 131, 171], [0, 140, 150, 190]);
    let (seqlens_q, seqlens_k) = (list(&cu_q.map(|x| x as u32)), list(&cu_k.map(|x| x as u32)));
    let lengths = Lengths::Packed { cu_seqlens_q: &cu_q, cu_seqlens_k: &cu_k };
    let (seqs, longest) = ((&seqlens_q, &seqlens_k), (130, 140));
    let calls = [
        (
            "varlen",
            flash_attn_varlen(&q, &k, &v, seqs.0, seqs.1, longest.0, longest.1, SCALE, true),
            question(None, Some(0), None),
        ),
        (
            "varlen in a window",
            flash_attn_varlen_windowed(
                &q,
                &k,
                &v,
                seqs.0,
                seqs.1,
                longest.0,
                longest.1,
                SCALE,
                Some(17),
                None,
            ),
            question(Some(17), None, None),
        ),
        (
            "varlen with a soft cap",
            flash_attn_varlen_alibi_windowed_softcap(
                &q,
                &k,
                &v,
                None,
                seqs.0,
                seqs.1,
                longest.0,
                longest.1,
                SCALE,
                None,
                Some(0),
                2.0,
            ),
            question(None, Some(0), Some(2.0)),
        ),
    ];
    for (what, out, options) in calls {
        let (expected, _) = exact(&q, &k, &v, &Question { options, lengths, ..Question::default() });
        assert_close(&out.unwrap(), &expected, LIMIT, what);
    }
}

#[test]
fn what_is_missing_or_wrong_is_said() {
    let [q, k, v] = dense();
    let slopes = Tensor::new(&[0.5f32; 3], &Device::Cpu).unwrap();
    assert_eq!(
        message(flash_attn_alibi(&q, &k, &v, &slopes, SCALE, true)),
        "alibi_slopes shape: value is [3], expected [4], the heads of q"
    );
    assert_eq!(
        message(flash_attn_alibi(&q, &k, &v, &slopes.to_dtype(DType::F64).unwrap(), SCALE, true)),
        "alibi_slopes: dtype is f64, expected f32"
    );
    let seqlens = list(&[0, 1]);
    let flat = normal(7, &[1, 4, 32], DType::F32);
    assert_eq!(
        message(flash_attn_varlen_alibi_windowed_softcap(
            &flat,
            &flat,
            &flat,
            Some(&slopes),
            &seqlens,
            &seqlens,
            1,
            1,
            SCALE,
            None,
            None,
            0.0,
        )),
        "alibi_slopes with packed sequences is not supported: call flash_attn_alibi with padded tensors"
    );
    assert_eq!(
        message(flash_attn(&flat, &flat, &flat, SCALE, false)),
        "q: shape is [1, 4, 32], expected [batch, seq, heads, head_dim]"
    );
}
