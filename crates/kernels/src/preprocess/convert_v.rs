//! V to contiguous tiles of 16-bit elements of the type that P·V is computed in.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Half, Program, Scalar, Val, kernel};

use super::tile_load::{Head, ROWS, RowOrder, Source, tile_grid};
use crate::kernel::Kernel;
use crate::operand::tile_columns;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Copies V into the workspace, for attention that computes in another type than V's, or that cannot read V's rows as
/// they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvertVConfig {
    /// V as given.
    pub source: Source,
    /// Element type of the tiles: f16 or bf16. Values that f16 cannot hold become infinities.
    pub to: DType,
}

kernel_params! {
    /// What a launch of [`ConvertVConfig`] passes. Strides are in elements.
    ConvertVParams, ConvertVArgs {
        /// V as given.
        input: input,
        /// Tiles.
        out: [u16],
        /// Tiles of the workspace, all sequences together.
        key_tiles: i32,
    }
}

impl ConvertVConfig {
    /// Bytes of a tile.
    pub const fn tile_bytes(&self) -> usize {
        2 * KEY_TILE * self.columns()
    }

    /// Channels of a row of tiles.
    const fn columns(&self) -> usize {
        tile_columns(self.source.head_dim)
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
        self.source.bound_registers(code, 1024);
        let p = ConvertVParams::declare(code);
        let head = Head::new(code, &self.source, &p.input);
        let [tile, ..] = code.block_index();
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()));

        let rows = head.load(tile, RowOrder::Modulo8);
        let width = self.columns() as i32;
        let workspace_tile = head.head * p.key_tiles + head.sequence.first_tile + tile;
        let start = workspace_tile.widen() * i64::from(KEY_TILE as i32 * width);
        let out = p.out.at(start);
        let out = match self.columns() == self.source.padded_dim() {
            true => out.at(head.thread << 3),
            false => out.at(head.part * width + (head.chunk << 3)),
        };
        let out = out.cast::<u32>();
        head.when_in_tile(self.columns(), || {
            for i in 0..ROWS {
                let words = rows.words(i).map(|word| self.convert(word));
                out.plus(i as i32 * ROWS as i32 * width / 2).store_vector(words);
            }
        });
    }

    /// Two neighbouring elements in the tiles' type.
    fn convert<'k>(&self, word: Val<'k, u32>) -> Val<'k, u32> {
        fn narrow<'k, T: Half>([low, high]: [Val<'k, f32>; 2]) -> Val<'k, u32>
        where
            T::Pair: Scalar,
        {
            low.pack::<T>(high).reinterpret()
        }
        match self.to {
            same if same == self.source.dtype => word,
            DType::F16 => narrow::<f16>(self.source.widen(word)),
            _ => narrow::<bf16>(self.source.widen(word)),
        }
    }
}

impl Kernel for ConvertVConfig {
    fn name(&self) -> String {
        format!("convert_v_{}_{}", self.to, self.source.suffix())
    }

    fn description(&self) -> String {
        format!("V to {}; {}", self.to, self.source.description())
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
