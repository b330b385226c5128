//! Results of `sageattn sparse`, for its tables, its JSON and its plot.

use sage_core::metrics::Accuracy;
use sageattention::sparse::BlockMap;
use sageattention::{Problem, Result};
use serde::Serialize;

use crate::metrics::Metrics;
use crate::timing::Times;

/// One setting of a predictor on the tensors of one prefix.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The file, or what was made up.
    pub source: String,
    pub prefix: String,
    pub predictor: &'static str,
    /// How many blocks are kept, in the words of the options.
    pub amount: String,
    pub block_q: usize,
    pub block_k: usize,
    pub scheme: String,
    pub dtype: &'static str,
    /// Blocks that were computed over those that the band shows.
    pub density: f64,
    #[serde(flatten)]
    pub times: Times,
    /// Median time of the prediction alone.
    pub prediction_ms: f64,
    /// Median time over that of dense attention of the same scheme.
    pub time_share: f64,
    /// Median time with a pooled term for each block left out.
    pub pooled_tail_ms: Option<f64>,
    #[serde(flatten)]
    pub errors: Errors,
    pub per_head: Vec<HeadRow>,
}

/// One head of a [`Row`].
#[derive(Clone, Debug, Serialize)]
pub struct HeadRow {
    pub batch: usize,
    pub head: usize,
    pub density: f64,
    #[serde(flatten)]
    pub errors: Errors,
}

/// Distances of one result.
#[derive(Clone, Debug, Serialize)]
pub struct Errors {
    /// From exact dense attention in double precision.
    #[serde(flatten)]
    pub against_exact: Metrics,
    /// From dense attention of the same scheme on the same device.
    pub against_dense: Metrics,
    /// With a pooled term for each block left out, from exact dense attention.
    pub pooled_tail: Option<Metrics>,
    /// Without the P·V of small tiles, in double precision, for each threshold.
    pub pv_filter: Vec<Filtered>,
}

/// What a threshold of [`PvFilter`](sageattention::sparse::PvFilter) did.
#[derive(Clone, Debug, Serialize)]
pub struct Filtered {
    pub pvthreshd: f32,
    /// Tiles that were skipped.
    pub skipped: usize,
    /// Tiles of the blocks that were kept, skipped or not, those of each warp.
    pub visited: usize,
    /// Distance from exact dense attention.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// What was computed of one head, `[q_len, head_dim]` each.
#[derive(Clone, Debug)]
pub struct Found {
    pub exact: Vec<f64>,
    /// Dense attention of the scheme.
    pub dense: Vec<f32>,
    /// Attention over the predicted blocks.
    pub sparse: Vec<f32>,
    /// The same with a pooled term for each block left out.
    pub pooled_tail: Option<Vec<f32>>,
    /// Threshold, output, tiles skipped and visited.
    pub filtered: Vec<(f32, Vec<f64>, [usize; 2])>,
}

impl Found {
    /// One result after the other.
    pub fn joined(all: &[Self]) -> Self {
        let mut joined = all.first().cloned().unwrap_or(Found {
            exact: Vec::new(),
            dense: Vec::new(),
            sparse: Vec::new(),
            pooled_tail: None,
            filtered: Vec::new(),
        });
        for found in all.iter().skip(1) {
            joined.exact.extend(&found.exact);
            joined.dense.extend(&found.dense);
            joined.sparse.extend(&found.sparse);
            if let (Some(joined), Some(found)) = (&mut joined.pooled_tail, &found.pooled_tail) {
                joined.extend(found);
            }
            for ((_, joined, counts), (_, found, more)) in joined.filtered.iter_mut().zip(&found.filtered) {
                joined.extend(found);
                counts.iter_mut().zip(more).for_each(|(count, more)| *count += more);
            }
        }
        joined
    }

    /// How far the results lie apart.
    pub fn errors(&self) -> Errors {
        let exact = &self.exact;
        let filtered = |(pvthreshd, out, [skipped, visited]): &(f32, Vec<f64>, [usize; 2])| Filtered {
            pvthreshd: *pvthreshd,
            skipped: *skipped,
            visited: *visited,
            metrics: Accuracy::of(out, exact).into(),
        };
        Errors {
            against_exact: Accuracy::of(&self.sparse, exact).into(),
            against_dense: Accuracy::of(&self.sparse, &self.dense).into(),
            pooled_tail: self.pooled_tail.as_ref().map(|out| Accuracy::of(out, exact).into()),
            pv_filter: self.filtered.iter().map(filtered).collect(),
        }
    }
}

/// The density of a map, and that of each of its heads in their order.
///
/// # Errors
/// When the map is not of the problem.
pub fn densities(map: &BlockMap, problem: &Problem) -> Result<(f64, Vec<f64>)> {
    let Problem { band, q_len, kv_len, .. } = problem;
    let [batch, heads, rows, columns] = map.shape();
    let of_head = |head: usize| {
        let flags = map.flags()[head * rows * columns..(head + 1) * rows * columns].to_vec();
        BlockMap::new(flags, [1, 1, rows, columns], map.block_q(), map.block_k())?
            .density(band, *q_len, *kv_len)
    };
    let heads = (0..batch * heads).map(of_head).collect::<Result<_>>()?;
    Ok((map.density(band, *q_len, *kv_len)?, heads))
}
