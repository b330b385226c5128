//! What a forward pass is asked for, beside the problem.

use sage_core::{Problem, Scheme};

use crate::attention::MaskForm;
use crate::sequence::Lengths;
use crate::tiling::Tiling;

/// Elements of the 16 bytes that aligned rows start at multiples of, and are whole chunks of.
pub(super) const CHUNK: usize = 8;

/// What a forward pass is asked for, beside the problem: options, and how the tensors lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// The scheme, or none for the planner's choice.
    pub scheme: Option<Scheme>,
    /// Largest relative L1 error on N(0, 1) data that the planner's choice may have; none for that of INT8 scores.
    pub accuracy: Option<f32>,
    /// Explicit mask.
    pub mask: MaskForm,
    /// Where lengths come from.
    pub lengths: Lengths,
    /// Query rows of the tensors: of a sequence, or of all when packed.
    pub q_rows: usize,
    /// Key rows of the tensors.
    pub kv_rows: usize,
    /// Whether every row of Q, K, V and the output starts at a multiple of 16 bytes.
    pub aligned: bool,
    /// Whether tensor maps can describe K and V: rows are aligned, and strides positive multiples of 16 bytes.
    pub has_tensor_map: bool,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
    /// The attention kernel's tile shape, or none for the tuning table's.
    pub tiling: Option<Tiling>,
}

impl Request {
    /// The planner's choices for a problem whose tensors are dense, without gaps and without the log-sum-exp; its mask, if it
    /// has one, is boolean.
    pub fn new(problem: &Problem) -> Self {
        let aligned = problem.head_dim.is_multiple_of(CHUNK);
        Request {
            scheme: None,
            accuracy: None,
            mask: if problem.masked { MaskForm::Bool } else { MaskForm::None },
            lengths: if problem.packed { Lengths::Packed } else { Lengths::Dense },
            q_rows: problem.q_len,
            kv_rows: problem.kv_len,
            aligned,
            has_tensor_map: aligned,
            lse: false,
            tiling: None,
        }
    }
}
