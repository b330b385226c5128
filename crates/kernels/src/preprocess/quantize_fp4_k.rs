//! K to tiles of 4-bit floats, with a scale for each group of channels: `e2m1((K − mean) / scale)`, or of rotated rows.

use sage_core::Fp4Format;
use sage_ptx::{Code, Program, Target, Val, kernel};

use super::smoothed_keys::{KeyMean, KeyPass, SmoothedKeys};
use super::tile_load::{CHUNK, ROWS, Source};
use crate::fp4::{GroupScale, ScaleWords};
use crate::integer::magnitude_bits;
use crate::kernel::Kernel;
use crate::key_order::KeyOrder;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Quantises K into the workspace: a block for each tile, and where smoothing another that collects its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantizeFp4KConfig {
    /// K as given.
    pub source: Source,
    /// Groups, and what their scales are.
    pub format: Fp4Format,
    /// In which order the keys of a tile are written.
    pub order: KeyOrder,
    /// What is subtracted from each channel first.
    pub mean: KeyMean,
    /// Whether rows are multiplied by a Hadamard matrix then.
    pub rotate: bool,
}

kernel_params! {
    /// What a launch of [`QuantizeFp4KConfig`] passes. Strides are in elements.
    QuantizeFp4KParams, QuantizeFp4KArgs {
        /// K as given.
        input: input,
        /// Tiles of codes, each with its scales behind it.
        out: [u8],
        /// Where one is subtracted: means, `[sequences][kv_heads][padded_dim]`.
        mean: [f32],
        /// Where it is collected: `[kv_heads][key_tiles][padded_dim]`.
        partials: [f32],
        /// Where it is collected: `[sequences][kv_heads]`, zeros before every launch.
        arrivals: [u32],
        /// Tiles of the workspace, all sequences together.
        key_tiles: i32,
        /// Where it is collected: heads that statistics are ahead by, at least 1, as in the grid.
        lead: i32,
    }
}

impl QuantizeFp4KConfig {
    const fn scales(&self) -> ScaleWords {
        ScaleWords::new(KEY_TILE, self.source.padded_dim())
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

    /// Blocks along x, y and z, where the longest sequence has `max_kv_len` keys and, where they are collected,
    /// statistics are `lead` heads ahead.
    pub fn grid(&self, max_kv_len: usize, kv_heads: usize, sequences: usize, lead: usize) -> [u32; 3] {
        self.mean.grid(max_kv_len, kv_heads, sequences, lead)
    }

    fn write(&self, code: &Code) {
        // Each row's groups have scales of their own, and rotated rows are needed twice.
        self.source.bound_registers(code, if self.rotate { 512 } else { 768 });
        let p = QuantizeFp4KParams::declare(code);
        let pass = KeyPass {
            source: &self.source,
            mean: self.mean,
            rotate: self.rotate,
            input: &p.input,
            means: p.mean,
            partials: p.partials,
            arrivals: p.arrivals,
            key_tiles: p.key_tiles,
            lead: p.lead,
        };
        pass.run(code, |keys| self.quantise(keys, &p));
    }

    fn quantise<'k>(&self, keys: &SmoothedKeys<'k>, p: &QuantizeFp4KParams<'k>) {
        let SmoothedKeys { head, rows, workspace_tile, .. } = keys;
        let code = head.code;
        code.note("scales and 4-bit codes");
        let tile = p.out.at(workspace_tile.widen() * i64::from(self.tile_bytes() as i32));
        let scales = tile.plus(self.code_bytes() as i32);
        // Threads that share a group hold neighbouring chunks of a row; the first of them writes the scale.
        let sharing = (self.format.group() / CHUNK) as i32;
        let leads = (head.chunk & (sharing - 1)).eq(0);
        let chunks_of_word = (sage_ptx::SCALED_DEPTH / CHUNK) as i32;
        let (step, within) = (head.chunk >> chunks_of_word.ilog2() as i32, head.chunk & (chunks_of_word - 1));
        let group = within >> sharing.ilog2() as i32;
        for i in 0..ROWS {
            let row = keys.row(i);
            let bits = row.into_iter().map(magnitude_bits).reduce(Val::max);
            // Rows that are missing differ from no mean, though their zeros may.
            let bits = rows.valid(i).select(bits.unwrap_or(code.constant(0)), 0);
            let scale = GroupScale::of_group(self.format, bits.reduce_lanes(sharing - 1, Val::max));
            let word = rows.valid(i).select(scale.word(row), 0u32);
            let [block, quad_lane, column] = self.stored(head.part, i);
            let to = block * 32 + quad_lane * 8 + column;
            tile.at(to * (self.source.padded_dim() / 2) as i32 + head.chunk * 4).cast::<u32>().store(word);
            code.when(leads, || {
                let index = self.scales().index(block, quad_lane, column, step);
                let byte = scales.at(index * 4 + group);
                byte.store(scale.code);
                if self.format == Fp4Format::Mx {
                    // The upper half of a word, which no product reads.
                    byte.plus(2).store(0u32);
                }
            });
        }
    }

    /// The row in which the thread's `i`-th key is stored: 32 · block + 8 · quad lane + column.
    fn stored<'k>(&self, part: Val<'k, i32>, i: usize) -> [Val<'k, i32>; 3] {
        let known = |x: usize| part.code().constant(x as i32);
        let (block, within) = (i / 4, i % 4);
        match self.order {
            // Key 32 · block + 8 · within + part.
            KeyOrder::Natural => [known(block), known(within), part],
            // The same key is stored in row 8 · (part / 2) + 2 · within + part mod 2 of its 32.
            KeyOrder::Octets => [known(block), part >> 1, (part & 1) + 2 * within as i32],
        }
    }
}

impl Kernel for QuantizeFp4KConfig {
    fn name(&self) -> String {
        let (format, order, smooth) =
            (self.format.name().to_lowercase(), self.order.suffix(), self.mean.suffix());
        let rotated = if self.rotate { "_rotated" } else { "" };
        format!("quantize_k_{format}{order}{smooth}{rotated}_{}", self.source.suffix())
    }

    fn description(&self) -> String {
        let (format, smooth) = (self.format.name(), self.mean.description());
        let order = match self.order {
            KeyOrder::Natural => "",
            KeyOrder::Octets => ", keys in octets",
        };
        let rotated = if self.rotate { ", rotated" } else { "" };
        format!("K to {format}{smooth}{rotated}{order}; {}", self.source.description())
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
