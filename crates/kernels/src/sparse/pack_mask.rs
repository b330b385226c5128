//! Classes of the tiles of a mask, and its elements as the attention kernel reads them.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Program, SLOT_ROWS, Stored, Val, kernel, lane_column, lane_row};

use super::mask_words::LANES;
use super::{ALL, CLASS_ROWS, NONE, Packing, SOME, STRIP_ROWS, VECTOR, element};
use crate::attention::MaskForm;
use crate::grid::{BlockHead, grid};
use crate::kernel::Kernel;
use crate::least_bias::LEAST_BIAS;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Warps of a block: one for each strip of a class's rows.
const WARPS: usize = CLASS_ROWS / STRIP_ROWS;

/// Reads a mask once: tells which of its tiles of [`CLASS_ROWS`] queries and [`KEY_TILE`] keys hide all keys, some or
/// none, and packs its elements. Dimensions that are broadcast are not expanded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackMaskConfig {
    /// Explicit mask.
    pub mask: MaskForm,
    /// Whether an explicit mask's pairs of neighbouring keys lie side by side, at multiples of their size.
    pub pairs: bool,
    /// Whether a block mask hides keys as well: one whose blocks are not made of whole tiles.
    pub blocks: bool,
    /// How elements are packed, where they are.
    pub packing: Option<Packing>,
}

/// An element of a mask.
struct Element<'k> {
    /// Whether the key is visible.
    visible: Val<'k, bool>,
    /// Whether its score is left as it is.
    kept: Val<'k, bool>,
    /// What is added to the score.
    bias: Val<'k, f32>,
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
        /// Packed elements, `[all_heads][strips of rows][tiles of keys]` of as many words as [`Packing`] takes.
        words: [u32],
    }
}

impl PackMaskConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, rows: usize, keys: usize, all_heads: usize) -> [u32; 3] {
        grid(rows.div_ceil(CLASS_ROWS) * keys.div_ceil(KEY_TILE), all_heads)
    }

    fn write<'k, B: Stored>(&self, code: &'k Code, read: impl Fn(Val<'k, B::Value>) -> Element<'k>) {
        let p = PackMaskParams::declare(code);
        // A launch has a block even where there are no keys, and so no classes.
        code.exit_when(p.keys.le(0));
        let BlockHead { sequence, head } = BlockHead::new(code, p.heads, p.all_heads);
        let tiles = p.keys.div_ceil(KEY_TILE);
        let [block, ..] = code.block_index();
        let (row_tile, tile) = (block / tiles, block % tiles);
        let [warp, lane] = [code.warp_index(), code.lane_index()];
        let strip = row_tile * WARPS as i32 + warp;
        let first_row = strip * STRIP_ROWS as i32 + lane_row(lane);
        let first_key = tile * KEY_TILE as i32 + lane_column(lane);

        let mask = p.mask.start.cast::<B>().at(p.mask.head(sequence, head));
        let blocks = p.blocks.start.at(p.blocks.head(sequence, head));
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
                let elements = (self.mask != MaskForm::None).then(|| {
                    // Of a pair that is not there the last one is read.
                    let clamped = keys.map(|key| key.min(p.keys - 1));
                    if self.pairs {
                        of_row.at(keys[0].min(p.keys - 2)).load_vector::<2>()
                    } else {
                        clamped.map(|key| of_row.at(key.widen() * p.mask.key_stride()).load())
                    }
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
        let [some_there, all_there] = [code.any(visible.ne(0u32)), code.all(whole.eq(u32::MAX))];
        if let Some(packing) = self.packing {
            let strips = p.rows.div_ceil(STRIP_ROWS);
            let number = sequence * p.heads + head;
            let first = (number.mul_wide(strips) + strip.widen()) * tiles.widen() + tile.widen();
            let words = p.words.at(first * packing.tile_words() as i64);
            code.when(strip.lt(strips), || match packing {
                Packing::Bits => words.at(lane).store(visible),
                Packing::Biases(dtype) => {
                    for (index, vector) in packed(dtype, &biases).chunks_exact(VECTOR).enumerate() {
                        let to = words.plus((index * VECTOR * LANES) as i32).at(lane * VECTOR as i32);
                        to.store_vector::<VECTOR>(std::array::from_fn(|i| vector[i]));
                    }
                }
            });
        }
        // Each warp's word: bit 0 where it sees something, bit 1 where something is not left as it is.
        let votes = code.shared::<u32>("votes", WARPS);
        code.when(lane.eq(0), || {
            votes.at(warp).store(some_there.select(1u32, 0u32) | all_there.select(0u32, 2u32));
        });
        code.barrier();
        code.when(code.thread().eq(0), || {
            let together = (0..WARPS as i32).map(|warp| votes.plus(warp).load()).reduce(|a, b| a | b);
            let votes = together.unwrap_or(zero);
            let partial = (votes & 2u32).ne(0u32).select(SOME, ALL);
            let class = (votes & 1u32).ne(0u32).select(partial, NONE);
            let row_tiles = p.rows.div_ceil(CLASS_ROWS);
            let first = ((sequence * p.heads + head).mul_wide(row_tiles) + row_tile.widen()) * tiles.widen();
            p.classes.at(first + tile.widen()).store(class);
        });
    }
}

impl Kernel for PackMaskConfig {
    fn name(&self) -> String {
        let pairs = if self.pairs { "_pairs" } else { "" };
        let blocks = if self.blocks { "_blocks" } else { "" };
        let packing = self.packing.map_or(String::new(), |packing| format!("_{}", packing.name()));
        format!("pack_mask_{}{pairs}{blocks}{packing}", self.mask.name())
    }

    fn description(&self) -> String {
        let mask = match (self.mask, self.blocks) {
            (MaskForm::None, _) => "block mask".to_owned(),
            (mask, false) => mask.name(),
            (mask, true) => format!("{} and block mask", mask.name()),
        };
        let pairs = if self.pairs { ", pairs of keys side by side" } else { "" };
        let packing = self.packing.map_or("", |_| ", and its elements packed");
        format!("classes of the tiles of a mask{packing}; {mask}{pairs}")
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), 32 * WARPS as u32, |code| match self.mask {
            // A byte that is not 0 hides nothing.
            MaskForm::None | MaskForm::Bool => self.write::<u8>(code, |byte| Element::of_flag(byte.ne(0u32))),
            MaskForm::Bias(DType::F16) => self.write::<f16>(code, |x| Element::of_bias(x.to_f32())),
            MaskForm::Bias(DType::BF16) => self.write::<bf16>(code, |x| Element::of_bias(x.to_f32())),
            MaskForm::Bias(DType::F32) => self.write::<f32>(code, Element::of_bias),
        })
    }
}

impl<'k> Element<'k> {
    fn of_flag(visible: Val<'k, bool>) -> Self {
        Element { visible, kept: visible, bias: visible.select(0.0, f32::NEG_INFINITY) }
    }

    /// A bias of NaN hides nothing.
    fn of_bias(bias: Val<'k, f32>) -> Self {
        Element { visible: !bias.eq(f32::NEG_INFINITY), kept: bias.eq(0.0), bias }
    }
}

/// [`LEAST_BIAS`], or what bf16 holds next to it that is not less.
const LEAST_PACKED: f32 = f32::from_bits(LEAST_BIAS.to_bits() & 0xffff_0000);

/// A lane's biases in words: but for −∞ none below what is finite in base 2.
fn packed<'k>(dtype: DType, biases: &[Val<'k, f32>]) -> Vec<Val<'k, u32>> {
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
