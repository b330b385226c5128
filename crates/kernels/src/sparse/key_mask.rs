//! Masks of keys alone, as of padding: everything that attention asks of them, in one launch.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Global, Program, Shared, Stored, Val, kernel, lane_column};

use super::list_tiles::List;
use super::mask_words::LANES;
use super::pack_mask::{Element, of_pairs, packed};
use super::{ALL, NONE, Packing, SOME, STRIPS, VECTOR};
use crate::attention::{CLEARED_TILE, CUT_TILE, MASKED_TILE, MaskForm};
use crate::counters::clear_counters;
use crate::grid;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::preprocess::{SEEN_WORDS, counts_and_is_visible};
use crate::sequence::KEY_TILE;

/// Warps of a block, which share out the tiles of keys, and then the lists.
const WARPS: usize = 16;

/// Most keys of a mask: the classes of their tiles are in shared memory.
pub(crate) const MOST_KEYS: usize = 128 << 10;

/// What a tile's number has beside its class where every query sees all of its keys.
const ALL_VISIBLE: u32 = 1 << 2;
/// The bits of its class.
const CLASS: u32 = ALL_VISIBLE - 1;

/// Reads a mask that is the same for all queries and heads, where no other mask hides keys: what
/// [`SeenKeysConfig`](crate::preprocess::SeenKeysConfig), [`PackMaskConfig`](super::PackMaskConfig) and
/// [`ListTilesConfig`](super::ListTilesConfig) make of other masks, in one launch, a block for each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyMaskConfig {
    /// The mask, which there is.
    pub mask: MaskForm,
    /// How elements are packed, where they are.
    pub packing: Option<Packing>,
    /// Keys of an attention kernel's tile.
    pub tile_keys: usize,
    /// Whether values are read as given, whose rows that no query sees are to be cleared.
    pub clears: bool,
}

kernel_params! {
    /// What a launch of [`KeyMaskConfig`] passes. Strides are in elements.
    KeyMaskParams, KeyMaskArgs {
        /// The mask.
        mask: (tensor 4),
        /// Keys.
        keys: i32,
        /// Sequences with a mask of their own.
        sequences: i32,
        /// Which keys of a tile some query sees, as [`SeenKeysConfig`](crate::preprocess::SeenKeysConfig) has it.
        seen: [u32],
        /// Words from one sequence to the next.
        seen_stride: i32,
        /// Packed elements, as [`PackMaskConfig`](super::PackMaskConfig) has them; of biases only those that
        /// change or hide a score of their tile.
        words: [u32],
        /// Lists of a sequence, one for each tile of queries.
        q_tiles: i32,
        /// Tiles of each list, `[sequences][q_tiles]`.
        tile_counts: [i32],
        /// The lists, `[sequences][q_tiles][list_stride]`, each with
        /// [`ENTRIES_BEHIND`](crate::attention::ENTRIES_BEHIND) entries behind it.
        tile_lists: [u32],
        /// Entries from one list to the next.
        list_stride: i32,
        /// Counters of the launches that follow, which the first block sets to zero.
        counters: [u32],
        /// How many.
        counter_count: i32,
    }
}

