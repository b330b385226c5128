//! Attention under block masks, and explicit masks whose tiles differ, in the emulator, against the oracle: on both
//! engines.

use sage_core::{Alignment, Band, DType, Layout, Preset, Problem, Scheme, Tensor};
use sage_kernels::attention::AttentionConfig;
use sage_kernels::forward::{ForwardPlan, Request, int8_scheme};
use sage_kernels::{Machine, Tiling, WarpgroupTiling};
use sage_ptx::Target;
use sage_testkit::{
    Case, CaseBlocks, CaseMask, Emulated, Extent, OwnedBlocks, OwnedCall, Runner, Sequences, check,
    normal_tensor,
};

const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };
const TOP_LEFT: Band = Band { alignment: Alignment::TopLeft, ..CAUSAL };

/// The newest GPU of each engine.
fn engines() -> [Emulated; 2] {
    [Target::SM_89, Target::SM_90A].map(|target| Emulated::on(target).multiprocessors(3))
}

fn schemes() -> [Scheme; 5] {
    [
        Preset::FULL.scheme(64),
        int8_scheme(DType::F16),
        Preset::INT8_FP8.scheme(64),
        Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64),
        Preset::SAGE1_INT8_FP16.scheme(64),
    ]
}

fn heads() -> Case {
    Case { q_heads: 4, kv_heads: 2, q_len: 150, kv_len: 330, ..Case::default() }
}

#[test]
fn every_scheme_with_blocks_of_every_size() {
    let bands = [Band::FULL, CAUSAL, TOP_LEFT];
    let densities = [0.5, 0.02, 1.0, 0.0];
    for gpu in engines() {
        let mut number = 0;
        for scheme in schemes() {
            for (block_q, block_k) in [(128, 64), (64, 128), (64, 64), (128, 128), (48, 80)] {
                let blocks = CaseBlocks::new(block_q, block_k).keeping(densities[number % densities.len()]);
                let case = Case {
                    seed: 8 * number as u64,
                    scheme: Some(scheme),
                    band: bands[number % bands.len()],
                    blocks: Some(blocks),
                    layout: if number % 2 == 0 { Layout::Hnd } else { Layout::Nhd },
                    dtype: if number % 5 == 0 { DType::BF16 } else { DType::F16 },
                    ..heads()
                };
                check(&gpu, &case);
                number += 1;
            }
        }
    }
}

#[test]
fn beside_lengths_masks_caps_and_odd_heads() {
    let blocks = Some(CaseBlocks::new(64, 64).keeping(0.5));
    let odd = Some(CaseBlocks::new(100, 40).keeping(0.5));
    for gpu in engines() {
        let lens = Sequences::KvLens(vec![330, 0, 70]);
        let packed = Sequences::Packed(vec![0, 150, 150, 170, 300], vec![0, 330, 400, 400, 650]);
        let fp8 = Some(Preset::INT8_FP8.scheme(64));
        for case in [
            Case { batch: 3, sequences: lens.clone(), blocks, ..heads() },
            Case { batch: 3, sequences: lens, blocks: odd, band: CAUSAL, ..heads() },
            Case { blocks, mask: Some(CaseMask::bool(Extent::All)), ..heads() },
            Case { blocks: odd, mask: Some(CaseMask::bool(Extent::BatchKeys)), band: CAUSAL, ..heads() },
            Case { blocks: odd, mask: Some(CaseMask::bias(DType::F16, Extent::Matrix)), ..heads() },
            Case { blocks: odd, mask: Some(CaseMask::bias(DType::F32, Extent::All)), ..heads() },
            // Packed sequences, of which one has no query and one no key.
            Case { sequences: packed.clone(), blocks, ..heads() },
            Case { sequences: packed.clone(), blocks, band: CAUSAL, scheme: fp8, ..heads() },
            Case { sequences: packed.clone(), blocks: odd, band: TOP_LEFT, ..heads() },
            Case { blocks, softcap: Some(5.0), ..heads() },
            Case { blocks, head_dim: 40, ..heads() },
            Case { blocks, head_dim: 256, ..heads() },
            Case { blocks, head_dim: 31, gap: 2, ..heads() },
            // Few queries: keys are split.
            Case { blocks, q_len: 20, kv_len: 1100, ..heads() },
        ] {
            check(&gpu.multiprocessors(40), &case);
        }
    }
}

/// Tiles that a mask hides wholly, leaves as they are, and cuts.
#[test]
fn tiles_of_every_class() {
    // Of tiles of 64 keys: the first is hidden, every second of the others whole, the rest has holes.
    fn bias([_, head, row, key]: [usize; 4]) -> f32 {
        match (key / 64, (key + row + head) % 3) {
            (0, _) | (1, 0) => f32::NEG_INFINITY,
            (2, _) | (_, 1) if row / 64 == 1 => 0.0,
            (_, 2) => -1.5,
            _ => 0.0,
        }
    }
    for gpu in engines() {
        for scheme in schemes() {
            for extent in [Extent::All, Extent::Rows, Extent::Keys] {
                // Keys in whole chunks of 16 flags, in pairs, and one by one.
                for kv_len in [336, 330, 329] {
                    let mask = Some(CaseMask::bool(extent).pattern(bias));
                    check(&gpu, &Case { mask, scheme: Some(scheme), kv_len, ..heads() });
                }
            }
            for (dtype, extent) in
                [(DType::F16, Extent::Rows), (DType::BF16, Extent::All), (DType::F32, Extent::Matrix)]
            {
                let bias = CaseMask::bias(dtype, extent).pattern(bias);
                check(&gpu, &Case { mask: Some(bias), scheme: Some(scheme), kv_len: 329, ..heads() });
            }
        }
    }
}

