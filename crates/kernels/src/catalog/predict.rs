//! The predictions of block maps whose kernels are shipped.

use sage_core::sparse::{Predictor, Select};
use sage_core::{DType, Problem};

use crate::predict::PredictCall;
use crate::sequence::Lengths;

/// A prediction by every kernel, and by every form of those that differ in more than sizes.
pub(super) fn calls() -> Vec<(PredictCall, Predictor)> {
    let call = |dtype, kv_len, lengths, aligned| PredictCall {
        lengths,
        aligned,
        ..PredictCall::new(&Problem::dense(dtype, [1, 8, 8], [16_384, kv_len], 128))
    };
    let sparge = |select| Predictor::sparge_attn(select, 0.6);
    let usual = call(DType::F16, 16_384, Lengths::Dense, true);
    vec![
        (usual, sparge(Select::Cdf(0.98.into()))),
        (usual, sparge(Select::TopK(0.5.into()))),
        (usual, Predictor::sparge_attn2(0.03, 0.2)),
        (usual, Predictor::sol_attn(1.0)),
        (call(DType::BF16, 16_384, Lengths::Packed, true), sparge(Select::TopK(0.5.into()))),
        // Rows of scores that registers do not hold, with rows of other kinds.
        (
            call(DType::BF16, 262_144, Lengths::KvLens, false),
            sparge(Select::Cdf(0.98.into())).blocks(1024, 64),
        ),
    ]
}
