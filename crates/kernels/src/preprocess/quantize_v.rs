//! V to E4M3 tiles, channels as rows: `e4m3((V − mean) · (v_max / max))`.

use sage_ptx::{Code, Program, Val, kernel};

use super::ahead::{self, Work};
use super::statistics::{ColumnStatistics, Meeting, Outputs};
use super::tile_load::{CHUNK, Head, ROWS, RowOrder, Rows, Source, input};
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Quantises V into the workspace: a block for each tile, and another that collects its columns. E4M3 needs sm_89.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantizeVConfig {
    /// V as given.
    pub source: Source,
    /// Whether each channel's mean is subtracted first.
    pub smooth: bool,
}

kernel_params! {
    /// What a launch of [`QuantizeVConfig`] passes. Strides are in elements.
    QuantizeVParams, QuantizeVArgs {
        /// V as given.
        x: [u16],
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
        /// Boundaries of packed sequences, or the valid keys of each batch entry.
        cu_seqlens: [i32],
        /// Stride of the batch.
        stride_batch: i64,
        /// Stride of the heads.
        stride_head: i64,
        /// Stride of the rows.
        stride_row: i64,
        /// Rows of the tensor.
        rows: i32,
        /// Tiles of the workspace, all sequences together.
        key_tiles: i32,
        /// Largest magnitude of quantised values: 448, or 2.25 where fp16 accumulates.
        v_max: f32,
        /// Heads of a sequence.
        kv_heads: i32,
        /// Sequences.
        sequences: i32,
        /// Heads that statistics are ahead by, at least 1, as in the grid.
        lead: i32,
    }
}

/// Words between neighbouring chunks' channels in shared memory: 64 bytes of a channel, and 16 that spread the writes of a
/// warp over the banks and keep reads of 16 bytes aligned.
const CHANNEL_WORDS: usize = 20;

impl QuantizeVConfig {
    /// The statistics that the kernel computes.
    pub const fn statistics(&self) -> ColumnStatistics {
        if self.smooth { ColumnStatistics::MeanAndScale } else { ColumnStatistics::Scale }
    }

    /// Bytes of a tile.
    pub const fn tile_bytes(&self) -> usize {
        KEY_TILE * self.source.padded_dim()
    }

    /// Name of the kernel, unique for the configuration.
    pub fn name(&self) -> String {
        let smooth = if self.smooth { "_smooth" } else { "" };
        format!("quantize_v_e4m3{smooth}_{}", self.source.suffix())
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z, where the longest sequence has `max_kv_len` keys and statistics are `lead` heads ahead.
    pub fn grid(&self, max_kv_len: usize, kv_heads: usize, sequences: usize, lead: usize) -> [u32; 3] {
        ahead::grid(max_kv_len, kv_heads, sequences, lead)
    }

    /// The kernel.
    pub fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }

    fn write(&self, code: &Code) {
        // With means, a kernel that combines columns needs a few registers more.
        let threads = if self.smooth { 896 } else { 1024 };
        self.source.bound_registers(code, threads);
        let p = QuantizeVParams::declare(code);
        let work = Work::new(code, p.kv_heads, p.sequences, p.lead);
        let head = Head::at(code, &self.source, &input!(p), [work.sequence, work.head], p.kv_heads);
        let statistics = self.statistics();
        let first_tile = head.head * p.key_tiles + head.sequence.first_tile;
        let meeting = Meeting::new(&head, statistics, first_tile, work.tile, p.partials, p.arrivals);
        let outputs = Outputs { mean: p.mean, scale: p.scale, factor: p.factor, v_max: p.v_max };
        let collect = || outputs.collect(&head, work.tile, statistics, RowOrder::Quads, &meeting);
        let quantise = || self.quantise(&head, &p, work.tile, first_tile, &meeting);
        code.if_else(work.collects, collect, quantise);
    }

    fn quantise<'k>(
        &self,
        head: &Head<'k>,
        p: &QuantizeVParams<'k>,
        tile: Val<'k, i32>,
        first_tile: Val<'k, i32>,
        meeting: &Meeting<'k>,
    ) {
        let code = head.code;
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()));
        // The tile does not depend on the statistics: it is on its way while the block looks whether they are there.
        let rows = head.load(tile, RowOrder::Quads);
        meeting.wait(head);

        code.note("E4M3, four tokens of a channel to a register");
        let factor = head.channels(p.factor);
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
        for i in 0..KEY_TILE / 16 {
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
