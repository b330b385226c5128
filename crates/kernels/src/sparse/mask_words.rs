//! A mask laid out as the lanes of a warp hold scores: of a strip of 16 rows and a tile of [`KEY_TILE`] keys, each lane
//! has 32 elements, as bits of one word or as biases side by side.

use std::ops::Range;

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{AddressSpace, Global, Pointer, Shared, Val};

use super::CLASS_ROWS;
use crate::key_order::KeyOrder;
use crate::sequence::KEY_TILE;

/// Query rows of a strip, as of a tensor core's tile of scores.
pub(crate) const STRIP_ROWS: usize = 16;

/// Strips of a tile of [`CLASS_ROWS`] rows, whose words lie side by side.
pub(crate) const STRIPS: usize = CLASS_ROWS / STRIP_ROWS;

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

    /// Words of a strip before the lane's first.
    pub(crate) fn lane_start(self, lane: Val<'_, i32>) -> Val<'_, i32> {
        match self {
            Packing::Bits => lane,
            Packing::Biases(_) => lane * VECTOR as i32,
        }
    }

    /// Words of all lanes for a strip and a tile of keys.
    pub(crate) const fn strip_words(self) -> usize {
        LANES * self.lane_words()
    }

    /// Words for a tile of [`CLASS_ROWS`] rows and a tile of keys.
    pub(crate) const fn tile_words(self) -> usize {
        STRIPS * self.strip_words()
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

/// The words of a head, inside the attention kernel: `[tiles of rows][tiles of keys][strips][vectors][lanes]`, where a
/// vector is of up to [`VECTOR`] words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MaskWords<'k> {
    pub packing: Packing,
    /// Which keys a lane's columns are. Biases are read in their natural order alone.
    pub order: KeyOrder,
    /// The head's first word.
    pub start: Global<'k, u32>,
    pub lane: Val<'k, i32>,
    /// Words from one tile of rows to the next; 0 where all rows have the same mask.
    pub stride_rows: Val<'k, i64>,
    /// The last tile of rows that the sequence has, which stands in for those behind it.
    pub last_rows: Val<'k, i32>,
}

impl<'k> MaskWords<'k> {
    /// The words of a tile of [`CLASS_ROWS`] rows and a tile of keys.
    #[track_caller]
    pub fn tile(&self, rows: Val<'k, i32>, keys: Val<'k, i32>) -> Global<'k, u32> {
        let rows = self.start.at(rows.min(self.last_rows).widen() * self.stride_rows);
        rows.at(keys.mul_wide(self.packing.tile_words() as i32))
    }

    /// The lane's word of a strip, packed as bits, for the first tile of keys.
    #[track_caller]
    pub fn bits(&self, strip: Val<'k, i32>) -> LaneBits<'k> {
        let (rows, strip) = strip.split_index(STRIPS);
        let rows = self.start.at(rows.min(self.last_rows).widen() * self.stride_rows);
        LaneBits(rows.at(strip * Packing::Bits.strip_words() as i32).at(self.lane).held())
    }

    /// The lane's words of some strips and a tile of keys: those that hold some of its columns, of [`KEY_TILE`].
    #[track_caller]
    pub fn load(&self, strips: &[Val<'k, i32>], tile: Val<'k, i32>, columns: Range<usize>) -> LaneWords<'k> {
        let of_strip = |&strip: &Val<'k, i32>| {
            let (rows, strip) = strip.split_index(STRIPS);
            let strip = self.tile(rows, tile).at(strip * self.packing.strip_words() as i32);
            match self.order {
                KeyOrder::Natural => {
                    lane_words(self.packing, strip.at(self.packing.lane_start(self.lane)), columns.clone())
                }
                KeyOrder::Octets => octets(strip, self.lane),
            }
        };
        let strips = strips.iter().map(of_strip).collect();
        LaneWords { packing: self.packing, order: self.order, strips }
    }
}

/// Where a lane's bits of a strip lie, for a loop over tiles of keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaneBits<'k>(Global<'k, u32>);

