//! K to INT8 or INT4 tiles: `round((K − mean) / scale)`, or of rotated rows `round((K − mean) · H / scale)`.

use sage_core::{Granularity, IntBits, IntQuantizer, Rounding, Tile, ZeroGroup};
use sage_ptx::{Code, Program, Val, Var, kernel};

use super::groups::{Group, group_maxima_per_token, group_maximum, groups_of_tile};
use super::smoothed_keys::{KeyMean, KeyPass, SmoothedKeys, subtract};
use super::tile_load::{CHUNK, ROWS, Source};
use crate::integer::{Step, magnitude_bits};
use crate::kernel::Kernel;
use crate::operand::{Element, tile_columns};
use crate::params::kernel_params;
use crate::rotation::rotated_dim;
use crate::sequence::KEY_TILE;

/// Quantises K into the workspace: a block for each tile, and where smoothing another that collects its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantizeKConfig {
    /// K as given.
    pub source: Source,
    /// Width of the integers.
    pub bits: IntBits,
    /// Rows of a tile that share a scale. Per tensor is not available: its kernel would be read as per block.
    pub granularity: Granularity,
    /// How quotients are rounded.
    pub rounding: Rounding,
    /// How a group of zeros is treated.
    pub zero_group: ZeroGroup,
    /// What is subtracted from each channel first.
    pub mean: KeyMean,
    /// Whether rows are multiplied by a Hadamard matrix then.
    pub rotate: bool,
}