impl KeyMaskConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, sequences: usize) -> [u32; 3] {
        grid::grid(1, sequences)
    }

    fn write<'k, B: Stored>(&self, code: &'k Code, read: impl Fn(Val<'k, B::Value>) -> Element<'k>) {
        let p = KeyMaskParams::declare(code);
        let sequence = grid::number(code);
        clear_counters(code, p.counters, p.counter_count, (WARPS * LANES) as u32);
        code.exit_when(sequence.ge(p.sequences));
        let (warp, lane) = (code.warp_index(), code.lane_index());
        let classes = code.shared::<u32>("classes", MOST_KEYS / KEY_TILE);
        let mask = p.mask.start.cast::<B>().at(sequence.widen() * p.mask.batch_stride());
        let seen = p.seen.at(sequence.mul_wide(p.seen_stride));
        let tiles = p.keys.div_ceil(KEY_TILE);

        code.note("the classes of all tiles");
        code.range_by(warp, tiles, WARPS as i32, |tile| {
            let of_half = |half: usize| {
                let key = tile * KEY_TILE as i32 + (lane + (half * LANES) as i32);
                let there = key.lt(p.keys);
                let key = key.min(p.keys - 1);
                let element = read(mask.at(key.widen() * p.mask.key_stride()).load());
                let [counts, visible] = match self.mask {
                    MaskForm::Bias(dtype) => counts_and_is_visible(element.bias, dtype),
                    MaskForm::None | MaskForm::Bool => [element.visible; 2],
                };
                let kept = element.kept | !there;
                [counts & there, visible & there, kept].map(|is| code.ballot(is))
            };
            let [[counts, visible, kept], [counts_above, visible_above, kept_above]] = [0, 1].map(of_half);
            code.when(lane.eq(0), || {
                let words = [counts, counts_above, visible, visible_above];
                seen.at(tile * SEEN_WORDS as i32).store_vector::<SEEN_WORDS>(words);
                let partial = (kept & kept_above).eq(u32::MAX).select(ALL, SOME);
                let class = (visible | visible_above).eq(0u32).select(NONE, partial);
                let all_visible = (visible & visible_above).eq(u32::MAX).select(ALL_VISIBLE, 0u32);
                classes.at(tile).store(class | all_visible);
            });
            match self.packing {
                Some(packing @ Packing::Bits) => {
                    let own = [visible, visible_above].map(|word| of_pairs(word >> (2 * (lane & 3))));
                    let of_row = own[0] | (own[1] << 8);
                    let word = of_row | (of_row << 16);
                    let words = self.words(&p, sequence, tiles, tile, packing);
                    for strip in 0..STRIPS {
                        words.plus((strip * packing.strip_words()) as i32).at(lane).store(word);
                    }
                }
                Some(packing @ Packing::Biases(dtype)) => {
                    let changed = !(kept & kept_above).eq(u32::MAX);
                    code.when(changed & (visible | visible_above).ne(0u32), || {
                        let biases = self.biases(&p, &mask, tile, &read);
                        let words = self.words(&p, sequence, tiles, tile, packing);
                        for (index, vector) in packed(dtype, &biases).chunks_exact(VECTOR).enumerate() {
                            for strip in 0..STRIPS {
                                let first = strip * packing.strip_words() + index * VECTOR * LANES;
                                let to = words.plus(first as i32).at(lane * VECTOR as i32);
                                to.store_vector::<VECTOR>(std::array::from_fn(|i| vector[i]));
                            }
                        }
                    });
                }
                None => {}
            }
        });
        code.barrier();
        self.list(code, &p, sequence, classes);
    }

    /// Where the words of a tile go.
    fn words<'k>(
        &self,
        p: &KeyMaskParams<'k>,
        sequence: Val<'k, i32>,
        tiles: Val<'k, i32>,
        tile: Val<'k, i32>,
        packing: Packing,
    ) -> Global<'k, u32> {
        let number = sequence.mul_wide(tiles) + tile.widen();
        p.words.at(number * packing.tile_words() as i64)
    }

    /// The lane's biases of a tile, in the order of [`super::element`]: those of its second row are those of its first.
    fn biases<'k, B: Stored>(
        &self,
        p: &KeyMaskParams<'k>,
        mask: &Global<'k, B>,
        tile: Val<'k, i32>,
        read: &impl Fn(Val<'k, B::Value>) -> Element<'k>,
    ) -> Vec<Val<'k, f32>> {
        let code = tile.code();
        let first = tile * KEY_TILE as i32 + lane_column(code.lane_index());
        let of_row: Vec<_> = (0..KEY_TILE as i32)
            .filter(|column| column % 8 < 2)
            .map(|column| {
                let key = (first + column).min(p.keys - 1);
                read(mask.at(key.widen() * p.mask.key_stride()).load()).bias
            })
            .collect();
        [&of_row[..], &of_row[..]].concat()
    }

    /// Writes the lists, which are all alike.
    fn list<'k>(
        &self,
        code: &'k Code,
        p: &KeyMaskParams<'k>,
        sequence: Val<'k, i32>,
        classes: Shared<'k, u32>,
    ) {
        code.note("the lists");
        let lane = code.lane_index();
        let tiles = p.keys.div_ceil(self.tile_keys);
        // A tile of fewer keys than a class has is one of its parts.
        let parts = self.tile_keys.div_ceil(KEY_TILE);
        let last = (p.keys.div_ceil(KEY_TILE) - 1).max(0);
        code.range_by(code.warp_index(), p.q_tiles, WARPS as i32, |q_tile| {
            let list = (sequence * p.q_tiles + q_tile).named("list");
            let written = List::new(lane, p.tile_lists.at(list.mul_wide(p.list_stride)));
            code.range_by(0, tiles, LANES as i32, |base| {
                let tile = base + lane;
                let of_parts: Vec<_> = (0..parts as i32)
                    .map(|part| {
                        let part = tile * self.tile_keys as i32 / KEY_TILE as i32 + part;
                        (part.le(last), classes.at(part.min(last)).load())
                    })
                    .collect();
                let class = |word: Val<'k, u32>| word & CLASS;
                let any = |is: &dyn Fn(Val<'k, bool>, Val<'k, u32>) -> Val<'k, bool>| {
                    let of_parts = of_parts.iter().map(|&(there, word)| is(there, word));
                    of_parts.reduce(|a, b| a | b).unwrap_or(code.constant(false))
                };
                let kept = tile.lt(tiles) & any(&|there, word| there & class(word).ne(NONE));
                let masked = any(&|there, word| there & class(word).ne(ALL));
                let cleared = any(&|there, word| !there | (word & ALL_VISIBLE).eq(0u32));
                let cut = ((tile + 1) * self.tile_keys as i32).gt(p.keys);
                let flag = |is: Val<'k, bool>, flag: u32| is.select(flag, 0u32);
                let mut entry = tile.reinterpret::<u32>() | flag(cut, CUT_TILE) | flag(masked, MASKED_TILE);
                if self.clears {
                    entry = entry | flag(cleared, CLEARED_TILE);
                }
                written.add(kept, || entry);
            });
            written.end(|| p.tile_counts.at(list));
        });
    }
}

impl Kernel for KeyMaskConfig {
    fn name(&self) -> String {
        let packing = self.packing.map_or(String::new(), |packing| format!("_{}", packing.name()));
        let clears = if self.clears { "_clears" } else { "" };
        format!("key_mask_{}{packing}_k{}{clears}", self.mask.name(), self.tile_keys)
    }

    fn description(&self) -> String {
        let packed = self.packing.map_or("", |_| ", its elements packed");
        format!("lists of tiles of {} keys by a mask of keys{packed}; {}", self.tile_keys, self.mask.name())
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), (WARPS * LANES) as u32, |code| match self.mask {
            // A byte that is not 0 hides nothing.
            MaskForm::None | MaskForm::Bool => self.write::<u8>(code, |byte| Element::of_flag(byte.ne(0u32))),
            MaskForm::Bias(DType::F16) => self.write::<f16>(code, |x| Element::of_bias(x.to_f32())),
            MaskForm::Bias(DType::BF16) => self.write::<bf16>(code, |x| Element::of_bias(x.to_f32())),
            MaskForm::Bias(DType::F32) => self.write::<f32>(code, Element::of_bias),
        })
    }
}