impl<'k> LaneBits<'k> {
    /// The bits for a tile of keys.
    #[track_caller]
    pub fn load(&self, tile: Val<'k, i32>) -> Val<'k, u32> {
        self.0.at(tile * Packing::Bits.tile_words() as i32).load()
    }
}

/// The words of a warp's strip in shared memory, `[tiles of keys][strips][vectors][lanes]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StagedWords<'k> {
    pub packing: Packing,
    /// The lane's first word for the first tile of keys.
    pub start: Shared<'k, u32>,
}

impl<'k> StagedWords<'k> {
    /// The lane's words of a tile of keys.
    #[track_caller]
    pub fn load(&self, tile: usize) -> LaneWords<'k> {
        let lane = self.start.plus((tile * self.packing.tile_words()) as i32);
        let strips = vec![lane_words(self.packing, lane, 0..KEY_TILE)];
        LaneWords { packing: self.packing, order: KeyOrder::Natural, strips }
    }
}

/// The bits of a quad's lanes, for the keys of a lane's octets: of the words as packed, lane `a` has the keys `2a` and
/// `2a + 1` of every eight, and of a group of 32 keys this lane has the eight of its place. Moved so that its eight are
/// where the first lane's are.
#[track_caller]
fn octets<'k>(strip: Global<'k, u32>, lane: Val<'k, i32>) -> Vec<Option<Val<'k, u32>>> {
    let words = strip.at(lane & !3).load_vector::<4>();
    words.map(|word| Some(word >> (2 * (lane & 3)))).to_vec()
}

/// The words from a lane's first on of a strip and a tile of keys, but for those that hold none of its columns.
#[track_caller]
fn lane_words<'k, S: AddressSpace>(
    packing: Packing,
    lane: Pointer<'k, S, u32>,
    columns: Range<usize>,
) -> Vec<Option<Val<'k, u32>>> {
    let mut words = vec![None; packing.lane_words()];
    if let Packing::Bits = packing {
        words[0] = Some(lane.load());
        return words;
    }
    for column in columns.step_by(8) {
        for slot in 0..2 {
            let first = packing.word(element(slot, column)) / VECTOR * VECTOR;
            if words[first].is_none() {
                let vector = lane.plus((first * LANES) as i32).load_vector::<VECTOR>().map(Some);
                words[first..first + VECTOR].copy_from_slice(&vector);
            }
        }
    }
    words
}

/// A lane's words of some strips and a tile of keys.
#[derive(Clone, Debug)]
pub(crate) struct LaneWords<'k> {
    pub packing: Packing,
    /// Which keys columns are.
    order: KeyOrder,
    /// The words of each strip, as far as they were loaded.
    strips: Vec<Vec<Option<Val<'k, u32>>>>,
}

impl<'k> LaneWords<'k> {
    /// The bits of one strip.
    pub fn of_strip_bits(bits: Val<'k, u32>) -> Self {
        LaneWords { packing: Packing::Bits, order: KeyOrder::Natural, strips: vec![vec![Some(bits)]] }
    }

    /// Words whose first columns are others: `with` moves each.
    pub fn map(self, with: impl Fn(Val<'k, u32>) -> Val<'k, u32>) -> Self {
        let moved = |words: Vec<Option<_>>| words.into_iter().map(|word| word.map(&with)).collect();
        LaneWords { strips: self.strips.into_iter().map(moved).collect(), ..self }
    }

    fn word(&self, row_slot: usize, column: usize) -> (Val<'k, u32>, usize) {
        let (element, word) = match self.order {
            KeyOrder::Natural => {
                let element = element(row_slot % 2, column);
                (element, self.packing.word(element))
            }
            // The octet's keys are those of four lanes, and those of each side by side.
            KeyOrder::Octets => (element(row_slot % 2, column / 32 * 32 + column % 2), column % 32 / 8),
        };
        let word = self.strips[row_slot / 2][word];
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
