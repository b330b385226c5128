//! Which keys the queries of a head see where there is an explicit mask: core's `SeenKeys`, for each tile of keys.
//!
//! Two launches: the first reads the mask, a block for each tile of keys, and stops early where all of its keys count;
//! the second, a warp for each head of a sequence, says how many keys before each tile count, so that some of them can
//! be picked by their rank.

use half::{bf16, f16};
use sage_core::{DType, padding_bias};
use sage_ptx::isa::AtomicOp;
use sage_ptx::{Code, Global, Program, Stored, Val, Var, kernel};

use crate::attention::MaskForm;
use crate::counters::clear_counters;
use crate::grid::{BlockHead, grid};
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::{KEY_TILE, LengthParams, Lengths, Sequence};

/// Words of a tile: keys that count, then keys that are visible, 32 to a word.
pub const SEEN_WORDS: usize = 4;

/// Warps of a block, which share out the mask's rows.
const WARPS: usize = 8;

/// Rows that a warp has in flight.
const IN_FLIGHT: usize = 4;

/// Lanes of a warp.
const LANES: i32 = 32;

/// Reduces a mask over the query rows that share a key head: `[tiles + 1][SEEN_WORDS]` for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeenKeysConfig {
    /// The mask, which there is.
    pub mask: MaskForm,
    /// Where the lengths of sequences come from; not packed.
    pub lengths: Lengths,
}

kernel_params! {
    /// What a launch of [`SeenKeysConfig`] passes. Strides are in elements of the mask.
    SeenKeysParams, SeenKeysArgs {
        /// The mask.
        mask: (tensor 4),
        /// Query heads whose rows are looked at together: those of a key head, or one where all have the same mask.
        group: i32,
        /// Such groups of a sequence with a mask of their own.
        heads: i32,
        /// Sequences with a mask of their own.
        sequences: i32,
        /// Query rows that are looked at: one where all have the same mask.
        rows: i32,
        /// Query rows of the tensors.
        q_rows: i32,
        /// Key rows of the tensors.
        kv_rows: i32,
        /// Valid keys of each batch entry.
        cu_seqlens: [i32],
        /// Keys visible before the diagonal; 2³⁰ for all.
        window_left: i32,
        /// Keys visible after the diagonal; 2³⁰ for all.
        window_right: i32,
        /// Whether the last query sees the last key at the diagonal (1), or the first the first (0).
        bottom_right: i32,
        /// The words, with strides in tiles.
        seen: [u32],
        /// Tiles from one sequence's words to the next.
        stride_sequence: i32,
        /// Tiles from one head's words to the next.
        stride_head: i32,
        /// Counters of the launches that follow, which the first block sets to zero.
        counters: [u32],
        /// How many.
        counter_count: i32,
    }
}

impl SeenKeysConfig {
    /// Blocks along x, y and z, where the longest sequence has `max_kv_len` keys.
    pub fn grid(&self, max_kv_len: usize, heads: usize, sequences: usize) -> [u32; 3] {
        grid(max_kv_len.div_ceil(KEY_TILE), heads * sequences)
    }

