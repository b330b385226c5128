//! Full precision against exact attention in double precision.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use sage_core::{Alignment, Band, DType, Layout, Preset, oracle};
use sage_cpu::{Cpu, InstructionSet};
use sage_testkit::{CPU_FULL, Case, CaseBlocks, CaseMask, Extent, Runner, Sequences, every_cpu};

fn check_with(cpu: &Cpu, case: &Case) -> Result<(), String> {
    let built = case.build();
    let run = cpu.run_preset(&built, Preset::FULL);
    let expected = oracle::exact(&built.call());
    run.check(&expected, &CPU_FULL.rounded(case.dtype))
        .map_err(|error| format!("{error}\non {} with {case:?}", cpu.instruction_set()))
}

fn check(cases: impl IntoIterator<Item = Case>) {
    let cpu = Cpu::detect();
    let failures: Vec<String> = cases.into_iter().filter_map(|case| check_with(&cpu, &case).err()).collect();
    assert!(
        failures.is_empty(),
        "{} cases:\n{}",
        failures.len(),
        failures[..failures.len().min(5)].join("\n")
    );
}

const BOTTOM_RIGHT: Band = Band::causal(Alignment::BottomRight);
const TOP_LEFT: Band = Band::causal(Alignment::TopLeft);

fn window(left: Option<usize>, right: Option<usize>, alignment: Alignment) -> Band {
    Band { left, right, alignment }
}

/// Every kind of mask, and combinations of them.
fn maskings() -> Vec<Case> {
    use Alignment::{BottomRight, TopLeft};
    let none = Case::f32();
    let band = |band| Case { band, ..Case::f32() };
    let mask = |mask| Case { mask: Some(mask), ..Case::f32() };
    let blocks = |(q, k)| Case { blocks: Some(CaseBlocks::new(q, k)), ..Case::f32() };
    let staggered = Case { sequences: Sequences::Staggered, ..Case::f32() };
    let mut all = vec![
        none,
        band(BOTTOM_RIGHT),
        band(TOP_LEFT),
        band(window(Some(9), Some(0), BottomRight)),
        band(window(Some(4), None, TopLeft)),
        band(window(None, Some(5), BottomRight)),
        band(window(Some(0), Some(0), TopLeft)),
        band(window(Some(30), Some(3), BottomRight)),
        staggered.clone(),
        blocks((7, 5)),
        blocks((64, 128)),
        Case { band: BOTTOM_RIGHT, ..blocks((1, 33)) },
        Case {
            mask: Some(CaseMask::bias(DType::F32, Extent::Rows)),
            band: BOTTOM_RIGHT,
            ..staggered.clone()
        },
        Case { band: window(Some(20), Some(2), TopLeft), ..mask(CaseMask::bool(Extent::BatchKeys)) },
        Case {
            mask: Some(CaseMask::bool(Extent::All)),
            band: TOP_LEFT,
            blocks: Some(CaseBlocks::new(3, 31)),
            ..staggered
        },
    ];
    for extent in
        [Extent::All, Extent::Rows, Extent::BatchKeys, Extent::HeadRows, Extent::Keys, Extent::Matrix]
    {
        all.push(mask(CaseMask::bool(extent)));
        all.push(mask(CaseMask::bias(DType::F32, extent)));
    }
    all.push(mask(CaseMask::bias(DType::F16, Extent::Rows)));
    all.push(mask(CaseMask::bias(DType::BF16, Extent::All)));
    all
}

/// Head counts: one, two alike, and groups of 2, 8 and all.
const HEADS: [(usize, usize); 5] = [(1, 1), (2, 2), (4, 2), (8, 1), (3, 1)];

#[test]
fn every_mask_with_every_layout_type_and_group_of_heads() {
    let mut cases = Vec::new();
    for (q_len, kv_len) in [(19, 37), (41, 23), (1, 130), (20, 150)] {
        for masking in maskings() {
            for layout in [Layout::Hnd, Layout::Nhd] {
                for dtype in DType::ALL {
                    for (q_heads, kv_heads) in HEADS {
                        cases.push(Case {
                            seed: 8 * cases.len() as u64,
                            dtype,
                            layout,
                            batch: 3,
                            q_heads,
                            kv_heads,
                            q_len,
                            kv_len,
                            head_dim: 16,
                            ..masking.clone()
                        });
                    }
                }
            }
        }
    }
    check(cases);
}

