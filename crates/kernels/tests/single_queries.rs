//! Grouped-query attention of one query a sequence, whose heads are rows of one tile.

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

/// The number of blocks of threads that the heads of a group share, and where they may not.
#[test]
fn only_calls_whose_heads_see_the_same_have_them_as_rows() {
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
    // A window of a dense call leaves out keys, and the rest is seen whole; of given lengths it begins elsewhere in each.
    assert!(shared(1, [8, 2], Band { left: Some(9), ..CAUSAL }, dense, None));
    assert!(!shared(1, [8, 2], Band { left: Some(9), ..CAUSAL }, Lengths::KvLens, None));
    assert!(!shared(2, [8, 2], full, dense, None), "rows and heads would be apart differently");
    assert!(!shared(1, [8, 8], full, dense, None), "one head each");
    assert!(!shared(1, [8, 2], full, dense, Some(Preset::INT8_FP8)), "a scale is of rows of one head");
}
