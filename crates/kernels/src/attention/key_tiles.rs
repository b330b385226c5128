//! Which tiles of keys a block's queries are multiplied with: the one thing that the loops of every engine walk over,
//! those of the warps or the producer that load tiles and those of the warps that compute.
//!
//! Tiles have positions, in whose order they are loaded and computed. In a band, positions are the tiles' indices; a
//! list in device memory gives each position its tile, for maps of blocks and for masks whose tiles somebody has
//! classed.

use sage_ptx::{Code, Global, Val, Var};

use super::band::Band;
use super::config::{AttentionConfig, AttentionParams};
use crate::key_order::KeyOrder;
use crate::params::kernel_params;
use crate::sparse::{CLASS_ROWS, MaskWords, Packing};
use crate::tiling::Engine;

/// What an entry of a list has beside the index of a tile of which the band or the end of the keys hides some score:
/// keys of such a tile are compared with both.
pub const CUT_TILE: u32 = 1 << 31;

/// What an entry of a list has beside the index of a tile of which a mask hides or changes some score: there it is
/// read.
pub const MASKED_TILE: u32 = 1 << 30;

/// What an entry of a list has beside the index of a tile that has a key that no query sees, where values are read as
/// given: those rows are cleared, as they may hold anything.
pub const CLEARED_TILE: u32 = 1 << 29;

/// Entries behind the last of a list, which are read ahead and mean nothing.
pub const ENTRIES_BEHIND: usize = 2;

kernel_params! {
    /// What a launch of a kernel whose tiles are those of lists passes after [`AttentionArgs`](super::AttentionArgs).
    /// There is a list for each tile of [`block_q`](AttentionConfig::block_q) queries; lists that are alike may be the
    /// same.
    TileListParams, TileListArgs {
        /// Tiles of each list.
        tile_counts: [i32],
        /// The lists: indices of tiles of [`tile_keys`](crate::Tiling::tile_keys) keys that the sequence has, in any
        /// order, none twice, with [`CUT_TILE`], [`MASKED_TILE`] and [`CLEARED_TILE`] where these are so; behind them
        /// stand [`ENTRIES_BEHIND`] indices of any.
        tile_lists: [u32],
        /// Entries from one list to the next.
        list_stride: i32,
        /// Lists from one sequence's to the next's.
        list_stride_sequence: i32,
        /// Lists from one query head's to the next's.
        list_stride_head: i32,
        /// The words of a mask: see [`PackMaskConfig`](crate::sparse::PackMaskConfig).
        mask_words: [u32],
        /// Words from one sequence's to the next's.
        words_stride_sequence: i64,
        /// Words from one query head's to the next's.
        words_stride_head: i64,
        /// Words from those of one tile of 64 rows to the next's.
        words_stride_rows: i64,
    }
}

/// A list of tiles, inside a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileList<'k> {
    count: Val<'k, i32>,
    entries: Global<'k, u32>,
}

impl<'k> TileListParams<'k> {
    /// The list of a tile of queries.
    pub(super) fn list(
        &self,
        sequence: Val<'k, i32>,
        head: Val<'k, i32>,
        q_tile: Val<'k, i32>,
    ) -> TileList<'k> {
        let list = sequence * self.list_stride_sequence + head * self.list_stride_head + q_tile;
        let entries = self.tile_lists.at(list.mul_wide(self.list_stride));
        TileList { count: self.tile_counts.at(list).load().named("tile_count"), entries }
    }

    /// The words of a head's mask, for a lane; the sequence has `q_len` rows.
    pub(super) fn mask_words(
        &self,
        packing: Packing,
        order: KeyOrder,
        sequence: Val<'k, i32>,
        head: Val<'k, i32>,
        lane: Val<'k, i32>,
        q_len: Val<'k, i32>,
    ) -> MaskWords<'k> {
        let first = sequence.widen() * self.words_stride_sequence + head.widen() * self.words_stride_head;
        MaskWords {
            packing,
            order,
            start: self.mask_words.at(first),
            lane,
            stride_rows: self.words_stride_rows,
            last_rows: (q_len - 1) / CLASS_ROWS as i32,
        }
    }
}

/// Positions from `start` on, below `end`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<'k> {
    pub start: Val<'k, i32>,
    pub end: Val<'k, i32>,
}

impl<'k> Span<'k> {
    /// Part `split` of `splits`.
    fn part(self, splits: Val<'k, i32>, split: Val<'k, i32>) -> Self {
        let each = (self.end - self.start).max(0);
        let each = (each + splits - 1) / splits;
        let start = self.start + each * split;
        Span { start, end: (start + each).min(self.end) }
    }

    fn named(self, start: &str, end: &str) -> Self {
        Span { start: self.start.named(start), end: self.end.named(end) }
    }
}

