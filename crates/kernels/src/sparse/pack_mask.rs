//! Classes of the tiles of a mask, and its elements as the attention kernel reads them.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Program, SLOT_ROWS, Stored, Val, kernel, lane_column};

use super::mask_strip::{MaskSize, Strip};
use super::mask_words::LANES;
use super::{CLASS_ROWS, Packing, STRIPS, VECTOR, element};
use crate::attention::MaskForm;
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::least_bias::LEAST_BIAS;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Warps of a block: one for each strip of a class's rows.
const WARPS: usize = STRIPS;

/// Tiles of keys of a block that reads chunks of flags: as many as keep enough loads in flight.
const FLAG_TILES: usize = 4;

/// How an explicit mask's neighbouring keys lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MaskAccess {
    /// Anyhow.
    Elements,
    /// As pairs side by side, at multiples of a pair's size.
    Pairs,
    /// As whole chunks of 16 bytes at multiples of 16 bytes.
    Chunks,
}

impl MaskAccess {
    /// Keys that are read at once, of elements of such a size.
    pub(crate) const fn elements(self, element_bytes: usize) -> usize {
        match self {
            MaskAccess::Elements => 1,
            MaskAccess::Pairs => 2,
            MaskAccess::Chunks => 16 / element_bytes,
        }
    }
}

/// Reads a mask once: tells which of its tiles of [`CLASS_ROWS`] queries and [`KEY_TILE`] keys hide all keys, some or
/// none, and packs its elements. Dimensions that are broadcast are not expanded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackMaskConfig {
    /// Explicit mask.
    pub mask: MaskForm,
    /// How an explicit mask's neighbouring keys lie.
    pub access: MaskAccess,
    /// Whether a block mask hides keys as well: one whose blocks are not made of whole tiles.
    pub blocks: bool,
    /// How elements are packed, where they are.
    pub packing: Option<Packing>,
}

/// An element of a mask.
pub(super) struct Element<'k> {
    /// Whether the key is visible.
    pub visible: Val<'k, bool>,
    /// Whether its score is left as it is.
    pub kept: Val<'k, bool>,
    /// What is added to the score.
    pub bias: Val<'k, f32>,
}

kernel_params! {
    /// What a launch of [`PackMaskConfig`] passes. Strides are in elements.
    PackMaskParams, PackMaskArgs {
        /// Explicit mask.
        mask: (tensor 4),
        /// Bytes of a block mask, `[batch, heads, blocks of queries, blocks of keys]`.
        blocks: (tensor 4),
        /// Queries of a block of the block mask.
        blocks_q: i32,
        /// Keys of a block of the block mask.
        blocks_k: i32,
        /// Query rows with a mask of their own: one where all have the same.
        rows: i32,
        /// Keys.
        keys: i32,
        /// Heads of a sequence with a mask of their own.
        heads: i32,
        /// Such heads of all sequences with a mask of their own.
        all_heads: i32,
        /// Classes, `[all_heads][tiles of rows][tiles of keys]`.
        classes: [u8],
        /// Packed elements, `[all_heads][tiles of rows][tiles of keys][strips]` of as many words as [`Packing`] takes.
        words: [u32],
    }
}

impl<'k> PackMaskParams<'k> {
    fn size(&self) -> MaskSize<'k> {
        MaskSize { rows: self.rows, keys: self.keys, heads: self.heads, all_heads: self.all_heads }
    }
}

