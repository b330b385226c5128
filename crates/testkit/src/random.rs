//! Reproducible numbers.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::{DType, Tensor};

/// Values drawn from N(0, 1).
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// A tensor of values drawn from N(0, 1), rounded to `dtype`.
pub fn normal_tensor(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::new(normal(seed, shape.iter().product()), shape).unwrap().to_dtype(dtype)
}

/// Values spread evenly over (−1, 1).
pub fn uniform(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A tensor of values spread evenly over (−1, 1), rounded to `dtype`.
pub fn uniform_tensor(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::new(uniform(seed, shape.iter().product()), shape).unwrap().to_dtype(dtype)
}
