//! V to E4M3 tiles, channels as rows: `e4m3((V − mean) · (v_max / max))`.

use sage_core::oracle::E4M3_MAX;
use sage_ptx::{Code, Program, Target, Val, kernel};

use super::ahead::{self, Work};
use super::statistics::{ColumnStatistics, LastBlock, Outputs, Part};
use super::tile_load::{CHUNK, Head, ROWS, RowOrder, Rows, Source, tile_grid};
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::operand::tile_columns;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Quantises V into the workspace, a block for each tile. E4M3 needs sm_89.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantizeVConfig {
    /// V as given.
    pub source: Source,
    /// Whether each channel's mean is subtracted first.
    pub smooth: bool,
    /// Where scales come from.
    pub scales: ValueScales,
}

/// Blocks that collect the tiles of a head that was marked, and as many that quantise them. Those of the other heads
/// end at once: a block for each tile would take 24 µs to do so with 128 heads of 8192 tokens.
const MARKED_BLOCKS: i32 = 16;

/// Where the scales of V's channels come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ValueScales {
    /// All rows, by another block for each tile, which collects its columns.
    Collected,
    /// A launch before, from some rows: heads are marked in which a value exceeds what E4M3 holds.
    Given,
    /// All rows, but only of heads that were marked. The others are left as they are.
    CollectedWhereMarked,
}

kernel_params! {
    /// What a launch of [`QuantizeVConfig`] passes. Strides are in elements.
    QuantizeVParams, QuantizeVArgs {
        /// V as given.
        input: input,
        /// E4M3 tiles.
        out: [u8],
        /// Means, `[sequences][kv_heads][padded_dim]`, where smoothing.
        mean: [f32],
        /// Scales, as the means. 0 for a channel of zeros, NaN for one with a non-finite value.
        scale: [f32],
        /// What channels are multiplied by, as the means. 0 where the scale is 0 or NaN.
        factor: [f32],
        /// `[kv_heads][key_tiles][`[`ColumnStatistics::partials`]`][padded_dim]`.
        partials: [f32],
        /// `[sequences][kv_heads]`, zeros before every launch.
        arrivals: [u32],
        /// Heads in which a value exceeds what E4M3 holds, where scales are from some rows: `[sequences][kv_heads]`,
        /// not zero for such a head. Zeros before the launch that marks them.
        marked: [u32],
        /// Tiles of the workspace, all sequences together.
        key_tiles: i32,
        /// Largest magnitude of quantised values: 448, or 2.25 where fp16 accumulates.
        v_max: f32,
        /// Heads that statistics are ahead by, at least 1, as in the grid.
        lead: i32,
    }
}

/// Words between neighbouring chunks' channels in shared memory: 64 bytes of a channel, and 16 that spread the writes
/// of a warp over the banks and keep reads of 16 bytes aligned.
const CHANNEL_WORDS: usize = 20;

impl QuantizeVConfig {
    /// The statistics that the kernel computes.
    pub const fn statistics(&self) -> ColumnStatistics {
        if self.smooth { ColumnStatistics::MeanAndScale } else { ColumnStatistics::Scale }
    }

    /// Bytes of a tile.
    pub const fn tile_bytes(&self) -> usize {
        KEY_TILE * self.columns()
    }

