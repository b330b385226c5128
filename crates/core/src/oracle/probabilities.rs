//! P as each scheme's P·V sees it.

use half::{bf16, f16};

use super::exact::maximum;
use super::fixed::FIXED12_MAX;
use super::fp4::{E2M1_MAX, e2m1_value};
use super::fp8::{E4M3_MAX, E4M3_P_EXPONENT, round_e4m3};
use super::{Score, absmax};
use crate::{Fp4Format, PLevels, Pv};

/// One row's probabilities before normalisation, relative to `exp` of the row's maximum.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// For each visible key the weight that V gets, as quantised.
    pub p: Vec<f64>,
    /// The row sum ℓ that the output is divided by.
    pub sum: f64,
    /// The row sum that the log-sum-exp is of.
    pub lse_sum: f64,
}

/// Quantises one row of `P = exp(score − max)`.
///
/// `max` is the row's largest score. A kernel that goes through the keys once has only the largest so far; P then
/// differs by a factor that the later rescaling takes back, so only its rounding differs.
///
/// | P | quantised to | row sum of | log-sum-exp of |
/// |---|---|---|---|
/// | `F32`, `F16`, `BF16` | the nearest value | quantised P | unrounded P |
/// | `Fp8` | `e4m3(2^8.807 · P) / 2^8.807` | unrounded P | unrounded P |
/// | `Int8` | `round(127 · P) / 127`, ties to even | unrounded P | unrounded P |
/// | `Fixed12` | `round(4095 · P / P_max) / 4095 · P_max`, ties to even | quantised P | quantised P |
/// | `Fp4` | `σ · e2m1(f · P / σ) / f`, where `f` is 2688 in two levels and 1 in one | unrounded P | unrounded P |
///
/// `P_max` is the largest P of a block of keys; `σ` is the format's scale ([`Fp4Format::scale`]) of the `f · P` of a group
/// of keys.
///
/// # Panics
/// When [`Pv::Fixed12`]'s block is 0.
pub fn quantize_p(scores: &[Score], max: f64, pv: &Pv) -> Weights {
    let exact: Vec<f64> = scores.iter().map(|s| (s.value - max).exp()).collect();
    let exact_sum: f64 = exact.iter().sum();
    let unrounded = |p: Vec<f64>| Weights { p, sum: exact_sum, lse_sum: exact_sum };
    let quantised = |p: Vec<f64>| Weights { sum: p.iter().sum(), p, lse_sum: exact_sum };
    let each = |round: &dyn Fn(f32) -> f64| exact.iter().map(|&p| round(p as f32)).collect();
    match *pv {
        Pv::F32 => quantised(each(&|p| f64::from(p))),
        Pv::F16(_) => quantised(each(&|p| f16::from_f32(p).to_f64())),
        Pv::BF16(_) => quantised(each(&|p| bf16::from_f32(p).to_f64())),
        Pv::Fp8 { .. } => {
            let factor = E4M3_P_EXPONENT.exp2();
            unrounded(each(&|p| f64::from(round_e4m3(p * factor)) / f64::from(factor)))
        }
        Pv::Int8 => unrounded(each(&|p| f64::from((p * 127.0).round_ties_even()) / 127.0)),
        Pv::Fixed12 { block } => {
            let weights = quantised(fixed12(scores, max, block));
            Weights { lse_sum: weights.sum, ..weights }
        }
        Pv::Fp4 { format, levels } => unrounded(fp4(scores, &exact, format, levels)),
    }
}

