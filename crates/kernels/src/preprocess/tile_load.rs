//! Reading 64 rows of one head into registers: 16 bytes at a time, all of them in flight at once.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{BF16x2, Code, F16x2, Global, Scalar, Val, Var};

use super::input::InputParams;
use super::seen::{RankedKeys, SeenTile};
use crate::grid::{BlockHead, grid};
use crate::sequence::{KEY_TILE, Lengths, Sequence};

/// Channels of a thread: 16 bytes.
pub(crate) const CHUNK: usize = 8;

/// Rows that a thread holds of each tile. Eight threads share a chunk of channels.
pub(crate) const ROWS: usize = 8;

/// Most channels of a head of a [`Source`]: a block has a thread for each column of a tile.
pub(crate) const MOST_CHANNELS: usize = 256;

/// A tensor of 16-bit elements that a kernel reads, `[batch, heads, rows, head_dim]` with the last dimension
/// contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Element type: f16 or bf16.
    pub dtype: DType,
    /// Channels of a head, 1 to 256.
    pub head_dim: usize,
    /// Whether all rows start at multiples of 16 bytes and are whole such chunks.
    pub aligned: bool,
    /// Where the lengths of sequences come from.
    pub lengths: Lengths,
    /// Whether an explicit mask hides rows, which are keys or their values.
    pub masked: bool,
}

impl Source {
    /// Smallest of 64, 128 and 256 that holds the head's channels: columns of the block of threads, and of statistics.
    pub const fn padded_dim(&self) -> usize {
        match self.head_dim {
            0..=64 => 64,
            65..=128 => 128,
            _ => 256,
        }
    }

    /// Threads of a block: one for each column of a tile.
    pub(super) const fn threads(&self) -> u32 {
        self.padded_dim() as u32
    }

    /// Asks that `threads` threads fit a multiprocessor. With 1024 of 64 registers, 128 KiB of tiles are on their way
    /// to registers or waiting there, which covers the latency of memory. Loads of single elements need more registers:
    /// with a tighter bound, or none, the driver's compiler spills.
    pub(super) fn bound_registers(&self, code: &Code, threads: u32) {
        let threads = if self.aligned { threads } else { 256 };
        code.min_blocks(threads / self.threads());
    }

    /// Part of a kernel's name.
    pub(crate) fn suffix(&self) -> String {
        let unaligned = if self.aligned { "" } else { "_unaligned" };
        let masked = if self.masked { "_masked" } else { "" };
        format!("{}_d{}{unaligned}{}{masked}", self.dtype, self.head_dim, self.lengths.suffix())
    }

    /// The tensor in words.
    pub(crate) fn description(&self) -> String {
        let lengths = self.lengths.description();
        let unaligned = if self.aligned { "" } else { ", unaligned rows" };
        let masked = if self.masked { ", masked" } else { "" };
        format!("{}, head_dim {}{lengths}{unaligned}{masked}", self.dtype, self.head_dim)
    }

    /// Two infinities, below or above every element.
    fn infinities(&self, below: bool) -> u32 {
        let sign = if below { -1.0 } else { 1.0 };
        let bits = match self.dtype {
            DType::F16 => f16::from_f32(sign * f32::INFINITY).to_bits(),
            _ => bf16::from_f32(sign * f32::INFINITY).to_bits(),
        };
        u32::from(bits) << 16 | u32::from(bits)
    }

    /// The channels of registers in single precision; exact.
    #[track_caller]
    pub(super) fn widen_chunk<'k>(&self, words: [Val<'k, u32>; CHUNK / 2]) -> [Val<'k, f32>; CHUNK] {
        let pairs = words.map(|word| self.widen(word));
        std::array::from_fn(|channel| pairs[channel / 2][channel % 2])
    }

    /// Two neighbouring elements in single precision; exact.
    #[track_caller]
    pub(super) fn widen<'k>(&self, word: Val<'k, u32>) -> [Val<'k, f32>; 2] {
        match self.dtype {
            DType::F16 => word.split::<f16>().map(|half| half.to_f32()),
            // The upper half of a single: two integer instructions where conversions would take three.
            _ => [(word << 16).reinterpret(), (word & 0xffff_0000).reinterpret()],
        }
    }
}

/// A block for each tile of 64 rows: tiles along x, so that the blocks of a head start together.
pub(super) fn tile_grid(max_rows: usize, heads: usize, sequences: usize) -> [u32; 3] {
    grid(max_rows.div_ceil(KEY_TILE), heads * sequences)
}

/// Which rows of a tile a thread holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// Rows that are equal modulo 8: those that share a scale per thread lie in few threads.
    Modulo8,
    /// The four rows of two groups of 16 that E4M3 operands hold in neighbouring bytes.
    Quads,
    /// Eight that follow each other.
    Octets,
}

