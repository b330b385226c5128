//! Random calls on the processor, of any number of channels of keys and another of values, against the oracle.

mod random_calls;

use random_calls::{Found, check};
use sage_core::Preset;
use sage_testkit::{RandomCall, count, every_cpu};

/// Most rows of a sequence: more than a tile of keys.
const MOST_ROWS: usize = 300;

/// Schemes near enough to exact attention to be told from something wrong, of each form of the products.
const PRESETS: [Preset; 4] = [Preset::FULL, Preset::INT8, Preset::INT8_F32, Preset::INT8_PER_TOKEN];

#[test]
fn random_calls_of_any_channels_agree_with_the_oracle() {
    let (cpus, mut worst) = (every_cpu(), Found::default());
    for number in 0..count(80) {
        let call = RandomCall::of_any_channels(number, MOST_ROWS, &PRESETS);
        let found = check(&cpus[number % cpus.len()], &call);
        worst = worst.max(found.unwrap_or_else(|refused| panic!("{call:?}: {refused}")));
    }
    let Found { of_scheme, of_exact } = worst;
    eprintln!("worst error {of_scheme:.2} and {of_exact:.2} of what is allowed");
}
