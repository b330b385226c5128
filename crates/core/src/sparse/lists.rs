//! Key blocks of each query block as lists of indices.

use std::collections::HashSet;

use super::grid::check_shape;
use crate::{Error, Geometry, Result};

/// The key blocks of each query block as a list of indices and its length, as kernels walk them.
///
/// Row-major, in 32 bits: indices `[batch, num_q_heads, q_blocks, width]`, of which each list fills the first places,
/// and lengths `[batch, num_q_heads, q_blocks]`. These are VSA's `q2k_idx` and `q2k_num`. SpargeAttn's `lut` and
/// `valid_block_num` hold the distance of each index from the one before it instead: [`BlockLists::deltas`].
///
/// ```
/// use sage_core::sparse::BlockLists;
///
/// let lists = BlockLists::from_deltas(&[1, 2, 0, 0], &[2], [1, 1, 1, 4])?;
/// assert_eq!(lists.indices(), [1, 3, 0, 0]);
/// # Ok::<(), sage_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLists {
    indices: Vec<i32>,
    counts: Vec<i32>,
    shape: [usize; 4],
    columns: usize,
}

impl BlockLists {
    /// Lists of blocks among `columns` of them. `shape` is that of `indices`, `[batch, num_q_heads, q_blocks, width]`.
    /// What lies behind the end of a list is ignored.
    ///
    /// # Errors
    /// When `indices` and `counts` do not fit `shape`, when a list is longer than `width` or has a negative length, or
    /// when it holds an index outside `0..columns`, or one twice.
    pub fn new(indices: &[i32], counts: &[i32], shape: [usize; 4], columns: usize) -> Result<Self> {
        let lists = BlockLists { indices: indices.to_vec(), counts: counts.to_vec(), shape, columns };
        lists.read(["indices", "counts"], |_, index| index)
    }

    /// Lists from SpargeAttn's `lut`, whose `shape` is `[batch, num_q_heads, q_blocks, k_blocks]`: the first index of
    /// each list, and then how far each lies from the one before it.
    ///
    /// # Errors
    /// As [`BlockLists::new`].
    pub fn from_deltas(lut: &[i32], valid_block_num: &[i32], shape: [usize; 4]) -> Result<Self> {
        let (indices, counts) = (lut.to_vec(), valid_block_num.to_vec());
        let lists = BlockLists { indices, counts, shape, columns: shape[3] };
        lists.read(["lut", "valid_block_num"], |last, delta| last + delta)
    }

    /// These lists with each entry replaced by the index that `index` makes of the one before it and the entry, after
    /// all checks. `names` are what the caller calls entries and lengths.
    fn read(mut self, names: [&'static str; 2], index: impl Fn(i64, i64) -> i64) -> Result<Self> {
        let [batch, heads, rows, width] = self.shape;
        check_shape([batch, heads, rows, self.columns])?;
        check_len(names[0], &self.indices, &self.shape)?;
        check_len(names[1], &self.counts, &self.shape[..3])?;
        for (row, &count) in self.counts.iter().enumerate() {
            let place = format!("{}, {}, {}", row / rows / heads, row / rows % heads, row % rows);
            let places = &mut self.indices[row * width..(row + 1) * width];
            let count = usize::try_from(count).ok().filter(|&count| count <= width).ok_or_else(|| {
                Error::value(format!("{}[{place}]", names[1]), count, format!("0 to {width}"))
            })?;
            let (mut last, mut listed) = (0, HashSet::new());
            for (at, entry) in places[..count].iter_mut().enumerate() {
                last = index(last, i64::from(*entry));
                let wrong = |wanted| {
                    Err(Error::value(format!("{}[{place}, {at}]", names[0]), format!("block {last}"), wanted))
                };
                // Fewer than 2³¹ blocks: every index that passes fits 32 bits.
                if !(0..self.columns as i64).contains(&last) {
                    return wrong(format!("one of {} blocks", self.columns));
                }
                if !listed.insert(last) {
                    return wrong("each block at most once in a list".into());
                }
                *entry = last as i32;
            }
            places[count..].fill(0);
        }
        Ok(self)
    }

    /// Lists that were made of a map of `shape`.
    pub(super) fn of_map(indices: Vec<i32>, counts: Vec<i32>, shape: [usize; 4]) -> Self {
        BlockLists { indices, counts, shape, columns: shape[3] }
    }

    /// All lists, each in its `width` places, of which those behind its end are 0.
    pub fn indices(&self) -> &[i32] {
        &self.indices
    }

    /// The length of each list.
    pub fn counts(&self) -> &[i32] {
        &self.counts
    }

    /// Shape of the indices: `[batch, num_q_heads, q_blocks, width]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The number of blocks of keys that there are, listed or not.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Each list, without the places behind its end.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[i32]> {
        let width = self.shape[3];
        self.counts
            .iter()
            .enumerate()
            .map(move |(row, &count)| &self.indices[row * width..][..count as usize])
    }

