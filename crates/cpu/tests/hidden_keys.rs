//! Keys that masks hide from every query have no influence, whatever K and V hold there, and neither has padding on
//! means and scales.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use sage_core::oracle::{self, SeenKeys};
use sage_core::{Alignment, Band, Call, DType, Geometry, Mask, Tensor, View};
use sage_testkit::{
    Bias, Case, CaseBlocks, CaseMask, Extent, Memory, OwnedBlocks, OwnedCall, OwnedMask, Runner, Sequences,
    Tolerance, cpu_narrow_schemes, cpu_schemes as schemes, every_cpu, run_on_cpu,
};

/// What stray memory holds.
const STRAY: [f32; 6] = [30.0, 1e3, 1e10, f32::INFINITY, f32::NAN, f32::MIN];

/// Queries few enough to be split over keys, and more.
const Q_LENS: [usize; 2] = [2, 256];

#[test]
fn padding_behind_a_boolean_mask_is_as_behind_lengths() {
    for q_len in Q_LENS {
        for dtype in DType::ALL {
            let case = Case { batch: 2, q_heads: 4, kv_heads: 4, q_len, kv_len: 256, dtype, ..Case::f32() };
            let mut sliced = case.build();
            sliced.kv_lens = Some(vec![200; 2]);
            let exact = oracle::exact(&sliced.call());
            let clean = case.build();
            let beyond = |row: &[usize]| row[2] >= 210;
            let visible: Vec<bool> = (0..2 * 256).map(|x| x % 256 < 200).collect();
            let masked = STRAY.map(|stray| OwnedCall {
                k: clean.k.with_rows(stray, beyond),
                v: clean.v.with_rows(stray, beyond),
                mask: Some(OwnedMask::bools(visible.clone(), &[2, 1, 1, 256])),
                ..clean.clone()
            });
            for cpu in every_cpu() {
                for scheme in schemes(64) {
                    let wanted = cpu.run(&sliced, Some(scheme));
                    // INT8 on N(0, 1): 1.34e-2 is the worst measured; 4e-3 is the rounding of bf16's output.
                    assert!(wanted.relative_l1(&exact) < 0.018, "{dtype} with {scheme}");
                    for (masked, stray) in masked.iter().zip(STRAY) {
                        let run = cpu.run(masked, Some(scheme));
                        assert_eq!(run.bits(), wanted.bits(), "{stray} in {dtype} with {scheme}");
                    }
                }
            }
        }
    }
}

/// Such keys enter means and scales, as a block mask says what is computed: zeros change these hardly, and would change
/// a sum much.
#[test]
fn a_block_column_that_is_absent_weighs_nothing() {
    let case = Case { q_heads: 2, kv_heads: 2, q_len: 300, kv_len: 300, ..Case::f32() };
    let clean = case.build();
    let column = |row: &[usize]| (128..192).contains(&row[2]);
    // Columns of 64 keys: the third is absent for all.
    let blocks = (0..2 * 3 * 5).map(|at| at % 5 != 2).collect::<Vec<bool>>();
    let masked = OwnedCall {
        k: clean.k.with_rows(0.0, column),
        v: clean.v.with_rows(0.0, column),
        blocks: Some(OwnedBlocks::new(blocks, &[1, 2, 3, 5], [128, 64])),
        ..clean
    };
    let exact = oracle::exact(&masked.call());
    for cpu in every_cpu() {
        for scheme in schemes(64) {
            let error = cpu.run(&masked, Some(scheme)).relative_l1(&exact);
            // The worst measured of INT8 on N(0, 1) is 1.34e-2.
            assert!(error < 0.015, "{scheme}: {error}");
        }
    }
}

