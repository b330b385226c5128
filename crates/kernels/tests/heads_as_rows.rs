//! Grouped-query attention of one query or a few a sequence, whose heads are rows of one tile.

use sage_core::{Alignment, Band, Call, DType, Inputs, Layout, Options, Preset, Tensor};
use sage_kernels::forward::{ForwardPlan, Request};
use sage_kernels::{Lengths, Machine};
use sage_ptx::Target;
use sage_testkit::{Case, CaseMask, Emulated, Extent, Sequences, check};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

#[test]
fn heads_of_a_group_are_right_as_rows() {
    let group =
        Case { q_len: 1, q_heads: 8, kv_heads: 2, batch: 2, kv_len: 300, lse: true, ..Case::default() };
    let cases = [
        group.clone(),
        Case { band: CAUSAL, layout: Layout::Nhd, ..group.clone() },
        Case { softcap: Some(5.0), dtype: DType::BF16, head_dim: 128, ..group.clone() },
        Case { q_heads: 7, kv_heads: 1, head_dim: 72, gap: 8, ..group.clone() },
        Case { offset: 1, head_dim: 40, ..group.clone() },
        // More heads than a tile has rows.
        Case { q_heads: 71, kv_heads: 1, batch: 1, ..group.clone() },
        Case { sequences: Sequences::KvLens(vec![300, 17]), band: CAUSAL, ..group.clone() },
        Case { sequences: Sequences::KvLens(vec![300, 0]), ..group.clone() },
        Case { mask: Some(CaseMask::bool(Extent::All)), ..group.clone() },
        Case { mask: Some(CaseMask::bias(DType::F16, Extent::All)), ..group.clone() },
        Case { mask: Some(CaseMask::bool(Extent::Rows)), kv_heads: 1, ..group.clone() },
        Case { band: Band { left: Some(50), ..CAUSAL }, ..group.clone() },
    ];
    for target in [Target::SM_80, Target::SM_90A] {
        for case in &cases {
            check(&Emulated::on(target), case);
            // Keys are split between multiprocessors, and parts merged.
            check(&Emulated::on(target).multiprocessors(20), case);
        }
    }
}

/// Speculative steps: the kernel finds the query and the head of each row.
#[test]
fn heads_of_a_few_queries_are_right_as_rows() {
    let full = Some(Preset::FULL.scheme(64));
    let steps = Case {
        q_len: 4,
        q_heads: 8,
        kv_heads: 2,
        batch: 2,
        kv_len: 300,
        band: CAUSAL,
        lse: true,
        scheme: full,
        ..Case::default()
    };
    let window = Band { left: Some(50), ..CAUSAL };
    let cases = [
        steps.clone(),
        Case { q_len: 7, layout: Layout::Nhd, gap: 8, band: Band::FULL, ..steps.clone() },
        Case { q_heads: 6, softcap: Some(5.0), dtype: DType::BF16, head_dim: 128, ..steps.clone() },
        Case { q_len: 13, offset: 1, head_dim: 40, ..steps.clone() },
        Case { band: window, q_len: 3, ..steps.clone() },
        Case { band: Band { alignment: Alignment::TopLeft, ..CAUSAL }, ..steps.clone() },
        // More rows than a tile has, or two warpgroups, and rows before the first key.
        Case { q_len: 20, q_heads: 16, lse: false, ..steps.clone() },
        Case { q_len: 33, q_heads: 10, batch: 1, kv_len: 20, ..steps.clone() },
        Case { sequences: Sequences::KvLens(vec![300, 2]), ..steps.clone() },
        Case { sequences: Sequences::KvLens(vec![0, 300]), band: window, q_len: 1, ..steps.clone() },
        Case {
            sequences: Sequences::Packed(vec![0, 4, 4, 9, 10], vec![0, 130, 150, 153, 300]),
            batch: 1,
            ..steps.clone()
        },
        Case {
            sequences: Sequences::Packed(vec![0, 1, 2, 3], vec![0, 250, 250, 300]),
            batch: 1,
            layout: Layout::Nhd,
            ..steps.clone()
        },
    ];
    for target in [Target::SM_75, Target::SM_80, Target::SM_90A] {
        for case in cases.iter().filter(|case| target != Target::SM_75 || case.dtype == DType::F16) {
            for gpu in [Emulated::on(target), Emulated::on(target).multiprocessors(20)] {
                let computed = check(&gpu, case);
                assert!(computed.kernels.iter().any(|name| name.contains("_heads")), "{case:?}");
            }
        }
    }
}

/// Where the heads of a group share a tile, and where they may not.
#[test]
fn only_calls_whose_heads_may_and_should_have_them_as_rows() {
    let shared = |q_len: usize, heads: [usize; 2], band: Band, lengths: Lengths, preset: Option<Preset>| {
        let tensor = |heads, rows: usize| Tensor::zeros(DType::BF16, &[1, heads, rows, 64]).unwrap();
        let (q, k) = (tensor(heads[0], q_len), tensor(heads[1], 500));
        let inputs = Inputs::new(q.view(), k.view(), k.view());
        let call = Call::check(&inputs, &Options::default().band(band)).unwrap();
        let scheme = preset.map(|preset| preset.scheme(64));
        let request = Request { lengths, scheme, ..Request::new(&call.problem) };
        let plan = ForwardPlan::new(&call.problem, &request, &Machine::typical(Target::SM_90A)).unwrap();
        plan.reasons().iter().any(|reason| reason.contains("query heads are rows of one"))
    };
    let (full, dense) = (Band::FULL, Lengths::Dense);
    assert!(shared(1, [8, 2], full, dense, None));
    assert!(shared(1, [8, 2], CAUSAL, Lengths::KvLens, Some(Preset::FULL)));
    assert!(shared(1, [8, 2], Band { left: Some(9), ..CAUSAL }, dense, None));
    assert!(shared(1, [8, 2], Band { left: Some(9), ..CAUSAL }, Lengths::KvLens, None));
    assert!(shared(2, [8, 2], CAUSAL, dense, None));
    assert!(shared(48, [8, 2], CAUSAL, dense, Some(Preset::FULL)), "three tiles for four");
    assert!(!shared(50, [8, 2], CAUSAL, dense, Some(Preset::FULL)), "four tiles for four");
    assert!(!shared(65, [16, 1], CAUSAL, dense, Some(Preset::FULL)), "not bound by memory");
    assert!(!shared(1, [8, 8], full, dense, None), "one head each");
    assert!(!shared(1, [8, 2], full, dense, Some(Preset::INT8_FP8)), "a scale is of rows of one head");
}
