//! Keys that masks hide from every query have no influence, whatever K and V hold there, and neither has padding on
//! means and scales.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Built, Case, Explicit, Extent, Masking, Run, Tolerance, bits, every_cpu, normal, schemes};
use sage_core::metrics::Accuracy;
use sage_core::oracle::{self, Output, SeenKeys};
use sage_core::{Alignment, Band, DType, Inputs, Mask, Tensor};

/// What stray memory holds.
const STRAY: [f32; 6] = [30.0, 1e3, 1e10, f32::INFINITY, f32::NAN, f32::MIN];

/// Σ|o − r| / Σ|r|.
fn relative_l1(run: &Run, exact: &Output) -> f64 {
    Accuracy::of(&run.out, &exact.out).relative_l1
}

/// The tensor, with the rows of `keys` of every head replaced.
fn with_rows(tensor: &Tensor, mut keys: impl FnMut(usize, usize, usize) -> bool, value: f32) -> Tensor {
    let &[_, heads, len, width] = tensor.shape() else { panic!("{:?}", tensor.shape()) };
    let mut values = tensor.to_f32_vec();
    for (row, values) in values.chunks_exact_mut(width).enumerate() {
        if keys(row / (heads * len), row / len % heads, row % len) {
            values.fill(value);
        }
    }
    Tensor::new(values, tensor.shape()).unwrap().to_dtype(tensor.dtype())
}

/// Queries few enough to be split over keys, and more.
const Q_LENS: [usize; 2] = [2, 256];

