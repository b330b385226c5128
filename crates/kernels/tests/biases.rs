//! Additive masks that all heads share, whose biases are packed, in the emulator, against the oracle: on both engines.

use sage_core::{Alignment, Band, DType, Preset, Problem, Scheme};
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{ForwardPlan, Request, Tensors, int8_scheme};
use sage_kernels::{Machine, TensorArg};
use sage_ptx::Target;
use sage_testkit::{Case, CaseMask, Emulated, Extent, check};

const DTYPES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };

/// The newest GPU of each engine.
fn engines() -> [Emulated; 2] {
    [Target::SM_89, Target::SM_90A].map(|target| Emulated::on(target).multiprocessors(3))
}

/// Scores of 16-bit numbers and of integers; values as given, converted, and of one and two levels of FP8.
fn schemes(head_dim: usize) -> [Scheme; 5] {
    [
        Preset::FULL.scheme(head_dim),
        int8_scheme(DType::F16),
        Preset::INT8_FP8.scheme(head_dim),
        Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(head_dim),
        Preset::SAGE1_INT8_FP16.scheme(head_dim),
    ]
}

fn case(bias: fn([usize; 4]) -> f32, dtype: DType) -> Case {
    let mask = Some(CaseMask::bias(dtype, Extent::Rows).pattern(bias));
    Case { q_heads: 4, kv_heads: 2, q_len: 200, kv_len: 336, mask, ..Case::default() }
}

/// Biases of every size in every tile, some of them −∞.
fn mixed([_, _, row, key]: [usize; 4]) -> f32 {
    let size = [0.0, -0.5, 3.0, -8.0, 1.25][(row * 7 + key * 3) % 5];
    if (row + key) % 11 == 0 { f32::NEG_INFINITY } else { size + (key % 13) as f32 / 16.0 }
}

#[test]
fn every_scheme_type_and_head() {
    let mut number = 0;
    for gpu in engines() {
        for head_dim in [64, 128, 256, 40] {
            for scheme in schemes(head_dim) {
                // Keys in whole chunks of 16 bytes, in pairs, and one by one.
                let kv_len = [336, 330, 336, 329][number % 4];
                let band = if number % 2 == 0 { Band::FULL } else { CAUSAL };
                let (scheme, dtype) = (Some(scheme), DTYPES[number % 3]);
                check(&gpu, &Case { head_dim, scheme, band, kv_len, ..case(mixed, dtype) });
                number += 1;
            }
        }
    }
}

/// Each tile of keys is biased by much more than the ones before: references move far, from below what is subtracted at
/// once.
#[test]
fn rows_whose_biases_rise_from_tile_to_tile() {
    fn rising([_, _, row, key]: [usize; 4]) -> f32 {
        let steps = [-60000.0, -20000.0, -3000.0, -100.0, -5.0, 0.5];
        steps[key / 64] + ((row + key) % 4) as f32
    }
    fn least_then_common([_, _, row, key]: [usize; 4]) -> f32 {
        if key < 64 * (1 + row / 70) {
            f32::from_bits(0xff7f_0000)
        } else {
            mixed([0, 0, row, key]).max(-9.0)
        }
    }
    for gpu in engines() {
        for scheme in schemes(64) {
            for dtype in DTYPES {
                check(&gpu, &Case { scheme: Some(scheme), ..case(rising, dtype) });
            }
            for dtype in [DType::BF16, DType::F32] {
                check(&gpu, &Case { scheme: Some(scheme), ..case(least_then_common, dtype) });
            }
        }
    }
}

/// Rows that see nothing at all, nothing in the first tiles, or nothing in some.
#[test]
fn rows_that_see_nothing_for_a_while() {
    fn late([_, _, row, key]: [usize; 4]) -> f32 {
        let hidden = row % 5 == 0 || key < row || (row % 3 == 0 && key / 64 == 3);
        if hidden { f32::NEG_INFINITY } else { -((key % 7) as f32) }
    }
    for gpu in engines() {
        for scheme in schemes(64) {
            for dtype in DTYPES {
                check(&gpu, &Case { scheme: Some(scheme), ..case(late, dtype) });
            }
        }
    }
}

/// A bias of −∞ hides a key whatever its score is, also one that is no number.
#[test]
fn hidden_keys_that_are_no_numbers() {
    fn hidden([_, _, row, key]: [usize; 4]) -> f32 {
        if key / 32 % 3 == 1 { f32::NEG_INFINITY } else { mixed([0, 0, row, key]) }
    }
    for gpu in engines() {
        for scheme in schemes(64) {
            for (dtype, spoil) in DTYPES.into_iter().zip([f32::NAN, f32::INFINITY, 6e4]) {
                check(&gpu, &Case { scheme: Some(scheme), spoil: Some(spoil), ..case(hidden, dtype) });
            }
        }
    }
}

/// Two, and three, warpgroups, and few queries: sequences whose last tile of rows is not whole, and one query.
#[test]
fn few_and_odd_queries() {
    for gpu in engines() {
        for (q_len, kv_len) in [(1, 200), (65, 64), (129, 70), (193, 640), (385, 200)] {
            for dtype in DTYPES {
                check(&gpu, &Case { q_len, kv_len, ..case(mixed, dtype) });
            }
        }
    }
}

/// A mask of one sequence and one head is one for all, also where its strides say otherwise.
#[test]
fn what_there_is_one_of_does_not_differ() {
    let names = |[batch, heads]: [usize; 2], strides: [i64; 4]| {
        let mut problem = Problem::dense(DType::F16, [batch, heads, heads], [2048, 2048], 128);
        problem.masked = true;
        let mask = TensorArg { address: 0, strides };
        let scheme = Some(int8_scheme(DType::F16));
        let request = Request { scheme, mask: MaskForm::Bias(DType::F16), ..Request::new(&problem) }
            .with_masks_of(&Tensors { mask, ..Tensors::default() });
        let plan = ForwardPlan::new(&problem, &request, &Machine::typical(Target::SM_90A)).unwrap();
        plan.pass().kernel_names()
    };
    let (rows, square) = (2048, 2048 * 2048);
    let shared = names([2, 4], [0, 0, rows, 1]);
    assert_eq!(names([1, 4], [square, 0, rows, 1]), shared);
    assert_eq!(names([1, 1], [square, square, rows, 1]), shared);
    assert_ne!(names([2, 4], [square, 0, rows, 1]), shared);
    assert_ne!(names([1, 4], [square, square, rows, 1]), shared);
}