    fn write<'k, B: Stored>(
        &self,
        code: &'k Code,
        counts_and_visible: impl Fn(Val<'k, B::Value>) -> [Val<'k, bool>; 2],
    ) {
        let p = SeenKeysParams::declare(code);
        clear_counters(code, p.counters, p.counter_count, (WARPS * LANES as usize) as u32);
        let [tile, ..] = code.block_index();
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.heads * p.sequences);
        let lengths = LengthParams {
            q_rows: p.q_rows,
            kv_rows: p.kv_rows,
            cu_seqlens_q: p.cu_seqlens,
            cu_seqlens_k: p.cu_seqlens,
            window_left: p.window_left,
            window_right: p.window_right,
            bottom_right: p.bottom_right,
        };
        let sequence = Sequence::new(code, self.lengths, true, &lengths, index);
        let diagonal = p.bottom_right.ne(0).select(sequence.kv_len - p.q_rows, 0).named("diagonal");
        let [warp, lane] = [code.warp_index(), code.lane_index()];
        let keys: [Val<'k, i32>; 2] =
            std::array::from_fn(|half| tile * KEY_TILE as i32 + (lane + LANES * half as i32));
        let mask = p.mask.start.cast::<B>().at(sequence.batch.widen() * p.mask.batch_stride());
        let of_keys = keys.map(|key| key.min(sequence.kv_len - 1).max(0).widen() * p.mask.key_stride());

        // Keys that count and keys that are visible, as far as all warps have found any.
        let words = code.shared::<u32>("words", SEEN_WORDS);
        code.when(code.thread().lt(SEEN_WORDS as i32), || words.at(code.thread()).store(0u32));
        code.barrier();
        // Of the lane's two keys: whether they count, and whether they are visible. There are none beyond the end.
        let found = keys.map(|_| [(); 2].map(|()| code.var(0i32)));
        let settled = |half: usize| found[half][0].get().ne(0) | keys[half].ge(sequence.kv_len);
        // From the last row on: a causal mask shows it all keys.
        let row = code.var(p.group * p.rows - 1 - warp).named("row");
        code.while_loop(
            || row.get().ge(0) & !code.all(settled(0) & settled(1)),
            || {
                let rows: Vec<_> = (0..IN_FLIGHT).map(|i| row.get() - (i * WARPS) as i32).collect();
                let elements: Vec<[Val<'k, B::Value>; 2]> = rows
                    .iter()
                    .map(|&row| {
                        let row = row.max(0);
                        let (head, row) = (head * p.group + row / p.rows, row % p.rows);
                        let of_row =
                            mask.at(head.widen() * p.mask.head_stride() + row.widen() * p.mask.row_stride());
                        of_keys.map(|key| of_row.at(key).load())
                    })
                    .collect();
                for (&row, elements) in rows.iter().zip(elements) {
                    let diagonal = row.max(0) % p.rows + diagonal;
                    let end = (diagonal + p.window_right + 1).min(sequence.kv_len);
                    let start = diagonal - p.window_left;
                    for ((&key, element), found) in keys.iter().zip(elements).zip(&found) {
                        let inside = row.ge(0) & key.ge(start) & key.lt(end);
                        for (found, is) in found.iter().zip(counts_and_visible(element)) {
                            found.set((inside & is).select(1, found.get()));
                        }
                    }
                }
                // What other warps have found need not be found again.
                let ballot = |part: usize, half: usize| code.ballot(found[half][part].get().ne(0));
                let own = [ballot(0, 0), ballot(0, 1), ballot(1, 0), ballot(1, 1)];
                let of_lane = (0..SEEN_WORDS)
                    .rev()
                    .fold(code.constant(0u32), |word, i| lane.eq(i as i32).select(own[i], word));
                let together = code.var(0u32);
                code.when(lane.lt(SEEN_WORDS as i32), || {
                    together.set(words.at(lane).atomic(AtomicOp::Or, of_lane) | of_lane);
                });
                for (half, found) in found.iter().enumerate() {
                    for (part, found) in found.iter().enumerate() {
                        let word = together.get().shuffle((2 * part + half) as i32);
                        found.set(((word >> lane) & 1u32).reinterpret());
                    }
                }
                row.set(row.get() - (IN_FLIGHT * WARPS) as i32);
            },
        );
        code.barrier();
        code.when(code.thread().lt(SEEN_WORDS as i32), || {
            let together = words.at(code.thread()).load();
            let first = index * p.stride_sequence + head * p.stride_head + tile;
            p.seen.at(first.mul_wide(SEEN_WORDS as i32)).at(code.thread()).store(together);
        });
    }
}

impl Kernel for SeenKeysConfig {
    fn name(&self) -> String {
        format!("seen_keys_{}{}", self.mask.name(), self.lengths.suffix())
    }

    fn description(&self) -> String {
        format!("keys that some query sees; {}{}", self.mask.name(), self.lengths.description())
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), WARPS as u32 * LANES as u32, |code| match self.mask {
            // A byte that is not 0 hides nothing.
            MaskForm::None | MaskForm::Bool => self.write::<u8>(code, |byte| {
                let visible = byte.ne(0u32);
                [visible, visible]
            }),
            MaskForm::Bias(DType::F16) => {
                self.write::<f16>(code, |x| counts_and_is_visible(x.to_f32(), DType::F16))
            }
            MaskForm::Bias(DType::BF16) => {
                self.write::<bf16>(code, |x| counts_and_is_visible(x.to_f32(), DType::BF16))
            }
            MaskForm::Bias(DType::F32) => self.write::<f32>(code, |x| counts_and_is_visible(x, DType::F32)),
        })
    }
}

/// Whether a key with such a bias counts, and whether it is visible.
pub(crate) fn counts_and_is_visible(bias: Val<'_, f32>, dtype: DType) -> [Val<'_, bool>; 2] {
    // A bias of NaN is neither hidden nor padding.
    [!bias.le(padding_bias(dtype)), !bias.le(f32::NEG_INFINITY)]
}