impl RowOrder {
    /// The thread's rows beyond its first.
    pub const fn offsets(self) -> [i32; ROWS] {
        match self {
            RowOrder::Modulo8 => [0, 8, 16, 24, 32, 40, 48, 56],
            RowOrder::Quads => [0, 1, 8, 9, 16, 17, 24, 25],
            RowOrder::Octets => [0, 1, 2, 3, 4, 5, 6, 7],
        }
    }

    /// The first row of the thread that is `part`-th of those with its channels.
    fn first(self, part: Val<'_, i32>) -> Val<'_, i32> {
        match self {
            RowOrder::Modulo8 => part,
            RowOrder::Quads => ((part >> 2) << 5) + ((part & 3) << 1),
            RowOrder::Octets => part << 3,
        }
    }
}

/// One head of one sequence, and the thread's place in each of its tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head<'k> {
    pub code: &'k Code,
    pub source: Source,
    pub sequence: Sequence<'k>,
    /// Index of the head.
    pub head: Val<'k, i32>,
    /// Index of the sequence and head in statistics: `sequence · heads + head`.
    pub index: Val<'k, i32>,
    pub thread: Val<'k, i32>,
    /// The thread's chunk of channels.
    pub chunk: Val<'k, i32>,
    /// The thread's index among the eight with its channels.
    pub part: Val<'k, i32>,
    rows: Global<'k, u16>,
    stride: Val<'k, i64>,
    /// Where rows are masked.
    ranked: Option<RankedKeys<'k>>,
}

impl<'k> Head<'k> {
    /// The block's head in a [`grid`] of all heads of all sequences.
    #[track_caller]
    pub fn new(code: &'k Code, source: &Source, input: &InputParams<'k>) -> Self {
        let block = BlockHead::new(code, input.heads, input.heads * input.sequences);
        Head::at(code, source, input, [block.sequence, block.head])
    }

    /// The head of a sequence with those indices.
    pub fn at(
        code: &'k Code,
        source: &Source,
        input: &InputParams<'k>,
        [index, head]: [Val<'k, i32>; 2],
    ) -> Self {
        let sequence = Sequence::new(code, source.lengths, source.masked, &input.lengths(), index);
        let ranked = source.masked.then(|| {
            let first = index * input.seen_stride_sequence + head * input.seen_stride_head;
            RankedKeys::new(input.seen, input.ranks, first)
        });
        let stride = input.x.row_stride();
        let start = input.x.head(sequence.batch, head) + sequence.kv_start.widen() * stride;
        let chunks = (source.padded_dim() / CHUNK) as i32;
        let thread = code.thread();
        Head {
            code,
            source: *source,
            sequence,
            head,
            index: (index * input.heads + head).named("statistic"),
            thread,
            chunk: (thread & (chunks - 1)).named("chunk"),
            part: (thread >> chunks.ilog2() as i32).named("part"),
            rows: input.x.start.cast().at(start),
            stride,
            ranked,
        }
    }

    /// Rows of the sequence.
    pub fn len(&self) -> Val<'k, i32> {
        self.sequence.kv_len
    }

