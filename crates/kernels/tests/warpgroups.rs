//! The kernels of warpgroups in the emulator, against the oracle of their scheme. Tolerances are those of the other
//! engine's tests: see there.

#[allow(dead_code, reason = "other tests use other parts")]
mod support;

use sage_core::{Alignment, Band, DType, Preset, Pv, Scheme};
use sage_kernels::forward::int8_scheme;
use sage_kernels::{Tiling, WarpgroupTiling};
use sage_ptx::Target;
use support::{Case, MaskKind};

const F16: f64 = 1e-3;
const BF16: f64 = 6e-3;
/// P in E4M3 relative to a reference that lags behind the maximum by up to a factor of 16: as exact as before, but other
/// values fall on its coarse grid.
const FP8: f64 = 4e-2;

const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };

fn full() -> Scheme {
    Preset::FULL.scheme(64)
}

fn int8() -> Option<Scheme> {
    Some(int8_scheme(DType::F16))
}

fn hopper() -> Case {
    Case { target: Target::SM_90A, q_len: 150, kv_len: 200, k_bias: 3.0, scheme: int8(), ..Case::default() }
}

fn check(case: &Case) {
    let fp8 = case.scheme.is_some_and(|scheme| matches!(scheme.pv, Pv::Fp8 { .. }));
    let tolerance = match (fp8, case.dtype) {
        (true, _) => FP8,
        (false, DType::BF16) => BF16,
        _ => F16,
    };
    let kernels = case.check(tolerance);
    assert!(kernels.iter().any(|name| name.contains("_wg")), "{kernels:?}");
    // Without the log-sum-exp, sums of P may be products.
    Case { lse: false, ..case.clone() }.check(tolerance);
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
            check(&Case { dtype, head_dim, scheme, ..hopper() });
        }
    }
}

#[test]
fn lengths() {
    for (q_len, kv_len) in [(65, 1), (193, 64), (200, 257), (385, 128)] {
        for scheme in [int8(), Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
            check(&Case { q_len, kv_len, scheme, ..hopper() });
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
                    v_bias: 1.0,
                    ..hopper()
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
                check(&Case { band, scheme, q_heads: 4, kv_heads: 2, batch: 2, ..hopper() });
            }
        }
    }
}

#[test]
fn masks_and_caps() {
    for mask in [MaskKind::Bool, MaskKind::Bias(DType::F16), MaskKind::Bias(DType::F32)] {
        for scheme in [int8(), Some(full())] {
            check(&Case { mask, scheme, band: CAUSAL, ..hopper() });
        }
    }
    for scheme in [int8(), Some(full())] {
        let case = Case { softcap: Some(30.0), scheme, ..hopper() };
        case.check(2.0 * F16);
    }
}

#[test]
fn ragged_lengths() {
    for scheme in [int8(), Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
        let base = Case { scheme, q_heads: 2, ..hopper() };
        let kv_lens = Some(vec![100, 0, 65]);
        check(&Case { batch: 3, kv_lens, band: CAUSAL, ..base.clone() });
        let packed = Some((vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]));
        check(&Case { batch: 4, packed, band: CAUSAL, ..base });
    }
}

#[test]
fn gaps_and_split_keys() {
    check(&Case { gap: 8, ..hopper() });
    let case = Case { q_len: 70, kv_len: 1100, multiprocessors: 40, q_heads: 2, kv_heads: 2, ..hopper() };
    check(&case);
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
                check(&Case { scheme, tiling: Some(tiling), kv_len, ..hopper() });
            }
        }
    }
}

#[test]
fn log_sum_exps_change_no_bit_of_the_output() {
    for head_dim in [64, 72, 128] {
        for preset in [Preset::INT8_FP8, Preset::SAGE2_INT8_FP8_PER_THREAD, Preset::SAGE2_INT8_FP16_PER_WARP]
        {
            let scheme = Some(preset.scheme(head_dim));
            let [with, without] =
                [true, false].map(|lse| Case { head_dim, scheme, lse, ..hopper() }.run().0.out);
            assert!(with == without, "{preset}, head_dim {head_dim}");
        }
    }
}