#[test]
fn every_head_dim_with_every_pair_of_lengths() {
    let lengths = [1, 3, 17, 64, 127, 128, 129, 200, 300];
    let mut cases = Vec::new();
    for (d, head_dim) in [1, 7, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256].into_iter().enumerate() {
        for q_len in lengths {
            for kv_len in lengths {
                // Each pair meets each mask and type at some head_dim.
                let n = cases.len() + d;
                let (q_heads, kv_heads) = HEADS[n % 2 * 2];
                cases.push(Case {
                    seed: 8 * n as u64,
                    dtype: DType::ALL[n % 3],
                    q_heads,
                    kv_heads,
                    q_len,
                    kv_len,
                    head_dim,
                    band: [Band::FULL, BOTTOM_RIGHT][n / 3 % 2],
                    ..Case::f32()
                });
            }
        }
    }
    // The oracle's time is proportional to this; large corners are sampled.
    cases.retain(|case| case.seed % 32 == 0 || case.q_len * case.kv_len * case.head_dim < 1 << 20);
    check(cases);
}

#[test]
fn few_queries_are_split_over_keys() {
    let mut cases = Vec::new();
    let maskings = [
        Case::f32(),
        Case { band: BOTTOM_RIGHT, ..Case::f32() },
        Case { band: window(Some(300), Some(0), Alignment::BottomRight), ..Case::f32() },
        Case {
            mask: Some(CaseMask::bool(Extent::BatchKeys)),
            sequences: Sequences::Staggered,
            ..Case::f32()
        },
        Case { blocks: Some(CaseBlocks::new(2, 77)), ..Case::f32() },
    ];
    for (q_heads, kv_heads) in [(1, 1), (2, 2), (8, 1), (4, 2)] {
        for q_len in [1, 2, 4, 8] {
            for kv_len in [1, 127, 129, 512, 513, 1030, 1537] {
                for masking in &maskings {
                    let n = cases.len();
                    let (dtype, head_dim) = (DType::ALL[n % 3], [64, 7, 40][n / 3 % 3]);
                    cases.push(Case {
                        seed: 8 * n as u64,
                        dtype,
                        batch: 2,
                        q_heads,
                        kv_heads,
                        q_len,
                        kv_len,
                        head_dim,
                        ..masking.clone()
                    });
                }
            }
        }
    }
    check(cases);
}

