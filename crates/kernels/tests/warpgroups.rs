//! The kernels of warpgroups in the emulator, against the oracle of their scheme.

use std::collections::HashSet;

use sage_core::{Alignment, Band, DType, Geometry, Preset, Pv, Scheme};
use sage_kernels::forward::{Alternative, Request, int8_scheme};
use sage_kernels::{Machine, Tiling, WarpgroupTiling};
use sage_ptx::Target;
use sage_testkit::{
    Bias, Case, CaseMask, Emulated, Extent, Memory, OwnedCall, Runner, Sequences, check_within, normal,
};

fn gpu() -> Emulated {
    Emulated::on(Target::SM_90A)
}

const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };

fn full() -> Scheme {
    Preset::FULL.scheme(64)
}

fn int8() -> Option<Scheme> {
    Some(int8_scheme(DType::F16))
}

fn case() -> Case {
    Case { q_len: 150, kv_len: 200, k_bias: Bias::Channels(3.0), scheme: int8(), ..Case::default() }
}

/// In full precision `mma.sync` is as fast for such short calls.
const FULL: WarpgroupTiling = WarpgroupTiling {
    groups: 3,
    tile_keys: 64,
    queries_in_registers: true,
    stages: 4,
    sums_by_mma: true,
    lazy_rescale: 8,
};

fn check(case: &Case) {
    let short = case.scheme == Some(full()) && case.head_dim <= 64 && case.mask.is_none();
    let tiling = short.then_some(Tiling::Warpgroups(FULL));
    check_on(&Emulated { tiling, ..gpu() }, case);
}

fn check_on(gpu: &Emulated, case: &Case) {
    let kernels = sage_testkit::check(gpu, case).kernels;
    assert!(kernels.iter().any(|name| name.contains("_wg")), "{kernels:?}");
    // Without the log-sum-exp, sums of P may be products.
    sage_testkit::check(gpu, &Case { lse: false, ..case.clone() });
}

#[test]
fn head_dims() {
    for (i, head_dim) in [8, 40, 64, 72, 96, 128, 160, 256].into_iter().enumerate() {
        let dtype = if i % 2 == 0 { DType::F16 } else { DType::BF16 };
        // Wider heads leave no registers for sums in two levels.
        let fp8 = if head_dim <= 128 {
            Preset::SAGE2_INT8_FP8_PER_THREAD
        } else {
            Preset::SAGE2_INT8_FP8_F32_PER_WARP
        };
        for scheme in [int8_scheme(dtype), full(), fp8.scheme(head_dim)].map(Some) {
            check(&Case { dtype, head_dim, scheme, ..case() });
        }
    }
}

#[test]
fn lengths() {
    for (q_len, kv_len) in [(65, 1), (193, 64), (200, 257), (385, 128)] {
        for scheme in [int8(), Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
            check(&Case { q_len, kv_len, scheme, ..case() });
        }
    }
}

#[test]
fn named_schemes() {
    for preset in [
        Preset::SAGE2_INT8_FP16_PER_WARP,
        Preset::SAGE2_INT8_FP8_PER_THREAD,
        Preset::SAGE2_INT8_FP8_F32_PER_WARP,
        Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD,
        Preset::INT8_FP8,
    ] {
        for head_dim in [64, 128] {
            for dtype in [DType::F16, DType::BF16] {
                check(&Case {
                    scheme: Some(preset.scheme(head_dim)),
                    head_dim,
                    dtype,
                    v_bias: Bias::Channels(1.0),
                    ..case()
                });
            }
        }
    }
}

#[test]
fn bands_and_groups() {
    for (left, right) in [(None, Some(0)), (Some(40), Some(0)), (Some(10), Some(70))] {
        for alignment in [Alignment::BottomRight, Alignment::TopLeft] {
            let band = Band { left, right, alignment };
            for scheme in [int8(), Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
                check(&Case { band, scheme, q_heads: 4, kv_heads: 2, batch: 2, ..case() });
            }
        }
    }
}

#[test]
fn masks_and_caps() {
    let bias = |dtype| CaseMask::bias(dtype, Extent::All).hiding(0.0);
    for mask in [CaseMask::bool(Extent::All), bias(DType::F16), bias(DType::F32)] {
        for scheme in [int8(), Some(full())] {
            check(&Case { mask: Some(mask), scheme, band: CAUSAL, ..case() });
        }
    }
    for scheme in [int8_scheme(DType::F16), full()] {
        let capped = Case { softcap: Some(30.0), scheme: Some(scheme), ..case() };
        check_within(&gpu(), &capped, &gpu().tolerance(capped.dtype, &scheme).times(2.0));
    }
}

#[test]
fn ragged_lengths() {
    for scheme in [int8(), Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
        let base = Case { scheme, q_heads: 2, band: CAUSAL, ..case() };
        check(&Case { batch: 3, sequences: Sequences::KvLens(vec![100, 0, 65]), ..base.clone() });
        let sequences = Sequences::Packed(vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]);
        check(&Case { sequences, ..base });
    }
}

