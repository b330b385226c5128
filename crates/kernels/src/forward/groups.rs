//! Grouped-query attention of a single query: the heads that share a key head are rows of one tile.
//!
//! With one query a sequence, the query heads of a key head differ in nothing that a kernel asks of rows: they read the
//! same keys and values, and see all of them. As rows of one head they share what is read from memory, which is all that
//! such a call costs. Only strides change: a row is as far from the next as a head was.

use sage_core::{Alignment, Band, Problem, Qk, Scheme};

use super::request::{Extent, Request};
use super::tensors::Tensors;
use crate::sequence::Lengths;
use crate::tensor::TensorArg;

/// Query heads that became rows of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeadsAsRows {
    /// Query heads of a key head.
    group: usize,
}

impl HeadsAsRows {
    /// Where a problem allows it; its quantisation groups, where it has some, are of rows of one head.
    pub fn of(problem: &Problem, request: &Request, scheme: &Scheme) -> Option<Self> {
        let group = problem.group_size();
        let single = problem.q_len == 1 && group > 1 && problem.blocks.is_none();
        let sees_all = match request.lengths {
            Lengths::Dense => problem.band.keys(0, 1, problem.kv_len) == (0..problem.kv_len),
            // The query is the last of its sequence, whatever the length.
            Lengths::KvLens => {
                problem.band.left.is_none() && problem.band.alignment == Alignment::BottomRight
            }
            Lengths::Packed => false,
        };
        (single && sees_all && scheme.qk == Qk::Full).then_some(HeadsAsRows { group })
    }

    /// The problem with rows instead of heads.
    pub fn problem(self, problem: &Problem) -> Problem {
        let mut rows = *problem;
        (rows.num_q_heads, rows.q_len, rows.band) = (problem.num_kv_heads, self.group, Band::FULL);
        rows
    }

    /// The request with rows instead of heads.
    pub fn request(self, request: &Request) -> Request {
        let extent = request.mask_extent;
        let mask_extent = Extent { rows: extent.heads, ..extent };
        Request { q_rows: self.group, mask_extent, ..*request }
    }

    /// The tensors with rows instead of heads.
    pub fn tensors(self, tensors: &Tensors) -> Tensors {
        let group = self.group as i64;
        let rows = |TensorArg { address, strides: [batch, head, _] }: TensorArg| TensorArg {
            address,
            strides: [batch, group * head, head],
        };
        let [batch, head, _, key] = tensors.mask.strides;
        let mask = TensorArg { strides: [batch, group * head, head, key], ..tensors.mask };
        Tensors { q: rows(tensors.q), out: rows(tensors.out), mask, ..*tensors }
    }
}
