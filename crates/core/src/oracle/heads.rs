//! The heads of a call, one after the other.

use super::Matrix;
use crate::{Call, Sequence};

/// A query head of a sequence, with the key head that it reads, in double precision.
pub(crate) struct Head<'h> {
    /// The sequence.
    pub sequence: &'h Sequence,
    /// The query head.
    pub head: usize,
    /// Its queries.
    pub q: Matrix<f64>,
    /// Keys of the sequence.
    pub k: &'h Matrix<f64>,
    /// Their values.
    pub v: &'h Matrix<f64>,
}

/// Calls `each` with every query head of every sequence.
pub(crate) fn for_each_head(call: &Call<'_>, mut each: impl FnMut(Head<'_>)) {
    let group_size = call.problem.group_size();
    for sequence in call.sequences() {
        let read = |tensor, head, start, rows| {
            Matrix::of_head(tensor, sequence.batch, head, start, rows).map(f64::from)
        };
        for kv_head in 0..call.problem.num_kv_heads {
            let k = read(&call.k, kv_head, sequence.kv_start, sequence.kv_len);
            let v = read(&call.v, kv_head, sequence.kv_start, sequence.kv_len);
            for head in kv_head * group_size..(kv_head + 1) * group_size {
                let q = read(&call.q, head, sequence.q_start, sequence.q_len);
                each(Head { sequence: &sequence, head, q, k: &k, v: &v });
            }
        }
    }
}
