//! K's rows as quantisers take them: minus the mean, whose collection runs ahead, and rotated.

use sage_ptx::{Code, Global, Val};

use super::ahead::{self, Work};
use super::input::InputParams;
use super::statistics::{ColumnStatistics, LastBlock, Outputs};
use super::tile_load::{CHUNK, Head, ROWS, RowOrder, Rows, Source, tile_grid};
use crate::rotation::{RowLayout, rotate};
use crate::sequence::KEY_TILE;

/// What is subtracted from each of K's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyMean {
    /// Nothing.
    Zero,
    /// The mean of all rows, which the kernel computes and writes.
    Collected,
    /// What an earlier launch has written.
    Given,
}

impl KeyMean {
    /// Part of a kernel's name.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            KeyMean::Zero => "",
            KeyMean::Collected => "_smooth",
            KeyMean::Given => "_mean",
        }
    }

    /// Part of a kernel's description.
    pub(super) const fn description(self) -> &'static str {
        match self {
            KeyMean::Zero => "",
            KeyMean::Collected => ", smoothed",
            KeyMean::Given => ", smoothed by a given mean",
        }
    }

    /// Blocks along x, y and z of a kernel that quantises K, where the longest sequence has `max_kv_len` keys and,
    /// where they are collected, statistics are `lead` heads ahead.
    pub(super) fn grid(self, max_kv_len: usize, kv_heads: usize, sequences: usize, lead: usize) -> [u32; 3] {
        if self == KeyMean::Collected {
            ahead::grid(max_kv_len, kv_heads, sequences, lead)
        } else {
            tile_grid(max_kv_len, kv_heads, sequences)
        }
    }
}

/// What a kernel that quantises K reads, and where its means are.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyPass<'a, 'k> {
    pub source: &'a Source,
    pub mean: KeyMean,
    pub rotate: bool,
    pub input: &'a InputParams<'k>,
    pub means: Global<'k, f32>,
    pub partials: Global<'k, f32>,
    pub arrivals: Global<'k, u32>,
    /// Tiles of the workspace, all sequences together.
    pub key_tiles: Val<'k, i32>,
    pub lead: Val<'k, i32>,
}

impl<'k> KeyPass<'_, 'k> {
    /// The block's work: it collects a tile's columns, or calls `quantise` with the tile's rows, which are on their way.
    pub fn run(&self, code: &'k Code, quantise: impl Fn(&SmoothedKeys<'k>)) {
        let collected = self.mean == KeyMean::Collected;
        let work = if collected {
            Work::new(code, self.input.heads, self.input.sequences, self.lead)
        } else {
            Work::quantise_only(code, self.input.heads, self.input.sequences)
        };
        let head = Head::at(code, self.source, self.input, [work.sequence, work.head]);
        let first_tile = head.head * self.key_tiles + head.sequence.first_tile;
        let mean = ColumnStatistics::Mean;
        let last_block = collected
            .then(|| LastBlock::new(&head, mean, first_tile, work.tile, &work, self.partials, self.arrivals));
        let Some(last_block) = &last_block else {
            return quantise(&self.load(&head, &work, first_tile, None));
        };
        let outputs =
            Outputs { mean: self.means, scale: self.means, factor: self.means, v_max: code.constant(0.0) };
        let collect = || outputs.collect(&head, work.tile, mean, RowOrder::Modulo8, last_block);
        code.if_else(work.collects, collect, || {
            quantise(&self.load(&head, &work, first_tile, Some(last_block)))
        });
    }

    fn load(
        &self,
        head: &Head<'k>,
        work: &Work<'k>,
        first_tile: Val<'k, i32>,
        last_block: Option<&LastBlock<'k>>,
    ) -> SmoothedKeys<'k> {
        let (code, tile) = (head.code, work.tile);
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()));
        // The tile does not depend on the statistics: it is on its way while the block looks whether they are there.
        let rows = head.load(tile, RowOrder::Modulo8);
        let workspace_tile = (first_tile + tile).named("workspace_tile");
        if let Some(last_block) = last_block {
            last_block.wait(head);
        }
        let mean = (self.mean != KeyMean::Zero).then(|| head.channels(self.means));
        let rotated = self.rotate.then(|| rotated(head, &rows, mean));
        SmoothedKeys { head: *head, rows, mean, rotated, workspace_tile }
    }
}

/// A thread's rows of a tile of K, in the order [`RowOrder::Modulo8`].
pub(super) struct SmoothedKeys<'k> {
    pub head: Head<'k>,
    pub rows: Rows<'k>,
    pub mean: Option<[Val<'k, f32>; CHUNK]>,
    rotated: Option<[[Val<'k, f32>; CHUNK]; ROWS]>,
    pub workspace_tile: Val<'k, i32>,
}

impl<'k> SmoothedKeys<'k> {
    /// The thread's channels of its `i`-th row.
    #[track_caller]
    pub fn row(&self, i: usize) -> [Val<'k, f32>; CHUNK] {
        match &self.rotated {
            Some(rotated) => rotated[i],
            None => subtract(self.rows.row(i), self.mean),
        }
    }
}

/// The thread's rows, smoothed and rotated.
fn rotated<'k>(
    head: &Head<'k>,
    rows: &Rows<'k>,
    mean: Option<[Val<'k, f32>; CHUNK]>,
) -> [[Val<'k, f32>; CHUNK]; ROWS] {
    head.code.note("rotation");
    let lanes = head.source.padded_dim() / CHUNK;
    let layout = RowLayout { per: CHUNK, lanes, lane: head.chunk };
    std::array::from_fn(|i| {
        let mut row = subtract(rows.row(i), mean);
        rotate(&mut row, &layout, head.source.head_dim);
        row
    })
}

/// A row minus the mean.
#[track_caller]
pub(super) fn subtract<'k>(
    row: [Val<'k, f32>; CHUNK],
    mean: Option<[Val<'k, f32>; CHUNK]>,
) -> [Val<'k, f32>; CHUNK] {
    match mean {
        Some(mean) => std::array::from_fn(|channel| row[channel] - mean[channel]),
        None => row,
    }
}
