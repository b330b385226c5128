//! Results of `sageattn accuracy`, for its tables, its JSON and its plot.

use std::path::Path;

use sage_core::metrics::Accuracy;
use sageattention::{DType, Preset};
use serde::Serialize;

use crate::compare::{Comparison, ComputedBy};
use crate::heads::Head;
use crate::metrics::Metrics;

/// One scheme on the tensors of one prefix.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub file: String,
    pub prefix: String,
    pub scheme: &'static str,
    pub computed_by: ComputedBy,
    /// The predictor of the blocks that were computed, where not all were.
    pub predictor: Option<String>,
    pub dtype: &'static str,
    #[serde(flatten)]
    pub overall: Metrics,
    pub per_head: Vec<HeadRow>,
}

/// One head of a [`Row`].
#[derive(Clone, Debug, Serialize)]
pub struct HeadRow {
    pub batch: usize,
    pub head: usize,
    #[serde(flatten)]
    pub metrics: Metrics,
}

impl Row {
    /// A comparison, with what it is of.
    pub fn new(file: &Path, prefix: &str, dtype: DType, preset: Preset, comparison: Comparison) -> Self {
        let head = |(head, accuracy): (Head, Accuracy)| HeadRow {
            batch: head.batch,
            head: head.head,
            metrics: accuracy.into(),
        };
        Row {
            file: file.display().to_string(),
            prefix: prefix.to_owned(),
            scheme: preset.name(),
            computed_by: comparison.computed_by,
            predictor: None,
            dtype: dtype.name(),
            overall: comparison.overall.into(),
            per_head: comparison.per_head.into_iter().map(head).collect(),
        }
    }
}