#[test]
fn padding_behind_a_boolean_mask_is_as_behind_lengths() {
    for q_len in Q_LENS {
        for dtype in DType::ALL {
            let case = Case { batch: 2, heads: (4, 4), q_len, kv_len: 256, dtype, ..Case::default() };
            let mut sliced = case.build();
            sliced.kv_lens = Some(vec![200; 2]);
            let exact = oracle::exact(&sliced.call());
            for stray in STRAY {
                let rows = |_, _, j| j >= 210;
                let clean = case.build();
                let masked = Built {
                    k: with_rows(&clean.k, rows, stray),
                    v: with_rows(&clean.v, rows, stray),
                    bools: Some(((0..2 * 256).map(|x| x % 256 < 200).collect(), vec![2, 1, 1, 256])),
                    ..clean
                };
                for cpu in every_cpu() {
                    for scheme in schemes(64) {
                        let (run, wanted) = (masked.run(&cpu, Some(scheme)), sliced.run(&cpu, Some(scheme)));
                        let what = format!("{stray} in {dtype} with {scheme}");
                        assert_eq!(bits(&run), bits(&wanted), "{what}");
                        // INT8 on N(0, 1): 1.34e-2 is the worst measured; 4e-3 is the rounding of bf16's output.
                        assert!(relative_l1(&run, &exact) < 0.018, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn keys_of_a_block_column_that_is_absent_are_not_looked_at() {
    let case = Case { heads: (2, 2), q_len: 300, kv_len: 300, ..Case::default() };
    let clean = case.build();
    let column = |j: usize| (128..192).contains(&j);
    // Columns of 64 keys: the third is absent for all.
    let blocks = (0..2 * 3 * 5).map(|at| at % 5 != 2).collect::<Vec<bool>>();
    for stray in [1e4, f32::NAN] {
        let masked = Built {
            k: with_rows(&clean.k, |_, _, j| column(j), stray),
            v: with_rows(&clean.v, |_, _, j| column(j), stray),
            blocks: Some((blocks.clone(), vec![1, 2, 3, 5], 128, 64)),
            ..clean.clone()
        };
        let exact = oracle::exact(&masked.call());
        for cpu in every_cpu() {
            for scheme in schemes(64) {
                let error = relative_l1(&masked.run(&cpu, Some(scheme)), &exact);
                // The worst measured of INT8 on N(0, 1) is 1.34e-2.
                assert!(error < 0.015, "{stray} with {scheme}: {error}");
            }
        }
    }
}

#[test]
fn slots_of_a_static_cache_do_not_dilute_the_mean() {
    for bias in [10.0f32, 30.0] {
        for slots in [512, 4096] {
            let case = Case { heads: (2, 2), q_len: 130, kv_len: slots, ..Case::default() };
            let mut clean = case.build();
            let channels = normal(77, 64);
            let mut k = clean.k.to_f32_vec();
            k.iter_mut().enumerate().for_each(|(at, x)| *x += bias * channels[at % 64]);
            clean.k = Tensor::new(k, clean.k.shape()).unwrap();
            let zeros = |x: &Tensor| with_rows(x, |_, _, j| j >= 256, 0.0);
            let tensors = Built { k: zeros(&clean.k), v: zeros(&clean.v), ..clean };
            let mut sliced = tensors.clone();
            sliced.kv_lens = Some(vec![256]);
            let exact = oracle::exact(&sliced.call());
            for additive in [None, Some(f32::NEG_INFINITY), Some(f32::MIN)] {
                let mut masked = tensors.clone();
                let visible = (0..slots).map(|j| j < 256);
                match additive {
                    None => masked.bools = Some((visible.collect(), vec![1, 1, 1, slots])),
                    Some(hidden) => {
                        let bias: Vec<f32> = visible.map(|x| if x { 0.0 } else { hidden }).collect();
                        masked.bias = Some(Tensor::new(bias, &[1, 1, 1, slots]).unwrap());
                    }
                }
                for cpu in every_cpu().into_iter().take(if slots > 512 { 1 } else { 9 }) {
                    for scheme in schemes(64) {
                        let (run, wanted) = (masked.run(&cpu, Some(scheme)), sliced.run(&cpu, Some(scheme)));
                        let errors = (relative_l1(&run, &exact), relative_l1(&wanted, &exact));
                        // Padding saturates, but may share a 12-bit tile of probabilities: nothing else differs.
                        assert!(
                            errors.0 <= errors.1 * 1.001,
                            "{bias} in {slots} slots, {additive:?}, {scheme}: {errors:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rows_of_padding_alone_are_the_mean_of_v() {
    for q_len in Q_LENS {
        for dtype in DType::ALL {
            for mask_dtype in DType::ALL {
                let built = Case { heads: (2, 1), q_len, kv_len: 150, dtype, ..Case::default() }.build();
                let lowest = match mask_dtype {
                    DType::F16 => half::f16::MIN.to_f32(),
                    DType::BF16 => half::bf16::MIN.to_f32(),
                    DType::F32 => f32::MIN,
                };
                // The first row is padding throughout; the others see all keys.
                let bias = (0..q_len * 150).map(|x| if x < 150 { lowest } else { 0.0 });
                let bias =
                    Tensor::new(bias.collect::<Vec<f32>>(), &[q_len, 150]).unwrap().to_dtype(mask_dtype);
                let built = Built { bias: Some(bias), ..built };
                let v = built.v.to_f32_vec();
                let mean = |c: usize| v[c..].iter().step_by(64).map(|&x| f64::from(x)).sum::<f64>() / 150.0;
                for cpu in every_cpu() {
                    for scheme in schemes(64) {
                        let what = format!("{dtype} with a mask in {mask_dtype}, {scheme}");
                        let mut run = built.run(&cpu, Some(scheme));
                        let mut expected = oracle::scheme(&built.call(), &scheme);
                        // The lowest numbers have no equals in base 2: of such rows the log-sum-exp is the least finite
                        // number, which is also bf16's but for 8 bits.
                        for (found, wanted) in run.lse.iter_mut().zip(&mut expected.lse) {
                            if *wanted < -1e38 {
                                assert_eq!(*found, f32::MIN, "{what}, {wanted}");
                                (*found, *wanted) = (0.0, 0.0);
                            }
                        }
                        // Ties of bf16, see `quantised.rs`; beside −65504 a score in base 2 is rounded to 2⁻⁷.
                        let coarse = dtype == DType::BF16 || mask_dtype == DType::F16;
                        let ties = if coarse { 4.0 } else { 1.0 };
                        let tolerance =
                            Tolerance { relative_l1: 5e-4 * ties, element: 8e-3 * ties, lse: 3e-2 };
                        run.check(&expected, dtype, &tolerance)
                            .unwrap_or_else(|error| panic!("{what}: {error}"));
                        if mask_dtype == DType::F16 {
                            // Half precision's lowest number leaves the scores their say.
                            continue;
                        }
                        for (c, x) in run.out[..64].iter().enumerate() {
                            // A 4095th of what may be the largest of 150 values, and the output's rounding.
                            assert!(
                                (f64::from(*x) - mean(c)).abs() < 2e-3,
                                "{what}: {x}, expected {}",
                                mean(c)
                            );
                        }
                    }
                }
            }
        }
    }
}

/// K and V with `value` where the oracle says `spoils` of a key.
fn spoiled(built: &Built, value: f32, spoils: impl Fn(&SeenKeys, usize) -> bool) -> Built {
    let call = built.call();
    let seen: Vec<Vec<SeenKeys>> = call
        .sequences()
        .map(|s| (0..call.problem.num_kv_heads).map(|head| SeenKeys::of(&call, &s, head)).collect())
        .collect();
    let rows = |b: usize, head: usize, j: usize| j >= seen[b][head].len() || spoils(&seen[b][head], j);
    Built { k: with_rows(&built.k, rows, value), v: with_rows(&built.v, rows, value), ..built.clone() }
}

fn masked_cases() -> Vec<Case> {
    let causal = Band::causal(Alignment::BottomRight);
    let window = Band { left: Some(40), right: Some(3), alignment: Alignment::TopLeft };
    let mut cases = Vec::new();
    for (n, q_len) in [1, 3, 150].into_iter().enumerate() {
        for (m, explicit) in [
            Some(Explicit::Bool(Extent::All)),
            Some(Explicit::Bool(Extent::BatchKeys)),
            Some(Explicit::Bool(Extent::Keys)),
            Some(Explicit::Additive(DType::F32, Extent::BatchKeys)),
            Some(Explicit::Additive(DType::F16, Extent::Keys)),
            Some(Explicit::Additive(DType::BF16, Extent::Matrix)),
            Some(Explicit::Bool(Extent::Rows)),
            None,
        ]
        .into_iter()
        .enumerate()
        {
            let band = [Band::FULL, causal, window][(n + m) % 3];
            let blocks =
                [None, Some((64, 32)), Some((1, 100))][m % 3].or(explicit.is_none().then_some((70, 64)));
            cases.push(Case {
                seed: 3 + m as u64,
                dtype: DType::ALL[(n + m) % 3],
                batch: 2,
                heads: (4, 2),
                q_len,
                kv_len: 300,
                head_dim: 40,
                masking: Masking { band, explicit, blocks, kv_lens: m % 4 == 1 },
                softcap: (m % 4 == 3).then_some(5.0),
                k_bias: 3.0,
                ..Case::default()
            });
        }
    }
    cases
}

#[test]
fn no_mask_lets_what_it_hides_change_a_bit() {
    for case in masked_cases() {
        let built = case.build();
        for cpu in every_cpu() {
            for scheme in schemes(case.head_dim) {
                let hidden = |seen: &SeenKeys, j: usize| !seen.is_visible(j);
                let clean = spoiled(&built, 0.0, hidden).run(&cpu, Some(scheme));
                for stray in [f32::NAN, f32::INFINITY, 1e30] {
                    let run = spoiled(&built, stray, hidden).run(&cpu, Some(scheme));
                    assert_eq!(bits(&run), bits(&clean), "{stray} {scheme} {case:?}");
                }
                // Eight-bit ties of bf16, which fall to either side, are the worst: see `quantised.rs`.
                let tolerance = Tolerance { relative_l1: 6e-3, element: 4e-2, lse: 3e-2 };
                let expected = oracle::scheme(&spoiled(&built, 1e4, hidden).call(), &scheme);
                clean
                    .check(&expected, case.dtype, &tolerance)
                    .unwrap_or_else(|error| panic!("{error} {scheme} {case:?}"));
            }
        }
    }
}

#[test]
fn padding_enters_no_mean_and_no_scale_and_saturates() {
    for q_len in [3, 150] {
        for dtype in DType::ALL {
            let mut built =
                Case { heads: (4, 2), q_len, kv_len: 300, head_dim: 40, k_bias: 3.0, ..Case::default() }
                    .build();
            let padding = |j: usize| j >= 200 || j % 9 == 4;
            let bias = (0..300).map(|j| if padding(j) { f32::MIN } else { 0.0 }).collect::<Vec<f32>>();
            let cast = |x: &Tensor| x.clone().to_dtype(dtype);
            built = Built { q: cast(&built.q), k: cast(&built.k), v: cast(&built.v), ..built };
            built.bias = Some(Tensor::new(bias, &[300]).unwrap());
            for stray in [30.0, 1e4, -5e4] {
                let padded = spoiled(&built, stray, |seen, j| !seen.counts(j));
                let exact = oracle::exact(&padded.call());
                for cpu in every_cpu() {
                    for scheme in schemes(40) {
                        let what = format!("{stray} {dtype} {q_len} {scheme}");
                        let run = padded.run(&cpu, Some(scheme));
                        let expected = oracle::scheme(&padded.call(), &scheme);
                        let tolerance = Tolerance { relative_l1: 6e-3, element: 4e-2, lse: 3e-2 };
                        run.check(&expected, dtype, &tolerance)
                            .unwrap_or_else(|error| panic!("{what}: {error}"));
                        assert!(relative_l1(&run, &exact) < 0.02, "{what}");
                    }
                }
            }
        }
    }
}

/// Views of one mask with the same elements and any strides.
#[test]
fn strides_of_a_mask_do_not_matter() {
    let (q_len, kv_len) = (70, 300);
    let built = Case { heads: (2, 1), q_len, kv_len, ..Case::default() }.build();
    let element = |i: usize, j: usize| !(i * 7 + j * 3).is_multiple_of(5) && j % 11 != 3;
    let flags: Vec<bool> = (0..q_len * kv_len).map(|x| element(x / kv_len, x % kv_len)).collect();
    let places = |f: &dyn Fn(usize, usize) -> usize, len: usize| {
        let mut memory = vec![false; len];
        (0..q_len).for_each(|i| (0..kv_len).for_each(|j| memory[f(i, j)] = element(i, j)));
        memory
    };
    let (q, k) = (q_len as i64, kv_len as i64);
    let views: [(Vec<bool>, [i64; 2], i64); 4] = [
        (flags.clone(), [k, 1], 0),
        (places(&|i, j| j * q_len + i, flags.len()), [1, q], 0),
        (places(&|i, j| i * kv_len + kv_len - 1 - j, flags.len()), [k, -1], k - 1),
        (places(&|i, j| (i * kv_len + j) * 3 + 1, 3 * flags.len()), [3 * k, 3], 1),
    ];
    for cpu in every_cpu() {
        for scheme in schemes(64) {
            let mut wanted = None;
            for (memory, strides, offset) in &views {
                let geometry =
                    sage_core::Geometry::strided("mask", &[q_len, kv_len], strides, *offset).unwrap();
                let biases: Vec<f32> =
                    memory.iter().map(|&x| if x { 0.0 } else { f32::NEG_INFINITY }).collect();
                let bools = sage_core::View::strided("mask", memory, geometry).unwrap();
                let biases = sage_core::View::strided("mask", &biases, geometry).unwrap();
                for mask in [Mask::Bool(bools), Mask::Additive(biases.into())] {
                    let inputs = Inputs { mask: Some(mask), ..built.inputs() };
                    let call = sage_core::Call::check(&inputs, &built.options).unwrap();
                    let found = bits(&common::run(&cpu, &call, built.q.shape(), Some(scheme)));
                    assert_eq!(&found, wanted.get_or_insert(found.clone()), "{strides:?} {scheme}");
                }
            }
        }
    }
}
