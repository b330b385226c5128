//! What an oracle returns.

use crate::Call;

/// Attention's result in double precision.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Row-major `[batch, num_q_heads, seq, value_dim]`, whatever the caller's layout; batch is 1 when packed.
    pub out: Vec<f64>,
    /// Log-sum-exp (natural logarithm) of each row's visible scores, in the order of [`Call::lse_index`].
    pub lse: Vec<f64>,
}

impl Output {
    /// The result of a call in which no query sees a key: zeros, and log-sum-exps of −∞.
    pub(crate) fn without_keys(call: &Call<'_>) -> Self {
        let rows = call.lse_rows();
        Output { out: vec![0.0; rows * call.problem.value_dim], lse: vec![f64::NEG_INFINITY; rows] }
    }

    /// The output and log-sum-exp of the row whose log-sum-exp has index `row`.
    pub(crate) fn row(&self, row: usize) -> (&[f64], f64) {
        let value_dim = self.out.len() / self.lse.len();
        (&self.out[row * value_dim..(row + 1) * value_dim], self.lse[row])
    }

    /// Sets the row whose log-sum-exp has index `row`.
    pub(crate) fn set(&mut self, row: usize, out: &[f64], lse: f64) {
        self.out[row * out.len()..(row + 1) * out.len()].copy_from_slice(out);
        self.lse[row] = lse;
    }
}
