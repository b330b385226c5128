//! Masks of keys alone, such as padding, against the oracle on both engines: one launch makes all that attention asks of
//! them.

use sage_core::{Alignment, Band, DType, Preset, Problem};
use sage_kernels::Machine;
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{Extent, ForwardPlan, Request};
use sage_ptx::Target;
use sage_testkit::{Case, CaseMask, Emulated, Extent as Shape, check};

/// Every size, −∞ now and then and throughout the second tile, the least number, and nothing from key 200 to 260.
fn mixed([batch, _, _, key]: [usize; 4]) -> f32 {
    match key {
        64..128 => f32::NEG_INFINITY,
        200..260 => 0.0,
        _ if (key + batch) % 11 == 0 => f32::NEG_INFINITY,
        _ if key % 17 == 3 => -6e4,
        _ => (key % 13) as f32 / 16.0 - batch as f32,
    }
}

fn nothing(_: [usize; 4]) -> f32 {
    f32::NEG_INFINITY
}

/// The second sequence sees nothing.
fn of_the_first([batch, ..]: [usize; 4]) -> f32 {
    if batch == 0 { 0.0 } else { f32::NEG_INFINITY }
}

#[test]
fn every_form_and_length_on_both_engines() {
    let masks = [
        CaseMask::bool(Shape::All),
        CaseMask::bias(DType::F16, Shape::All),
        CaseMask::bias(DType::BF16, Shape::All),
        CaseMask::bias(DType::F32, Shape::All),
    ];
    let mut number = 0;
    for target in [Target::SM_75, Target::SM_89, Target::SM_90A] {
        for (mask, dtype) in masks.into_iter().zip([DType::F16, DType::BF16].into_iter().cycle()) {
            // Tensor cores of Turing have no bfloat16.
            let dtype = if target == Target::SM_75 { DType::F16 } else { dtype };
            for pattern in [mixed, nothing, of_the_first] {
                let (head_dim, kv_len) = [(64, 336), (128, 1), (40, 65), (256, 300), (96, 128)][number % 5];
                let extent = [Shape::BatchKeys, Shape::Keys][number % 2];
                let case = Case {
                    scheme: Some(Preset::FULL.scheme(head_dim)),
                    dtype,
                    head_dim,
                    batch: 2,
                    q_heads: 4,
                    kv_heads: 2,
                    q_len: [200, 1, 70][number % 3],
                    kv_len,
                    mask: Some(CaseMask { extent, ..mask.pattern(pattern) }),
                    spoil: Some(f32::NAN),
                    ..Case::default()
                };
                check(&Emulated::on(target), &case);
                number += 1;
            }
        }
    }
}

/// A mask of keys is one launch before that of attention; one whose rows or heads differ, and one beside a causal mask, are
/// more.
#[test]
fn the_launches_of_a_mask() {
    let launches = |extent: Extent, causal: bool| {
        let band = if causal { Band::causal(Alignment::TopLeft) } else { Band::FULL };
        let mut problem = Problem::dense(DType::F16, [2, 4, 4], [1024; 2], 128);
        (problem.masked, problem.band) = (true, band);
        let request = Request {
            scheme: Some(Preset::FULL.scheme(128)),
            mask: MaskForm::Bool,
            mask_extent: extent,
            ..Request::new(&problem)
        };
        let plan = ForwardPlan::new(&problem, &request, &Machine::typical(Target::SM_90A)).unwrap();
        plan.pass().kernel_names()
    };
    let of_keys = Extent { heads: false, rows: false, ..Extent::ALL };
    let names = launches(of_keys, false);
    assert!(names.len() == 2 && names[0].starts_with("key_mask_"), "{names:?}");
    assert!(launches(Extent { batches: false, ..of_keys }, false)[0].starts_with("key_mask_"));
    for (extent, causal) in [(Extent { rows: true, ..of_keys }, false), (of_keys, true)] {
        let names = launches(extent, causal);
        assert!(names[0].starts_with("seen_keys_"), "{names:?}");
    }
}