/// The tiles of keys of a block's queries. Warpgroups share the tiles that a block loads, of which each computes those
/// that its own rows see: a "group" is a warpgroup, or the whole block where there are none.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeyTiles<'k> {
    /// All that the band lets some row see.
    Band {
        /// Tiles that the block loads.
        loaded: Span<'k>,
        /// The tiles among them that the group computes.
        own: Span<'k>,
        /// The tiles among those that every row of the group sees wholly.
        inner: Span<'k>,
    },
    /// A list's, or a part of them: all groups compute them.
    List { entries: Global<'k, u32>, positions: Span<'k> },
}

/// A tile as a loop meets it.
#[derive(Clone, Copy)]
pub(super) struct KeyTile<'k> {
    /// Its place in the order in which tiles are loaded and computed.
    pub position: Val<'k, i32>,
    /// Which of the sequence's tiles it is.
    pub index: Val<'k, i32>,
    cut: Cut<'k>,
}

/// Whether some key of a tile is hidden from some row of the group.
#[derive(Clone, Copy)]
enum Cut<'k> {
    Known(bool),
    /// It is cut unless it is one of these.
    Outside(Span<'k>),
    /// Its entry in the list says whether.
    Entry(Val<'k, u32>),
}

impl<'k> KeyTile<'k> {
    fn of_entry(position: Val<'k, i32>, entry: Val<'k, u32>) -> Self {
        let index = (entry & !(CUT_TILE | MASKED_TILE | CLEARED_TILE)).reinterpret::<i32>().named("tile");
        KeyTile { position, index, cut: Cut::Entry(entry) }
    }

    /// Whether a mask hides or changes some of its scores.
    pub fn is_masked(&self) -> Val<'k, bool> {
        self.entry_has(MASKED_TILE)
    }

    /// Whether values as given must be cleared where a mask, or the end of its keys, hides their key from every query.
    pub fn is_cleared(&self) -> Val<'k, bool> {
        self.entry_has(CLEARED_TILE)
    }

    fn entry_has(&self, flag: u32) -> Val<'k, bool> {
        match self.cut {
            Cut::Entry(entry) => (entry & flag).ne(0u32),
            Cut::Known(_) | Cut::Outside(_) => self.index.code().constant(false),
        }
    }

    /// Whether the band or the end of the keys hides some key from some row of the group.
    pub fn is_cut(&self) -> Val<'k, bool> {
        match self.cut {
            Cut::Known(cut) => self.index.code().constant(cut),
            Cut::Outside(Span { start, end }) => {
                let inner = (end - start).reinterpret::<u32>();
                (self.index - start).reinterpret::<u32>().ge(inner)
            }
            Cut::Entry(entry) => (entry & CUT_TILE).ne(0u32),
        }
    }
}

impl<'k> KeyTiles<'k> {
    /// The tiles that a band lets a block's rows from `first_row` on see, or part `split` of them.
    pub fn of_band(
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        band: &Band<'k>,
        [first_row, warp, split]: [Val<'k, i32>; 3],
    ) -> Self {
        let (block_q, tile_keys) = (config.block_q() as i32, config.tiling.tile_keys());
        let first_key = |row: Val<'k, i32>| band.start(row).max(0);
        let start_tile = |row: Val<'k, i32>| first_key(row).split_index(tile_keys).0;
        let end_tile = |row: Val<'k, i32>| band.end(row).max(0).div_ceil(tile_keys);

        let seen = Span { start: start_tile(first_row), end: end_tile(band.last_row(first_row, block_q)) };
        let loaded = if config.split { seen.part(p.splits, split) } else { seen };
        let (row, rows, own) = match config.tiling.engine() {
            Engine::Warps => (first_row, block_q, loaded),
            Engine::Warpgroups => {
                let (row, rows) = (first_row + ((warp >> 2) << 6), 64);
                let end = end_tile(band.last_row(row, rows)).min(loaded.end).max(loaded.start);
                let start = start_tile(row).max(loaded.start).min(end);
                (row, rows, Span { start, end: band.has_row(row).select(end, start) })
            }
        };
        let last_row = band.last_row(row, rows);
        // The first row sees the least at the end, the last row at the start.
        let start = first_key(last_row).div_ceil(tile_keys).max(own.start).min(own.end);
        let end = (band.end(row) >> tile_keys.ilog2() as i32).min(own.end).max(start);
        KeyTiles::Band {
            loaded: loaded.named("copied_start", "copied_end"),
            own: own.named("first_tile", "end_tile"),
            inner: Span { start, end }.named("inner_start", "inner_end"),
        }
    }

    /// The tiles of a list, or part `split` of them.
    pub fn of_list(
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        list: &TileList<'k>,
        split: Val<'k, i32>,
    ) -> Self {
        let all = Span { start: split.code().constant(0), end: list.count };
        let positions = if config.split { all.part(p.splits, split) } else { all };
        KeyTiles::List { entries: list.entries, positions }
    }

    fn loaded(&self) -> Span<'k> {
        match *self {
            KeyTiles::Band { loaded, .. } => loaded,
            KeyTiles::List { positions, .. } => positions,
        }
    }