impl PackMaskConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, rows: usize, keys: usize, all_heads: usize) -> [u32; 3] {
        grid(rows.div_ceil(CLASS_ROWS) * keys.div_ceil(KEY_TILE).div_ceil(self.tiles()), all_heads)
    }

    /// Tiles of keys of a block.
    fn tiles(&self) -> usize {
        if self.reads_chunks_of_flags() { FLAG_TILES } else { 1 }
    }

    /// Bytes of an element of an explicit mask.
    fn element_bytes(&self) -> usize {
        match self.mask {
            MaskForm::None | MaskForm::Bool => 1,
            MaskForm::Bias(dtype) => dtype.bytes(),
        }
    }

    fn reads_chunks_of_flags(&self) -> bool {
        self.mask == MaskForm::Bool && self.access == MaskAccess::Chunks && !self.blocks
    }

    fn write<'k, B: Stored>(&self, code: &'k Code, read: impl Fn(Val<'k, B::Value>) -> Element<'k>) {
        let p = PackMaskParams::declare(code);
        let strip = Strip::new(code, p.size(), self.tiles());
        let (first_row, lane) = (strip.first_row, strip.lane);
        let first_key = strip.first_tile * KEY_TILE as i32 + lane_column(lane);

        let mask = p.mask.start.cast::<B>().at(p.mask.head(strip.sequence, strip.head));
        let blocks = p.blocks.start.at(p.blocks.head(strip.sequence, strip.head));
        let staged = (self.access == MaskAccess::Chunks && self.mask != MaskForm::None)
            .then(|| strip.stage::<B>(code, &p.mask, self.element_bytes()));
        let zero = code.constant(0u32);
        // Bits of the lane's scores that are visible, and of those that are left as they are or do not exist.
        let (mut visible, mut whole) = (zero, zero);
        let mut biases = vec![code.constant(0.0f32); LANES];
        for slot in 0..2 {
            // Rows beyond the last are like it: they are computed by nobody, or all rows have the same mask.
            let row = (first_row + (slot * SLOT_ROWS) as i32).min(p.rows - 1);
            let of_row = mask.at(row.widen() * p.mask.row_stride());
            let blocks = self.blocks.then(|| blocks.at((row / p.blocks_q).widen() * p.blocks.row_stride()));
            for column in (0..KEY_TILE).step_by(8) {
                let keys = [0, 1].map(|within| first_key + (column + within) as i32);
                let elements = (self.mask != MaskForm::None).then(|| match (staged, self.access) {
                    (Some(staged), _) => staged.pair(slot, column),
                    // Of a pair that is not there the last one is read.
                    (None, MaskAccess::Elements) => {
                        let clamped = keys.map(|key| key.min(p.keys - 1));
                        clamped.map(|key| of_row.at(key.widen() * p.mask.key_stride()).load())
                    }
                    (None, _) => of_row.at(keys[0].min(p.keys - 2)).load_vector::<2>(),
                });
                for (within, key) in keys.into_iter().enumerate() {
                    let there = key.lt(p.keys);
                    let in_block = blocks.map(|blocks| {
                        let column = (key.min(p.keys - 1) / p.blocks_k).widen() * p.blocks.key_stride();
                        blocks.at(column).load().ne(0u32)
                    });
                    let mut of_key = match elements {
                        Some(elements) => read(elements[within]),
                        None => Element::of_flag(code.constant(true)),
                    };
                    if let Some(in_block) = in_block {
                        of_key.visible = of_key.visible & in_block;
                        of_key.kept = of_key.kept & in_block;
                        of_key.bias = in_block.select(of_key.bias, f32::NEG_INFINITY);
                    }
                    let element = element(slot, column + within);
                    visible = visible | (of_key.visible & there).select(1u32 << element, 0u32);
                    whole = whole | (of_key.kept | !there).select(1u32 << element, 0u32);
                    biases[element] = of_key.bias;
                }
            }
        }
        if let Some(packing) = self.packing {
            let words = strip.words(p.words, packing, 0);
            match packing {
                Packing::Bits => words.at(lane).store(visible),
                Packing::Biases(dtype) => {
                    for (index, vector) in packed(dtype, &biases).chunks_exact(VECTOR).enumerate() {
                        let to = words.plus((index * VECTOR * LANES) as i32).at(lane * VECTOR as i32);
                        to.store_vector::<VECTOR>(std::array::from_fn(|i| vector[i]));
                    }
                }
            }
        }
        strip.classify(code, p.classes, &[(visible.ne(0u32), whole.eq(u32::MAX))]);
    }

    /// The same of flags that are chunks of 16 bytes: a lane has 16 keys of each of its rows, which the four lanes of a
    /// row then exchange as bits.
    fn write_flags(&self, code: &Code) {
        let p = PackMaskParams::declare(code);
        let strip = Strip::new(code, p.size(), self.tiles());
        let quad_lane = strip.lane & 3;
        let mask = p.mask.start.at(p.mask.head(strip.sequence, strip.head));
        let rows = [0, 1].map(|slot| {
            let row = (strip.first_row + (slot * SLOT_ROWS) as i32).min(p.rows - 1);
            mask.at(row.widen() * p.mask.row_stride())
        });
        let chunks: Vec<_> = (0..FLAG_TILES)
            .map(|tile| {
                let key = (strip.first_tile + tile as i32) * KEY_TILE as i32 + quad_lane * CHUNK_FLAGS;
                let there = key.min(p.keys - CHUNK_FLAGS);
                (key.lt(p.keys), rows.map(|row| row.at(there).cast::<u32>().load_streaming::<4>()))
            })
            .collect();
        let votes: Vec<_> = chunks
            .into_iter()
            .enumerate()
            .map(|(tile, (there, rows))| {
                let [first, second] = rows.map(bits_of_flags);
                let own = there.select(first | (second << 16), 0u32);
                if self.packing.is_some() {
                    let exists = (strip.first_tile + tile as i32).lt(strip.tiles);
                    let visible = of_quad(own, strip.lane);
                    let words = strip.words(p.words, Packing::Bits, tile);
                    code.when(exists, || words.at(strip.lane).store(visible));
                }
                (own.ne(0u32), own.eq(u32::MAX) | !there)
            })
            .collect();
        strip.classify(code, p.classes, &votes);
    }
}

/// Flags of a chunk.
const CHUNK_FLAGS: i32 = 16;