    /// SpargeAttn's `lut`: the first index of each list, how far each of the others lies from the one before it, and 0
    /// behind the end. Its `valid_block_num` is [`BlockLists::counts`].
    pub fn deltas(&self) -> Vec<i32> {
        let mut deltas = vec![0; self.indices.len()];
        for (row, list) in self.rows().enumerate() {
            let before = std::iter::once(&0).chain(list);
            let places = &mut deltas[row * self.shape[3]..];
            places
                .iter_mut()
                .zip(list.iter().zip(before))
                .for_each(|(place, (index, last))| *place = index - last);
        }
        deltas
    }
}

fn check_len(name: &'static str, entries: &[i32], shape: &[usize]) -> Result<()> {
    let wanted = Geometry::contiguous(name, shape)?.len();
    if entries.len() == wanted {
        return Ok(());
    }
    let wanted = format!("{wanted} for shape {shape:?}");
    Err(Error::Memory { name: name.into(), found: entries.len(), wanted })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::BlockMap;

    #[test]
    fn deltas_are_distances_from_the_index_before() {
        // Blocks 0, 2 and 3 of the first row of blocks, 1 of the second.
        let flags = [true, false, true, true, false, true, false, false];
        let lists = BlockMap::new(flags.to_vec(), [1, 1, 2, 4], 128, 64).unwrap().lists();
        assert_eq!(lists.indices(), [0, 2, 3, 0, 1, 0, 0, 0]);
        assert_eq!(lists.deltas(), [0, 2, 1, 0, 1, 0, 0, 0]);
        assert_eq!(lists.counts(), [3, 1]);
    }

    #[test]
    fn a_list_may_have_fewer_places_than_there_are_blocks_and_any_order() {
        let lists = BlockLists::new(&[4, 1, 3, -1], &[2, 1], [1, 2, 1, 2], 5).unwrap();
        assert_eq!(lists.indices(), [4, 1, 3, 0], "what lies behind the end is ignored");
        assert_eq!(lists.deltas(), [4, -3, 3, 0]);
        let map = BlockMap::from_lists(&lists, 64, 64).unwrap();
        let [no, yes] = [false, true];
        assert_eq!(map.flags(), [no, yes, no, no, yes, no, no, no, yes, no]);
        assert_eq!(map.shape(), [1, 2, 1, 5]);
    }

    #[test]
    fn what_is_no_list_is_refused_by_the_name_of_its_entry() {
        let plain = |indices: [i32; 4], counts: [i32; 2]| {
            BlockLists::new(&indices, &counts, [1, 2, 1, 2], 3).unwrap_err().to_string()
        };
        assert_eq!(
            plain([0, 1, 0, 3], [2, 2]),
            "indices[0, 1, 0, 1]: value is block 3, expected one of 3 blocks"
        );
        assert_eq!(
            plain([-1, 1, 0, 3], [2, 0]),
            "indices[0, 0, 0, 0]: value is block -1, expected one of 3 blocks"
        );
        assert_eq!(
            plain([0, 1, 2, 2], [2, 2]),
            "indices[0, 1, 0, 1]: value is block 2, expected each block at most once in a list"
        );
        assert_eq!(plain([0; 4], [1, 3]), "counts[0, 1, 0]: value is 3, expected 0 to 2");
        assert_eq!(plain([0; 4], [-1, 1]), "counts[0, 0, 0]: value is -1, expected 0 to 2");

        let deltas = |lut: &[i32], counts: &[i32]| {
            BlockLists::from_deltas(lut, counts, [2, 1, 1, 2]).unwrap_err().to_string()
        };
        assert_eq!(
            deltas(&[0, 1, 1, 1], &[2, 2]),
            "lut[1, 0, 0, 1]: value is block 2, expected one of 2 blocks"
        );
        assert_eq!(
            deltas(&[1, 0, 0, 0], &[2, 0]),
            "lut[0, 0, 0, 1]: value is block 1, expected each block at most once in a list"
        );
        assert_eq!(deltas(&[0; 4], &[0, 3]), "valid_block_num[1, 0, 0]: value is 3, expected 0 to 2");
        assert_eq!(
            deltas(&[0; 3], &[0; 2]),
            "lut: memory holds 3 elements, expected 4 for shape [2, 1, 1, 2]"
        );
        assert_eq!(
            deltas(&[0; 4], &[0]),
            "valid_block_num: memory holds 1 elements, expected 2 for shape [2, 1, 1]"
        );
    }
}
