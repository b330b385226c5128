//! Tiles of keys and values in shared memory: of means, and of tensors as given.

use sage_ptx::{CHUNK_BYTES, Code, FragmentSource, Global, SharedTile, Val};

use super::kernel::{PooledTailConfig, PooledTailParams};
use super::rows::TailRows;
use crate::attention::elements;
use crate::tensor::TensorParam;

/// Keys of a tile. With two tiles of keys and values 64 KiB of shared memory hold heads of 256 channels.
pub(super) const TILE: usize = 32;

/// Stages of keys and of values: one is copied to while the other is read.
const STAGES: usize = 2;

/// The shared memory of a block of threads.
pub(super) struct Tiles<'k, 'c> {
    code: &'k Code,
    config: &'c PooledTailConfig,
    keys: SharedTile<'k>,
    values: SharedTile<'k>,
}

impl<'k, 'c> Tiles<'k, 'c> {
    pub fn new(config: &'c PooledTailConfig, code: &'k Code) -> Self {
        let row_bytes = [config.padded_dim(), config.padded_value_dim()].map(|dim| 2 * dim);
        let [of_keys, of_values] = row_bytes.map(|bytes| STAGES * TILE * bytes);
        let shared = code.shared::<u8>("tiles", of_keys + of_values);
        let values = SharedTile::new(shared.plus(of_keys as i32), row_bytes[1]);
        Tiles { code, config, keys: SharedTile::new(shared, row_bytes[0]), values }
    }

    /// The keys and values of a stage.
    pub fn stage(&self, stage: Val<'k, i32>) -> (FragmentSource<'k>, FragmentSource<'k>) {
        let [of_keys, of_values] = self.offsets(stage);
        (self.keys.columns_of_b(0).at_byte(of_keys), self.values.rows_of_b(0).at_byte(of_values))
    }

    /// Bytes from the first stage of keys, and of values, to another.
    fn offsets(&self, stage: Val<'k, i32>) -> [Val<'k, i32>; 2] {
        let of_keys = stage * (TILE * self.keys.row_bytes()) as i32;
        if self.are_alike() {
            return [of_keys; 2];
        }
        [of_keys, stage * (TILE * self.values.row_bytes()) as i32]
    }

    /// Whether tiles of keys and of values have as many columns.
    fn are_alike(&self) -> bool {
        self.keys.row_bytes() == self.values.row_bytes()
    }

    /// The means of the rows' key head.
    pub fn means(&self, p: &PooledTailParams<'k>, rows: &TailRows<'k>) -> Means<'k, '_> {
        let first = rows.kv_number(p).mul_wide(p.k_blocks);
        let of_keys = first * self.config.padded_dim() as i64;
        let of_values = match self.are_alike() {
            true => of_keys,
            false => first * self.config.padded_value_dim() as i64,
        };
        Means {
            tiles: self,
            keys: p.k_means.at(of_keys),
            values: p.v_means.at(of_values),
            blocks: p.k_blocks,
        }
    }

    /// Copies keys `first..end` of K as given to the first stage, zeros behind them, and waits for them.
    pub fn load_keys(&self, k: &TensorParam<'k, 3>, rows: &TailRows<'k>, [first, end]: [Val<'k, i32>; 2]) {
        self.load_given(&self.keys, self.config.head_dim, k, rows, [first, end]);
    }

    /// Likewise of V.
    pub fn load_values(&self, v: &TensorParam<'k, 3>, rows: &TailRows<'k>, [first, end]: [Val<'k, i32>; 2]) {
        self.load_given(&self.values, self.config.value_dim, v, rows, [first, end]);
    }

    fn load_given(
        &self,
        tile: &SharedTile<'k>,
        head_dim: usize,
        tensor: &TensorParam<'k, 3>,
        rows: &TailRows<'k>,
        [first, end]: [Val<'k, i32>; 2],
    ) {
        let Tiles { code, config, .. } = *self;
        let stride = tensor.row_stride();
        let base = tensor.head(rows.sequence.batch, rows.kv_head) + rows.sequence.kv_start.widen() * stride;
        let base = tensor.start.cast::<u16>().at(base);
        // All warps have done with what lies there.
        code.barrier();
        self.each_chunk(tile, |row, chunk| {
            let target = tile.chunk(row, chunk).step(0, 0);
            let there = (first + row).lt(end) & (chunk * 8).lt(head_dim as i32);
            let from = base.at(there.select(first + row, 0).widen() * stride).at(there.select(chunk, 0) * 8);
            if config.aligned {
                target.copy_async(from, 16, there.select(16, 0));
            } else {
                target.cast::<u32>().store_vector(elements(head_dim as i32, from, chunk, there));
            }
        });
        code.commit_copies();
        code.wait_copies(0);
        code.barrier();
    }

    /// Calls `copy` with the row and the chunk of each of the thread's part of a tile.
    fn each_chunk(&self, tile: &SharedTile<'k>, copy: impl Fn(Val<'k, i32>, Val<'k, i32>)) {
        let (threads, chunks) = (self.config.threads() as usize, tile.row_bytes() / CHUNK_BYTES);
        for round in 0..(TILE * chunks).div_ceil(threads) {
            let index = self.code.thread() + (round * threads) as i32;
            let (row, chunk) = index.split_index(chunks);
            if (round + 1) * threads <= TILE * chunks {
                copy(row, chunk);
            } else {
                self.code.when(index.lt((TILE * chunks) as i32), || copy(row, chunk));
            }
        }
    }
}

/// Means of the blocks of a key head.
pub(super) struct Means<'k, 't> {
    tiles: &'t Tiles<'k, 't>,
    keys: Global<'k, u16>,
    values: Global<'k, u16>,
    blocks: Val<'k, i32>,
}

impl<'k> Means<'k, '_> {
    /// Starts copying a tile to a stage, zeros in place of blocks that there are not.
    pub fn copy(&self, tile: Val<'k, i32>, stage: Val<'k, i32>) {
        let Tiles { code, config, keys, values } = self.tiles;
        let [of_keys, of_values] = self.tiles.offsets(stage);
        let copy = |dim: usize, parts: &[(Global<'k, u16>, &SharedTile<'k>, Val<'k, i32>)]| {
            self.tiles.each_chunk(parts[0].1, |row, chunk| {
                let block = tile * TILE as i32 + row;
                let there = block.lt(self.blocks);
                let at = there.select(block, 0) * dim as i32 + chunk * 8;
                for &(from, to, stage) in parts {
                    let to = to.at_byte(stage).chunk(row, chunk).step(0, 0);
                    to.copy_async(from.at(at), 16, there.select(16, 0));
                }
            });
        };
        let parts = [(self.keys, keys, of_keys), (self.values, values, of_values)];
        if self.tiles.are_alike() {
            copy(config.padded_dim(), &parts);
        } else {
            copy(config.padded_dim(), &parts[..1]);
            copy(config.padded_value_dim(), &parts[1..]);
        }
        code.commit_copies();
    }
}
