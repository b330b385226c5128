//! Where everything lies in a pass's workspace.

use sage_core::Problem;

use super::{Request, Step, total_rows};
use crate::attention::{Engine, padded_dim};
use crate::combine::PART;
use crate::preprocess::{
    ColumnStatistics, KeyMean, QuantizeKConfig, QuantizeVConfig, SEEN_WORDS, ValueScales,
};
use crate::sequence::{KEY_TILE, total_key_tiles};

/// Offsets in the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layout {
    pub pieces_taken: Option<u64>,
    pub k_arrivals: u64,
    pub v_arrivals: u64,
    pub v_marked: u64,
    /// End of the counters, which the first launch that samples K, or who runs the pass, sets to zero.
    pub counters: u64,
    pub seen: u64,
    pub ranks: u64,
    pub k: u64,
    pub k_scale: u64,
    pub k_mean: u64,
    pub k_partials: u64,
    pub v: u64,
    pub v_scale: u64,
    pub v_mean: u64,
    pub v_factor: u64,
    pub v_partials: u64,
    pub q_mean: u64,
    pub delta_s: u64,
    pub partial: u64,
    pub partial_sums: u64,
    pub bytes: u64,
}

impl Layout {
    /// Of a pass whose keys are in `splits` parts.
    pub fn new(problem: &Problem, request: &Request, steps: &[Step], splits: usize) -> Self {
        let padded = padded_dim(problem.head_dim);
        let tiles = total_key_tiles(request.lengths, problem.batch, request.kv_rows);
        let heads = problem.num_kv_heads;
        let statistics = 4 * problem.batch * heads * padded;
        let mut end = 0u64;
        let mut take = |bytes: usize| {
            let offset = end;
            end += (bytes as u64).next_multiple_of(256);
            offset
        };
        let partials = |parts: usize| 4 * padded * parts * heads * tiles;
        let mut layout = Layout::default();
        for step in steps {
            match step {
                Step::QuantizeK(QuantizeKConfig { mean: KeyMean::Collected, .. }) => {
                    layout.k_arrivals = take(4 * problem.batch * heads);
                }
                Step::QuantizeV(QuantizeVConfig { scales: ValueScales::Given, .. }) => {
                    layout.v_marked = take(4 * problem.batch * heads);
                }
                Step::QuantizeV(_) => {
                    layout.v_arrivals = take(4 * problem.batch * heads);
                }
                Step::Attention(config)
                    if config.tiling.engine == Engine::Warpgroups && !request.pieces_alike(problem) =>
                {
                    layout.pieces_taken = Some(take(4));
                }
                _ => {}
            }
        }
        layout.counters = take(0);
        let seen_tiles = problem.batch * heads * seen_tiles(problem);
        for step in steps {
            match step {
                Step::SeenKeys(_) => layout.seen = take(4 * SEEN_WORDS * seen_tiles),
                Step::RankKeys(_) => layout.ranks = take(4 * seen_tiles),
                Step::QueryMeans(_) => {
                    let blocks = query_blocks(problem, steps);
                    layout.q_mean = take(4 * problem.batch * problem.num_q_heads * blocks * padded);
                }
                Step::QuantizeK(config) => {
                    layout.k = take(heads * tiles * config.tile_bytes());
                    layout.k_scale = take(4 * heads * tiles * config.groups());
                    if config.mean != KeyMean::Zero {
                        layout.k_mean = take(statistics);
                    }
                    if config.mean == KeyMean::Collected {
                        layout.k_partials = take(partials(ColumnStatistics::Mean.partials()));
                    }
                }
                Step::DeltaS(_) => {
                    let blocks = query_blocks(problem, steps);
                    let keys = problem.kv_len.next_multiple_of(KEY_TILE).max(KEY_TILE);
                    layout.delta_s = take(4 * problem.batch * problem.num_q_heads * blocks * keys);
                }
                Step::QuantizeV(config) => {
                    if config.scales != ValueScales::CollectedWhereMarked {
                        layout.v = take(heads * tiles * config.tile_bytes());
                        layout.v_scale = take(statistics);
                        layout.v_mean = take(statistics);
                        layout.v_factor = take(statistics);
                    }
                    if config.scales != ValueScales::Given {
                        layout.v_partials = take(partials(config.statistics().partials()));
                    }
                }
                Step::ConvertV(_) => layout.v = take(2 * heads * tiles * KEY_TILE * padded),
                Step::Combine(_) => {
                    let rows = splits * total_rows(problem, request);
                    layout.partial = take(4 * rows * problem.head_dim);
                    layout.partial_sums = take(4 * PART * rows);
                }
                Step::SampleK(_) | Step::SampleV(_) | Step::Attention(_) => {}
            }
        }
        layout.bytes = take(0);
        layout
    }
}

/// Tiles of a head's words of keys that are seen, and one more for the number of all that count.
pub(super) fn seen_tiles(problem: &Problem) -> usize {
    problem.kv_len.div_ceil(KEY_TILE).max(1) + 1
}

/// Query rows that share a mean; 0 where none is subtracted.
pub(super) fn query_block(steps: &[Step]) -> usize {
    let block = steps.iter().find_map(|step| match step {
        Step::QueryMeans(config) => Some(config.block),
        _ => None,
    });
    block.unwrap_or(0)
}

/// Such blocks of the longest sequence.
pub(super) fn query_blocks(problem: &Problem, steps: &[Step]) -> usize {
    match query_block(steps) {
        0 => 0,
        block => problem.q_len.div_ceil(block).max(1),
    }
}
