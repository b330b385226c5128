//! Strides that a caller may have, by chance.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use sage_core::Geometry;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Use {
    /// Dimensions may be repeated.
    Input,
    /// No two elements in one place.
    Output,
}

/// Which strides the tensors of a call may have: most calls have ordinary ones, as other kernels compute the others.
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    /// Rows need not start at multiples of 16 bytes.
    odd: bool,
    /// Dimensions may be repeated.
    repeated: bool,
    /// Dimensions may run backwards.
    backward: bool,
}

impl Strides {
    /// By chance.
    pub fn new(rng: &mut ChaCha8Rng) -> Self {
        Strides { odd: rng.random_bool(0.2), repeated: rng.random_bool(0.25), backward: rng.random_bool(0.2) }
    }

    /// Where the elements of `shape` lie, of which the last dimension is contiguous, and the elements of their memory:
    /// gaps between rows, dimensions in any order, backwards or, of an input, repeated, and a first element anywhere.
    pub fn geometry(&self, rng: &mut ChaCha8Rng, shape: &[usize], as_what: Use) -> (Geometry, usize) {
        let leading = shape.len() - 1;
        let mut order: Vec<usize> = (0..leading).collect();
        if rng.random_bool(0.4) {
            let [a, b] = [(); 2].map(|()| rng.random_range(0..leading));
            order.swap(a, b);
        }
        let gap = |rng: &mut ChaCha8Rng| match rng.random_range(0..10) {
            0..=5 => 0,
            6 | 7 => 8 * rng.random_range(1..=2),
            _ if self.odd => rng.random_range(1..=9),
            _ => 8,
        };
        let mut strides = vec![1i64; shape.len()];
        let mut next = shape[leading] + gap(rng);
        for &dimension in order.iter().rev() {
            strides[dimension] = next as i64;
            next = next * shape[dimension].max(1) + if rng.random_bool(0.2) { gap(rng) } else { 0 };
        }
        if as_what == Use::Input && self.repeated && rng.random_bool(0.5) {
            strides[rng.random_range(0..leading)] = 0;
        }
        let mut first = gap(rng) as i64;
        if self.backward && rng.random_bool(0.5) {
            let backward = rng.random_range(0..leading);
            first += strides[backward] * (shape[backward] as i64 - 1).max(0);
            strides[backward] = -strides[backward];
        }
        let geometry = Geometry::strided("tensor", shape, &strides, first).unwrap();
        let reach =
            shape.iter().zip(&strides).map(|(&size, &stride)| stride.max(0) * (size as i64 - 1).max(0));
        let len = if shape.contains(&0) { 0 } else { first + reach.sum::<i64>() + 1 + gap(rng) as i64 };
        (geometry, len as usize)
    }
}
