//! Predictions of block maps in the emulator, against the oracle: bit for bit.

use std::thread;

use sage_core::sparse::{Predictor, Select};
use sage_core::{DType, Problem};
use sage_kernels::predict::PredictCall;
use sage_ptx::Target;
use sage_testkit::{Emulated, Prediction, Sequences, predictions};

#[test]
fn maps_are_the_oracles() {
    let cases = predictions();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for first in 0..threads {
            let cases = cases.iter().enumerate().skip(first).step_by(threads);
            scope.spawn(move || {
                for (number, case) in cases {
                    let emulated = Emulated { folded: number % 3 == 0, ..Emulated::on(Target::SM_89) };
                    case.compare("the emulator", &emulated.predict(case));
                }
            });
        }
    });
}

/// A test of maps that keep everything, or nothing, would show little.
#[test]
fn most_maps_keep_some_blocks_and_not_others() {
    let maps: Vec<_> = predictions().iter().map(|case| case.expected()).collect();
    let mixed = maps.iter().filter(|map| (1..map.flags().len()).contains(&map.kept())).count();
    assert!(mixed * 5 >= maps.len() * 4, "{mixed} of {}", maps.len());
}

#[test]
fn what_kernels_do_not_predict_is_refused() {
    let call = |dtype| PredictCall::new(&Problem::dense(dtype, [1, 1, 1], [100, 100], 64));
    let error = |call: PredictCall, predictor: Predictor| call.pass(&predictor).unwrap_err().to_string();
    let predictor = Predictor::new(Select::Count(1));
    let f32 = error(call(DType::F32), predictor.clone());
    assert_eq!(f32, "a prediction from f32 on a GPU is not supported: use f16 or bf16");
    let empty = error(call(DType::F16), predictor.blocks(64, 0));
    assert_eq!(empty, "block_k: value is 0, expected at least 1");
}

/// Lengths in device memory may be others than the caller says: rows of the map for sequences as long as that are right,
/// and the emulator finds nothing that is read or written elsewhere.
#[test]
fn a_packed_sequence_longer_than_was_said_harms_no_other() {
    let sequences = Sequences::Packed(vec![0, 70, 300, 330], vec![0, 90, 640, 741]);
    for predictor in [
        Predictor::sparge_attn(Select::Cdf(0.7.into()), 0.28),
        Predictor::sla(0.4),
        Predictor::sol_attn(0.0).blocks(32, 16),
    ] {
        let case = Prediction { sequences: sequences.clone(), ..Prediction::of(predictor.clone()) };
        let gpu = Emulated { longest: Some([100, 128]), ..Emulated::on(Target::SM_89) };
        let bytes = gpu.predict(&case);
        let expected = case.expected();
        let [_, heads, q_blocks, k_blocks] = expected.shape();
        let said = [100usize.div_ceil(predictor.block_q), 128usize.div_ceil(predictor.block_k)];
        assert_eq!(bytes.len(), 3 * heads * said[0] * said[1]);
        for sequence in [0, 2] {
            for row in 0..heads * said[0] {
                let (head, block) = (row / said[0], row % said[0]);
                let found = &bytes[(sequence * heads * said[0] + row) * said[1]..][..said[1]];
                let of_oracle = ((sequence * heads + head) * q_blocks + block) * k_blocks;
                let wanted = &expected.flags()[of_oracle..][..said[1]];
                assert!(found.iter().zip(wanted).all(|(&byte, &kept)| byte == u8::from(kept)), "{case:?}");
            }
        }
    }
}

/// The rows of a long map are chosen in turns, whose scores fit the workspace's bound.
#[test]
fn a_long_map_takes_several_turns() {
    let problem = Problem::dense(DType::BF16, [1, 40, 40], [1 << 20, 1 << 20], 128);
    let pass = PredictCall::new(&problem).pass(&Predictor::vsa(32)).unwrap();
    let scores = pass.slots().find(|(name, _)| *name == "scores").map(|(_, bytes)| bytes);
    assert!(scores.is_some_and(|bytes| bytes <= 256 << 20), "{scores:?}");
    // Means of either side, then scores and choices of 16,384 rows, 64 (96) at a time.
    let rows = (256 << 20) / (4 * 40 * 16_384) / 32 * 32;
    assert_eq!(pass.kernels().len(), 2 + 2 * 16_384usize.div_ceil(rows));
}
