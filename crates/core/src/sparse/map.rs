//! Which blocks of the score matrix are computed.

use super::BlockLists;
use super::grid::{Grid, check_block, check_shape};
use crate::{Band, BlockMask, Error, Result, View};

/// A flag for each block of queries and block of keys of each head: `true` where the block of scores is computed.
///
/// The flags are row-major `[batch, num_q_heads, ⌈q_len / block_q⌉, ⌈kv_len / block_k⌉]`. Blocks may have any size;
/// kernels take 64 and 128.
///
/// ```
/// use sage_core::sparse::BlockMap;
///
/// let map = BlockMap::new(vec![true, false, true, true], [1, 1, 2, 2], 128, 64)?;
/// assert_eq!(map.lists().indices(), [0, 0, 0, 1]);
/// assert_eq!(map.lists().counts(), [1, 2]);
/// # Ok::<(), sage_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    flags: Vec<bool>,
    shape: [usize; 4],
    block_q: usize,
    block_k: usize,
}

impl BlockMap {
    /// A map of `shape`, which is `[batch, num_q_heads, q_blocks, k_blocks]`, with its flags in row-major order.
    ///
    /// # Errors
    /// When `flags` are not exactly those of `shape`, when a block has no tokens, or when blocks are too many to be
    /// numbered in 32 bits.
    pub fn new(flags: Vec<bool>, shape: [usize; 4], block_q: usize, block_k: usize) -> Result<Self> {
        check_shape(shape)?;
        check_block("block_q", block_q)?;
        check_block("block_k", block_k)?;
        // A view that cannot be made names what is wrong.
        View::contiguous("block_map", &flags, &shape)?;
        Ok(BlockMap { flags, shape, block_q, block_k })
    }

    /// The map that keeps exactly the listed blocks, with `block_q` rows and `block_k` columns of the lists' each.
    ///
    /// # Errors
    /// When a block has no tokens, or memory does not hold the flags.
    pub fn from_lists(lists: &BlockLists, block_q: usize, block_k: usize) -> Result<Self> {
        let [batch, heads, rows, _] = lists.shape();
        let shape = [batch, heads, rows, lists.columns()];
        let mut flags = cleared(shape)?;
        if lists.columns() > 0 {
            for (flags, listed) in flags.chunks_mut(lists.columns()).zip(lists.rows()) {
                listed.iter().for_each(|&index| flags[index as usize] = true);
            }
        }
        BlockMap::new(flags, shape, block_q, block_k)
    }

    /// `[batch, num_q_heads, q_blocks, k_blocks]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Queries in a block.
    pub fn block_q(&self) -> usize {
        self.block_q
    }

    /// Keys in a block.
    pub fn block_k(&self) -> usize {
        self.block_k
    }

    /// The flags in row-major order.
    pub fn flags(&self) -> &[bool] {
        &self.flags
    }

    /// The flags of each block of queries, over all blocks of keys: first those of the first head.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[bool]> {
        let [batch, heads, rows, columns] = self.shape;
        (0..batch * heads * rows).map(move |row| &self.flags[row * columns..(row + 1) * columns])
    }

    /// Number of blocks that are computed.
    pub fn kept(&self) -> usize {
        self.flags.iter().filter(|&&kept| kept).count()
    }

    /// The share of blocks that are computed among those in which `band` lets some query see a key; 1 where it shows
    /// none. One less the density is the sparsity that papers report.
    ///
    /// # Errors
    /// When sequences of such lengths have another number of blocks.
    pub fn density(&self, band: &Band, q_len: usize, kv_len: usize) -> Result<f64> {
        let grid = Grid { q_len, kv_len, block_q: self.block_q, block_k: self.block_k };
        let [batch, heads, q_blocks, k_blocks] = self.shape;
        if [q_blocks, k_blocks] != [grid.q_blocks(), grid.k_blocks()] {
            let blocks = [batch, heads, grid.q_blocks(), grid.k_blocks()];
            let wanted = format!("{blocks:?}, the blocks of {q_len} queries and {kv_len} keys");
            return Err(Error::shape("block_map", &self.shape, wanted));
        }
        let (mut seen, mut kept) = (0, 0);
        for (row, flags) in self.rows().enumerate() {
            let flags = &flags[grid.seen(band, row % q_blocks)];
            seen += flags.len();
            kept += flags.iter().filter(|&&kept| kept).count();
        }
        Ok(if seen == 0 { 1.0 } else { kept as f64 / seen as f64 })
    }

    /// Blocks of keys as rows and blocks of queries as columns: what a backward pass over keys walks.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let [batch, heads, rows, columns] = self.shape;
        let mut flags = Vec::with_capacity(self.flags.len());
        for head in 0..batch * heads {
            for column in 0..columns {
                flags.extend((0..rows).map(|row| self.flags[(head * rows + row) * columns + column]));
            }
        }
        let shape = [batch, heads, columns, rows];
        BlockMap { flags, shape, block_q: self.block_k, block_k: self.block_q }
    }

    /// The key blocks that each query block keeps, as lists in ascending order with a place for every key block.
    pub fn lists(&self) -> BlockLists {
        let mut indices = vec![0; self.flags.len()];
        let mut counts = Vec::with_capacity(self.rows().len());
        for (row, flags) in self.rows().enumerate() {
            let kept = (0..).zip(flags).filter_map(|(index, &kept)| kept.then_some(index));
            let places = &mut indices[row * flags.len()..];
            counts.push(places.iter_mut().zip(kept).map(|(place, index)| *place = index).count() as i32);
        }
        BlockLists::of_map(indices, counts, self.shape)
    }

    /// This map as a call to attention takes it.
    pub fn mask(&self) -> BlockMask<View<'_, bool>> {
        let blocks = View::contiguous("block_map", &self.flags, &self.shape);
        let blocks = blocks.expect("a map holds the flags of its shape");
        BlockMask { blocks, block_q: self.block_q, block_k: self.block_k }
    }
}

