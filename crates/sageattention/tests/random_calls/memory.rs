//! Random tensors: elements of 16 bits in memory of their own, with strides that a caller may have.

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::{DType, Geometry, MAX_RANK, TensorView, View};

/// What an output's memory holds before: a NaN that no kernel makes.
pub const UNTOUCHED: u16 = 0x7fa5;

/// Elements in memory, and where each lies. What no element is holds NaN, which must not be read.
#[derive(Clone, Debug)]
pub struct Memory {
    pub dtype: DType,
    pub bits: Vec<u16>,
    pub geometry: Geometry,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Use {
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
    pub fn new(rng: &mut ChaCha8Rng) -> Self {
        Strides { odd: rng.random_bool(0.2), repeated: rng.random_bool(0.25), backward: rng.random_bool(0.2) }
    }
}

impl Memory {
    /// Memory for `shape`, of which the last dimension is contiguous: gaps between rows, dimensions in any order,
    /// backwards or, of an input, repeated, and a first element anywhere.
    pub fn new(
        rng: &mut ChaCha8Rng,
        dtype: DType,
        shape: &[usize],
        strides_of: Strides,
        as_what: Use,
    ) -> Self {
        let leading = shape.len() - 1;
        let mut order: Vec<usize> = (0..leading).collect();
        if rng.random_bool(0.4) {
            let [a, b] = [(); 2].map(|()| rng.random_range(0..leading));
            order.swap(a, b);
        }
        let gap = |rng: &mut ChaCha8Rng| match rng.random_range(0..10) {
            0..=5 => 0,
            6 | 7 => 8 * rng.random_range(1..=2),
            _ if strides_of.odd => rng.random_range(1..=9),
            _ => 8,
        };
        let mut strides = vec![1i64; shape.len()];
        let mut next = shape[leading] + gap(rng);
        for &dimension in order.iter().rev() {
            strides[dimension] = next as i64;
            next = next * shape[dimension].max(1) + if rng.random_bool(0.2) { gap(rng) } else { 0 };
        }
        if as_what == Use::Input && strides_of.repeated && rng.random_bool(0.5) {
            strides[rng.random_range(0..leading)] = 0;
        }
        let mut first = gap(rng) as i64;
        if strides_of.backward && rng.random_bool(0.5) {
            let backward = rng.random_range(0..leading);
            first += strides[backward] * (shape[backward] as i64 - 1).max(0);
            strides[backward] = -strides[backward];
        }
        let geometry = Geometry::strided("tensor", shape, &strides, first).unwrap();
        let reach =
            shape.iter().zip(&strides).map(|(&size, &stride)| stride.max(0) * (size as i64 - 1).max(0));
        let len = if shape.contains(&0) { 0 } else { first + reach.sum::<i64>() + 1 + gap(rng) as i64 };
        let empty = match (as_what, dtype) {
            (Use::Output, _) => UNTOUCHED,
            (Use::Input, DType::BF16) => bf16::NAN.to_bits(),
            (Use::Input, _) => f16::NAN.to_bits(),
        };
        Memory { dtype, bits: vec![empty; len as usize], geometry }
    }

    /// N(0, 1) plus `bias` times an N(0, 1) of each channel, where `exists` says so of an element's index.
    pub fn fill(&mut self, rng: &mut ChaCha8Rng, bias: f32, exists: impl Fn(&[usize]) -> bool) {
        let shape = self.geometry.shape().to_vec();
        let mut normal = || -> f32 { StandardNormal.sample(rng) };
        let channels: Vec<f32> = (0..shape[shape.len() - 1]).map(|_| bias * normal()).collect();
        for_each_index(&shape, |index| {
            if exists(index) {
                let x = normal() + channels[index[index.len() - 1]];
                let at = self.position(index);
                self.bits[at] = match self.dtype {
                    DType::BF16 => bf16::from_f32(x).to_bits(),
                    _ => f16::from_f32(x).to_bits(),
                };
            }
        });
    }

    /// Where an element lies.
    pub fn position(&self, index: &[usize]) -> usize {
        let mut at = [0; MAX_RANK];
        at[MAX_RANK - index.len()..].copy_from_slice(index);
        self.geometry.index(at) as usize
    }

    pub fn view(&self) -> TensorView<'_> {
        let bits = self.bits.as_slice();
        match self.dtype {
            DType::BF16 => {
                View::<bf16>::strided("tensor", bits.reinterpret_cast(), self.geometry).unwrap().into()
            }
            _ => View::<f16>::strided("tensor", bits.reinterpret_cast(), self.geometry).unwrap().into(),
        }
    }
}

/// Calls `each` with every index of a shape, in row-major order.
pub fn for_each_index(shape: &[usize], mut each: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for number in 0..shape.iter().product::<usize>() {
        let mut rest = number;
        for d in (0..shape.len()).rev() {
            (index[d], rest) = (rest % shape[d], rest / shape[d]);
        }
        each(&index);
    }
}
