//! Attention sinks where keys are split and heads are rows of one tile, in the emulator: what merges the parts adds the
//! sinks, once. (The table of every backend has the other forms.)

use sage_core::{Alignment, Band, DType, Preset};
use sage_ptx::Target;
use sage_testkit::{Bias, Case, CaseMask, Emulated, Extent, Runner, Sequences, check};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

#[test]
fn parts_of_the_keys_have_the_sinks_once() {
    let case = Case { sinks: true, q_heads: 8, kv_heads: 2, q_len: 70, kv_len: 500, ..Case::default() };
    let int8 = Some(Preset::SAGE2_INT8_FP16_PER_THREAD.scheme(64));
    let smooth = Case { scheme: int8, k_bias: Bias::Channels(4.0), ..case.clone() };
    let cases = [
        Case { scheme: Some(Preset::FULL.scheme(64)), ..case.clone() },
        smooth.clone(),
        Case { lse: false, dtype: DType::BF16, ..smooth.clone() },
        Case { softcap: Some(5.0), ..smooth.clone() },
        // Rows that see no key in any part.
        Case { band: Band::causal(Alignment::Offset(-30)), ..smooth },
    ];
    for target in [Target::SM_80, Target::SM_90A] {
        for case in &cases {
            let gpu = Emulated { splits: Some(3), ..Emulated::on(target) };
            check(&gpu, case);
            let kernels = gpu.run(&case.build(), case.scheme).kernels;
            let last = kernels.last().unwrap();
            assert!(last.starts_with("combine") && last.contains("_sinks"), "{target}: {kernels:?}");
        }
    }
}

/// By strides, where a row's index says the head, and in the kernel, which finds it.
#[test]
fn heads_as_rows_have_each_its_own_sink() {
    let group =
        Case { sinks: true, q_heads: 8, kv_heads: 2, batch: 2, q_len: 1, kv_len: 300, ..Case::default() };
    let cases = [
        group.clone(),
        Case { q_heads: 7, kv_heads: 1, head_dim: 72, lse: false, ..group.clone() },
        Case { q_heads: 71, kv_heads: 1, batch: 1, ..group.clone() },
        Case { sequences: Sequences::KvLens(vec![300, 0]), ..group.clone() },
        Case { mask: Some(CaseMask::bool(Extent::All)), ..group.clone() },
        Case { q_len: 4, band: CAUSAL, scheme: Some(Preset::FULL.scheme(64)), ..group },
    ];
    for target in [Target::SM_80, Target::SM_90A] {
        for case in &cases {
            check(&Emulated::on(target), case);
            check(&Emulated::on(target).multiprocessors(20), case);
        }
    }
}
