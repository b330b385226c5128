//! Pooled terms for the blocks left out, in the emulator, beside the definition.

use sage_core::{Alignment, Band, DType, Preset, Scheme};
use sage_ptx::Target;
use sage_testkit::{Bias, Case, CaseBlocks, Emulated, Runner, Sequences, Tolerance, check, check_within};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

fn case() -> Case {
    Case { pooled_tail: true, q_heads: 4, kv_heads: 2, q_len: 140, kv_len: 333, ..Case::default() }
}

fn gpu(target: Target) -> Emulated {
    Emulated::on(target).multiprocessors(3)
}

fn blocks(block_q: usize, block_k: usize, kept: f64) -> Option<CaseBlocks> {
    Some(CaseBlocks::new(block_q, block_k).keeping(kept))
}

#[test]
fn every_density_is_the_definition_on_either_engine() {
    let schemes: [Option<Scheme>; 3] =
        [None, Some(Preset::INT8_FP8.scheme(64)), Some(Preset::FULL.scheme(64))];
    for (number, kept) in [0.0, 0.05, 0.3, 0.7, 1.0].into_iter().enumerate() {
        for (target, block_q) in [(Target::SM_80, 16), (Target::SM_90A, 64)] {
            let scheme = if target == Target::SM_80 { None } else { schemes[number % 3] };
            let case = Case { blocks: blocks(block_q, 64, kept), scheme, seed: number as u64, ..case() };
            check(&gpu(target), &case);
        }
    }
}

#[test]
fn split_keys_and_widths_of_heads_are_merged_alike() {
    // Few queries of many keys: attention is in parts, and what merges them writes the log-sum-exp.
    let few = Case { q_len: 5, kv_len: 1500, blocks: blocks(64, 64, 0.2), ..case() };
    let split = Emulated::on(Target::SM_80).multiprocessors(40);
    let computed = check(&split, &few);
    assert!(computed.kernels.iter().any(|name| name.starts_with("combine")), "{:?}", computed.kernels);
    check(&split, &Case { q_len: 1, ..few.clone() });
    check(&split, &Case { lse: false, ..few });
    for head_dim in [31, 128, 200, 256] {
        let band = if head_dim == 200 { CAUSAL } else { Band::FULL };
        check(&gpu(Target::SM_80), &Case { head_dim, band, blocks: blocks(48, 30, 0.3), ..case() });
    }
}

#[test]
fn a_bias_of_k_costs_smoothed_means_nothing() {
    // Channels of K are 20 from zero. In bfloat16 a mean of 20 is off by up to 2⁻⁹ · 20, scores of it by twice the
    // whole tolerance; smoothed, means are as small as those without a bias.
    for dtype in [DType::F16, DType::BF16] {
        let scheme = Some(Preset::INT8_PER_TOKEN.scheme(64));
        let case =
            Case { dtype, scheme, k_bias: Bias::Channels(20.0), blocks: blocks(64, 64, 0.2), ..case() };
        let own = gpu(Target::SM_89);
        let tolerance = own.tolerance(dtype, &Preset::INT8_PER_TOKEN.scheme(64));
        // Of scores of up to 20 · √64 the sums in single precision are off by 2⁻¹⁷ or so.
        check_within(&own, &case, &Tolerance { lse: 2e-3, ..tolerance });
    }
}

#[test]
fn padding_is_seen_by_none() {
    let sequences = Sequences::KvLens(vec![333, 64, 1, 0]);
    for band in [Band::FULL, CAUSAL] {
        let case = Case { batch: 4, sequences: sequences.clone(), band, spoil: Some(f32::NAN), ..case() };
        check(&gpu(Target::SM_80), &Case { blocks: blocks(32, 64, 0.3), ..case });
    }
}

#[test]
fn packed_sequences_are_refused_by_name() {
    let packed = Sequences::Packed(vec![0, 70, 140], vec![0, 100, 333]);
    let call = Case { sequences: packed, blocks: blocks(64, 64, 0.5), ..case() }.build();
    let reason = gpu(Target::SM_80).supports(&call, None).unwrap_err();
    assert!(reason.starts_with("pooled_tail with cu_seqlens on a GPU is not supported"), "{reason}");
}
