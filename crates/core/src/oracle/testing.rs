//! Inputs that the oracle's tests share.

pub use sage_testkit::normal;

use super::Matrix;
use crate::{Call, DType, Inputs, Options, Tensor};

/// A matrix of values drawn from N(0, 1).
pub fn normal_matrix(seed: u64, rows: usize, width: usize) -> Matrix<f32> {
    matrix(width, &normal(seed, rows * width))
}

/// A matrix of the given elements.
pub fn matrix<T: Copy>(width: usize, elements: &[T]) -> Matrix<T> {
    Matrix::from_fn(elements.len() / width, width, |i, c| elements[i * width + c])
}

/// Queries, keys and values in HND layout.
pub struct Sample {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

/// Sizes of a [`Sample`].
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
}

impl Sizes {
    /// One batch entry and one head.
    pub fn one_head(q_len: usize, kv_len: usize, head_dim: usize) -> Self {
        Sizes { batch: 1, num_q_heads: 1, num_kv_heads: 1, q_len, kv_len, head_dim }
    }

    fn q_shape(&self) -> [usize; 4] {
        [self.batch, self.num_q_heads, self.q_len, self.head_dim]
    }

    fn kv_shape(&self) -> [usize; 4] {
        [self.batch, self.num_kv_heads, self.kv_len, self.head_dim]
    }
}

impl Sample {
    /// One head with the given elements.
    pub fn one_head(head_dim: usize, q: &[f32], k: &[f32], v: &[f32]) -> Self {
        let tensor = |x: &[f32]| Tensor::new(x.to_vec(), &[1, 1, x.len() / head_dim, head_dim]).unwrap();
        Sample { q: tensor(q), k: tensor(k), v: tensor(v) }
    }

    /// Values drawn from N(0, 1).
    pub fn normal(seed: u64, sizes: Sizes) -> Self {
        Self::normal_with_k_bias(seed, sizes, 0.0)
    }

    /// Values drawn from N(0, 1), but every fourth channel of K has this mean.
    pub fn normal_with_k_bias(seed: u64, sizes: Sizes, bias: f32) -> Self {
        let elements = |part, shape: [usize; 4]| normal(3 * seed + part, shape.iter().product());
        let mut k = elements(1, sizes.kv_shape());
        k.iter_mut()
            .enumerate()
            .filter(|(at, _)| (at % sizes.head_dim).is_multiple_of(4))
            .for_each(|(_, x)| *x += bias);
        Sample {
            q: Tensor::new(elements(0, sizes.q_shape()), &sizes.q_shape()).unwrap(),
            k: Tensor::new(k, &sizes.kv_shape()).unwrap(),
            v: Tensor::new(elements(2, sizes.kv_shape()), &sizes.kv_shape()).unwrap(),
        }
    }

    /// The same with values of so many channels.
    pub fn value_dim(self, seed: u64, value_dim: usize) -> Self {
        let mut shape = self.v.shape().to_vec();
        shape[3] = value_dim;
        Sample { v: Tensor::new(normal(seed, shape.iter().product()), &shape).unwrap(), ..self }
    }

    /// The same, rounded.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        Sample { q: self.q.to_dtype(dtype), k: self.k.to_dtype(dtype), v: self.v.to_dtype(dtype) }
    }

    /// A call without masks.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs::new(self.q.view(), self.k.view(), self.v.view())
    }

    /// A checked call without masks.
    pub fn call(&self, options: &Options) -> Call<'_> {
        Call::check(&self.inputs(), options).unwrap()
    }
}
