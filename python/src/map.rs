//! Predicted maps of blocks, written where the caller has memory for them.

use sageattention::sparse::{BlockMap, Predictor};
use sageattention::{Error, Result};

use crate::host;
use crate::tensor::RawTensor;

/// Refuses memory for a map that has not a byte for each block, `[batch, heads, q_blocks, k_blocks]` without gaps, of
/// `[q, k]` in the one layout or the other.
pub(crate) fn check(
    map: &RawTensor,
    [q, k]: [&RawTensor; 2],
    nhd: bool,
    predictor: &Predictor,
) -> Result<()> {
    let (heads, tokens) = if nhd { (2, 1) } else { (1, 2) };
    if q.shape.len() != 4 || k.shape.len() != 4 || predictor.block_q == 0 || predictor.block_k == 0 {
        // The call itself says what is wrong with them.
        return Ok(());
    }
    let (q_blocks, k_blocks) =
        (q.shape[tokens].div_ceil(predictor.block_q), k.shape[tokens].div_ceil(predictor.block_k));
    let wanted = [q.shape[0], q.shape[heads], q_blocks, k_blocks];
    if map.shape != wanted || !map.geometry("map")?.is_contiguous() || !map.is_bytes() {
        return Err(Error::Shape {
            name: "map".into(),
            found: format!("{:?} with strides {:?}", map.shape, map.strides),
            wanted: format!("{wanted:?} of bool or uint8 without gaps"),
        });
    }
    Ok(())
}

/// Writes a predicted map into this machine's memory. Keys behind the last that any query sees have no blocks in it,
/// and none is computed.
///
/// # Safety
/// As for [`host::view_mut`].
pub(crate) unsafe fn write(map: &BlockMap, target: &RawTensor) -> Result<()> {
    // SAFETY: the caller's promise.
    let mut target_view = unsafe { host::bytes_mut("map", target) }?;
    let columns = target.shape.last().copied().unwrap_or(0);
    let predicted = map.shape()[3];
    if columns > 0 {
        for (flags, bytes) in map.rows().zip(target_view.data_mut().chunks_mut(columns)) {
            bytes.fill(0);
            bytes
                .iter_mut()
                .zip(&flags[..predicted.min(columns)])
                .for_each(|(byte, &flag)| *byte = flag.into());
        }
    }
    Ok(())
}
