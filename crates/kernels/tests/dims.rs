//! Heads of V with other channels than those of Q and K, and heads of more than 256 channels, in the emulator, against
//! the oracle of their scheme.

use sage_core::{Accumulator, Alignment, Band, DType, Preset, Pv, Scheme, SmoothQ};
use sage_kernels::forward::{Alternative, Request, int8_scheme};
use sage_ptx::Target;
use sage_testkit::{Bias, Case, CaseBlocks, CaseMask, Emulated, Extent, OwnedCall, Runner, Sequences, check};

/// The oldest GPU of each kind of kernel.
const TARGETS: [Target; 5] = [Target::SM_75, Target::SM_80, Target::SM_86, Target::SM_89, Target::SM_90A];

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

fn of(head_dim: usize, value_dim: usize) -> Case {
    Case {
        head_dim,
        value_dim: Some(value_dim),
        q_heads: 2,
        q_len: 70,
        kv_len: 130,
        k_bias: Bias::Channels(3.0),
        ..Case::default()
    }
}

fn full() -> Scheme {
    Preset::FULL.scheme(64)
}

fn int8() -> Scheme {
    int8_scheme(DType::F16)
}

/// Runs a case on a GPU, whose attention kernel is for such heads.
fn check_on(target: Target, case: &Case) {
    let kernels = check(&Emulated::on(target), case).kernels;
    let value_dim = case.value_dim.unwrap_or(case.head_dim);
    let dims = if value_dim == case.head_dim {
        format!("_d{value_dim}_")
    } else {
        format!("_d{}v{value_dim}_", case.head_dim)
    };
    assert!(kernels.iter().any(|name| name.starts_with("attention") && name.contains(&dims)), "{kernels:?}");
}

#[test]
fn unlike_heads_on_every_gpu() {
    for target in TARGETS {
        for (head_dim, value_dim) in [(192, 128), (64, 200), (256, 40), (80, 96), (31, 77)] {
            for scheme in [full(), int8()].map(Some) {
                check_on(target, &Case { scheme, ..of(head_dim, value_dim) });
            }
        }
    }
}

/// Heads whose tiles are of 192 channels, of every element.
#[test]
fn heads_of_192_channels_and_fewer() {
    for (head_dim, value_dim) in [(192, 192), (160, 160), (136, 192)] {
        let rotated = Scheme { rotate: true, ..int8() };
        for target in TARGETS {
            for scheme in [full(), int8(), rotated].map(Some) {
                check_on(target, &Case { scheme, ..of(head_dim, value_dim) });
            }
        }
        for target in [Target::SM_89, Target::SM_90A, Target::SM_120A] {
            for preset in [Preset::SAGE2_INT8_FP8_F32_PER_WARP, Preset::SAGE2_INT4_FP8] {
                check_on(target, &Case { scheme: Some(preset.scheme(head_dim)), ..of(head_dim, value_dim) });
            }
        }
    }
}

#[test]
fn every_scheme_of_unlike_heads() {
    let base = Case { v_bias: Bias::Channels(1.0), ..of(192, 128) };
    let mut smooth_q = int8();
    smooth_q.smooth.q = SmoothQ::Block(64);
    for target in [Target::SM_89, Target::SM_90A] {
        let presets = [
            Preset::INT8_FP8,
            Preset::SAGE2_INT8_FP8_PER_THREAD,
            Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD,
            Preset::SAGE2_INT8_FP16_PER_WARP,
            Preset::SAGE1_INT8_FP16,
            Preset::INT8_PER_TOKEN_ROTATED,
            Preset::SAGE2_INT4_FP8,
        ];
        for scheme in presets.map(|preset| preset.scheme(192)).into_iter().chain([smooth_q]) {
            for dtype in [DType::F16, DType::BF16] {
                check_on(target, &Case { dtype, scheme: Some(scheme), ..base.clone() });
            }
        }
    }
    for preset in [Preset::SAGE3_NVFP4, Preset::SAGE3_MXFP4, Preset::NVFP4_FP8] {
        for (head_dim, value_dim) in [(192, 128), (64, 160), (40, 96)] {
            let scheme = Some(preset.scheme(head_dim));
            check_on(Target::SM_120A, &Case { scheme, ..of(head_dim, value_dim) });
        }
    }
}