/// Says how many keys before each tile count, `[tiles + 1]` for each head, where `tiles` are those of the words. Where
/// no key of a head counts, all visible ones shall: their words are then written over the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RankKeysConfig;

kernel_params! {
    /// What a launch of [`RankKeysConfig`] passes.
    RankKeysParams, RankKeysArgs {
        /// Words of [`SeenKeysConfig`], with strides in tiles.
        seen: [u32],
        /// How many keys before each tile count, with the same strides.
        ranks: [i32],
        /// Tiles of a head.
        tiles: i32,
        /// Heads of a sequence with a mask of their own.
        heads: i32,
        /// Sequences with a mask of their own.
        sequences: i32,
        /// Tiles from one sequence's words to the next.
        stride_sequence: i32,
        /// Tiles from one head's words to the next.
        stride_head: i32,
    }
}

impl RankKeysConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, heads: usize, sequences: usize) -> [u32; 3] {
        grid(1, heads * sequences)
    }

    fn write<'k>(&self, code: &'k Code) {
        let p = RankKeysParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.heads * p.sequences);
        let first = index * p.stride_sequence + head * p.stride_head;
        let seen = p.seen.at(first.mul_wide(SEEN_WORDS as i32));
        let ranks = p.ranks.at(first);
        let lane = code.lane_index();
        let each = (p.tiles + (LANES - 1)) / LANES;
        let (start, end) = (lane * each, ((lane + 1) * each).min(p.tiles));
        let load = |tile: Val<'k, i32>| seen.at(tile * SEEN_WORDS as i32).load_vector::<4>();

        let sums: [Var<'k, i32>; 2] = std::array::from_fn(|_| code.var(0));
        code.range(start, end, |tile| {
            for (sum, words) in sums.iter().zip(load(tile).chunks(2)) {
                sum.set(sum.get() + words[0].count_ones() + words[1].count_ones());
            }
        });
        let [counted, visible] = sums.map(|sum| sum.get());
        let none_counts = code.all(counted.eq(0)).named("none_counts");
        let own = none_counts.select(visible, counted);
        let upto = [1, 2, 4, 8, 16].into_iter().fold(own, |sum, distance| {
            let before = sum.shuffle((lane - distance).max(0));
            sum + lane.ge(distance).select(before, 0)
        });
        let rank = code.var(upto - own).named("rank");
        code.range(start, end, |tile| {
            let [counted_low, counted_high, low, high] = load(tile);
            let low = none_counts.select(low, counted_low);
            let high = none_counts.select(high, counted_high);
            code.when(none_counts, || seen.at(tile * SEEN_WORDS as i32).store_vector([low, high]));
            ranks.at(tile).store(rank.get());
            rank.set(rank.get() + low.count_ones() + high.count_ones());
        });
        code.when(lane.eq(LANES - 1), || ranks.at(p.tiles).store(upto));
    }
}

impl Kernel for RankKeysConfig {
    fn name(&self) -> String {
        "rank_keys".to_owned()
    }

    fn description(&self) -> String {
        "how many keys before each tile count, behind a mask".to_owned()
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), LANES as u32, |code| self.write(code))
    }
}

/// The keys of a head that some query sees, inside the kernels that read them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenKeys<'k> {
    /// Words of the head's first tile.
    words: Global<'k, u32>,
}

impl<'k> SeenKeys<'k> {
    /// The keys of the head whose words are those from tile `first` on.
    pub fn new(seen: Global<'k, u32>, first: Val<'k, i32>) -> Self {
        SeenKeys { words: seen.at(first.mul_wide(SEEN_WORDS as i32)) }
    }

    /// Which keys of a tile count, and which are visible.
    #[track_caller]
    pub fn tile(&self, tile: Val<'k, i32>) -> SeenTile<'k> {
        let [a, b, c, d] = self.words.at(tile * SEEN_WORDS as i32).load_vector();
        SeenTile { counted: [a, b], visible: [c, d] }
    }

    /// Whether key `key` is visible.
    #[track_caller]
    pub fn is_visible(&self, key: Val<'k, i32>) -> Val<'k, bool> {
        let word = (key >> 6) * SEEN_WORDS as i32 + ((key >> 5) & 1) + 2;
        bit(self.words.at(word).load(), key)
    }
}

/// The same, and how many keys before each tile count.
#[derive(Clone, Copy, Debug)]
pub(super) struct RankedKeys<'k> {
    pub seen: SeenKeys<'k>,
    ranks: Global<'k, i32>,
}

impl<'k> RankedKeys<'k> {
    /// The keys of the head whose words and ranks are those from tile `first` on.
    pub fn new(seen: Global<'k, u32>, ranks: Global<'k, i32>, first: Val<'k, i32>) -> Self {
        RankedKeys { seen: SeenKeys::new(seen, first), ranks: ranks.at(first) }
    }

