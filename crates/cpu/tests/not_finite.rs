//! Numbers that are not finite, and memory that holds anything: where they show, and where they must not.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use std::ops::Range;

use sage_core::{Alignment, Band, DType, IntQuantizer, Layout, Preset, Qk, Scheme, Tensor, oracle};
use sage_testkit::{
    Case, Memory, OwnedCall, OwnedMask, Runner, Sequences, Tolerance, cpu_narrow_schemes, cpu_schemes,
    every_cpu,
};

fn schemes(head_dim: usize) -> Vec<Scheme> {
    [cpu_schemes(head_dim), cpu_narrow_schemes(head_dim)].concat()
}

/// Queries: few enough to be split over keys, and more.
const Q_LENS: [usize; 2] = [4, 45];

/// Kinds of number that are not finite.
const BAD: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

const HEAD_DIM: usize = 16;
const KV_LEN: usize = 300;

/// Two heads of one batch entry; in the first, one number of one tensor is replaced.
fn poisoned(tensor: char, row: usize, bad: f32, q_len: usize, dtype: DType) -> OwnedCall {
    let mut built =
        Case { q_heads: 2, kv_heads: 2, dtype, q_len, kv_len: KV_LEN, head_dim: HEAD_DIM, ..Case::f32() }
            .build();
    let to = match tensor {
        'q' => &mut built.q,
        'k' => &mut built.k,
        _ => &mut built.v,
    };
    *to = to.map(|at, x| if at == row * HEAD_DIM + 3 { bad } else { x });
    built
}

fn is_int(scheme: &Scheme) -> Option<IntQuantizer> {
    match scheme.qk {
        Qk::Int(quantizer) => Some(quantizer),
        _ => None,
    }
}