kernel_params! {
    /// What a launch of [`QuantizeKConfig`] passes. Strides are in elements.
    QuantizeKParams, QuantizeKArgs {
        /// K as given.
        input: input,
        /// Integer tiles.
        out: [u8],
        /// Scales, `[kv_heads][key_tiles][groups]`.
        scale: [f32],
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

impl QuantizeKConfig {
    /// The quantiser, as core describes it.
    pub const fn quantizer(&self) -> IntQuantizer {
        IntQuantizer {
            bits: self.bits,
            granularity: self.granularity,
            tile: Tile { block_q: 128, warp_q: 32, block_k: KEY_TILE, warp_k: KEY_TILE },
            rounding: self.rounding,
            zero_group: self.zero_group,
            scale_q_first: false,
        }
    }

    /// Scales of a tile.
    pub const fn groups(&self) -> usize {
        groups_of_tile(self.granularity)
    }

    /// Bytes of a tile.
    pub const fn tile_bytes(&self) -> usize {
        KEY_TILE * self.row_bytes()
    }

    const fn row_bytes(&self) -> usize {
        self.columns() * Element::of_bits(self.bits).bits() / 8
    }

    /// Channels of a row of tiles.
    const fn columns(&self) -> usize {
        let head_dim = self.source.head_dim;
        tile_columns(if self.rotate { rotated_dim(head_dim) } else { head_dim })
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
        // Steps of eight rows of their own take registers, and so do rotated rows: in single precision, as they are
        // needed twice.
        let threads = match self.granularity {
            _ if self.rotate => 512,
            Granularity::PerToken => 768,
            _ => 1024,
        };
        self.source.bound_registers(code, threads);
        let p = QuantizeKParams::declare(code);
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

    fn quantise<'k>(&self, keys: &SmoothedKeys<'k>, p: &QuantizeKParams<'k>) {
        let SmoothedKeys { head, rows, workspace_tile, .. } = keys;
        let (code, workspace_tile) = (head.code, *workspace_tile);

        code.note("scales");
        let groups = self.groups_of_rows(keys);
        // Steps of rows that have their own are computed where they are used: eight of them would not fit the
        // registers.
        let shared = Step::of_group(&self.quantizer(), groups[0].0);
        let step = |i: usize| match self.granularity {
            Granularity::PerToken => Step::of_group(&self.quantizer(), groups[i].0),
            _ => shared,
        };
        let scales = p.scale.at(workspace_tile * self.groups() as i32);
        let of_tile = if self.granularity == Granularity::PerToken { ROWS } else { 1 };
        let writes_scale = match self.granularity {
            Granularity::PerThread => head.chunk.eq(0) & (head.part & 1).eq(0),
            Granularity::PerToken => head.chunk.eq(0),
            _ => head.thread.eq(0),
        };
        code.when(writes_scale, || {
            groups[..of_tile]
                .iter()
                .enumerate()
                .for_each(|(i, (_, group))| scales.at(*group).store(step(i).scale));
        });

        code.note("integers");
        let ordinary = (0..of_tile).map(|i| step(i).is_ordinary()).reduce(|a, b| a & b);
        // A row that does not count may exceed its group's scale.
        let ordinary = ordinary.unwrap_or(code.constant(true)) & rows.all_count();
        let row_bytes = self.row_bytes() as i32;
        let tile_start = workspace_tile.widen() * i64::from(self.tile_bytes() as i32);
        let thread_start = head.part * row_bytes + head.chunk * (row_bytes / (self.columns() / CHUNK) as i32);
        let out = p.out.at(tile_start).at(thread_start).cast::<u32>();
        let store = |i: usize, words: &[Val<'_, u32>]| {
            let to = out.plus(i as i32 * ROWS as i32 * row_bytes / 4);
            match *words {
                [low, high] => to.store_vector([low, high]),
                _ => to.store(words[0]),
            }
        };
        let ordinarily = || (0..ROWS).for_each(|i| store(i, &self.words(&step(i), keys.row(i))));
        let carefully = || {
            let careful = shared.careful();
            for i in 0..ROWS {
                let careful = if of_tile == 1 { careful } else { step(i).careful() };
                let words = self.words(&careful, keys.row(i));
                let words: Vec<_> = words.iter().map(|&word| rows.valid(i).select(word, 0u32)).collect();
                store(i, &words);
            }
        };
        head.when_in_tile(self.columns(), || code.if_else(ordinary, ordinarily, carefully));
    }

    /// The group of each of the thread's rows: the same for all, but per token.
    fn groups_of_rows<'k>(&self, keys: &SmoothedKeys<'k>) -> Vec<Group<'k>> {
        let SmoothedKeys { head, rows, mean, .. } = keys;
        let code = head.code;
        // Rows that are missing differ from no mean, though their zeros may.
        let of_row = |i: usize| {
            let max = magnitude(keys.row(i));
            if mean.is_some() { rows.valid(i).select(max, 0.0) } else { max }
        };
        let maxima = || -> [Val<'k, f32>; ROWS] { std::array::from_fn(of_row) };
        if self.granularity == Granularity::PerToken {
            // A row that does not count is alone in its group, and so is measured all the same.
            return group_maxima_per_token(head, &maxima());
        }
        if self.source.masked {
            let maxima = maxima();
            let of_rows = |enters: &dyn Fn(usize) -> Val<'k, bool>| {
                // Below the bits of every magnitude: of no row.
                let bits = (0..ROWS).map(|i| enters(i).select(magnitude_bits(maxima[i]), -1));
                group_maximum(head, self.granularity, bits.reduce(Val::max).unwrap_or(code.constant(-1)))
            };
            let (counted, group) = of_rows(&|i| rows.counts(i));
            let (visible, _) = of_rows(&|i| rows.valid(i));
            return vec![(counted.lt(0).select(visible, counted).max(0), group); ROWS];
        }
        if self.rotate {
            return vec![group_maximum(head, self.granularity, magnitude(maxima()).reinterpret()); ROWS];
        }
        let max = Var::new(code);
        let whole = || {
            // The largest difference from a channel's mean is that of its largest or least element.
            let of_extremes = |largest| {
                let extremes = self.source.widen_chunk(rows.extremes(largest, true));
                magnitude(subtract(extremes, *mean))
            };
            max.set(of_extremes(true).max_nan(of_extremes(false)));
        };
        code.if_else(rows.whole(), whole, || max.set(magnitude(maxima())));
        vec![group_maximum(head, self.granularity, max.get().reinterpret()); ROWS]
    }

    /// The thread's part of a row, packed.
    fn words<'k>(&self, step: &Step<'k>, row: [Val<'k, f32>; CHUNK]) -> Vec<Val<'k, u32>> {
        match self.bits {
            IntBits::Eight => row.chunks(4).map(|four| step.round_word(four)).collect(),
            IntBits::Four => vec![step.round_word(&row)],
        }
    }
}

impl Kernel for QuantizeKConfig {
    fn name(&self) -> String {
        let bits = match self.bits {
            IntBits::Eight => "int8",
            IntBits::Four => "int4",
        };
        let granularity = self.granularity.name().replace('-', "_");
        let rounding = match self.rounding {
            Rounding::NearestEven => "even",
            Rounding::HalfAwayFromZero => "away",
        };
        let zero_group = match self.zero_group {
            ZeroGroup::Guard => "guard",
            ZeroGroup::AddToScale => "add",
            ZeroGroup::ClampMaximum => "clamp",
        };
        let smooth = self.mean.suffix();
        let rotated = if self.rotate { "_rotated" } else { "" };
        format!(
            "quantize_k_{bits}_{granularity}_{rounding}_{zero_group}{smooth}{rotated}_{}",
            self.source.suffix()
        )
    }

    fn description(&self) -> String {
        let smooth = self.mean.description();
        let (bits, granularity) = (self.bits.name(), self.granularity.name());
        let rotated = if self.rotate { ", rotated" } else { "" };
        format!("K to {bits} {granularity}{smooth}{rotated}; {}", self.source.description())
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}

/// The largest magnitude, NaN where a value is.
fn magnitude<'k>(row: [Val<'k, f32>; CHUNK]) -> Val<'k, f32> {
    let [first, rest @ ..] = row.map(Val::abs);
    rest.into_iter().fold(first, |max, x| max.max_nan(x))
}