    /// How many keys before tile `tile` count.
    #[track_caller]
    pub fn rank(&self, tile: Val<'k, i32>) -> Val<'k, i32> {
        self.ranks.at(tile).load()
    }

    /// The keys of those ranks among the keys that count, in a head of `tiles` tiles: found side by side, as each step
    /// waits for memory.
    #[track_caller]
    pub fn of_ranks<const N: usize>(
        &self,
        ranks: [Val<'k, i32>; N],
        tiles: Val<'k, i32>,
    ) -> [Val<'k, i32>; N] {
        let code = tiles.code();
        let found = ranks.map(|_| code.var(0i32));
        let step = code.var(1i32).named("step");
        code.while_loop(|| (step.get() * 2).lt(tiles), || step.set(step.get() * 2));
        code.while_loop(
            || step.get().gt(0),
            || {
                let next = found.map(|tile| tile.get() + step.get());
                let of_next = next.map(|tile| self.rank(tile.min(tiles)));
                for (((tile, next), of_next), rank) in found.iter().zip(next).zip(of_next).zip(ranks) {
                    tile.set((next.lt(tiles) & of_next.le(rank)).select(next, tile.get()));
                }
                step.set(step.get() >> 1);
            },
        );
        std::array::from_fn(|i| {
            let tile = found[i].get();
            tile * KEY_TILE as i32 + self.seen.tile(tile).of_rank(ranks[i] - self.rank(tile))
        })
    }
}

/// The same of a tile: 64 keys in two words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenTile<'k> {
    counted: [Val<'k, u32>; 2],
    visible: [Val<'k, u32>; 2],
}

impl<'k> SeenTile<'k> {
    /// Whether key `index` of the tile is visible.
    #[track_caller]
    pub fn is_visible(&self, index: Val<'k, i32>) -> Val<'k, bool> {
        bit_of_two(self.visible, index)
    }

    /// Whether key `index` of the tile counts.
    #[track_caller]
    pub fn counts(&self, index: Val<'k, i32>) -> Val<'k, bool> {
        bit_of_two(self.counted, index)
    }

    /// Which of the rows from `first` on, the start of a group within 32, enter means and scales: a bit each, from the
    /// lowest on.
    #[track_caller]
    pub fn counted_bits(&self, first: usize) -> Val<'k, u32> {
        self.counted[first / 32] >> (first % 32) as i32
    }

    /// Whether all keys of the tile count.
    #[track_caller]
    pub fn all_count(&self) -> Val<'k, bool> {
        (self.counted[0] & self.counted[1]).eq(u32::MAX)
    }

    /// Whether all keys of the tile are visible.
    #[track_caller]
    pub fn all_visible(&self) -> Val<'k, bool> {
        (self.visible[0] & self.visible[1]).eq(u32::MAX)
    }

    /// The tile of those keys alone that count.
    pub fn only_counted(&self) -> Self {
        SeenTile { visible: self.counted, ..*self }
    }

    /// The `rank`-th key that counts.
    #[track_caller]
    fn of_rank(&self, rank: Val<'k, i32>) -> Val<'k, i32> {
        let [low, high] = self.counted;
        let in_low = low.count_ones();
        let upper = rank.ge(in_low);
        let mut word = upper.select(high, low);
        let mut rank = rank - upper.select(in_low, 0);
        let mut index = upper.select(LANES, 0);
        for width in [16, 8, 4, 2, 1] {
            let lower = word & ((1u32 << width) - 1);
            let ones = lower.count_ones();
            let above = rank.ge(ones);
            rank = rank - above.select(ones, 0);
            word = above.select(word >> width, lower);
            index = index + above.select(width, 0);
        }
        index
    }
}

#[track_caller]
fn bit_of_two<'k>([low, high]: [Val<'k, u32>; 2], index: Val<'k, i32>) -> Val<'k, bool> {
    bit(index.lt(LANES).select(low, high), index)
}

/// Bit `index` modulo 32.
#[track_caller]
fn bit<'k>(word: Val<'k, u32>, index: Val<'k, i32>) -> Val<'k, bool> {
    ((word >> (index & (LANES - 1))) & 1u32).ne(0u32)
}