#[test]
fn a_bad_query_makes_its_group_nan_and_no_other_row() {
    for q_len in [4, 200] {
        for (bad, dtype) in [(BAD[0], DType::F32), (BAD[1], DType::F16), (BAD[2], DType::BF16)] {
            let row = q_len - 2;
            let built = poisoned('q', row, bad, q_len, dtype);
            for cpu in every_cpu() {
                for scheme in schemes(HEAD_DIM) {
                    let run = cpu.run(&built, Some(scheme));
                    let bad_row = |i: usize| match is_int(&scheme) {
                        Some(quantizer) => quantizer.q_group(i) == quantizer.q_group(row),
                        None => i == row,
                    };
                    for i in 0..2 * q_len {
                        let out = &run.out[i * HEAD_DIM..(i + 1) * HEAD_DIM];
                        let wanted = i < q_len && bad_row(i);
                        // ±∞ gives scores of +∞ for some keys and −∞ for others.
                        assert!(
                            out.iter().all(|x| x.is_nan() == wanted),
                            "{bad} {scheme} row {i} of {q_len}"
                        );
                        assert_eq!(run.lse[i].is_nan(), wanted, "{bad} {scheme} row {i} of {q_len}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_bad_key_makes_the_rows_nan_that_read_its_scale() {
    for q_len in [4, 45] {
        for (bad, dtype) in [(BAD[0], DType::F32), (BAD[1], DType::F16), (BAD[2], DType::BF16)] {
            let key = 200;
            // All rows see the key; of 45 rows the last ones do, and of 4 none; none does.
            for band in [
                Band::FULL,
                Band { left: None, right: Some(160), alignment: Alignment::TopLeft },
                Band { left: Some(20), right: Some(20), alignment: Alignment::TopLeft },
            ] {
                let seen = (0..q_len).any(|i| band.keys(i, q_len, KV_LEN).contains(&key));
                let mut built = poisoned('k', key, bad, q_len, dtype);
                built.options.band = band;
                let exact = oracle::exact(&built.call());
                for cpu in every_cpu() {
                    for scheme in schemes(HEAD_DIM) {
                        let run = cpu.run(&built, Some(scheme));
                        let expected = oracle::scheme(&built.call(), &scheme);
                        for i in 0..2 * q_len {
                            let out = &run.out[i * HEAD_DIM..(i + 1) * HEAD_DIM];
                            let what = format!("{bad} {scheme} row {i} of {q_len}, {band:?}");
                            // NaN exactly where the oracle of the scheme says so: everywhere in the head when K is
                            // smoothed, in rows that see the group otherwise; nowhere where no row sees the key.
                            let wanted = if scheme.qk != Qk::Full || scheme.smooth.k.is_on() {
                                expected.lse[i]
                            } else {
                                exact.lse[i]
                            };
                            assert!(out.iter().all(|x| x.is_nan() == wanted.is_nan()), "{what}");
                            assert_eq!(run.lse[i].is_nan(), wanted.is_nan(), "{what}");
                            if scheme.smooth.k.is_on() {
                                assert_eq!(wanted.is_nan(), seen && i < q_len, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_bad_value_reaches_its_channel_of_the_rows_that_see_it_and_no_other_channel() {
    for q_len in Q_LENS {
        for (bad, dtype) in [(BAD[0], DType::F32), (BAD[1], DType::F16), (BAD[2], DType::BF16)] {
            // Key 250 lies in the second tile; the second band hides that tile from all rows.
            for (band, seen) in [
                (Band::FULL, true),
                (Band { left: None, right: Some(60), alignment: Alignment::TopLeft }, false),
            ] {
                let mut built = poisoned('v', 250, bad, q_len, dtype);
                built.options.band = band;
                for cpu in every_cpu() {
                    for scheme in schemes(HEAD_DIM) {
                        let run = cpu.run(&built, Some(scheme));
                        for (at, x) in run.out.iter().enumerate() {
                            let wanted = seen && at / HEAD_DIM < q_len && at % HEAD_DIM == 3;
                            // An infinity may stay one where P·V is in floating point; 12 bits make it NaN.
                            assert_eq!(!x.is_finite(), wanted, "{bad} {scheme}: element {at} is {x}");
                        }
                        assert!(run.lse.iter().all(|x| x.is_finite()), "{bad} {scheme}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_mask_hides_a_bad_key_in_full_precision() {
    for q_len in Q_LENS {
        for bad in BAD {
            for additive in [false, true] {
                let mut built = poisoned('k', 77, bad, q_len, DType::F32);
                if additive {
                    let bias = |j| if j == 77 { f32::NEG_INFINITY } else { 0.0 };
                    let biases: Vec<f32> = (0..KV_LEN).map(bias).collect();
                    built.mask = Some(OwnedMask::biases(Tensor::new(biases, &[KV_LEN]).unwrap()));
                } else {
                    let visible = (0..KV_LEN).map(|j| j != 77).collect();
                    built.mask = Some(OwnedMask::bools(visible, &[KV_LEN]));
                }
                let expected = oracle::exact(&built.call());
                for cpu in every_cpu() {
                    let run = cpu.run_preset(&built, Preset::FULL);
                    let tolerance =
                        Tolerance { relative_l1: 1e-5, element: Some(1e-5), rounding: 0.0, lse: 1e-5 };
                    run.check(&expected, &tolerance).unwrap();
                }
            }
        }
    }
}

#[test]
fn an_infinite_bias_makes_its_row_nan() {
    for q_len in Q_LENS {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut built = Case { q_len, kv_len: KV_LEN, head_dim: HEAD_DIM, ..Case::f32() }.build();
            let mut bias = vec![0.0; q_len * KV_LEN];
            bias[KV_LEN + 140] = bad;
            built.mask = Some(OwnedMask::biases(Tensor::new(bias, &[q_len, KV_LEN]).unwrap()));
            for cpu in every_cpu() {
                for scheme in schemes(HEAD_DIM) {
                    let run = cpu.run(&built, Some(scheme));
                    let nan = |(at, x): (usize, &f32)| x.is_nan() == (at / HEAD_DIM == 1);
                    assert!(run.out.iter().enumerate().all(nan), "{bad} {scheme}");
                    assert!(
                        run.lse.iter().enumerate().all(|(i, x)| x.is_nan() == (i == 1)),
                        "{bad} {scheme}"
                    );
                }
            }
        }
    }
}

/// The call with garbage in some rows of K and V, counted through memory.
fn with_garbage(built: &OwnedCall, rows: impl Fn(usize) -> bool, bad: f32) -> OwnedCall {
    let spoil = |tensor: &Memory| tensor.map(|at, x| if rows(at / HEAD_DIM) { bad } else { x });
    OwnedCall { k: spoil(&built.k), v: spoil(&built.v), ..built.clone() }
}

#[test]
fn keys_beyond_kv_lens_are_never_read() {
    for q_len in Q_LENS {
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let case = Case {
                batch: 3,
                q_len,
                kv_len: KV_LEN,
                head_dim: HEAD_DIM,
                q_heads: 4,
                kv_heads: 2,
                sequences: Sequences::Staggered,
                ..Case::f32()
            };
            let clean = case.build();
            let lens = clean.kv_lens.clone().unwrap();
            let beyond = |row: usize| row % KV_LEN >= lens[row / (2 * KV_LEN)] as usize;
            let spoiled = with_garbage(&clean, beyond, bad);
            for cpu in every_cpu() {
                for scheme in schemes(HEAD_DIM) {
                    let (clean, spoiled) = (cpu.run(&clean, Some(scheme)), cpu.run(&spoiled, Some(scheme)));
                    assert_eq!(clean.bits(), spoiled.bits(), "{bad} {scheme}");
                }
            }
        }
    }
}

#[test]
fn packed_sequences_do_not_read_each_other() {
    let lengths = [(3, 140), (0, 30), (50, 70), (2, 0), (4, 300)];
    let starts = |len: fn(&(usize, usize)) -> usize| {
        (0..=lengths.len()).map(|b| lengths[..b].iter().map(len).sum::<usize>() as i32).collect::<Vec<i32>>()
    };
    let (cu_q, cu_k) = (starts(|l| l.0), starts(|l| l.1));
    let case = Case {
        layout: Layout::Nhd,
        head_dim: HEAD_DIM,
        sequences: Sequences::Packed(cu_q.clone(), cu_k.clone()),
        ..Case::f32()
    };
    let clean = case.build();
    for (b, (q_len, _)) in lengths.into_iter().enumerate() {
        let inside = |row: usize| (cu_k[b] as usize..cu_k[b + 1] as usize).contains(&row);
        let spoiled = with_garbage(&clean, |row| !inside(row), f32::NAN);
        for cpu in every_cpu() {
            for scheme in schemes(HEAD_DIM) {
                let (clean, spoiled) = (cpu.run(&clean, Some(scheme)), cpu.run(&spoiled, Some(scheme)));
                let rows: Range<usize> = cu_q[b] as usize..cu_q[b] as usize + q_len;
                let part = |x: &[f32]| x[rows.start * HEAD_DIM..rows.end * HEAD_DIM].to_vec();
                assert_eq!(part(&clean.out), part(&spoiled.out), "{scheme}, sequence {b}");
                assert_eq!(clean.lse[rows.clone()], spoiled.lse[rows], "{scheme}, sequence {b}");
            }
        }
    }
}
