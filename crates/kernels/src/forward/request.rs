//! What a forward pass is asked for, beside the problem.

use sage_core::{Problem, Scheme};

use super::tensors::{Tensors, whole_chunks};
use crate::attention::MaskForm;
use crate::sequence::Lengths;
use crate::sparse::MaskAccess;
use crate::tiling::Tiling;

/// What a forward pass is asked for, beside the problem: options, and how the tensors lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// The scheme, or none for the planner's choice.
    pub scheme: Option<Scheme>,
    /// Largest relative L1 error on N(0, 1) data that the planner's choice may have; none for that of INT8 scores.
    pub accuracy: Option<f32>,
    /// Explicit mask.
    pub mask: MaskForm,
    /// Which dimensions of an explicit mask are not broadcast.
    pub mask_extent: Extent,
    /// How an explicit mask's neighbouring keys lie.
    pub mask_access: MaskAccess,
    /// Which dimensions of a block mask are not broadcast.
    pub blocks_extent: Extent,
    /// Where lengths come from.
    pub lengths: Lengths,
    /// Query rows of the tensors: of a sequence, or of all when packed.
    pub q_rows: usize,
    /// Key rows of the tensors.
    pub kv_rows: usize,
    /// Whether every row of Q, K, V and the output starts at a multiple of 16 bytes.
    pub aligned: bool,
    /// Whether V is the first channels of K, in the same memory.
    pub values_in_keys: bool,
    /// Whether tensor maps can describe K and V: rows are aligned, and strides positive multiples of 16 bytes.
    pub has_tensor_map: bool,
    /// Whether one can describe Q.
    pub has_query_map: bool,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
    /// The attention kernel's tile shape, or none for the planner's choice.
    pub tiling: Option<Tiling>,
    /// Parts that keys are split into, or none for the planner's choice.
    pub splits: Option<usize>,
}

/// Which dimensions of a mask are not broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Whether batch entries differ.
    pub batches: bool,
    /// Whether heads differ.
    pub heads: bool,
    /// Whether query rows differ.
    pub rows: bool,
}

impl Extent {
    /// All of them.
    pub const ALL: Extent = Extent { batches: true, heads: true, rows: true };

    pub(super) const NONE: Extent = Extent { batches: false, heads: false, rows: false };

    /// That of a mask with such strides: an element that is at the same place for all indices is broadcast.
    pub fn of(strides: &[i64; 4]) -> Self {
        let [batches, heads, rows, _] = strides.map(|stride| stride != 0);
        Extent { batches, heads, rows }
    }

    /// That of a mask for a problem: what there is one of does not differ, whatever its stride is.
    fn within(self, problem: &Problem) -> Self {
        Extent {
            batches: self.batches && problem.batch > 1,
            heads: self.heads && problem.num_q_heads > 1,
            rows: self.rows && problem.q_len > 1,
        }
    }

    /// That of two masks together.
    pub(super) fn or(self, other: Self) -> Self {
        Extent {
            batches: self.batches || other.batches,
            heads: self.heads || other.heads,
            rows: self.rows || other.rows,
        }
    }
}

impl Request {
    /// The planner's choices for a problem whose tensors are dense, without gaps and without the log-sum-exp; its mask,
    /// if it has one, is boolean.
    pub fn new(problem: &Problem) -> Self {
        let aligned = whole_chunks(problem);
        Request {
            scheme: None,
            accuracy: None,
            mask: if problem.masked { MaskForm::Bool } else { MaskForm::None },
            mask_extent: Extent::ALL,
            mask_access: access(problem.kv_len, 1),
            blocks_extent: Extent::ALL,
            lengths: if problem.packed { Lengths::Packed } else { Lengths::Dense },
            q_rows: problem.q_len,
            kv_rows: problem.kv_len,
            aligned,
            values_in_keys: false,
            has_tensor_map: aligned,
            has_query_map: aligned,
            lse: false,
            tiling: None,
            splits: None,
        }
    }

    /// The same for masks of a problem.
    pub(super) fn within(self, problem: &Problem) -> Self {
        let [mask_extent, blocks_extent] =
            [self.mask_extent, self.blocks_extent].map(|extent| extent.within(problem));
        Request { mask_extent, blocks_extent, ..self }
    }

    /// The same for masks that lie so in memory.
    #[must_use]
    pub fn with_masks_of(self, tensors: &Tensors) -> Self {
        let [of_others @ .., of_keys] = &tensors.mask.strides;
        let element_bytes = match self.mask {
            MaskForm::None | MaskForm::Bool => 1,
            MaskForm::Bias(dtype) => dtype.bytes(),
        };
        let is_aligned = |access: MaskAccess| {
            let elements = access.elements(element_bytes);
            let apart = of_others.iter().all(|stride| stride.unsigned_abs().is_multiple_of(elements as u64));
            apart && tensors.mask.address.is_multiple_of((elements * element_bytes) as u64)
        };
        let possible = if *of_keys == 1 { access(self.kv_rows, element_bytes) } else { MaskAccess::Elements };
        let accesses = [MaskAccess::Chunks, MaskAccess::Pairs].into_iter();
        let mask_access = accesses.filter(|access| *access <= possible).find(|&access| is_aligned(access));
        let mask_access = mask_access.unwrap_or(MaskAccess::Elements);
        let [mask_extent, blocks_extent] =
            [tensors.mask, tensors.blocks].map(|mask| Extent::of(&mask.strides));
        Request { mask_extent, mask_access, blocks_extent, ..self }
    }
}

/// How so many keys of a mask may be read, where rows follow each other without gaps.
fn access(keys: usize, element_bytes: usize) -> MaskAccess {
    let accesses = [MaskAccess::Chunks, MaskAccess::Pairs].into_iter();
    let whole = |access: &MaskAccess| keys > 0 && keys.is_multiple_of(access.elements(element_bytes));
    accesses.into_iter().find(whole).unwrap_or(MaskAccess::Elements)
}