    /// Tiles of the head.
    #[track_caller]
    pub fn tiles(&self) -> Val<'k, i32> {
        self.len().div_ceil(KEY_TILE)
    }

    /// Rows of the sequence that enter means and scales.
    #[track_caller]
    pub fn counted_len(&self) -> Val<'k, i32> {
        self.ranked.map_or(self.len(), |ranked| ranked.rank(self.tiles()))
    }

    /// Writes what the thread has of a tile of so many columns, where it has some: fewer than threads hold.
    pub fn when_in_tile(&self, columns: usize, write: impl FnOnce()) {
        if columns == self.source.padded_dim() {
            write();
        } else {
            self.code.when(self.chunk.lt((columns / CHUNK) as i32), write);
        }
    }

    /// What an array `[sequences][heads][padded_dim]` holds for the thread's channels.
    #[track_caller]
    pub fn channels(&self, array: Global<'k, f32>) -> [Val<'k, f32>; CHUNK] {
        let of_head = array.at(self.index.widen() * i64::from(self.source.padded_dim() as i32));
        let of_thread = of_head.at(self.chunk * CHUNK as i32);
        let ([a, b, c, d], [e, f, g, h]) = (of_thread.load_vector(), of_thread.plus(4).load_vector());
        [a, b, c, d, e, f, g, h]
    }

    /// Starts loading the thread's rows of a tile that has at least one row. Rows beyond the sequence's end, rows that
    /// no query sees, and channels beyond the head's are zeros.
    #[track_caller]
    pub fn load(&self, tile: Val<'k, i32>, order: RowOrder) -> Rows<'k> {
        let offsets = order.offsets();
        let rows = Rows {
            source: self.source,
            words: offsets.map(|_| [(); CHUNK / 2].map(|()| Var::new(self.code))),
            first: order.first(self.part),
            offsets,
            height: KEY_TILE as i32,
            base: self.rows.at((tile * KEY_TILE as i32).widen() * self.stride),
            left: (self.len() - tile * KEY_TILE as i32).named("rows_left"),
            seen: self.ranked.map(|ranked| ranked.seen.tile(tile)),
        };
        self.start(&rows);
        rows
    }

    /// Starts loading eight rows that follow each other from row `first` of the sequence on, of which the first `left`
    /// count; the others are zeros. Row `first + left - 1` is there, even where `left` is not positive.
    #[track_caller]
    pub fn load_eight(&self, first: Val<'k, i32>, left: Val<'k, i32>) -> Rows<'k> {
        let rows = Rows {
            source: self.source,
            words: [(); ROWS].map(|()| [(); CHUNK / 2].map(|()| Var::new(self.code))),
            first: self.code.constant(0),
            offsets: std::array::from_fn(|i| i as i32),
            height: ROWS as i32,
            base: self.rows.at(first.widen() * self.stride),
            left,
            seen: None,
        };
        self.start(&rows);
        rows
    }

    /// Loads rows `first` to `first + 63` of `count` that lie evenly among those that count; zeros beyond the last, and
    /// in place of rows that there are not.
    #[track_caller]
    pub fn load_sample(&self, first: usize, count: usize) -> Rows<'k> {
        let offsets = RowOrder::Modulo8.offsets();
        let rows = Rows {
            source: self.source,
            words: offsets.map(|_| [(); CHUNK / 2].map(|()| self.code.var(0u32))),
            first: self.part + first as i32,
            offsets,
            height: KEY_TILE as i32,
            base: self.rows,
            left: self.counted_len().min(count as i32),
            seen: None,
        };
        self.code.note("load sampled rows");
        let len = self.counted_len();
        let few = len.le(count as i32);
        // index · len / count, of which no part exceeds 32 bits.
        let (step, rest) = len.split_index(count);
        let place = |i: usize| {
            let index = rows.index(i);
            let spread = index * step + (index * rest).split_index(count).0;
            few.select(index, spread)
        };
        let places: [Val<'k, i32>; ROWS] = std::array::from_fn(place);
        let sampled = match self.ranked {
            // Ranks beyond the last are no row's, and none is loaded for them.
            Some(ranked) => ranked.of_ranks(places, self.len().div_ceil(KEY_TILE)),
            None => places,
        };
        for (i, row) in sampled.into_iter().enumerate() {
            self.code.when(rows.valid(i), || {
                let loaded = self.load_chunk(self.rows.at(row.widen() * self.stride));
                rows.words[i].iter().zip(loaded).for_each(|(word, loaded)| word.set(loaded));
            });
        }
        rows
    }

    #[track_caller]
    fn start(&self, rows: &Rows<'k>) {
        let code = self.code;
        code.note("load a tile");
        let Rows { offsets, base, left, first, .. } = *rows;
        let set = |i: usize, loaded: [Val<'k, u32>; CHUNK / 2]| {
            rows.words[i].iter().zip(loaded).for_each(|(word, loaded)| word.set(loaded));
        };
        let clamped = || {
            for (i, offset) in offsets.into_iter().enumerate() {
                let row = first + offset;
                let valid = rows.valid(i);
                let row = base.at(row.min(left - 1).widen() * self.stride);
                set(i, self.load_chunk(row).map(|word| valid.select(word, 0u32)));
            }
        };
        if !self.source.aligned {
            return clamped();
        }
        let whole = || {
            // Neighbouring rows are few distances apart: each address is the one before plus a known stride.
            let mut row = base.at(first.widen() * self.stride);
            for (i, offset) in offsets.into_iter().enumerate() {
                if let Some(before) = i.checked_sub(1) {
                    row = row.at(self.stride * i64::from(offset - offsets[before]));
                }
                set(i, self.load_chunk(row));
            }
        };
        code.if_else(rows.whole(), whole, clamped);
    }

    /// The thread's channels of a row.
    #[track_caller]
    fn load_chunk(&self, row: Global<'k, u16>) -> [Val<'k, u32>; 4] {
        let (dim, channel) = (self.source.head_dim as i32, self.chunk * CHUNK as i32);
        if self.source.aligned {
            if self.source.head_dim == self.source.padded_dim() {
                return row.at(channel).cast::<u32>().load_streaming();
            }
            let inside = channel.lt(dim);
            let words = row.at(inside.select(channel, 0)).cast::<u32>().load_streaming();
            return words.map(|word| inside.select(word, 0u32));
        }
        let element = |i: usize| {
            let channel = channel + i as i32;
            let [x] = row.at(channel.min(dim - 1)).load_streaming();
            channel.lt(dim).select(x, 0u32)
        };
        std::array::from_fn(|word| element(2 * word) | (element(2 * word + 1) << 16))
    }
}

