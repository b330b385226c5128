//! A tensor that a pass is handed: for the host, and inside a kernel.

use sage_ptx::{Arg, Code, Global, Val};

/// A tensor in device memory, whose last dimension has no gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorArg<const N: usize = 3> {
    /// Address of element 0.
    pub address: u64,
    /// Strides in elements: of batch, heads and rows; of a mask of keys as well.
    pub strides: [i64; N],
}

impl<const N: usize> Default for TensorArg<N> {
    fn default() -> Self {
        TensorArg { address: 0, strides: [0; N] }
    }
}

impl TensorArg {
    /// Whether a tensor map can describe this tensor of `[batch, heads, rows, …]`, whose rows are aligned: it knows
    /// neither repeated nor backward dimensions, nor strides of a terabyte.
    pub fn has_map(&self, shape: &[usize]) -> bool {
        let valid = |(&size, &stride): (&usize, &i64)| size == 1 || (1..1 << 39).contains(&stride);
        shape.iter().zip(&self.strides).all(valid)
    }
}

/// What a launch passes of a tensor.
macro_rules! args {
    ($n:literal, $count:literal) => {
        impl TensorArg<$n> {
            /// Address and strides.
            pub(crate) fn args(&self) -> [Arg; $count] {
                std::array::from_fn(|i| match i {
                    0 => Arg::Pointer(self.address),
                    _ => Arg::I64(self.strides[i - 1]),
                })
            }
        }
    };
}

args!(3, 4);
args!(4, 5);

/// The same inside a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorParam<'k, const N: usize> {
    /// Element 0, of whatever type.
    pub start: Global<'k, u8>,
    strides: [Val<'k, i64>; N],
}

/// Names of the strides' parameters.
const STRIDES: [&str; 4] = ["batch", "head", "row", "key"];

impl<'k, const N: usize> TensorParam<'k, N> {
    /// Declares address and strides.
    pub fn declare(code: &'k Code, name: &str) -> Self {
        TensorParam {
            start: code.global(name),
            strides: std::array::from_fn(|i| code.param(&format!("{name}_stride_{}", STRIDES[i]))),
        }
    }

    /// Elements from one batch entry to the next.
    pub fn batch_stride(&self) -> Val<'k, i64> {
        self.strides[0]
    }

    /// Elements from one head to the next.
    pub fn head_stride(&self) -> Val<'k, i64> {
        self.strides[1]
    }

    /// Elements from one row to the next.
    pub fn row_stride(&self) -> Val<'k, i64> {
        self.strides[2]
    }

    /// Where a head begins, in elements.
    #[track_caller]
    pub fn head(&self, batch: Val<'k, i32>, head: Val<'k, i32>) -> Val<'k, i64> {
        batch.widen() * self.batch_stride() + head.widen() * self.head_stride()
    }
}

impl<'k> TensorParam<'k, 4> {
    /// Elements from one key to the next.
    pub fn key_stride(&self) -> Val<'k, i64> {
        self.strides[3]
    }
}
