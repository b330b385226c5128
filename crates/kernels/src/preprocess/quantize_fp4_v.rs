//! V to tiles of 4-bit floats, channels as rows, with a scale for each group of tokens of a channel: `e2m1(V / scale)`.

use sage_core::Fp4Format;
use sage_ptx::{Code, Program, Target, Val, kernel};

use super::tile_load::{CHUNK, Head, ROWS, RowOrder, Rows, Source, tile_grid};
use crate::fp4::{GroupScale, ScaleWords};
use crate::integer::magnitude_bits;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Quantises V into the workspace, a block for each tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantizeFp4VConfig {
    /// V as given.
    pub source: Source,
    /// Groups, and what their scales are.
    pub format: Fp4Format,
}

kernel_params! {
    /// What a launch of [`QuantizeFp4VConfig`] passes. Strides are in elements.
    QuantizeFp4VParams, QuantizeFp4VArgs {
        /// V as given.
        input: input,
        /// Tiles of codes, each with its scales behind it.
        out: [u8],
        /// Tiles of the workspace, all sequences together.
        key_tiles: i32,
    }
}

/// Words of a channel's tokens in shared memory, and four that spread neighbouring ones over the banks.
const CHANNEL_WORDS: usize = KEY_TILE / 2 + 4;

/// Words that set groups of channels apart, for the same.
const BLOCK_GAP: usize = 4;

/// Tokens of a word of codes.
const WORD_TOKENS: usize = 8;

impl QuantizeFp4VConfig {
    const fn scales(&self) -> ScaleWords {
        ScaleWords::new(self.source.padded_dim(), KEY_TILE)
    }

    const fn code_bytes(&self) -> usize {
        KEY_TILE * self.source.padded_dim() / 2
    }

    /// Bytes of a tile and its scales.
    pub const fn tile_bytes(&self) -> usize {
        self.code_bytes() + self.scales().bytes()
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z, where the longest sequence has `max_kv_len` keys.
    pub fn grid(&self, max_kv_len: usize, kv_heads: usize, sequences: usize) -> [u32; 3] {
        tile_grid(max_kv_len, kv_heads, sequences)
    }

    fn write(&self, code: &Code) {
        self.source.bound_registers(code, 768);
        let p = QuantizeFp4VParams::declare(code);
        let head = Head::new(code, &self.source, &p.input);
        let [tile, ..] = code.block_index();
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()));
        let rows = head.load(tile, RowOrder::Octets);
        let workspace_tile = head.head * p.key_tiles + head.sequence.first_tile + tile;
        let out = p.out.at(workspace_tile.widen() * i64::from(self.tile_bytes() as i32));

        code.note("tokens of a channel side by side");
        // Channels that are equal modulo 8 lie together, so that neither writes nor reads of a warp share banks.
        let block_words = self.source.padded_dim() / CHUNK * CHANNEL_WORDS + BLOCK_GAP;
        let transposed = code.shared::<u32>("transposed", CHUNK * block_words);
        let to = transposed.at(head.chunk * CHANNEL_WORDS as i32 + head.part * (ROWS / 2) as i32);
        let words: [_; ROWS] = std::array::from_fn(|i| rows.words(i));
        for channel in 0..CHUNK {
            let halves = if channel % 2 == 0 { 0x5410 } else { 0x7632 };
            let pair =
                |i: usize| words[2 * i][channel / 2].permute_bytes(words[2 * i + 1][channel / 2], halves);
            to.plus((channel * block_words) as i32).store_vector([pair(0), pair(1), pair(2), pair(3)]);
        }
        code.barrier();

        code.note("scales and 4-bit codes of a channel");
        let channel = head.thread;
        let from = transposed.at((channel & 7) * block_words as i32 + (channel >> 3) * CHANNEL_WORDS as i32);
        let codes = out.at(channel * (KEY_TILE / 2) as i32).cast::<u32>();
        let group = self.format.group();
        let (mut scales, mut codes_of_channel) = (code.constant(0u32), Vec::new());
        for (index, first) in (0..KEY_TILE).step_by(group).enumerate() {
            let vectors = (first / 2..(first + group) / 2).step_by(4);
            let words = vectors.flat_map(|word| from.plus(word as i32).load_vector::<4>());
            let tokens: Vec<_> = words.flat_map(|word| self.source.widen(word)).collect();
            let (scale, tokens) = self.group(&head, &rows, first, tokens);
            scales = scales | (scale.code << (8 * index) as i32);
            let words = tokens.chunks(WORD_TOKENS).map(|x| scale.word(std::array::from_fn(|i| x[i])));
            codes_of_channel.extend(words);
        }
        for (i, words) in codes_of_channel.chunks(4).enumerate() {
            codes.plus(4 * i as i32).store_vector::<4>(std::array::from_fn(|word| words[word]));
        }
        // The tokens of a tile are one step of the product's depth.
        let step = code.constant(0);
        let index = self.scales().index(channel >> 5, (channel >> 3) & 3, channel & 7, step);
        out.plus(self.code_bytes() as i32).cast::<u32>().at(index).store(scales);
    }

    /// The scale of the tokens of a group, and the tokens, of which none is larger than those that it is taken from.
    fn group<'k>(
        &self,
        head: &Head<'k>,
        rows: &Rows<'k>,
        first: usize,
        tokens: Vec<Val<'k, f32>>,
    ) -> (GroupScale<'k>, Vec<Val<'k, f32>>) {
        let code = head.code;
        let largest = |bits: Vec<Val<'k, i32>>| bits.into_iter().reduce(Val::max).unwrap_or(code.constant(0));
        let bits: Vec<_> = tokens.iter().map(|&x| magnitude_bits(x)).collect();
        let Some(seen) = rows.seen else {
            return (GroupScale::of_group(self.format, largest(bits)), tokens);
        };
        // The tokens that count, or all where none does: those that no query sees are zeros.
        let of_group = seen.counted_bits(first) & (u32::MAX >> (32 - self.format.group()));
        let measured = of_group.eq(0u32).select(u32::MAX, of_group);
        let counted =
            bits.iter().enumerate().map(|(i, &bits)| (measured & (1 << i)).ne(0u32).select(bits, 0));
        let max = largest(counted.collect());
        // A NaN spoils the group whether it counts or not.
        let all = largest(bits);
        let max = all.gt(f32::INFINITY.to_bits() as i32).select(all, max);
        let limit = max.reinterpret::<f32>();
        let tokens = tokens.into_iter().map(|x| x.max(-limit).min(limit)).collect();
        (GroupScale::of_group(self.format, max), tokens)
    }
}

impl Kernel for QuantizeFp4VConfig {
    fn name(&self) -> String {
        format!("quantize_v_{}_{}", self.format.name().to_lowercase(), self.source.suffix())
    }

    fn description(&self) -> String {
        format!("V to {}; {}", self.format.name(), self.source.description())
    }

    fn oldest_target(&self) -> Target {
        Target::SM_120A
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
