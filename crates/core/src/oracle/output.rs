//! What an oracle returns.

use crate::Call;

/// Attention's result in double precision.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Row-major `[batch, num_q_heads, seq, value_dim]`, whatever the caller's layout; batch is 1 when packed.
    pub out: Vec<f64>,
    /// Log-sum-exp (natural logarithm) of each row's visible scores and its head's sink, where there is one, in the
    /// order of [`Call::lse_index`].
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

    /// The same with the call's attention sinks: a sink s of a row with the log-sum-exp L is a key of score s and value
    /// 0 beside the others, so that the output loses the share `exp(s) / (exp(L) + exp(s))` and the log-sum-exp becomes
    /// `ln(exp(L) + exp(s))`.
    pub(crate) fn with_sinks(mut self, call: &Call<'_>) -> Self {
        if call.sinks.is_none() {
            return self;
        }
        for sequence in call.sequences() {
            for head in 0..call.problem.num_q_heads {
                let Some(sink) = call.sink(head).map(f64::from) else { continue };
                for i in 0..sequence.q_len {
                    let row = call.lse_index(&sequence, head, i);
                    let (out, lse) = self.row(row);
                    let max = lse.max(sink);
                    if max == f64::NEG_INFINITY {
                        continue;
                    }
                    // A row of NaN stays one: `max` passes it over, the exponential does not.
                    let with_sink = max + ((lse - max).exp() + (sink - max).exp()).ln();
                    let share = (lse - with_sink).exp();
                    let out: Vec<f64> = out.iter().map(|x| x * share).collect();
                    self.set(row, &out, with_sink);
                }
            }
        }
        self
    }

    /// Sets the row whose log-sum-exp has index `row`.
    pub(crate) fn set(&mut self, row: usize, out: &[f64], lse: f64) {
        self.out[row * out.len()..(row + 1) * out.len()].copy_from_slice(out);
        self.lse[row] = lse;
    }
}