/// The log-sum-exps of the two halves of the keys say how their outputs are merged.
#[test]
fn two_halves_of_the_keys_are_the_whole() {
    const HALF: usize = 128;
    let (heads, rows, dim) = (2, 150, 64);
    let q = normal_tensor(1, &[1, heads, rows, dim], DType::F16);
    let halves =
        |seed: u64| [0, 1].map(|half| normal_tensor(seed + half, &[1, heads, HALF, dim], DType::F16));
    let (k, v) = (halves(2), halves(4));
    // Of each head, the keys of both halves one after the other.
    let whole = |[a, b]: &[Tensor; 2]| {
        let [a, b] = [a, b].map(Tensor::to_f32_vec);
        let heads_of = a.chunks(HALF * dim).zip(b.chunks(HALF * dim));
        let data: Vec<f32> = heads_of.flat_map(|(a, b)| [a, b].concat()).collect();
        Tensor::new(data, &[1, heads, 2 * HALF, dim]).unwrap().to_dtype(DType::F16)
    };
    // Blocks of 64 × 64: three rows of four for each head. One row has none in the first half.
    let visible = |head: usize, row: usize, column: usize| {
        (head + row + column).is_multiple_of(2) && !(row == 1 && column < 2)
    };
    let call = |k: Tensor, v: Tensor, columns: std::ops::Range<usize>| {
        let each = |head, row| columns.clone().map(move |column| visible(head, row, column));
        let flags = (0..heads).flat_map(|head| (0..3).flat_map(move |row| each(head, row))).collect();
        let blocks = Some(OwnedBlocks::new(flags, &[1, heads, 3, columns.len()], [64, 64]));
        OwnedCall { blocks, ..OwnedCall::dense(q.clone(), k, v) }
    };
    for gpu in engines() {
        // Each half has a mean of its own, and scales of its own.
        for (scheme, tolerance) in [(Preset::FULL.scheme(dim), 2e-3), (int8_scheme(DType::F16), 0.03)] {
            let whole = gpu.run(&call(whole(&k), whole(&v), 0..4), Some(scheme));
            let [a, b] =
                [0, 1].map(|i| gpu.run(&call(k[i].clone(), v[i].clone(), 2 * i..2 * i + 2), Some(scheme)));
            let (mut error, mut size) = (0.0, 0.0);
            for (at, &lse) in whole.lse.iter().enumerate() {
                let [in_a, in_b] = [a.lse[at], b.lse[at]].map(|half| f64::from(half - lse).exp());
                assert!((in_a + in_b - 1.0).abs() < tolerance, "row {at}: {in_a} and {in_b}");
                for channel in at * dim..(at + 1) * dim {
                    let merged = in_a * f64::from(a.out[channel]) + in_b * f64::from(b.out[channel]);
                    error += (merged - f64::from(whole.out[channel])).abs();
                    size += f64::from(whole.out[channel]).abs();
                }
            }
            assert!(error / size < tolerance, "{}", error / size);
        }
    }
}

/// Blocks of whole tiles are left out without a look at single scores.
#[test]
fn tiles_are_those_that_blocks_are_made_of() {
    let config = |target: Target, scheme: Scheme, blocks: [usize; 2]| {
        let problem = Problem::dense(DType::F16, [1, 24, 24], [4096, 4096], 128).blocks(blocks);
        let request = Request { scheme: Some(scheme), ..Request::new(&problem) };
        let plan = ForwardPlan::new(&problem, &request, &Machine::typical(target)).unwrap();
        let found =
            plan.pass().kernels().find_map(|kernel| kernel.downcast_ref::<AttentionConfig>().copied());
        found.unwrap()
    };
    for target in [Target::SM_80, Target::SM_86, Target::SM_90A] {
        for scheme in [Preset::FULL.scheme(128), int8_scheme(DType::F16)] {
            for blocks in [[128, 64], [64, 128], [64, 64], [128, 128]] {
                let config = config(target, scheme, blocks);
                assert!(!config.block_edges, "{target}, {blocks:?}: {}", config.tiling);
            }
            assert!(config(target, scheme, [48, 80]).block_edges);
        }
    }
    let Tiling::Warpgroups(WarpgroupTiling { groups, .. }) =
        config(Target::SM_90A, Preset::INT8_FP8.scheme(128), [64, 128]).tiling
    else {
        panic!("Hopper has warpgroups");
    };
    assert_eq!(groups, 1, "two blocks of a multiprocessor have lists of their own");
}
