//! Which keys a row of queries sees where no mask hides more.

use sage_ptx::Val;

use crate::sequence::{LengthParams, Sequence};

/// The band around the diagonal of a sequence's scores, and the end of its keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Band<'k> {
    /// Rows.
    rows: Val<'k, i32>,
    kv_len: Val<'k, i32>,
    /// What a key's index is compared with: `key ≤ row + diagonal + window_right`.
    diagonal: Val<'k, i32>,
    window_left: Val<'k, i32>,
    window_right: Val<'k, i32>,
    /// Rows of each query, one after the other, where there are several.
    rows_of_query: Option<Val<'k, i32>>,
}

impl<'k> Band<'k> {
    pub fn new(p: &LengthParams<'k>, sequence: &Sequence<'k>) -> Self {
        let aligned = p.bottom_right.ne(0).select(sequence.kv_len - sequence.q_len, 0);
        Band {
            rows: sequence.q_len,
            kv_len: sequence.kv_len,
            diagonal: aligned.named("diagonal"),
            window_left: p.window_left,
            window_right: p.window_right,
            rows_of_query: None,
        }
    }

    /// The band where each query has so many rows, which see the same keys.
    pub fn with_rows_of_queries(self, rows: Val<'k, i32>) -> Self {
        Band { rows: self.rows * rows, rows_of_query: Some(rows), ..self }
    }

    /// The query that a row is of.
    fn query(&self, row: Val<'k, i32>) -> Val<'k, i32> {
        self.rows_of_query.map_or(row, |rows| row / rows)
    }

    /// Whether the sequence has a row.
    pub fn has_row(&self, row: Val<'k, i32>) -> Val<'k, bool> {
        row.lt(self.rows)
    }

    /// The last of `rows` rows from `first` on that the sequence has.
    pub fn last_row(&self, first: Val<'k, i32>, rows: i32) -> Val<'k, i32> {
        (first + (rows - 1)).min(self.rows - 1)
    }

    /// The first key that a row sees, or before the first that there is.
    pub fn start(&self, row: Val<'k, i32>) -> Val<'k, i32> {
        self.query(row) + self.diagonal - self.window_left
    }

    /// One past the last key that a row sees; not positive where it sees none.
    pub fn end(&self, row: Val<'k, i32>) -> Val<'k, i32> {
        (self.query(row) + self.diagonal + self.window_right + 1).min(self.kv_len)
    }
}