#[test]
fn every_instruction_set_of_this_machine() {
    let mut failures = Vec::new();
    for cpu in every_cpu() {
        for (q_len, kv_len) in [(1, 300), (7, 129), (50, 64), (130, 257)] {
            for head_dim in [1, 40, 64, 128, 256] {
                for masking in maskings().into_iter().step_by(3) {
                    let seed = 8 * (failures.len() as u64 + q_len as u64);
                    let dtype = DType::ALL[(head_dim + kv_len) % 3];
                    let (q_heads, kv_heads) = HEADS[head_dim % 3];
                    let case = Case { seed, dtype, q_heads, kv_heads, q_len, kv_len, head_dim, ..masking };
                    failures.extend(check_with(&cpu, &case).err());
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} cases:\n{}", failures.len(), failures[0]);
}

#[test]
fn a_soft_cap_comes_before_masks() {
    let mut cases = Vec::new();
    for softcap in [0.5, 5.0, 50.0] {
        for (q_len, kv_len) in [(3, 150), (33, 150), (140, 40)] {
            for masking in maskings() {
                let (seed, softcap) = (8 * cases.len() as u64, Some(softcap));
                cases.push(Case { seed, softcap, q_heads: 2, q_len, kv_len, ..masking });
            }
        }
    }
    check(cases);
}

/// Boundaries of sequences of these lengths of queries and keys.
fn packed(lengths: &[(usize, usize)]) -> Sequences {
    let boundaries = |len: fn(&(usize, usize)) -> usize| {
        let ends = lengths.iter().map(len).scan(0, |sum, len| {
            *sum += len as i32;
            Some(*sum)
        });
        [0].into_iter().chain(ends).collect::<Vec<i32>>()
    };
    Sequences::Packed(boundaries(|l| l.0), boundaries(|l| l.1))
}

#[test]
fn packed_sequences_some_of_them_empty() {
    let tables: [&[(usize, usize)]; 6] = [
        &[(5, 5), (0, 0), (40, 70), (129, 128), (0, 17), (13, 0)],
        &[(0, 3), (1, 200), (2, 1)],
        &[(0, 0), (0, 0)],
        &[(4, 0), (3, 0)],
        &[(3, 600), (0, 0), (1, 513)],
        &[(17, 17), (130, 300), (1, 1), (0, 0)],
    ];
    for (seed, lengths) in tables.into_iter().enumerate() {
        for (q_heads, kv_heads) in [(1, 1), (4, 2)] {
            for dtype in DType::ALL {
                for band in
                    [Band::FULL, BOTTOM_RIGHT, TOP_LEFT, window(Some(7), Some(2), Alignment::BottomRight)]
                {
                    let case = Case {
                        seed: 8 * seed as u64,
                        dtype,
                        layout: Layout::Nhd,
                        q_heads,
                        kv_heads,
                        head_dim: 24,
                        band,
                        sequences: packed(lengths),
                        ..Case::f32()
                    };
                    for cpu in every_cpu() {
                        check_with(&cpu, &case).unwrap_or_else(|error| panic!("{error}"));
                    }
                }
            }
        }
    }
}

#[test]
fn a_long_sequence_forgets_nothing() {
    // Every tile rescales what came before it: 1024 rescalings by 1 must not add up to something else.
    let case = Case { seed: 64, q_len: 12, kv_len: 1 << 17, head_dim: 8, ..Case::f32() };
    let split = Case { q_len: 2, ..case.clone() };
    check([case, split]);
}

fn bands() -> impl Strategy<Value = Band> {
    let limit = || prop_oneof![Just(None), (0usize..200).prop_map(Some)];
    let alignment = prop_oneof![
        Just(Alignment::BottomRight),
        Just(Alignment::TopLeft),
        (-200i64..400).prop_map(Alignment::Offset)
    ];
    (limit(), limit(), alignment).prop_map(|(left, right, alignment)| Band { left, right, alignment })
}

fn masks() -> impl Strategy<Value = Option<CaseMask>> {
    let extent = || {
        prop::sample::select(vec![
            Extent::All,
            Extent::Rows,
            Extent::BatchKeys,
            Extent::HeadRows,
            Extent::Keys,
            Extent::Matrix,
        ])
    };
    prop_oneof![
        Just(None),
        extent().prop_map(|extent| Some(CaseMask::bool(extent))),
        (prop::sample::select(&DType::ALL[..]), extent())
            .prop_map(|(dtype, extent)| Some(CaseMask::bias(dtype, extent))),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let blocks = prop_oneof![Just(None), (1usize..70, 1usize..140).prop_map(Some)];
    let masking = (bands(), masks(), blocks, any::<bool>()).prop_map(|(band, mask, blocks, staggered)| {
        let sequences = if staggered { Sequences::Staggered } else { Sequences::Dense };
        let blocks = blocks.map(|(q, k)| CaseBlocks::new(q, k));
        Case { band, mask, blocks, sequences, ..Case::f32() }
    });
    let softcap = prop_oneof![3 => Just(None), 1 => (0.5f32..60.0).prop_map(Some)];
    let heads = (1usize..=4, 1usize..=2).prop_map(|(group, kv)| (group * kv, kv));
    (
        any::<u16>(),
        prop::sample::select(&DType::ALL[..]),
        any::<bool>(),
        1usize..=3,
        heads,
        (1usize..140, 1usize..300, 1usize..=96),
        masking,
        softcap,
    )
        .prop_map(|(seed, dtype, nhd, batch, heads, (q_len, kv_len, head_dim), masking, softcap)| Case {
            seed: 8 * u64::from(seed),
            dtype,
            layout: if nhd { Layout::Nhd } else { Layout::Hnd },
            batch,
            q_heads: heads.0,
            kv_heads: heads.1,
            q_len,
            kv_len,
            head_dim,
            softcap,
            ..masking
        })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        rng_seed: proptest::test_runner::RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_combination(case in cases(), set in prop::sample::select(InstructionSet::detected())) {
        let cpu = Cpu::detect().with_instruction_set(set).unwrap();
        check_with(&cpu, &case).map_err(TestCaseError::fail)?;
    }
}