/// Bits of a chunk's flags: whether each byte is not 0.
fn bits_of_flags<'k>(words: [Val<'k, u32>; 4]) -> Val<'k, u32> {
    let of_word = |word: Val<'k, u32>| {
        // The highest bit of each byte, and then these four side by side, the first byte's lowest.
        let highest = (((word & 0x7f7f_7f7f) + 0x7f7f_7f7f) | word) & 0x8080_8080;
        (highest * 0x0020_4081) >> 28
    };
    let [a, b, c, d] = words.map(of_word);
    a | (b << 4) | (c << 8) | (d << 12)
}

/// Bits of the lane's scores, from the four lanes that have 16 keys each of a row and of the row [`SLOT_ROWS`] below.
fn of_quad<'k>(own: Val<'k, u32>, lane: Val<'k, i32>) -> Val<'k, u32> {
    let quad_lane = lane & 3;
    let of_chunk = |chunk: i32| {
        // Two neighbouring keys of every eight.
        four_of_sixteen(own.shuffle((lane - quad_lane) + chunk) >> (quad_lane * 2)) << (4 * chunk)
    };
    (0..4).map(of_chunk).reduce(|a, b| a | b).expect("a quad has lanes")
}

/// The lowest two of every eight bits, side by side.
pub(super) fn of_pairs(bits: Val<'_, u32>) -> Val<'_, u32> {
    let fours = four_of_sixteen(bits);
    (fours | (fours >> 12)) & 0xff
}

/// The lowest two of every eight bits, those of each half side by side in its lowest four.
fn four_of_sixteen(bits: Val<'_, u32>) -> Val<'_, u32> {
    let pairs = bits & 0x0303_0303;
    (pairs | (pairs >> 6)) & 0x000f_000f
}

impl Kernel for PackMaskConfig {
    fn name(&self) -> String {
        let access = match self.access {
            MaskAccess::Elements => "",
            MaskAccess::Pairs => "_pairs",
            MaskAccess::Chunks => "_chunks",
        };
        let blocks = if self.blocks { "_blocks" } else { "" };
        let packing = self.packing.map_or(String::new(), |packing| format!("_{}", packing.name()));
        format!("pack_mask_{}{access}{blocks}{packing}", self.mask.name())
    }

    fn description(&self) -> String {
        let mask = match (self.mask, self.blocks) {
            (MaskForm::None, _) => "block mask".to_owned(),
            (mask, false) => mask.name(),
            (mask, true) => format!("{} and block mask", mask.name()),
        };
        let access = match self.access {
            MaskAccess::Elements => "",
            MaskAccess::Pairs => ", pairs of keys side by side",
            MaskAccess::Chunks => ", chunks of 16 bytes",
        };
        let packing = self.packing.map_or("", |_| ", and its elements packed");
        format!("classes of the tiles of a mask{packing}; {mask}{access}")
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), 32 * WARPS as u32, |code| match self.mask {
            // A byte that is not 0 hides nothing.
            MaskForm::Bool if self.reads_chunks_of_flags() => self.write_flags(code),
            MaskForm::None | MaskForm::Bool => self.write::<u8>(code, |byte| Element::of_flag(byte.ne(0u32))),
            MaskForm::Bias(DType::F16) => self.write::<f16>(code, |x| Element::of_bias(x.to_f32())),
            MaskForm::Bias(DType::BF16) => self.write::<bf16>(code, |x| Element::of_bias(x.to_f32())),
            MaskForm::Bias(DType::F32) => self.write::<f32>(code, Element::of_bias),
        })
    }
}

impl<'k> Element<'k> {
    pub fn of_flag(visible: Val<'k, bool>) -> Self {
        Element { visible, kept: visible, bias: visible.select(0.0, f32::NEG_INFINITY) }
    }

    /// A bias of NaN hides nothing.
    pub fn of_bias(bias: Val<'k, f32>) -> Self {
        Element { visible: !bias.eq(f32::NEG_INFINITY), kept: bias.eq(0.0), bias }
    }
}

/// [`LEAST_BIAS`], or what bf16 holds next to it that is not less.
const LEAST_PACKED: f32 = f32::from_bits(LEAST_BIAS.to_bits() & 0xffff_0000);

/// A lane's biases in words: but for −∞ none below what is finite in base 2.
pub(super) fn packed<'k>(dtype: DType, biases: &[Val<'k, f32>]) -> Vec<Val<'k, u32>> {
    let finite = |&bias: &Val<'k, f32>| {
        bias.eq(f32::NEG_INFINITY).select(f32::NEG_INFINITY, bias.max_nan(LEAST_PACKED))
    };
    let biases: Vec<_> = biases.iter().map(finite).collect();
    match dtype {
        DType::F32 => biases.iter().map(|bias| bias.reinterpret()).collect(),
        DType::F16 => biases.chunks(2).map(|pair| pair[0].pack::<f16>(pair[1]).reinterpret()).collect(),
        DType::BF16 => biases.chunks(2).map(|pair| pair[0].pack::<bf16>(pair[1]).reinterpret()).collect(),
    }
}