#[test]
fn slots_of_a_static_cache_do_not_dilute_the_mean() {
    for bias in [10.0f32, 30.0] {
        for slots in [512, 4096] {
            let k_bias = Bias::Channels(bias);
            let case = Case { q_heads: 2, kv_heads: 2, q_len: 130, kv_len: slots, k_bias, ..Case::f32() };
            let clean = case.build();
            let zeros = |x: &Memory| x.with_rows(0.0, |row| row[2] >= 256);
            let tensors = OwnedCall { k: zeros(&clean.k), v: zeros(&clean.v), ..clean };
            let mut sliced = tensors.clone();
            sliced.kv_lens = Some(vec![256]);
            let exact = oracle::exact(&sliced.call());
            for additive in [None, Some(f32::NEG_INFINITY), Some(f32::MIN)] {
                let mut masked = tensors.clone();
                let visible = (0..slots).map(|j| j < 256);
                masked.mask = Some(match additive {
                    None => OwnedMask::bools(visible.collect(), &[1, 1, 1, slots]),
                    Some(hidden) => {
                        let bias: Vec<f32> = visible.map(|x| if x { 0.0 } else { hidden }).collect();
                        OwnedMask::biases(Tensor::new(bias, &[1, 1, 1, slots]).unwrap())
                    }
                });
                for cpu in every_cpu().into_iter().take(if slots > 512 { 1 } else { 9 }) {
                    for scheme in schemes(64) {
                        let (run, wanted) = (cpu.run(&masked, Some(scheme)), cpu.run(&sliced, Some(scheme)));
                        let errors = (run.relative_l1(&exact), wanted.relative_l1(&exact));
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
                let built =
                    Case { q_heads: 2, kv_heads: 1, q_len, kv_len: 150, dtype, ..Case::f32() }.build();
                let lowest = match mask_dtype {
                    DType::F16 => half::f16::MIN.to_f32(),
                    DType::BF16 => half::bf16::MIN.to_f32(),
                    DType::F32 => f32::MIN,
                };
                // The first row is padding throughout; the others see all keys.
                let bias = (0..q_len * 150).map(|x| if x < 150 { lowest } else { 0.0 });
                let bias =
                    Tensor::new(bias.collect::<Vec<f32>>(), &[q_len, 150]).unwrap().to_dtype(mask_dtype);
                let built = OwnedCall { mask: Some(OwnedMask::biases(bias)), ..built };
                let v = built.v.to_f32_vec();
                let mean = |c: usize| v[c..].iter().step_by(64).map(|&x| f64::from(x)).sum::<f64>() / 150.0;
                for cpu in every_cpu() {
                    for scheme in schemes(64) {
                        let what = format!("{dtype} with a mask in {mask_dtype}, {scheme}");
                        let run = cpu.run(&built, Some(scheme));
                        let expected = oracle::scheme(&built.call(), &scheme);
                        // Ties of bf16, see `CPU_TIES`; beside −65504 a score in base 2 is rounded to 2⁻⁷.
                        let coarse = dtype == DType::BF16 || mask_dtype == DType::F16;
                        let ties = if coarse { 4.0 } else { 1.0 };
                        let tolerance = Tolerance {
                            relative_l1: 5e-4 * ties,
                            element: Some(8e-3 * ties),
                            rounding: 0.0,
                            lse: 3e-2,
                        };
                        run.check(&expected, &tolerance.rounded(dtype))
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

fn masked_cases() -> Vec<Case> {
    let causal = Band::causal(Alignment::BottomRight);
    let window = Band { left: Some(40), right: Some(3), alignment: Alignment::TopLeft };
    let mut cases = Vec::new();
    for (n, q_len) in [1, 3, 150].into_iter().enumerate() {
        for (m, mask) in [
            Some(CaseMask::bool(Extent::All)),
            Some(CaseMask::bool(Extent::BatchKeys)),
            Some(CaseMask::bool(Extent::Keys)),
            Some(CaseMask::bias(DType::F32, Extent::BatchKeys)),
            Some(CaseMask::bias(DType::F16, Extent::Keys)),
            Some(CaseMask::bias(DType::BF16, Extent::Matrix)),
            Some(CaseMask::bool(Extent::Rows)),
            None,
        ]
        .into_iter()
        .enumerate()
        {
            let band = [Band::FULL, causal, window][(n + m) % 3];
            let blocks = [None, Some((64, 32)), Some((1, 100))][m % 3].or(mask.is_none().then_some((70, 64)));
            let blocks = blocks.map(|(q, k)| CaseBlocks::new(q, k));
            cases.push(Case {
                seed: 8 * (3 + m as u64),
                dtype: DType::ALL[(n + m) % 3],
                batch: 2,
                q_heads: 4,
                kv_heads: 2,
                q_len,
                kv_len: 300,
                head_dim: 40,
                band,
                mask,
                blocks,
                sequences: if m % 4 == 1 { Sequences::Staggered } else { Sequences::Dense },
                softcap: (m % 4 == 3).then_some(5.0),
                k_bias: Bias::EveryFourth(3.0),
                ..Case::f32()
            });
        }
    }
    cases
}

#[test]
fn no_mask_lets_what_it_hides_change_a_bit() {
    for case in masked_cases() {
        let built = case.build();
        let hiding = [0.0, f32::NAN, f32::INFINITY, 1e30].map(|stray| built.with_hidden_rows(stray));
        let hiding_large = built.with_hidden_rows(1e4);
        for scheme in schemes(case.head_dim).into_iter().chain(cpu_narrow_schemes(case.head_dim)) {
            let expected = oracle::scheme(&hiding_large.call(), &scheme);
            // Eight-bit ties of bf16, which fall to either side, are the worst: see `CPU_TIES`.
            let ties = Tolerance { relative_l1: 6e-3, element: Some(4e-2), rounding: 0.0, lse: 3e-2 };
            for cpu in every_cpu() {
                let narrow = cpu_narrow_schemes(case.head_dim).contains(&scheme);
                let tolerance = if narrow { cpu.tolerance(DType::F32, &scheme) } else { ties };
                let [clean, others @ ..] = hiding.each_ref().map(|call| cpu.run(call, Some(scheme)));
                for run in others {
                    assert_eq!(run.bits(), clean.bits(), "{scheme} {case:?}");
                }
                clean
                    .check(&expected, &tolerance.rounded(case.dtype))
                    .unwrap_or_else(|error| panic!("{error} {scheme} {case:?}"));
            }
        }
    }
}

#[test]
fn padding_enters_no_mean_and_no_scale_and_saturates() {
    for q_len in [3, 150] {
        for dtype in DType::ALL {
            let mut built = Case {
                dtype,
                q_heads: 4,
                kv_heads: 2,
                q_len,
                kv_len: 300,
                head_dim: 40,
                k_bias: Bias::EveryFourth(3.0),
                ..Case::f32()
            }
            .build();
            let padding = |j: usize| j >= 200 || j % 9 == 4;
            let bias = (0..300).map(|j| if padding(j) { f32::MIN } else { 0.0 }).collect::<Vec<f32>>();
            built.mask = Some(OwnedMask::biases(Tensor::new(bias, &[300]).unwrap()));
            for stray in [30.0, 1e4, -5e4] {
                let padded = built.with_rows_but(stray, SeenKeys::counts);
                let exact = oracle::exact(&padded.call());
                for cpu in every_cpu() {
                    for scheme in schemes(40) {
                        let what = format!("{stray} {dtype} {q_len} {scheme}");
                        let run = cpu.run(&padded, Some(scheme));
                        let expected = oracle::scheme(&padded.call(), &scheme);
                        let tolerance =
                            Tolerance { relative_l1: 6e-3, element: Some(4e-2), rounding: 0.0, lse: 3e-2 };
                        run.check(&expected, &tolerance.rounded(dtype))
                            .unwrap_or_else(|error| panic!("{what}: {error}"));
                        assert!(run.relative_l1(&exact) < 0.02, "{what}");
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
    let built = Case { q_heads: 2, kv_heads: 1, q_len, kv_len, ..Case::f32() }.build();
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
                let geometry = Geometry::strided("mask", &[q_len, kv_len], strides, *offset).unwrap();
                let biases: Vec<f32> =
                    memory.iter().map(|&x| if x { 0.0 } else { f32::NEG_INFINITY }).collect();
                let bools = View::strided("mask", memory, geometry).unwrap();
                let biases = View::strided("mask", &biases, geometry).unwrap();
                for mask in [Mask::Bool(bools), Mask::Additive(biases.into())] {
                    let inputs = built.inputs().mask(mask);
                    let call = Call::check(&inputs, &built.options).unwrap();
                    let found = run_on_cpu(&cpu, &call, built.out, Some(scheme)).bits();
                    assert_eq!(&found, wanted.get_or_insert(found.clone()), "{strides:?} {scheme}");
                }
            }
        }
    }
}