/// Every option of a call.
fn options(case: &Case) -> Vec<Case> {
    let of_case = || Case { k_bias: Bias::None, kv_heads: 1, ..case.clone() };
    let blocks = |q, k| Some(CaseBlocks::new(q, k));
    let packed = Sequences::Packed(vec![0, 70, 70, 71, 140], vec![0, 64, 130, 130, 227]);
    vec![
        Case { band: CAUSAL, ..of_case() },
        Case { band: Band { left: Some(40), ..CAUSAL }, batch: 2, lse: false, ..of_case() },
        Case { mask: Some(CaseMask::bool(Extent::All)), spoil: Some(f32::NAN), ..of_case() },
        Case { mask: Some(CaseMask::bias(DType::F32, Extent::Rows)), band: CAUSAL, ..of_case() },
        Case { mask: Some(CaseMask::bias(DType::F16, Extent::All)), ..of_case() },
        Case { blocks: blocks(64, 64), ..of_case() },
        Case { blocks: blocks(48, 80), band: CAUSAL, ..of_case() },
        Case { softcap: Some(20.0), sm_scale: Some(0.05), ..of_case() },
        Case { batch: 3, sequences: Sequences::Staggered, spoil: Some(f32::NAN), ..of_case() },
        Case { sequences: packed, band: CAUSAL, spoil: Some(f32::NAN), ..of_case() },
        Case { gap: 8, ..of_case() },
        Case { gap: 3, offset: 1, ..of_case() },
        Case { q_len: 3, kv_len: 700, ..of_case() },
        Case { q_len: 0, ..of_case() },
        Case { kv_len: 0, ..of_case() },
    ]
}

#[test]
fn options_of_unlike_heads() {
    for target in [Target::SM_80, Target::SM_90A] {
        for scheme in [full(), int8()].map(Some) {
            for case in options(&Case { scheme, ..of(192, 128) }) {
                check(&Emulated::on(target).multiprocessors(20), &case);
            }
        }
    }
}

#[test]
fn pooled_tails_of_unlike_heads() {
    let blocks = Some(CaseBlocks::new(48, 30).keeping(0.3));
    for (head_dim, value_dim) in [(192, 128), (64, 200), (40, 31)] {
        for band in [Band::FULL, CAUSAL] {
            let case = Case { blocks, pooled_tail: true, band, ..of(head_dim, value_dim) };
            check(&Emulated::on(Target::SM_80), &case);
        }
    }
}

/// Dimensions of heads of which several blocks share V's channels, or whose queries no registers hold.
const LARGE: [(usize, usize); 6] = [(512, 512), (576, 512), (300, 300), (320, 64), (64, 512), (257, 261)];

#[test]
fn large_heads_on_every_gpu() {
    for target in TARGETS {
        for (head_dim, value_dim) in LARGE {
            check_on(target, &Case { scheme: Some(full()), ..of(head_dim, value_dim) });
            let dtype = if target == Target::SM_75 { DType::F16 } else { DType::BF16 };
            check_on(target, &Case { dtype, q_len: 20, kv_len: 70, ..of(head_dim, value_dim) });
        }
    }
}

#[test]
fn options_of_large_heads() {
    for target in [Target::SM_75, Target::SM_86, Target::SM_90A] {
        for case in options(&Case { scheme: Some(full()), ..of(576, 512) }) {
            check(&Emulated::on(target).multiprocessors(20), &case);
        }
    }
    // Of the last block's channels the head has a part.
    for case in options(&Case { scheme: Some(full()), ..of(48, 280) }) {
        check(&Emulated::on(Target::SM_80).multiprocessors(20), &case);
    }
}

/// INT8 scores of usual keys beside values of many channels.
#[test]
fn integer_scores_beside_large_values() {
    for target in [Target::SM_80, Target::SM_90A] {
        for scheme in [int8(), Preset::INT8_PER_TOKEN.scheme(128)].map(Some) {
            check_on(target, &Case { scheme, ..of(128, 512) });
        }
    }
}

/// A call whose values are the first channels of its keys, in the same memory, as those of a latent cache are.
fn latent(case: &Case) -> OwnedCall {
    let call = case.build();
    let call = case.spoil.map_or(call.clone(), |value| call.with_hidden_rows(value));
    OwnedCall { v: call.k.first_channels(case.value_dim.unwrap_or(case.head_dim)), ..call }
}

fn check_latent(gpu: &Emulated, case: &Case) {
    let computed = gpu.run(&latent(case), case.scheme);
    let expected = latent(&Case { spoil: None, ..case.clone() });
    let expected = gpu.expected(&expected.call(), &computed.scheme);
    let checked = computed.check(&expected, &gpu.tolerance(case.dtype, &computed.scheme));
    assert_eq!(checked, Ok(()), "{case:?}, {:?}", computed.kernels);
    let in_keys = computed.kernels.iter().any(|name| name.contains("_vk"));
    assert!(in_keys || computed.out.is_empty() || case.kv_len == 0, "{:?}", computed.kernels);
}

