//! Masks applied to scores of any kind.

use half::{bf16, f16};
use sage_testkit::normal;

use super::*;
use crate::testing::tables;

/// Scores of any kind: a key is hidden whatever its score is.
fn any_scores(len: usize) -> Vec<f32> {
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN, f32::MAX, -0.0];
    let mut scores = normal(5, len);
    scores.iter_mut().step_by(7).zip(special.iter().cycle()).for_each(|(score, x)| *score = *x);
    scores
}

fn same(a: f32, b: f32) -> bool {
    // A zero may change its sign: nothing reads the sign of a score.
    a == b || a.is_nan() && b.is_nan()
}

#[test]
fn a_boolean_mask_hides_keys_and_leaves_the_others() {
    for (set, kernels) in tables() {
        for len in 0..=TILE_KEYS {
            let before = any_scores(len);
            let visible: Vec<bool> = normal(len as u64, len).iter().map(|x| *x < 0.4).collect();
            let mut scores = before.clone();
            kernels.hide_keys(HideKeys { visible: &visible, scores: &mut scores });
            for j in 0..len {
                let wanted = if visible[j] { before[j] } else { f32::NEG_INFINITY };
                assert!(same(scores[j], wanted), "{set}: {} became {}", before[j], scores[j]);
            }
        }
    }
}

#[test]
fn a_bias_is_added_in_base_2_and_only_minus_infinity_hides() {
    fn check<E: Load>() {
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN, f32::MAX, -0.0, 1e-40, -6e4];
        let lowest = [f16::MIN.to_f32(), bf16::MIN.to_f32(), f32::MIN / 2.0];
        for (set, kernels) in tables() {
            for len in 0..=TILE_KEYS {
                let before = any_scores(len);
                let mut bias = normal(len as u64 + 9, len);
                let all = special.iter().chain(&lowest).cycle();
                bias.iter_mut().step_by(3).zip(all).for_each(|(bias, x)| *bias = *x);
                let bias: Vec<E> = bias.into_iter().map(E::from_f32).collect();
                let mut scores = before.clone();
                E::add_bias(kernels, AddBias { bias: &bias, scores: &mut scores });
                for j in 0..len {
                    let bias = bias[j].to_f32();
                    let in_base_2 = (bias * LOG2_E).clamp(f32::MIN, f32::MAX);
                    let wanted = match bias {
                        f32::NEG_INFINITY => bias,
                        f32::INFINITY => before[j] + bias,
                        _ => before[j] + in_base_2,
                    };
                    assert!(same(scores[j], wanted), "{set}: {} and {bias} became {}", before[j], scores[j]);
                }
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}
