//! Log-sum-exps in the emulator, against the oracle: as exact as scores are, whatever P is rounded to, and no
//! different output.

use sage_core::{DType, Preset, Scheme, oracle};
use sage_kernels::forward::int8_scheme;
use sage_ptx::Target;
use sage_testkit::{Bias, Case, Emulated, Runner};

/// FlashAttention's are within this. Of sums of P as rounded to bfloat16 they are off by up to 2.6e-3: its units are
/// 2⁻⁸ of a value, and a row of few large probabilities has no others to even them out. What is left, mostly of scores
/// times log₂e in single precision and of the approximate exponential, was 2e-5 at most, and of integer scores 3e-4.
const LIMIT: f64 = 5e-4;

/// Factors on scores that make rows nearly flat, ordinary, and of one large probability. Integer scores are summed as
/// floats beside 1.5 · 2²³, which rounds a row's reference to half a unit of an integer product: at 2 that is 6e-4,
/// far below what quantising did.
fn scales(exact: bool) -> [f32; 3] {
    [0.002, 0.1, if exact { 2.0 } else { 0.5 }]
}

/// The largest error of a case's log-sum-exps.
fn error(gpu: &Emulated, case: &Case, exact: bool) -> f64 {
    let call = case.build();
    let computed = gpu.run(&call, case.scheme);
    let call = call.call();
    let wanted = if exact { oracle::exact(&call) } else { oracle::scheme(&call, &computed.scheme) };
    computed.lse_error(&wanted)
}

/// Whether a target multiplies tensors of that type as they are.
fn has_full(target: Target, dtype: DType) -> bool {
    Emulated::on(target).machine.product_dtype(dtype) == dtype
}

fn check(name: &str, scheme: Scheme, exact: bool) {
    for (target, q_len) in [(Target::SM_80, 20), (Target::SM_90A, 140)] {
        for dtype in [DType::BF16, DType::F16] {
            if exact && !has_full(target, dtype) {
                continue;
            }
            let mut worst = 0.0f64;
            for (kv_len, head_dim) in
                [(1, 64), (2, 64), (17, 128), (64, 64), (65, 128), (150, 72), (700, 64), (2000, 128)]
            {
                for sm_scale in scales(exact) {
                    let case = Case {
                        dtype,
                        q_len,
                        kv_len,
                        head_dim,
                        k_bias: if exact { Bias::None } else { Bias::Channels(1.0) },
                        sm_scale: Some(sm_scale),
                        scheme: Some(scheme),
                        ..Case::default()
                    };
                    let error = error(&Emulated::on(target), &case, exact);
                    worst = worst.max(error);
                    assert!(error <= LIMIT, "{name}: {error} of {case:?}");
                }
            }
            println!("{name}, {dtype}, {target}: {worst:.1e}");
        }
    }
}

#[test]
fn of_full_precision() {
    check("full", Preset::FULL.scheme(64), true);
}

#[test]
fn of_integer_scores_with_16_bit_values() {
    for (name, dtype) in [("int8 with f16", DType::F16), ("int8 with bf16", DType::BF16)] {
        check(name, int8_scheme(dtype), false);
    }
}

#[test]
fn of_keys_in_parts() {
    for dtype in [DType::BF16, DType::F16] {
        for (q_len, target) in [(1, Target::SM_80), (140, Target::SM_90A)] {
            for (scheme, exact) in [(Preset::FULL.scheme(64), true), (int8_scheme(dtype), false)] {
                if exact && !has_full(target, dtype) {
                    continue;
                }
                let mut worst = 0.0f64;
                for sm_scale in scales(exact) {
                    let case = Case {
                        dtype,
                        q_len,
                        kv_len: 2000,
                        sm_scale: Some(sm_scale),
                        scheme: Some(scheme),
                        ..Case::default()
                    };
                    let error = error(&Emulated::on(target).multiprocessors(40), &case, exact);
                    worst = worst.max(error);
                    assert!(error <= LIMIT, "{error} of {case:?}");
                }
                println!("{scheme} in parts, {dtype}, {target}: {worst:.1e}");
            }
        }
    }
}

#[test]
fn asking_for_them_changes_no_bit_of_the_output() {
    for target in [Target::SM_80, Target::SM_90A] {
        for head_dim in [64, 72, 128] {
            for (dtype, scheme) in [
                (DType::BF16, Preset::FULL.scheme(head_dim)),
                (DType::F16, Preset::FULL.scheme(head_dim)),
                (DType::BF16, int8_scheme(DType::BF16)),
                (DType::F16, Preset::SAGE2_INT8_FP16_F16F32_PER_WARP.scheme(head_dim)),
            ] {
                let (whole, parts) = (Emulated::on(target), Emulated::on(target).multiprocessors(40));
                for (gpu, q_len, kv_len) in [(whole, 150, 200), (parts, 2, 1100)] {
                    let case = Case { dtype, head_dim, q_len, kv_len, ..Case::default() };
                    let run = |lse| gpu.run(&Case { lse, ..case.clone() }.build(), Some(scheme)).out;
                    assert!(run(true) == run(false), "{case:?}");
                }
            }
        }
    }
}
