//! Which heads are computed where.

use sageattention::cuda::Cuda;
use sageattention::{DType, MAX_HEAD_DIM, MAX_VALUE_DIM, Problem};

use crate::errors::guarded;

/// Whether heads of so many channels are computed, of queries and keys and of values: on the CPU, or on the GPU of this
/// number. Tensors as long as tiles are: whether a kernel exists does not depend on lengths.
pub(crate) fn are_computed(head_dim: usize, value_dim: usize, gpu: Option<u32>) -> bool {
    if !(1..=MAX_HEAD_DIM).contains(&head_dim) || !(1..=MAX_VALUE_DIM).contains(&value_dim) {
        return false;
    }
    let Some(ordinal) = gpu else { return true };
    let problem = Problem::dense(DType::F16, [1, 1, 1], [128, 128], head_dim).value_dim(value_dim);
    guarded(|| Cuda::shared(ordinal)?.check_problem(&problem)).is_ok()
}
