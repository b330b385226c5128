//! A mask laid out as the lanes of a warp hold scores: of a strip of 16 rows and a tile of [`KEY_TILE`] keys, each lane
//! has 32 elements, as bits of one word or as biases side by side.

use std::ops::Range;

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Global, Val};

use crate::sequence::KEY_TILE;

/// Query rows of a strip, as of a tensor core's tile of scores.
pub(crate) const STRIP_ROWS: usize = 16;

/// Lanes of a warp.
pub(super) const LANES: usize = 32;

/// Words of 32 bits that a lane reads at once.
pub(crate) const VECTOR: usize = 4;

/// How a mask's elements are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// A bit each: whether the key is visible.
    Bits,
    /// Biases of this type.
    Biases(DType),
}

impl Packing {
    /// Words of a lane for a strip and a tile of keys.
    pub const fn lane_words(self) -> usize {
        match self {
            Packing::Bits => 1,
            Packing::Biases(dtype) => LANES * dtype.bytes() / 4,
        }
    }

    /// The word of a lane's element.
    const fn word(self, element: usize) -> usize {
        match self {
            Packing::Bits => 0,
            Packing::Biases(dtype) => element * dtype.bytes() / 4,
        }
    }

    /// Words of all lanes.
    pub(crate) const fn tile_words(self) -> usize {
        LANES * self.lane_words()
    }

    /// Part of a kernel's name.
    pub(crate) fn name(self) -> String {
        match self {
            Packing::Bits => "bits".to_owned(),
            Packing::Biases(dtype) => format!("biases_{dtype}"),
        }
    }
}

/// Which of a lane's elements lies in its row `slot` (0 or 1) of a strip at column `column` from its first, of
/// [`KEY_TILE`].
pub(crate) const fn element(slot: usize, column: usize) -> usize {
    slot * (KEY_TILE / 4) + column / 8 * 2 + column % 2
}

/// The words of a head, inside the attention kernel: `[strips][tiles of keys][vectors][lanes]`, where a vector is of up
/// to [`VECTOR`] words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MaskWords<'k> {
    pub packing: Packing,
    /// The head's first word.
    pub start: Global<'k, u32>,
    pub lane: Val<'k, i32>,
    /// Words from one strip to the next; 0 where all rows have the same mask.
    pub stride_strip: Val<'k, i64>,
    /// The last strip that the sequence has, which stands in for those behind it.
    pub last_strip: Val<'k, i32>,
}

impl<'k> MaskWords<'k> {
    /// The lane's words of some strips and a tile of keys: those that hold some of its columns, of [`KEY_TILE`].
    #[track_caller]
    pub fn load(&self, strips: &[Val<'k, i32>], tile: Val<'k, i32>, columns: Range<usize>) -> LaneWords<'k> {
        let of_strip = |&strip: &Val<'k, i32>| {
            let strip = self.start.at(strip.min(self.last_strip).widen() * self.stride_strip);
            let tile = strip.at(tile.mul_wide(self.packing.tile_words() as i32));
            let mut words = vec![None; self.packing.lane_words()];
            if let Packing::Bits = self.packing {
                words[0] = Some(tile.at(self.lane).load());
                return words;
            }
            let needed = [0, 1]
                .into_iter()
                .flat_map(|slot| columns.clone().step_by(8).map(move |column| element(slot, column)));
            for element in needed {
                let first = self.packing.word(element) / VECTOR * VECTOR;
                if words[first].is_none() {
                    let vector = tile.plus((first * LANES) as i32).at(self.lane * VECTOR as i32);
                    let vector = vector.load_vector::<VECTOR>().map(Some);
                    words[first..first + VECTOR].copy_from_slice(&vector);
                }
            }
            words
        };
        LaneWords { packing: self.packing, strips: strips.iter().map(of_strip).collect() }
    }
}

/// A lane's words of some strips and a tile of keys.
#[derive(Clone, Debug)]
pub(crate) struct LaneWords<'k> {
    pub packing: Packing,
    /// The words of each strip, as far as they were loaded.
    strips: Vec<Vec<Option<Val<'k, u32>>>>,
}

impl<'k> LaneWords<'k> {
    /// All words of one strip.
    pub fn of_strip(packing: Packing, words: impl Iterator<Item = Val<'k, u32>>) -> Self {
        LaneWords { packing, strips: vec![words.map(Some).collect()] }
    }

    /// Words whose first columns are others: `with` moves each.
    pub fn map(self, with: impl Fn(Val<'k, u32>) -> Val<'k, u32>) -> Self {
        let moved = |words: Vec<Option<_>>| words.into_iter().map(|word| word.map(&with)).collect();
        LaneWords { strips: self.strips.into_iter().map(moved).collect(), ..self }
    }

    /// The words of the first strip.
    pub fn words(&self) -> impl Iterator<Item = Val<'k, u32>> {
        self.strips[0].iter().copied().flatten()
    }

    fn word(&self, row_slot: usize, column: usize) -> (Val<'k, u32>, usize) {
        let element = element(row_slot % 2, column);
        let word = self.strips[row_slot / 2][self.packing.word(element)];
        (word.expect("the words of the columns at hand were loaded"), element)
    }

    /// Whether the key of a column is visible to a row slot, where the mask is packed as bits.
    #[track_caller]
    pub fn is_visible(&self, row_slot: usize, column: usize) -> Val<'k, bool> {
        let (word, element) = self.word(row_slot, column);
        (word & (1u32 << element)).ne(0u32)
    }

    /// What is added to the score of a row slot and a column, where the mask is packed as biases of type `dtype`.
    #[track_caller]
    pub fn bias(&self, dtype: DType, row_slot: usize, column: usize) -> Val<'k, f32> {
        let (word, element) = self.word(row_slot, column);
        match dtype {
            DType::F32 => word.reinterpret(),
            DType::F16 => word.split::<f16>()[element % 2].to_f32(),
            DType::BF16 => word.split::<bf16>()[element % 2].to_f32(),
        }
    }
}