/// [`quantize_p`] as a kernel does that goes through the keys once, `tile` of them at a time: each tile's P is relative to
/// the largest score so far, and the later rescaling, which is exact here, makes it relative to the row's largest. The
/// keys of a tile are counted from the sequence's first.
///
/// # Panics
/// When `tile` is 0, or a block of [`Pv::Fixed12`] is.
pub fn quantize_p_by_tiles(scores: &[Score], tile: usize, pv: &Pv) -> Weights {
    let max = maximum(scores);
    let mut all = Weights { p: Vec::with_capacity(scores.len()), sum: 0.0, lse_sum: 0.0 };
    let mut running = f64::NEG_INFINITY;
    for keys in scores.chunk_by(|a, b| a.key / tile == b.key / tile) {
        running = running.max(maximum(keys));
        if running == f64::NEG_INFINITY {
            all.p.extend(keys.iter().map(|_| 0.0));
            continue;
        }
        let (weights, factor) = (quantize_p(keys, running, pv), (running - max).exp());
        all.p.extend(weights.p.iter().map(|p| p * factor));
        all.sum += weights.sum * factor;
        all.lse_sum += weights.lse_sum * factor;
    }
    all
}

fn fixed12(scores: &[Score], max: f64, block: usize) -> Vec<f64> {
    let levels = f64::from(FIXED12_MAX);
    let in_block = |keys: &[Score]| {
        let block_max = maximum(keys);
        let factor = (block_max - max).exp() / levels;
        // A block of scores −∞ has weight 0, and no finite maximum to be relative to.
        let relative = move |s: &Score| if factor == 0.0 { 0.0 } else { (s.value - block_max).exp() };
        keys.iter().map(|s| factor * (levels * relative(s)).round_ties_even()).collect::<Vec<_>>()
    };
    scores.chunk_by(|a, b| a.key / block == b.key / block).flat_map(in_block).collect()
}

/// The first level, where there are two, maps the row to `[0, 448 · 6]`, the other each group of keys to E2M1's range.
fn fp4(scores: &[Score], exact: &[f64], format: Fp4Format, levels: PLevels) -> Vec<f64> {
    let factor = match levels {
        PLevels::One => 1.0,
        PLevels::Two => E4M3_MAX * E2M1_MAX,
    };
    let keyed: Vec<(usize, f32)> =
        scores.iter().zip(exact).map(|(s, &p)| (s.key, p as f32 * factor)).collect();
    let in_group = |group: &[(usize, f32)]| {
        let scale = format.scale(absmax(group.iter().map(|&(_, p)| p)));
        let sigma = f64::from(format.scale_value(scale)) / f64::from(factor);
        group.iter().map(|&(_, p)| sigma * f64::from(e2m1_value(format.code(p, scale)))).collect::<Vec<_>>()
    };
    keyed.chunk_by(|a, b| a.0 / format.group() == b.0 / format.group()).flat_map(in_group).collect()
}

