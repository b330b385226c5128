//! Grouped-query attention of few queries: the query heads that share a key head are rows of one tile.
//!
//! The query heads of a key head read the same keys and values. As rows of one head they share what is read from
//! memory, which is all that a call of few queries costs: `q_len` queries of a group of heads are `group · q_len` rows,
//! those of each query one after the other, so that neighbouring rows see the same keys.

use sage_core::{Alignment, Band, Problem, Qk, Scheme};

use super::choice::FEW_QUERIES;
use super::request::{Extent, Request};
use super::tensors::Tensors;
use crate::attention::MaskForm;
use crate::sequence::Lengths;
use crate::tensor::TensorArg;

/// Query heads that become rows of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadsAsRows {
    /// Of a single query that sees all keys: a group of so many heads differs in nothing that a kernel asks of rows, so
    /// that only strides change. A row is as far from the next as a head was, also in masks.
    ByStrides { group: usize },
    /// Of several queries, or one that does not see all keys: the kernel finds each row's query and head.
    InKernel,
}

impl HeadsAsRows {
    /// Where a problem allows it, and it pays; its quantisation groups, where it has some, are of rows of one head.
    pub fn of(problem: &Problem, request: &Request, scheme: &Scheme) -> Option<Self> {
        let group = problem.group_size();
        if group == 1
            || problem.q_len == 0
            || problem.q_len > FEW_QUERIES
            || problem.blocks.is_some()
            || scheme.qk != Qk::Full
        {
            return None;
        }
        if problem.q_len == 1 && sees_all(problem, request) {
            return Some(HeadsAsRows::ByStrides { group });
        }
        // Tiles are of as many rows as few queries are. As many tiles would read K and V as often.
        let pays = (group * problem.q_len).div_ceil(FEW_QUERIES) < group;
        (request.mask == MaskForm::None && pays).then_some(HeadsAsRows::InKernel)
    }

    /// The problem with rows instead of heads, where a kernel does not tell them apart.
    pub fn problem(self, problem: &Problem) -> Problem {
        let mut rows = *problem;
        if let HeadsAsRows::ByStrides { group } = self {
            (rows.num_q_heads, rows.q_len, rows.band) = (problem.num_kv_heads, group, Band::FULL);
        }
        rows
    }

    /// The request with rows instead of heads, likewise.
    pub fn request(self, request: &Request) -> Request {
        let HeadsAsRows::ByStrides { group } = self else { return *request };
        let extent = request.mask_extent;
        let mask_extent = Extent { rows: extent.heads, ..extent };
        Request { q_rows: group, mask_extent, ..*request }
    }

    /// The tensors with rows instead of heads, likewise.
    pub fn tensors(self, tensors: &Tensors) -> Tensors {
        let HeadsAsRows::ByStrides { group } = self else { return *tensors };
        let group = group as i64;
        let rows = |TensorArg { address, strides: [batch, head, _] }: TensorArg| TensorArg {
            address,
            strides: [batch, group * head, head],
        };
        let [batch, head, _, key] = tensors.mask.strides;
        let mask = TensorArg { strides: [batch, group * head, head, key], ..tensors.mask };
        let sinks = tensors.sinks.as_rows(group as usize);
        Tensors { q: rows(tensors.q), out: rows(tensors.out), mask, sinks, ..*tensors }
    }
}

/// Whether the only query of each sequence sees all of its keys.
fn sees_all(problem: &Problem, request: &Request) -> bool {
    match request.lengths {
        Lengths::Dense => problem.band.keys(0, 1, problem.kv_len) == (0..problem.kv_len),
        // The query is the last of its sequence, whatever the length.
        Lengths::KvLens => problem.band.left.is_none() && problem.band.alignment == Alignment::BottomRight,
        Lengths::Packed => false,
    }
}