/// Flags of a map of `shape` that keeps no block.
pub(super) fn cleared(shape: [usize; 4]) -> Result<Vec<bool>> {
    let len = check_shape(shape)?.len();
    let mut flags = Vec::new();
    if flags.try_reserve_exact(len).is_err() {
        return Err(Error::unsupported(
            format!("a block map of shape {shape:?}"),
            "there is not enough memory",
        ));
    }
    flags.resize(len, false);
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Alignment;

    #[test]
    fn density_counts_the_blocks_that_the_band_shows() {
        // Four queries and keys in blocks of two: a causal band hides the upper right block.
        let map = BlockMap::new(vec![true, true, false, true], [1, 1, 2, 2], 2, 2).unwrap();
        let density = |band| map.density(&band, 4, 4).unwrap();
        assert_eq!(density(Band::FULL), 0.75);
        assert_eq!(density(Band::causal(Alignment::TopLeft)), 2.0 / 3.0);
        assert_eq!(density(Band::causal(Alignment::Offset(-9))), 1.0, "no block is seen");
        assert_eq!(map.kept(), 3);
        let error = map.density(&Band::FULL, 5, 4).unwrap_err().to_string();
        let wanted =
            "block_map: shape is [1, 1, 2, 2], expected [1, 1, 3, 2], the blocks of 5 queries and 4 keys";
        assert_eq!(error, wanted);
    }

    #[test]
    fn a_transposed_map_lists_the_query_blocks_of_each_key_block() {
        let flags = vec![true, false, true, true, true, false];
        let map = BlockMap::new(flags, [1, 1, 2, 3], 64, 128).unwrap();
        let transposed = map.transposed();
        assert_eq!((transposed.shape(), transposed.block_q(), transposed.block_k()), ([1, 1, 3, 2], 128, 64));
        assert_eq!(transposed.lists().indices(), [0, 1, 1, 0, 0, 0]);
        assert_eq!(transposed.lists().counts(), [2, 1, 1]);
    }

    #[test]
    fn a_map_is_the_mask_of_a_call() {
        let map = BlockMap::new(vec![true, false], [1, 1, 1, 2], 64, 128).unwrap();
        let mask = map.mask();
        assert_eq!(
            (mask.block_q, mask.block_k, mask.blocks.geometry().shape()),
            (64, 128, &[1, 1, 1, 2][..])
        );
        assert_eq!(mask.blocks.data(), [true, false]);
    }

    #[test]
    fn what_is_no_map_is_refused() {
        let error = |flags: usize, shape, block_q, block_k| {
            BlockMap::new(vec![true; flags], shape, block_q, block_k).unwrap_err().to_string()
        };
        assert_eq!(
            error(3, [1, 1, 2, 2], 64, 64),
            "block_map: memory holds 3 elements, expected 4 for shape [1, 1, 2, 2]"
        );
        assert_eq!(error(1, [1; 4], 0, 64), "block_q: value is 0, expected at least 1");
        assert_eq!(error(1, [1; 4], 64, 0), "block_k: value is 0, expected at least 1");
        assert!(error(0, [0, 1, 1, usize::MAX], 1, 1).contains("fewer than 2³¹ blocks"));
        // Without flags, but with a list for each block of queries.
        assert!(error(0, [1 << 20, 1 << 20, 1, 0], 1, 1).contains("fewer than 2³¹ blocks"));
    }

    proptest! {
        #[test]
        fn a_map_is_its_lists_its_deltas_and_its_transposed_transposed(
            [batch, heads, rows, columns] in [0usize..3, 1usize..3, 0usize..5, 0usize..6],
            seed in any::<u64>(),
        ) {
            let shape = [batch, heads, rows, columns];
            let len: usize = shape.iter().product();
            let flags: Vec<bool> = (0..len).map(|at| seed.rotate_left(at as u32) & 1 == 1).collect();
            let map = BlockMap::new(flags, shape, 128, 64).unwrap();
            let lists = map.lists();
            prop_assert_eq!(&BlockMap::from_lists(&lists, 128, 64).unwrap(), &map);
            let from_deltas = BlockLists::from_deltas(&lists.deltas(), lists.counts(), shape).unwrap();
            prop_assert_eq!(from_deltas, lists);
            prop_assert_eq!(map.transposed().transposed(), map);
        }
    }
}