/// A tile's row of P as SageAttention's 8-bit training quantises it: integers in 0..=127 relative to the row's own
/// maximum within the tile, and the scale `exp(tile maximum − running maximum) / 127`.
///
/// Source: SageAttention3 §4 (SageBwd), forward pass. A row without a score above −∞ has scale 0.
pub fn quantize_p_per_token(scores: &[Score], running_max: f64) -> (Vec<i8>, f32) {
    let max = maximum(scores);
    if max == f64::NEG_INFINITY {
        return (vec![0; scores.len()], 0.0);
    }
    let values = scores.iter().map(|s| (127.0 * (s.value - max).exp()).round_ties_even() as i8).collect();
    (values, ((max - running_max).exp() / 127.0) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Accumulator;
    use crate::oracle::testing::normal;

    const TWO_LEVELS: Pv = Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::Two };
    const ONE_LEVEL: Pv = Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::One };
    const MXFP4: Pv = Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One };

    const ALL: [Pv; 9] = [
        Pv::F32,
        Pv::F16(Accumulator::F32),
        Pv::BF16(Accumulator::F32),
        Pv::Fp8 { v_max: 448.0, rows: crate::ScaleRows::All, accumulator: Accumulator::F32 },
        Pv::Int8,
        Pv::Fixed12 { block: 4 },
        TWO_LEVELS,
        ONE_LEVEL,
        MXFP4,
    ];

    /// Scores of keys 0, 1, 2 … whose exponentials are `p`.
    fn scores(p: &[f64]) -> Vec<Score> {
        p.iter().enumerate().map(|(key, p)| Score { key, value: p.ln() }).collect()
    }

    fn close(actual: &[f64], expected: &[f64]) {
        let near = |(a, e): (&f64, &f64)| (a - e).abs() < 1e-6;
        assert!(
            actual.len() == expected.len() && actual.iter().zip(expected).all(near),
            "{actual:?} {expected:?}"
        );
    }

    #[test]
    fn numbers_worked_out_by_hand() {
        let row = scores(&[1.0, 0.3]);
        let p = |pv: Pv| quantize_p(&row, 0.0, &pv);
        // 0.3·127 = 38.1.
        close(&p(Pv::Int8).p, &[1.0, 38.0 / 127.0]);
        close(&[p(Pv::Int8).sum, p(Pv::Int8).lse_sum], &[1.3, 1.3]);
        // Of bfloat16's eight bits the last is 1/512 there, and 0.3 is 153.6 of them.
        let bf16 = p(Pv::BF16(Accumulator::F32));
        close(&[bf16.sum, bf16.lse_sum], &[1.0 + 154.0 / 512.0, 1.3]);
        // 447.89 rounds to 448; 134.37 lies between 128 and 144.
        let factor = f64::from(8.807f32.exp2());
        close(
            &p(Pv::Fp8 { v_max: 448.0, rows: crate::ScaleRows::All, accumulator: Accumulator::F32 }).p,
            &[448.0 / factor, 128.0 / factor],
        );
        // 2688 in a group of scale 448: 6; 806.4 is 1.8 of it, nearest 2.
        close(&p(TWO_LEVELS).p, &[1.0, 2.0 * 448.0 / 2688.0]);
        // A scale of 1/6 rounds to 11/64: 1 is 5.8 of it, and 0.3 is 1.745, nearest 1.5.
        close(&p(ONE_LEVEL).p, &[6.0 * 11.0 / 64.0, 1.5 * 11.0 / 64.0]);
        // A quarter: 4 and 1.2.
        close(&p(MXFP4).p, &[1.0, 0.25]);
        // 0.3·4095 = 1228.5, and a little more or less as ln 0.3 is rounded.
        let fixed = p(Pv::Fixed12 { block: 2 });
        assert!((fixed.p[1] - 0.3).abs() <= 0.5001 / 4095.0 && fixed.p[0] == 1.0);
        assert_eq!(fixed.sum, fixed.p[0] + fixed.p[1]);
    }

    #[test]
    fn fixed_point_is_relative_to_the_maximum_of_each_block() {
        // The second block's largest is 2⁻²⁰: 12 bits below 1 would be nothing.
        let tiny = (-20f64).exp2();
        let row = scores(&[1.0, 0.5, tiny, tiny / 2.0]);
        let weights = quantize_p(&row, 0.0, &Pv::Fixed12 { block: 2 });
        assert!((weights.p[2] / tiny - 1.0).abs() < 1e-12 && (weights.p[3] / tiny - 0.5).abs() < 1e-3);
        // Blocks are of keys, not of visible keys: here each has one, and is exact.
        let sparse = [Score { key: 0, value: 0.0 }, Score { key: 5, value: 0.3f64.ln() }];
        close(&quantize_p(&sparse, 0.0, &Pv::Fixed12 { block: 4 }).p, &[1.0, 0.3]);
    }

    #[test]
    fn each_form_is_as_near_as_its_bits_allow() {
        let row: Vec<Score> = normal(1, 100)
            .into_iter()
            .enumerate()
            .map(|(key, x)| Score { key, value: f64::from(x) })
            .collect();
        let max = maximum(&row);
        for pv in ALL {
            // Relative to P where the form floats, relative to the largest P (here 1) where it does not.
            let (relative, absolute) = match pv {
                Pv::F32 => (1e-7, 0.0),
                Pv::F16(_) => (1.0 / 2048.0, 1e-7),
                Pv::BF16(_) => (1.0 / 256.0, 0.0),
                Pv::Fp8 { .. } => (1.0 / 16.0, 1e-5),
                Pv::Int8 => (0.0, 0.5 / 127.0),
                Pv::Fixed12 { .. } => (0.0, 0.5 / 4095.0),
                // Half the widest step, 1 of 6, and the scale's own rounding, 1 of 16; a power of two may cut 2 of 8.
                Pv::Fp4 { format: Fp4Format::Nv, .. } => (0.0, 1.0 / 6.0 * 17.0 / 16.0),
                Pv::Fp4 { format: Fp4Format::Mx, .. } => (0.0, 0.25),
            };
            for (p, s) in quantize_p(&row, max, &pv).p.iter().zip(&row) {
                let exact = (s.value - max).exp();
                assert!(
                    (p - exact).abs() <= relative * exact * 1.001 + absolute,
                    "{pv:?}: {exact} became {p}"
                );
            }
        }
    }

    #[test]
    fn tiles_are_relative_to_the_largest_score_so_far() {
        // The first tile is relative to 1, and its 0.3 is nearest 2 · 448 / 2688; the second to 4.
        let row = scores(&[1.0, 0.3, 4.0, 1.2]);
        let by_tiles = quantize_p_by_tiles(&row, 2, &TWO_LEVELS);
        let of_tile = 2.0 * 448.0 / 2688.0;
        close(&by_tiles.p, &[0.25, of_tile / 4.0, 1.0, of_tile]);
        close(&[by_tiles.sum, by_tiles.lse_sum], &[6.5 / 4.0; 2]);
        // Of one tile, and where rounding does not depend on the maximum, it is the same.
        let whole = quantize_p(&row, 4f64.ln(), &TWO_LEVELS);
        close(&quantize_p_by_tiles(&row, 4, &TWO_LEVELS).p, &whole.p);
        close(&quantize_p_by_tiles(&row, 2, &Pv::F32).p, &quantize_p(&row, 4f64.ln(), &Pv::F32).p);
        let hidden = [f64::NEG_INFINITY, 0.0].map(|value| Score { key: 0, value });
        let hidden: Vec<Score> = hidden.into_iter().enumerate().map(|(key, s)| Score { key, ..s }).collect();
        close(&quantize_p_by_tiles(&hidden, 1, &TWO_LEVELS).p, &[0.0, 1.0]);
    }

    #[test]
    fn a_score_of_minus_infinity_weighs_nothing() {
        let row: Vec<Score> = [0.0, -1.0, f64::NEG_INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY]
            .into_iter()
            .enumerate()
            .map(|(key, value)| Score { key, value })
            .collect();
        for pv in ALL {
            // With blocks of 2, the second block holds nothing else.
            let pv = if matches!(pv, Pv::Fixed12 { .. }) { Pv::Fixed12 { block: 2 } } else { pv };
            let weights = quantize_p(&row, 0.0, &pv);
            assert_eq!(weights.p[2..], [0.0; 3], "{pv:?}");
            assert!(weights.sum.is_finite());
        }
    }

    #[test]
    fn training_quantises_p_relative_to_its_tile() {
        // Within a tile whose maximum is e⁻² of the running one.
        let row: Vec<Score> =
            [1.0, 1.0 - 2f64.ln()].into_iter().enumerate().map(|(key, value)| Score { key, value }).collect();
        let (values, scale) = quantize_p_per_token(&row, 3.0);
        // ½·127 = 63.5 up to rounding of ln 2.
        assert!(values[0] == 127 && (63..=64).contains(&values[1]));
        assert!((f64::from(scale) - (-2f64).exp() / 127.0).abs() < 1e-9);
        let hidden = [Score { key: 0, value: f64::NEG_INFINITY }];
        assert_eq!(quantize_p_per_token(&hidden, 3.0), (vec![0], 0.0));
    }
}
