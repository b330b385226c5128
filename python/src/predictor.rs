//! Which blocks of the score matrix a call computes.

use pyo3::prelude::*;
use sageattention::sparse::{self, PaddedBlocks, PerHead, Select};
use sageattention::{Error, Result};

use crate::errors::exception;

/// A predictor of block maps. Made once for each combination of options, and kept.
#[pyclass(frozen)]
pub(crate) struct Predictor(sparse::Predictor);

#[pymethods]
impl Predictor {
    /// `select` is "topk", "count", "cdf", "topk_topp" or "sigmas", of `threshold`, `topp` and `num_blocks` as
    /// [`Select`] has them. Hyper-parameters are lists: of one value for all query heads, or of one for each.
    /// `sink_blocks` are where the always computed blocks of keys begin and end, and those of queries; paddings say how many
    /// tokens of each block count.
    #[new]
    #[pyo3(signature = (
        *, select, threshold, topp, num_blocks, block_q, block_k, predict_smooth_k, simthreshd1, sink_blocks, original_tails, q_padding,
        k_padding
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python constructor")]
    fn new(
        select: &str,
        threshold: Vec<f64>,
        topp: Vec<f64>,
        num_blocks: usize,
        block_q: usize,
        block_k: usize,
        predict_smooth_k: bool,
        simthreshd1: Option<Vec<f64>>,
        sink_blocks: [usize; 4],
        original_tails: bool,
        q_padding: Option<Vec<i32>>,
        k_padding: Option<Vec<i32>>,
    ) -> PyResult<Self> {
        let make = || {
            let mut predictor = sparse::Predictor::new(selection(select, threshold, topp, num_blocks)?)
                .blocks(block_q, block_k)
                .smooth_k(predict_smooth_k)
                .sink_k(sink_blocks[0]..sink_blocks[1])
                .sink_q(sink_blocks[2]..sink_blocks[3])
                .original_tails(original_tails);
            if let Some(threshold) = simthreshd1 {
                predictor = predictor.similarity(per_head(threshold));
            }
            if let Some(sizes) = q_padding {
                predictor = predictor.q_padding(PaddedBlocks::new(&sizes, block_q)?);
            }
            if let Some(sizes) = k_padding {
                predictor = predictor.k_padding(PaddedBlocks::new(&sizes, block_k)?);
            }
            Ok(predictor)
        };
        make().map(Predictor).map_err(exception)
    }
}

impl Predictor {
    /// The predictor as the library takes it.
    pub(crate) fn get(&self) -> &sparse::Predictor {
        &self.0
    }
}

fn selection(name: &str, threshold: Vec<f64>, topp: Vec<f64>, num_blocks: usize) -> Result<Select> {
    Ok(match name {
        "topk" => Select::TopK(per_head(threshold)),
        "count" => Select::Count(num_blocks),
        "cdf" => Select::Cdf(per_head(threshold)),
        "topk_topp" => Select::TopKTopP { k: per_head(threshold), p: per_head(topp) },
        "sigmas" => Select::Sigmas(per_head(threshold)),
        other => return Err(Error::value("select", other, "topk, count, cdf, topk_topp or sigmas")),
    })
}

/// One value for all heads, or one for each.
fn per_head(values: Vec<f64>) -> PerHead {
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    match values[..] {
        [value] => value.into(),
        _ => values.into(),
    }
}