/// A thread's rows of a tile: 8 rows of 8 channels, two to a register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'k> {
    pub source: Source,
    words: [[Var<'k, u32>; CHUNK / 2]; ROWS],
    first: Val<'k, i32>,
    offsets: [i32; ROWS],
    /// Rows of all threads together, those that the sequence does not have included.
    height: i32,
    base: Global<'k, u16>,
    /// Rows from the tile's first on that the sequence has.
    pub left: Val<'k, i32>,
    /// Where rows are masked.
    pub seen: Option<SeenTile<'k>>,
}

impl<'k> Rows<'k> {
    /// The thread's channels of its `i`-th row, two to a register.
    #[track_caller]
    pub fn words(&self, i: usize) -> [Val<'k, u32>; CHUNK / 2] {
        self.words[i].map(Var::get)
    }

    /// The thread's channels of its `i`-th row.
    #[track_caller]
    pub fn row(&self, i: usize) -> [Val<'k, f32>; CHUNK] {
        self.source.widen_chunk(self.words(i))
    }

    /// A channel of all rows.
    #[track_caller]
    pub fn column(&self, channel: usize) -> [Val<'k, f32>; ROWS] {
        std::array::from_fn(|i| self.source.widen(self.words[i][channel / 2].get())[channel % 2])
    }

    /// The largest or least element of each channel, two channels to a register; NaN where one is. Rows that the
    /// sequence does not have count as zeros, or as nothing.
    #[track_caller]
    pub fn extremes(&self, largest: bool, zeros: bool) -> [Val<'k, u32>; CHUNK / 2] {
        std::array::from_fn(|pair| {
            let column = (0..ROWS).map(|i| {
                let word = self.words[i][pair].get();
                if zeros { word } else { self.valid(i).select(word, self.source.infinities(largest)) }
            });
            let extreme = |a, b| match self.source.dtype {
                DType::F16 => extreme::<F16x2>(a, b, largest),
                _ => extreme::<BF16x2>(a, b, largest),
            };
            column.reduce(extreme).unwrap_or(self.words[0][pair].get())
        })
    }

    /// Index in the tile of the `i`-th row.
    #[track_caller]
    pub fn index(&self, i: usize) -> Val<'k, i32> {
        self.first + self.offsets[i]
    }

    /// Whether the sequence has the `i`-th row, and some query sees it.
    #[track_caller]
    pub fn valid(&self, i: usize) -> Val<'k, bool> {
        let there = self.index(i).lt(self.left);
        self.seen.map_or(there, |seen| there & seen.is_visible(self.index(i)))
    }

    /// Whether the `i`-th row enters means and scales.
    #[track_caller]
    pub fn counts(&self, i: usize) -> Val<'k, bool> {
        self.seen.map_or(self.valid(i), |seen| self.valid(i) & seen.counts(self.index(i)))
    }

    /// Whether the sequence has all rows of the tile, and queries see them.
    #[track_caller]
    pub fn whole(&self) -> Val<'k, bool> {
        let there = self.left.ge(self.height);
        self.seen.map_or(there, |seen| there & seen.all_visible())
    }

    /// Whether the tile is whole, and all of its rows enter means and scales.
    #[track_caller]
    pub fn all_count(&self) -> Val<'k, bool> {
        self.seen.map_or(self.whole(), |seen| self.whole() & seen.all_count())
    }

    /// The rows that enter means and scales; zeros in place of others, which are not valid then.
    #[track_caller]
    pub fn only_counted(&self) -> Self {
        let Some(seen) = self.seen else { return *self };
        let code = self.left.code();
        let words = std::array::from_fn(|i| {
            let counts = self.counts(i);
            self.words(i).map(|word| code.var(counts.select(word, 0u32)))
        });
        Rows { words, seen: Some(seen.only_counted()), ..*self }
    }
}

/// The larger or smaller of two pairs, each by itself.
#[track_caller]
fn extreme<'k, T: Scalar>(a: Val<'k, u32>, b: Val<'k, u32>, largest: bool) -> Val<'k, u32> {
    let (a, b) = (a.reinterpret::<T>(), b.reinterpret::<T>());
    if largest { a.max_nan(b).reinterpret() } else { a.min_nan(b).reinterpret() }
}
