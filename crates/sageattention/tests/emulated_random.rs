//! Some of the random calls that `gpu_random.rs` makes, by the emulator: with every check that a GPU lacks.

mod random_calls;

use random_calls::{Found, check};
use sage_core::Qk;
use sage_ptx::Target;
use sage_testkit::{Emulated, RandomCall, count, presets};

/// Most rows of a sequence: the emulator takes its time.
const MOST_ROWS: usize = 150;

#[test]
fn random_calls_agree_with_the_oracle() {
    // Hopper has the most kinds of kernels, and the newest target more schemes.
    let targets = [
        Target::SM_90A,
        Target::SM_80,
        Target::SM_90A,
        Target::SM_89,
        Target::SM_90A,
        Target::SM_120A,
        Target::SM_75,
    ];
    let (mut computed, mut worst) = (0, Found::default());
    let count = count(80);
    for number in 0..count {
        let target = targets[number / 4 % targets.len()];
        let gpu = Emulated::on(target).multiprocessors(7 + number % 60);
        let mut presets = presets(&gpu.machine);
        if target == Target::SM_120A {
            // Its other kernels are those of the targets before it.
            presets.retain(|preset| matches!(preset.scheme(64).qk, Qk::Fp4(_)));
        }
        let call = RandomCall::new(number, MOST_ROWS, &presets);
        match check(&gpu, &call) {
            Ok(found) => {
                worst = worst.max(found);
                computed += 1;
            }
            Err(refused) => eprintln!("{call:?}: not computed: {refused}"),
        }
    }
    let Found { of_scheme, of_exact } = worst;
    eprintln!(
        "{computed} of {count} calls computed; worst error {of_scheme:.2} and {of_exact:.2} of what is allowed"
    );
    assert!(computed * 10 >= count * 9, "{computed} of {count}");
}
