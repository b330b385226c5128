//! Numbers from the whole range of single precision: what attention of them is, is as right as of ordinary ones.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use sage_core::{Band, DType, IntQuantizer, Qk, Scheme, ZeroGroup, oracle};
use sage_testkit::{Bias, Case, Memory, OwnedCall, Runner, cpu_schemes as schemes, every_cpu, unit_roundoff};

/// Schemes whose scales are quotients. Others add 1e-7, or take no maximum below it: they are the original's, and
/// smaller numbers are zeros to them.
fn scaling(head_dim: usize) -> Vec<Scheme> {
    let guards = |scheme: &Scheme| match scheme.qk {
        Qk::Int(IntQuantizer { zero_group, .. }) => zero_group == ZeroGroup::Guard,
        _ => true,
    };
    schemes(head_dim).into_iter().filter(guards).collect()
}

fn times(tensor: &Memory, factor: f32) -> Memory {
    tensor.map(|_, x| x * factor)
}

/// Compares a call whose Q, K and V are multiplied by `factors` with exact attention.
fn check(case: &Case, [q, k, v]: [f32; 3]) {
    let built = case.build();
    let built = OwnedCall { q: times(&built.q, q), k: times(&built.k, k), v: times(&built.v, v), ..built };
    let exact = oracle::exact(&built.call());
    let magnitude = exact.out.iter().map(|x| x.abs()).sum::<f64>() / exact.out.len() as f64;
    // The last place of the smallest numbers is 2⁻¹⁴⁹, by which each of many sums is rounded: measured 3 of them;
    // doubled. Of bf16 it is 2⁻¹³³, by which the output is rounded.
    let smallest = 6.0 * 2f64.powi(-149) / magnitude
        + if case.dtype == DType::BF16 { 2f64.powi(-134) / magnitude } else { 0.0 };
    for cpu in every_cpu() {
        for scheme in scaling(case.head_dim) {
            let what = format!("{} · {q:e}, {k:e}, {v:e} {scheme} {case:?}", cpu.instruction_set());
            let run = cpu.run(&built, Some(scheme));
            assert!(run.out.iter().chain(&run.lse).all(|x| x.is_finite()), "{what}");
            let error = run.relative_l1(&exact);
            // The worst measured of ordinary numbers is 1.7e-2, rotated with a bias, and 2e-4 without integers.
            let allowed = if matches!(scheme.qk, Qk::Int(_)) { 2e-2 } else { 1e-3 };
            assert!(error <= allowed + unit_roundoff(case.dtype) + smallest, "{what}: {error}");
            let lse = run.lse_error(&exact);
            assert!(lse <= if matches!(scheme.qk, Qk::Int(_)) { 0.1 } else { 1e-3 }, "{what}: {lse}");
        }
    }
}

/// Factors of Q, K and V. Scores stay ordinary, or vanish.
const FACTORS: [[f32; 3]; 17] = [
    [1.0, 1.0, 1.0],
    [1e-37, 1e37, 1.0],
    [1e37, 1e-37, 1.0],
    [5e-38, 2e37, 1e-36],
    [1e-30, 1e30, 1e30],
    [1e36, 1e-36, 1e36],
    [1.0, 1.0, 1e-36],
    [1.0, 1.0, 1e-38],
    [1.0, 1.0, 3e-41],
    [1.0, 1.0, 1e36],
    [1e-20, 1.0, 1e-20],
    [1.0, 1e-36, 1.0],
    [1e-40, 1e37, 1.0],
    [1e37, 1e-41, 1.0],
    [1.0, 1.0, 5e37],
    [1e-38, 4e37, 1.0],
    [4e37, 1e-38, 1.0],
];

#[test]
fn large_and_small_numbers_give_what_ordinary_ones_do() {
    for dtype in [DType::F32, DType::BF16] {
        for q_len in [3, 150] {
            for factors in FACTORS {
                // bf16 has no more than 3 bits of the smallest.
                if dtype == DType::BF16 && factors.iter().any(|x| *x < 1e-38) {
                    continue;
                }
                for k_bias in [Bias::None, Bias::EveryFourth(2.0)] {
                    check(
                        &Case { dtype, q_heads: 2, kv_heads: 1, q_len, kv_len: 700, k_bias, ..Case::f32() },
                        factors,
                    );
                }
            }
        }
    }
}

#[test]
fn groups_caps_and_bands_do_not_matter() {
    for (factors, head_dim) in FACTORS.into_iter().zip([32, 64, 128, 40].into_iter().cycle()) {
        let case = Case { q_len: 130, kv_len: 260, head_dim, softcap: Some(20.0), ..Case::f32() };
        check(&case, factors);
        let mut banded = case;
        banded.band = Band { left: Some(100), right: Some(100), ..Band::FULL };
        check(&banded, factors);
    }
}

/// Equal values, whose sum over many keys is beyond what a single holds.
#[test]
fn a_mean_of_values_that_no_sum_holds() {
    for q_len in [2, 130] {
        let case = Case { q_len, kv_len: 3000, head_dim: 16, ..Case::f32() };
        let built = case.build();
        let built = OwnedCall { v: built.v.map(|_, x| 1.5e36 + x * 1e35), ..built };
        let exact = oracle::exact(&built.call());
        for cpu in every_cpu() {
            for scheme in scaling(16) {
                let run = cpu.run(&built, Some(scheme));
                let error = run.relative_l1(&exact);
                assert!(error <= 1e-3, "{scheme}, {q_len} queries: {error}");
            }
        }
    }
}