    /// Positions of the tiles that the group computes.
    pub fn own(&self) -> Span<'k> {
        match *self {
            KeyTiles::Band { own, .. } => own,
            KeyTiles::List { positions, .. } => positions,
        }
    }

    /// The tile at a position.
    pub fn at(&self, position: Val<'k, i32>) -> KeyTile<'k> {
        match *self {
            KeyTiles::Band { inner, .. } => KeyTile { position, index: position, cut: Cut::Outside(inner) },
            KeyTiles::List { entries, .. } => KeyTile::of_entry(position, entries.at(position).load()),
        }
    }

    /// Calls `load` with the index of the tile at a position, where the block loads one.
    pub fn when_loaded(&self, position: Val<'k, i32>, load: impl FnOnce(Val<'k, i32>)) {
        position.code().when(position.lt(self.loaded().end), || load(self.at(position).index));
    }

    /// Calls `load` with each tile that the block loads.
    pub fn for_each_loaded(&self, code: &'k Code, load: impl FnOnce(KeyTile<'k>)) {
        let Span { start, end } = self.loaded();
        match *self {
            KeyTiles::Band { .. } => code.range(start, end, |position| load(self.at(position))),
            // An entry is asked for a tile ahead of its use.
            KeyTiles::List { entries, .. } => code.when(start.lt(end), || {
                let next = code.var(entries.at(start).load()).named("next_entry");
                code.range(start, end, |position| {
                    let this = code.var(next.get());
                    next.set(entries.at(position).plus(1).load());
                    load(KeyTile::of_entry(position, this.get()));
                });
            }),
        }
    }

    /// Calls `pass` with each tile that the block loads for other groups before this one's.
    pub fn for_each_before(&self, code: &'k Code, pass: impl FnOnce(Val<'k, i32>)) {
        if let KeyTiles::Band { loaded, own, .. } = self {
            code.range(loaded.start, own.start, pass);
        }
    }

    /// Calls `pass` with each tile that the block loads for other groups after this one's.
    pub fn for_each_after(&self, code: &'k Code, pass: impl FnOnce(Val<'k, i32>)) {
        if let KeyTiles::Band { loaded, own, .. } = self {
            code.range(own.end, loaded.end, pass);
        }
    }

    /// Calls `compute` with each tile that the group computes.
    pub fn for_each(&self, code: &'k Code, compute: impl Fn(KeyTile<'k>)) {
        match *self {
            // First come tiles that a window's start cuts, then whole ones, then those that the diagonal or the end
            // cuts: whole tiles pay for no comparison.
            KeyTiles::Band { own, inner, .. } => code.range(0, 2, |end| {
                let start = end.eq(0).select(own.start, inner.end);
                let stop = end.eq(0).select(inner.start, own.end);
                let tile = |index, cut| KeyTile { position: index, index, cut: Cut::Known(cut) };
                code.range(start, stop, |index| compute(tile(index, true)));
                code.when(end.eq(0), || {
                    code.range(inner.start, inner.end, |index| compute(tile(index, false)));
                });
            }),
            KeyTiles::List { positions, .. } => {
                code.range(positions.start, positions.end, |position| compute(self.at(position)));
            }
        }
    }
}

/// The tiles that a group computes, one after the other, of which the next is known while this one is computed: entries
/// of a list are asked for a tile ahead of that, as what is loaded ahead of a tile waits for its entry.
pub(super) struct Walk<'k> {
    tiles: KeyTiles<'k>,
    /// The entries of this tile, the next and the one after it, where there is a list.
    entries: Option<[Var<'k, u32>; 3]>,
}

impl<'k> Walk<'k> {
    /// From the first tile on, which there is.
    pub fn start(code: &'k Code, tiles: KeyTiles<'k>) -> Self {
        let entries = match tiles {
            KeyTiles::Band { .. } => None,
            KeyTiles::List { entries, positions } => {
                let entries = entries.at(positions.start);
                let [first, second] = [0, 1].map(|ahead| entries.plus(ahead).load());
                let later = code.var(second).named("later_entry");
                Some([code.var(first).named("entry"), code.var(second).named("next_entry"), later])
            }
        };
        Walk { tiles, entries }
    }

    /// The tile at a position, where the walk is.
    pub fn this(&self, position: Val<'k, i32>) -> KeyTile<'k> {
        match self.entries {
            None => self.tiles.at(position),
            Some([this, ..]) => KeyTile::of_entry(position, this.get()),
        }
    }

    /// The tile after the one at a position, which there is.
    pub fn next(&self, position: Val<'k, i32>) -> KeyTile<'k> {
        match (self.tiles, self.entries) {
            (KeyTiles::List { entries, .. }, Some([_, next, later])) => {
                later.set(entries.at(position).plus(2).load());
                KeyTile::of_entry(position + 1, next.get())
            }
            (tiles, _) => tiles.at(position + 1),
        }
    }

    /// Moves to the tile that was the next.
    pub fn advance(&self) {
        if let Some([this, next, later]) = self.entries {
            this.set(next.get());
            next.set(later.get());
        }
    }
}