#[test]
fn values_in_keys() {
    for target in [Target::SM_75, Target::SM_80, Target::SM_86, Target::SM_90A] {
        let gpu = Emulated::on(target).multiprocessors(20);
        for (head_dim, value_dim) in [(576, 512), (512, 512), (288, 256)] {
            let case = Case { scheme: Some(full()), ..of(head_dim, value_dim) };
            check_latent(&gpu, &case);
            // A query of as many heads as models with a latent cache have.
            check_latent(&gpu, &Case { q_len: 1, q_heads: 128, kv_len: 300, batch: 2, ..case });
        }
        for case in options(&Case { scheme: Some(full()), ..of(576, 512) }) {
            check_latent(&gpu, &case);
        }
    }
}

#[test]
fn one_query_of_many_heads() {
    for target in [Target::SM_80, Target::SM_86, Target::SM_90A] {
        let case = Case { q_len: 1, q_heads: 32, kv_len: 300, batch: 2, k_bias: Bias::None, ..of(576, 512) };
        let kernels = check(&Emulated::on(target).multiprocessors(20), &case).kernels;
        assert!(kernels.last().is_some_and(|name| name.starts_with("combine")), "{kernels:?}");
    }
}

/// What no kernel computes is refused, with what to use instead.
#[test]
fn what_large_heads_have_no_kernels_for() {
    let refusal = |case: &Case, target| {
        let refused = Emulated::on(target).supports(&case.build(), case.scheme);
        refused.expect_err("a refusal")
    };
    let large = |preset: Preset| Case { scheme: Some(preset.scheme(512)), ..of(512, 512) };
    assert_eq!(
        refusal(&large(Preset::INT8), Target::SM_80),
        "INT8 Q·Kᵀ with head_dim 512 on a GPU is not supported: heads of more than 256 channels are multiplied in 16 \
         bits: use `full`"
    );
    let values = Case { scheme: Some(Preset::INT8_FP8.scheme(64)), ..of(64, 512) };
    assert_eq!(
        refusal(&values, Target::SM_89),
        "P·V in FP8 with heads of 512 channels on a GPU is not supported: values beside more than 256 channels are \
         multiplied as given: use P·V in f16"
    );
    let turing = Case { dtype: DType::BF16, ..large(Preset::FULL) };
    assert_eq!(
        refusal(&turing, Target::SM_75),
        "full-precision scores of bf16 on sm_75 is not supported: products of bf16 need sm_80 or later; give q, k and \
         v in f16"
    );
    let tail = Case { blocks: Some(CaseBlocks::new(64, 64)), pooled_tail: true, ..large(Preset::FULL) };
    assert_eq!(
        refusal(&tail, Target::SM_80),
        "pooled_tail with heads of more than 256 channels on a GPU is not supported: leave it out: the blocks that are \
         kept are computed without it"
    );
}

/// Values of the workspace, whose tiles are of 64 keys, beside wide keys as given, which leave them little room.
#[test]
fn wide_keys_as_given_beside_values_of_the_workspace() {
    let scheme = |pv| Scheme { pv, ..full() };
    for target in [Target::SM_89, Target::SM_90A, Target::SM_120A] {
        for (head_dim, value_dim) in [(256, 256), (256, 64), (192, 128)] {
            for pv in [Preset::INT8_FP8.scheme(64).pv, Pv::BF16(Accumulator::F32)] {
                let case =
                    Case { scheme: Some(scheme(pv)), kv_heads: 2, batch: 2, ..of(head_dim, value_dim) };
                check_on(target, &case);
            }
        }
    }
}

/// Blocks of three warpgroups, which only more than 128 rows have, whose queries of 192 channels lie in shared memory.
#[test]
fn three_warpgroups_of_unlike_heads() {
    for scheme in [full(), int8(), Preset::INT8_FP8.scheme(192)] {
        for (head_dim, band) in [(192, CAUSAL), (136, Band::FULL)] {
            let scheme = Some(scheme);
            let case = Case { scheme, band, q_len: 200, kv_len: 200, lse: false, ..of(head_dim, 128) };
            let gpu = Emulated::on(Target::SM_90A);
            let problem = case.build().call().problem;
            let request = Request { scheme, ..Request::new(&problem) };
            let weighed = Alternative::all(&problem, &request, &gpu.machine).unwrap();
            let three = weighed.iter().find(|cut| cut.tiling.block_q() == 192).unwrap();
            let kernels = check(&Emulated { tiling: Some(three.tiling), ..gpu }, &case).kernels;
            assert!(kernels.iter().any(|name| name.contains("_wg12x16x64x64")), "{kernels:?}");
        }
    }
}