    /// Channels of a tile.
    const fn columns(&self) -> usize {
        tile_columns(self.source.head_dim)
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z, where the longest sequence has `max_kv_len` keys and, where they are collected,
    /// statistics are `lead` heads ahead.
    pub fn grid(&self, max_kv_len: usize, kv_heads: usize, sequences: usize, lead: usize) -> [u32; 3] {
        match self.scales {
            ValueScales::Collected => ahead::grid(max_kv_len, kv_heads, sequences, lead),
            ValueScales::Given => tile_grid(max_kv_len, kv_heads, sequences),
            ValueScales::CollectedWhereMarked => grid(2 * MARKED_BLOCKS as usize, kv_heads * sequences),
        }
    }

    fn write(&self, code: &Code) {
        // With means, a kernel that combines columns needs a few registers more.
        let threads = if self.smooth { 896 } else { 1024 };
        self.source.bound_registers(code, threads);
        let p = QuantizeVParams::declare(code);
        let work = match self.scales {
            ValueScales::Collected => Work::new(code, p.input.heads, p.input.sequences, p.lead),
            _ => Work::quantise_only(code, p.input.heads, p.input.sequences),
        };
        let head = Head::at(code, &self.source, &p.input, [work.sequence, work.head]);
        let statistics = self.statistics();
        let first_tile = head.head * p.key_tiles + head.sequence.first_tile;
        let last_block =
            |tile| LastBlock::new(&head, statistics, first_tile, tile, &work, p.partials, p.arrivals);
        let outputs = Outputs { mean: p.mean, scale: p.scale, factor: p.factor, v_max: p.v_max };
        let collect = |tile| outputs.collect(&head, tile, statistics, RowOrder::Quads, &last_block(tile));
        let quantise = |tile| self.quantise(&head, &p, tile, first_tile, Some(&last_block(tile)));
        match self.scales {
            ValueScales::Collected => {
                code.if_else(work.collects, || collect(work.tile), || quantise(work.tile));
            }
            ValueScales::Given => self.quantise(&head, &p, work.tile, first_tile, None),
            ValueScales::CollectedWhereMarked => {
                code.exit_when(p.marked.at(head.index).load().eq(0));
                let tiles = head.tiles();
                // Blocks wait for earlier ones alone, so that none waits for one that cannot start.
                code.if_else(
                    work.tile.lt(MARKED_BLOCKS),
                    || code.range_by(work.tile, tiles, MARKED_BLOCKS, collect),
                    || code.range_by(work.tile - MARKED_BLOCKS, tiles, MARKED_BLOCKS, quantise),
                );
            }
        }
    }

    fn quantise<'k>(
        &self,
        head: &Head<'k>,
        p: &QuantizeVParams<'k>,
        tile: Val<'k, i32>,
        first_tile: Val<'k, i32>,
        last_block: Option<&LastBlock<'k>>,
    ) {
        let code = head.code;
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()));
        // The tile does not depend on the statistics: it is on its way while the block looks whether they are there.
        let rows = head.load(tile, RowOrder::Quads);
        if let Some(last_block) = last_block {
            last_block.wait(head);
        }

        code.note("E4M3, four tokens of a channel to a register");
        let factor = head.channels(p.factor);
        if last_block.is_none() {
            let magnitudes = Part::Magnitude.of_rows(&rows.only_counted());
            let exceeds = |channel: usize| {
                let (magnitude, factor) = (magnitudes[channel], factor[channel]);
                // NaN compares as false.
                !(magnitude * factor).le(E4M3_MAX) | (factor.eq(0.0) & magnitude.ne(0.0))
            };
            let some = (0..CHUNK).map(exceeds).reduce(|a, b| a | b).unwrap_or(code.constant(false));
            code.when(some, || {
                p.marked.at(head.index).atomic(sage_ptx::isa::AtomicOp::Add, 1u32);
            });
        }
        let mean = self.smooth.then(|| head.channels(p.mean));
        let chunks = self.source.padded_dim() / CHUNK;
        // Channels that are equal modulo 8 lie together, and blocks of them an odd number of half bank rows apart.
        let block_words = chunks * CHANNEL_WORDS + 16;
        let transposed = code.shared::<u32>("transposed", CHUNK * block_words);
        // Group of 16 tokens and place in it: two groups for each half of the threads that share a chunk.
        let place = ((head.part >> 2) << 3) + (head.part & 3);
        let to = transposed.at(head.chunk * CHANNEL_WORDS as i32 + place);
        for channel in 0..CHUNK {
            let codes = self.codes(&rows, channel, factor[channel], mean.map(|mean| mean[channel]));
            for (group, word) in codes.into_iter().enumerate() {
                to.plus((channel * block_words + group * 4) as i32).store(word);
            }
        }
        code.barrier();

        code.note("16 tokens of a channel are 16 bytes");
        let (group, channel) = (head.thread & 3, head.thread >> 2);
        let from = transposed
            .at((channel & 7) * block_words as i32 + (channel >> 3) * CHANNEL_WORDS as i32 + (group << 2));
        let start = (first_tile + tile).widen() * i64::from(self.tile_bytes() as i32);
        let out = p.out.at(start).at(head.thread << 4).cast::<u32>();
        let width = self.source.padded_dim();
        for i in (0..KEY_TILE / 16).filter(|i| i * width / 4 < self.columns()) {
            let chunks_further = i * width / 4 / CHUNK;
            let words = from.plus((chunks_further * CHANNEL_WORDS) as i32).load_vector::<4>();
            out.plus((i * width * 4) as i32).store_vector(words);
        }
    }

    /// The codes of the thread's rows of a channel, a register for each of its groups of 16 tokens.
    fn codes<'k>(
        &self,
        rows: &Rows<'k>,
        channel: usize,
        factor: Val<'k, f32>,
        mean: Option<Val<'k, f32>>,
    ) -> [Val<'k, u32>; ROWS / 4] {
        let mut column = rows.column(channel);
        if let Some(mean) = mean {
            for (i, x) in column.iter_mut().enumerate() {
                *x = rows.valid(i).select(*x - mean, 0.0);
            }
        }
        let column = column.map(|x| x * factor);
        std::array::from_fn(|group| {
            let word = Val::pack_e4m3(std::array::from_fn(|i| column[4 * group + i]));
            // Zeros also where a value that is not finite spoils the channel, and no negative ones.
            factor.eq(0.0).select(0u32, word)
        })
    }
}

impl Kernel for QuantizeVConfig {
    fn name(&self) -> String {
        let smooth = if self.smooth { "_smooth" } else { "" };
        let scales = match self.scales {
            ValueScales::Collected => "",
            ValueScales::Given => "_given",
            ValueScales::CollectedWhereMarked => "_marked",
        };
        format!("quantize_v_e4m3{smooth}{scales}_{}", self.source.suffix())
    }

    fn description(&self) -> String {
        let smooth = if self.smooth { ", smoothed" } else { "" };
        let scales = match self.scales {
            ValueScales::Collected => "",
            ValueScales::Given => ", with given scales",
            ValueScales::CollectedWhereMarked => ", of heads that given scales do not fit",
        };
        format!("V to E4M3{smooth}{scales}; {}", self.source.description())
    }

    fn oldest_target(&self) -> Target {
        Target::SM_89
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