#[test]
fn gaps_and_split_keys() {
    check(&Case { gap: 8, ..case() });
    let long = Case { q_len: 70, kv_len: 1100, q_heads: 2, kv_heads: 2, ..case() };
    check_on(&gpu().multiprocessors(40), &long);
}

/// Queries that no tensor map can describe, of repeated heads or heads that run backwards, are read by the lanes.
#[test]
fn queries_without_a_tensor_map() {
    let case = Case { q_heads: 3, kv_heads: 3, ..case() };
    let plain = case.build();
    let [_, heads, rows, channels] = plain.q.geometry().shape().try_into().unwrap();
    let of_head = (rows * channels) as i64;
    for (stride, first) in [(0, 0), (-of_head, (heads as i64 - 1) * of_head)] {
        for scheme in [int8_scheme(DType::F16), full()] {
            let strides = [0, stride, channels as i64, 1];
            let geometry = Geometry::strided("q", &[1, heads, rows, channels], &strides, first).unwrap();
            let q = Memory::new(normal(5, heads * rows * channels), DType::F16, geometry);
            let call = OwnedCall { q, ..plain.clone() };
            let tiling = (scheme == full()).then_some(Tiling::Warpgroups(FULL));
            let gpu = Emulated { tiling, ..gpu() };
            let computed = gpu.run(&call, Some(scheme));
            let kernel = computed.kernels.iter().find(|name| name.contains("_wg")).unwrap();
            assert!(!kernel.contains("qtma"), "{kernel}");
            let expected = gpu.expected(&call.call(), &computed.scheme);
            computed.check(&expected, &gpu.tolerance(DType::F16, &computed.scheme)).unwrap();
        }
    }
}

/// Every way to order the work of a tile.
#[test]
fn schedules() {
    for scheme in [
        int8(),
        Some(full()),
        Some(Preset::SAGE2_INT8_FP8_F32_PER_WARP.scheme(64)),
        Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64)),
    ] {
        for (index, tile_keys) in [64, 128, 64, 128].into_iter().enumerate() {
            let tiling = Tiling::Warpgroups(WarpgroupTiling {
                groups: 2 + index % 2,
                tile_keys,
                queries_in_registers: index < 2,
                stages: 2 + index % 2,
                sums_by_mma: index >= 2,
                lazy_rescale: if scheme.is_some_and(|scheme| matches!(scheme.pv, Pv::Fp8 { .. })) {
                    4
                } else {
                    8
                },
            });
            for kv_len in [30, 64, 128, 150, 320, 700] {
                check_on(&Emulated { tiling: Some(tiling), ..gpu() }, &Case { scheme, kv_len, ..case() });
            }
        }
    }
}

/// Every way to cut the work that the planner weighs: other numbers of warpgroups, `mma.sync`, keys whole or in parts.
#[test]
fn cuts() {
    let machine = Machine { multiprocessors: 132, ..gpu().machine };
    for head_dim in [64, 72, 128, 256] {
        let mut shapes = HashSet::new();
        for scheme in [full(), int8_scheme(DType::F16), Preset::INT8_FP8.scheme(head_dim)] {
            let band = if shapes.len() % 2 == 0 { CAUSAL } else { Band::FULL };
            let case = Case { head_dim, kv_len: 600, band, scheme: Some(scheme), ..case() };
            let problem = case.build().call().problem;
            let request = Request { scheme: Some(scheme), ..Request::new(&problem) };
            for cut in Alternative::all(&problem, &request, &machine).unwrap() {
                shapes.insert((cut.tiling.block_q(), cut.tiling.engine(), cut.splits > 1));
                let gpu = Emulated { tiling: Some(cut.tiling), splits: Some(cut.splits), ..gpu() };
                sage_testkit::check(&gpu, &case);
                sage_testkit::check(&gpu, &Case { lse: false, ..case.clone() });
            }
        }
        // Blocks of 64, 128 and 192 rows and of `mma.sync`, each with keys whole and split.
        assert!(shapes.len() >= if head_dim == 256 { 2 } else { 7 }, "head_dim {head_dim}: {shapes:?}");
    }
}

#[test]
fn log_sum_exps_change_no_bit_of_the_output() {
    for head_dim in [64, 72, 128] {
        for preset in [Preset::INT8_FP8, Preset::SAGE2_INT8_FP8_PER_THREAD, Preset::SAGE2_INT8_FP16_PER_WARP]
        {
            let scheme = Some(preset.scheme(head_dim));
            let [with, without] =
                [true, false].map(|lse| gpu().run(&Case { head_dim, lse, ..case() }.build(), scheme).out);
            assert!(with == without, "{preset}, head_dim {head_dim}");
        }
    }
}
