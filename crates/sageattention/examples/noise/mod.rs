//! Random data for the benchmarks on GPUs.

use half::f16;

/// 64 random bits at each call, from a generator that fills gigabytes in no time: Marsaglia's xorshift.
pub fn bits(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// About N(0, 1): sums of uniform numbers.
pub fn normal(seed: u64, len: usize) -> Vec<f16> {
    let mut bits = bits(seed);
    let mut next = || {
        let bits = bits();
        let uniform = |shift: u32| (bits >> shift & 0xffff) as f32 / 65536.0;
        // Four uniform numbers have the variance 1/3.
        f16::from_f32((uniform(0) + uniform(16) + uniform(32) + uniform(48) - 2.0) * 3f32.sqrt())
    };
    let mut values: Vec<f16> = (0..len.min(1 << 22)).map(|_| next()).collect();
    while values.len() < len {
        values.extend_from_within(..values.len().min(len - values.len()));
    }
    values
}
