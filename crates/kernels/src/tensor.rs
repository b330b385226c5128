//! A tensor that a pass is handed.

/// A tensor of 16-bit elements in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorArg {
    /// Address of element 0.
    pub address: u64,
    /// Strides of batch, heads and rows, in elements.
    pub strides: [i64; 3],
}

impl TensorArg {
    /// Whether a tensor map can describe this tensor of `[batch, heads, rows, …]`, whose rows are aligned: it knows
    /// neither repeated nor backward dimensions, nor strides of a terabyte.
    pub fn has_map(&self, shape: &[usize]) -> bool {
        let valid = |(&size, &stride): (&usize, &i64)| size == 1 || (1..1 << 39).contains(&stride);
        shape.iter().zip(&self.strides).all(valid)
    }
}
