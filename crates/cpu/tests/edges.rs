//! Empty calls, rows without keys, refusals, and determinism.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use sage_core::{
    Accumulator, Alignment, Band, DType, Error, Granularity, IntQuantizer, Layout, Preset, Pv, Qk, Scheme,
    Tensor, Tile, oracle,
};
use sage_cpu::{Cpu, InstructionSet, nearest_scheme};
use sage_testkit::{
    Bias, Case, CaseBlocks, CaseMask, Extent, OwnedBlocks, OwnedCall, OwnedMask, Runner, Sequences,
    cpu_narrow_schemes, cpu_schemes, every_cpu,
};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

fn schemes(head_dim: usize) -> Vec<Scheme> {
    [cpu_schemes(head_dim), cpu_narrow_schemes(head_dim)].concat()
}

/// Queries: few enough to be split over keys, and more.
const Q_LENS: [usize; 2] = [4, 45];

#[test]
fn sizes_of_zero_are_calls_like_any_other() {
    for (batch, q_len, kv_len) in [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 40, 0), (0, 0, 0), (2, 0, 0)] {
        for layout in [Layout::Hnd, Layout::Nhd] {
            for masked in [
                Case::f32(),
                Case { band: CAUSAL, sequences: Sequences::Staggered, ..Case::f32() },
                Case { mask: Some(CaseMask::bool(Extent::All)), ..Case::f32() },
                Case { blocks: Some(CaseBlocks::new(3, 2)), ..Case::f32() },
            ] {
                let case = Case { batch, layout, q_heads: 4, kv_heads: 2, q_len, kv_len, ..masked };
                let built = case.build();
                for cpu in every_cpu() {
                    for scheme in schemes(64) {
                        let run = cpu.run(&built, Some(scheme));
                        assert_eq!(run.out, vec![0.0; batch * 4 * q_len * 64], "{case:?}");
                        assert_eq!(run.lse, vec![f32::NEG_INFINITY; batch * 4 * q_len], "{case:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn no_heads_at_all_is_a_call_too() {
    let tensor = |heads: usize| Tensor::zeros(DType::F32, &[2, heads, 5, 8]).unwrap();
    let built = OwnedCall::dense(tensor(0), tensor(1), tensor(1));
    for scheme in schemes(8) {
        let run = Cpu::detect().run(&built, Some(scheme));
        assert!(run.out.is_empty() && run.lse.is_empty());
    }
}

/// Ways of hiding every key of some rows: a name, and the call.
fn hidden(q_len: usize, kv_len: usize) -> Vec<(&'static str, OwnedCall)> {
    let case = Case { q_len, kv_len, head_dim: 24, ..Case::f32() };
    let rows = |i: usize, j: usize| !i.is_multiple_of(3) && j % 2 == 1;
    let all: Vec<bool> = (0..q_len * kv_len).map(|at| rows(at / kv_len, at % kv_len)).collect();
    let biases: Vec<f32> = all.iter().map(|&seen| if seen { 0.5 } else { f32::NEG_INFINITY }).collect();
    let shape = [q_len, kv_len];
    let with = |mask| OwnedCall { mask: Some(mask), ..case.build() };
    let (rows, columns) = (q_len.div_ceil(2), kv_len.div_ceil(50));
    let blocks = (0..rows * columns).map(|at| at / columns % 2 == 1).collect();
    let blocks = Some(OwnedBlocks::new(blocks, &[rows, columns], [2, 50]));
    let left_of_all = Band { left: Some(0), right: Some(0), alignment: Alignment::TopLeft };
    vec![
        ("causal with more queries than keys", Case { band: CAUSAL, ..case.clone() }.build()),
        ("a window beyond the last key", Case { band: left_of_all, ..case.clone() }.build()),
        ("kv_lens", Case { batch: 3, sequences: Sequences::Staggered, ..case.clone() }.build()),
        ("a bool mask", with(OwnedMask::bools(all, &shape))),
        ("an additive mask", with(OwnedMask::biases(Tensor::new(biases, &shape).unwrap()))),
        ("a block mask", OwnedCall { blocks, ..case.build() }),
    ]
}

#[test]
fn a_row_without_keys_is_zero_and_its_log_sum_exp_minus_infinity() {
    for q_len in Q_LENS {
        for kv_len in [2, 150] {
            for (what, built) in hidden(q_len, kv_len) {
                let expected = oracle::exact(&built.call());
                let empty = |row: &usize| expected.lse[*row] == f64::NEG_INFINITY;
                let empty: Vec<usize> = (0..expected.lse.len()).filter(empty).collect();
                for cpu in every_cpu() {
                    for scheme in schemes(24) {
                        let run = cpu.run(&built, Some(scheme));
                        for (row, lse) in run.lse.iter().enumerate() {
                            let out = &run.out[row * 24..(row + 1) * 24];
                            if empty.contains(&row) {
                                assert!(
                                    *lse == f32::NEG_INFINITY && out.iter().all(|x| *x == 0.0),
                                    "{what}, {scheme}, row {row}"
                                );
                            } else {
                                assert!(
                                    lse.is_finite() && out.iter().any(|x| *x != 0.0),
                                    "{what}, {scheme}, row {row}"
                                );
                            }
                        }
                    }
                }
                let longer = kv_len > q_len
                    && matches!(what, "causal with more queries than keys" | "a window beyond the last key");
                assert!(longer || !empty.is_empty(), "{what} hides nothing");
            }
        }
    }
}

fn is_int(scheme: &Scheme) -> Option<IntQuantizer> {
    match scheme.qk {
        Qk::Int(quantizer) => Some(quantizer),
        _ => None,
    }
}

#[test]
fn a_plan_of_another_problem_is_refused() {
    let cpu = Cpu::detect();
    let built = Case::f32().build();
    let other = Case { kv_len: 65, ..Case::f32() }.build();
    let plan = cpu.plan(&other.call().problem, None).unwrap();
    let mut out = Tensor::zeros(DType::F32, built.q.shape()).unwrap();
    let error = cpu.forward(&plan, &built.call(), out.view_mut(), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a plan of another problem is not supported: plan the problem of this call"
    );
}

#[test]
fn outputs_that_do_not_fit_are_refused() {
    let cpu = Cpu::detect();
    let built = Case::f32().build();
    let call = built.call();
    let plan = cpu.plan(&call.problem, None).unwrap();
    let refused = |mut out: Tensor, lse: Option<&mut [f32]>, wanted: &str| {
        let error = cpu.forward(&plan, &call, out.view_mut(), lse).unwrap_err();
        assert_eq!(error.to_string(), wanted);
    };
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
    refused(
        zeros(DType::F32, &[1, 1, 63, 64]),
        None,
        "out: shape is [1, 1, 63, 64], expected [1, 1, 64, 64], as q",
    );
    refused(zeros(DType::F16, &[1, 1, 64, 64]), None, "out: dtype is f16, expected f32, as q");
    refused(
        zeros(DType::F32, &[1, 1, 64, 64]),
        Some(&mut [0.0; 63]),
        "lse: shape is [63], expected [64], the rows of [1, 1, 64]",
    );
}

#[test]
fn the_scheme_without_kernels_is_refused_and_the_message_says_what_would_do() {
    let int8 = Preset::INT8.scheme(64);
    let scheme = Scheme { pv: Pv::Fixed12 { block: 64 }, ..int8 };
    let problem = Case::f32().build().call().problem;
    let error: Error = Cpu::detect().plan(&problem, Some(scheme)).unwrap_err();
    assert_eq!(nearest_scheme(scheme), int8);
    assert_eq!(
        error.to_string(),
        "12-bit P·V of 64 keys in the CPU kernels is not supported: of 128 they have it; the nearest that they compute \
         is `int8`, INT8 QK per-block · smooth K · 12-bit PV (128)"
    );
}

#[test]
fn groups_of_any_size_have_one_scale() {
    let int8 = Preset::INT8.scheme(32);
    let quantizer = is_int(&int8).unwrap();
    // Padding and hidden keys measure no group, whatever tile they are in.
    let lengths = Sequences::KvLens(vec![200, 131]);
    let case = Case { batch: 2, q_len: 70, kv_len: 200, head_dim: 32, sequences: lengths, ..Case::f32() };
    let padding = (0..200).map(|j| if j % 9 == 4 { f32::MIN } else { 0.0 }).collect::<Vec<f32>>();
    let mask = OwnedMask::biases(Tensor::new(padding, &[200]).unwrap());
    let built = OwnedCall { mask: Some(mask), ..case.build() };
    let built = OwnedCall { k: built.k.map(|at, x| if at / 32 % 9 == 4 { 50.0 * x } else { x }), ..built };
    let cpu = Cpu::detect();
    for granularity in [
        Granularity::PerTensor,
        Granularity::PerBlock,
        Granularity::PerWarp,
        Granularity::PerThread,
        Granularity::PerToken,
    ] {
        for (block_q, warp_q) in [(128, 32), (1, 1), (7, 7), (24, 8)] {
            for (block_k, warp_k) in [(128, 128), (64, 8), (2, 2), (1, 1), (256, 256), (48, 24), (0, 0)] {
                let tile = Tile { block_q, warp_q, block_k, warp_k };
                let qk = Qk::Int(IntQuantizer { granularity, tile, ..quantizer });
                let scheme = Scheme { qk, rotate: block_k == 256, ..int8 };
                if scheme.check().is_err() {
                    assert!(cpu.plan(&built.call().problem, Some(scheme)).is_err());
                    continue;
                }
                let expected = oracle::scheme(&built.call(), &scheme);
                let run = cpu.run(&built, Some(scheme));
                let checked = run.check(&expected, &cpu.tolerance(DType::F32, &scheme));
                checked.unwrap_or_else(|error| panic!("{error}: {granularity:?} of {tile:?}"));
            }
        }
    }
}

#[test]
fn an_instruction_set_that_is_not_there_is_refused() {
    let all = [
        InstructionSet::Portable,
        InstructionSet::Avx2,
        InstructionSet::AvxVnni,
        InstructionSet::Avx512Vnni,
        InstructionSet::Amx,
        InstructionSet::NeonDotprod,
    ];
    let detected = InstructionSet::detected();
    assert_eq!(detected.last(), Some(&InstructionSet::Portable));
    let names: Vec<&str> = detected.iter().map(|set| set.name()).collect();
    for set in all {
        match Cpu::detect().with_instruction_set(set) {
            Ok(cpu) => assert!(detected.contains(&set) && cpu.instruction_set() == set),
            Err(error) => {
                assert!(!detected.contains(&set));
                let wanted = format!("instruction_set: value is {set}, expected {}", names.join(", "));
                assert_eq!(error.to_string(), wanted);
            }
        }
    }
}

#[test]
fn the_same_call_gives_the_same_bits_whatever_the_threads() {
    let k_bias = Bias::EveryFourth(1.0);
    let cases = [
        // Work is cut into blocks of queries by the number of threads.
        Case { q_heads: 2, kv_heads: 1, q_len: 300, kv_len: 900, band: CAUSAL, k_bias, ..Case::f32() },
        Case { q_heads: 2, kv_heads: 1, q_len: 130, kv_len: 5000, head_dim: 16, k_bias, ..Case::f32() },
        Case { q_heads: 8, kv_heads: 1, q_len: 1, kv_len: 5000, band: CAUSAL, ..Case::f32() },
        Case { dtype: DType::BF16, q_len: 200, kv_len: 700, softcap: Some(9.0), band: CAUSAL, ..Case::f32() },
    ];
    for case in cases {
        let built = case.build();
        for scheme in schemes(case.head_dim) {
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let cpu = Cpu::detect();
                    let runs = [cpu.run(&built, Some(scheme)), cpu.run(&built, Some(scheme))];
                    assert_eq!(
                        runs[0].bits(),
                        runs[1].bits(),
                        "{scheme} with {threads} threads, twice: {case:?}"
                    );
                    runs
                })
            };
            let one = run(1);
            for threads in [2, 5] {
                let differing =
                    run(threads)[0].bits().iter().zip(one[0].bits()).filter(|(a, b)| **a != *b).count();
                assert_eq!(
                    differing,
                    0,
                    "of {} {scheme}, 1 and {threads} threads: {case:?}",
                    one[0].out.len()
                );
            }
        }
    }
}

#[test]
fn a_plan_says_what_it_does() {
    let cpu = Cpu::detect();
    let plan = |case: &Case, scheme| cpu.plan(&case.build().call().problem, scheme).unwrap();
    let few = plan(&Case { q_len: 1, kv_len: 5000, ..Case::f32() }, None);
    assert_eq!(few.scheme(), &Preset::FULL.scheme(64));
    assert!(few.to_string().contains("units of 512 keys"), "{few}");
    let many = plan(&Case { q_len: 256, kv_len: 256, ..Case::f32() }, None);
    let (full, int8) = (Preset::FULL.scheme(64), Preset::INT8_PER_TOKEN.scheme(64));
    let bf16 = Pv::BF16(Accumulator::F32);
    // Tensors in single precision, and in bfloat16.
    let wanted = match cpu.instruction_set() {
        InstructionSet::Portable => [full, full],
        InstructionSet::Amx => [Scheme { pv: bf16, ..int8 }, Scheme { pv: bf16, ..full }],
        _ => [int8, int8],
    };
    assert_eq!(many.scheme(), &wanted[0]);
    let many_bf16 = plan(&Case { q_len: 256, kv_len: 256, dtype: DType::BF16, ..Case::f32() }, None);
    assert_eq!(many_bf16.scheme(), &wanted[1]);
    assert!(!many.reasons().is_empty() && many.workspace_bytes() > 0);
}
