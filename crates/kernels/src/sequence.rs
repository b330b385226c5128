//! Which rows of the tensors are a sequence's, and where its key tiles lie in the workspace.

use sage_core::{Alignment, Band, Problem};
use sage_ptx::{Code, Global, Val};

use crate::params::kernel_params;

/// Keys of a tile: what the quantised K and V are cut into.
pub const KEY_TILE: usize = 64;

/// Where a kernel learns the lengths of sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Lengths {
    /// All sequences are as long as the tensors.
    #[default]
    Dense,
    /// The number of valid keys of each batch entry, in device memory.
    KvLens,
    /// Boundaries of packed sequences, in device memory.
    Packed,
}

impl Lengths {
    /// Part of a kernel's name.
    pub const fn suffix(self) -> &'static str {
        match self {
            Lengths::Dense => "",
            Lengths::KvLens => "_kvlens",
            Lengths::Packed => "_packed",
        }
    }

    /// An addition to a kernel's description.
    pub(crate) const fn description(self) -> &'static str {
        match self {
            Lengths::Dense => "",
            Lengths::KvLens => ", kv_lens",
            Lengths::Packed => ", packed",
        }
    }
}

/// Key tiles of a workspace, all sequences together. Packed sequences have at most one tile more than whole tiles each,
/// so that a sequence's first tile needs no sum over the sequences before it.
pub fn total_key_tiles(lengths: Lengths, batch: usize, kv_rows: usize) -> usize {
    match lengths {
        Lengths::Dense | Lengths::KvLens => batch * kv_rows.div_ceil(KEY_TILE),
        Lengths::Packed => kv_rows / KEY_TILE + batch,
    }
}

/// Tiles of keys of which the band lets some of `rows` queries from `first` on see a key; `first` is one of the problem's.
pub fn seen_key_tiles(problem: &Problem, first: usize, rows: usize) -> usize {
    let last = (first + rows).min(problem.q_len) - 1;
    let seen = |query: usize| problem.band.keys(query, problem.q_len, problem.kv_len);
    let (start, end) = (seen(first).start, seen(last).end);
    end.max(start).div_ceil(KEY_TILE) - start / KEY_TILE
}

/// A sequence, inside a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence<'k> {
    /// Index in the tensors' batch dimension.
    pub batch: Val<'k, i32>,
    /// First query row.
    pub q_start: Val<'k, i32>,
    /// Query rows.
    pub q_len: Val<'k, i32>,
    /// First key row.
    pub kv_start: Val<'k, i32>,
    /// Valid key rows, but where no explicit mask counts keys from the first: from `kv_start` on, those that the band
    /// lets some query see. (Of dense tensors the host has left out the others.)
    pub kv_len: Val<'k, i32>,
    /// First key tile in the workspace.
    pub first_tile: Val<'k, i32>,
}

kernel_params! {
    /// What a kernel is told about lengths.
    LengthParams, LengthArgs {
        /// Query rows of the tensors.
        q_rows: i32,
        /// Key rows of the tensors.
        kv_rows: i32,
        /// Boundaries of packed queries.
        cu_seqlens_q: [i32],
        /// Boundaries of packed keys, or valid keys of each batch entry.
        cu_seqlens_k: [i32],
        /// Keys visible before the diagonal; 2³⁰ for all.
        window_left: i32,
        /// Keys visible after the diagonal; 2³⁰ for all.
        window_right: i32,
        /// Whether the last query sees the last key at the diagonal (1), or the first the first (0).
        bottom_right: i32,
    }
}

/// "No limit" of a window: far beyond any key, and far from overflow.
pub(crate) const NO_LIMIT: i32 = 1 << 30;

/// Keys visible before and after the diagonal of a band, which an offset moves; [`NO_LIMIT`] for all.
pub(crate) fn window(band: &Band) -> [i32; 2] {
    let (left, right) = band.limits();
    let no_limit = i64::from(NO_LIMIT);
    [left, right].map(|side| side.map_or(NO_LIMIT, |reach| reach.clamp(-no_limit, no_limit) as i32))
}

/// Whether the last query sees the last key at the diagonal of a band (1), or the first the first (0).
pub(crate) fn bottom_right(band: &Band) -> i32 {
    i32::from(band.alignment == Alignment::BottomRight)
}

impl<'k> Sequence<'k> {
    /// Sequence `index` of the call, which has an explicit mask or not.
    pub fn new(
        code: &'k Code,
        lengths: Lengths,
        masked: bool,
        params: &LengthParams<'k>,
        index: Val<'k, i32>,
    ) -> Self {
        let sequence = Sequence::given(code, lengths, params, index);
        if masked || lengths == Lengths::Dense { sequence } else { sequence.seen(params) }
    }

    /// The sequence with the keys that its band lets some query see: core's `Band::seen`.
    fn seen(self, params: &LengthParams<'k>) -> Self {
        let diagonal = params.bottom_right.ne(0).select(self.kv_len - self.q_len, 0);
        let start = (diagonal - params.window_left).max(0).min(self.kv_len);
        let end = (self.q_len + diagonal + params.window_right).min(self.kv_len).max(start);
        Sequence {
            kv_start: (self.kv_start + start).named("kv_start"),
            kv_len: (end - start).named("kv_len"),
            ..self
        }
    }

    /// The sequence with all keys that the lengths give it.
    fn given(code: &'k Code, lengths: Lengths, params: &LengthParams<'k>, index: Val<'k, i32>) -> Self {
        let zero = code.constant(0);
        let dense_tile = index * params.kv_rows.div_ceil(KEY_TILE);
        match lengths {
            Lengths::Dense => Sequence {
                batch: index,
                q_start: zero,
                q_len: params.q_rows,
                kv_start: zero,
                kv_len: params.kv_rows,
                first_tile: dense_tile,
            },
            Lengths::KvLens => Sequence {
                batch: index,
                q_start: zero,
                q_len: params.q_rows,
                kv_start: zero,
                kv_len: params.cu_seqlens_k.at(index).load().max(0).min(params.kv_rows).named("kv_len"),
                first_tile: dense_tile,
            },
            Lengths::Packed => {
                // What lies outside the tensors is cut off: nobody has checked lengths in device memory.
                let boundary = |list: Global<'k, i32>, rows| list.load().max(0).min(rows);
                let (q, k) = (params.cu_seqlens_q.at(index), params.cu_seqlens_k.at(index));
                let q_start = boundary(q, params.q_rows).named("q_start");
                let kv_start = boundary(k, params.kv_rows).named("kv_start");
                let q_len = (boundary(q.plus(1), params.q_rows) - q_start).named("q_len");
                let kv_len = (boundary(k.plus(1), params.kv_rows) - kv_start).max(0);
                Sequence {
                    batch: zero,
                    q_start,
                    q_len,
                    kv_start,
                    // Keys without a query are seen by none, and the host's grids have no blocks for them.
                    kv_len: q_len.gt(0).select(kv_len, 0).named("kv_len"),
                    first_tile: kv_start.split_index(KEY_TILE).0 + index,
                }
            }
        }
    }
}
