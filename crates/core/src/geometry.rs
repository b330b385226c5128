//! Shape, strides and offset: where each element of a tensor lies, in 64-bit arithmetic.

use std::fmt;
use std::ops::Range;

use crate::{Error, Result};

/// Most dimensions a tensor has here.
pub const MAX_RANK: usize = 4;

/// Where each element of a tensor lies in its memory.
///
/// Offsets and strides count elements, are 64 bits wide and may be negative or zero (a broadcast dimension).
/// Construction proves that no index overflows, so [`Geometry::index`] is plain arithmetic.
///
/// ```
/// use sage_core::Geometry;
///
/// // Keys inside a fused [batch, seq, 3, heads, head_dim] tensor, seen as [batch, seq, heads, head_dim].
/// let (seq, heads, head_dim) = (10, 4, 64);
/// let row = (3 * heads * head_dim) as i64;
/// let k = Geometry::strided("k", &[2, seq, heads, head_dim], &[seq as i64 * row, row, 64, 1], 256)?;
/// assert_eq!(k.index([1, 2, 3, 4]), 10 * 768 + 2 * 768 + 256 + 3 * 64 + 4);
/// # Ok::<(), sage_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    rank: usize,
    // Unused leading dimensions have size 1 and stride 0, so that `index` needs no rank.
    shape: [usize; MAX_RANK],
    strides: [i64; MAX_RANK],
    offset: i64,
}

impl Geometry {
    /// A row-major tensor without gaps.
    ///
    /// # Errors
    /// When there are more than [`MAX_RANK`] dimensions, or more elements than fit 63 bits.
    pub fn contiguous(name: &str, shape: &[usize]) -> Result<Self> {
        let mut strides = [0; MAX_RANK];
        let mut stride: i64 = 1;
        for d in (0..shape.len().min(MAX_RANK)).rev() {
            strides[d] = stride;
            stride = i64::try_from(shape[d])
                .ok()
                .and_then(|n| stride.checked_mul(n.max(1)))
                .ok_or_else(|| too_many(name, shape))?;
        }
        Self::strided(name, shape, &strides[..shape.len().min(MAX_RANK)], 0)
    }

    /// A tensor with the given strides and offset of its first element, in elements.
    ///
    /// # Errors
    /// When there are more than [`MAX_RANK`] dimensions, when shape and strides differ in length, or when an
    /// element's index does not fit 63 bits.
    pub fn strided(name: &str, shape: &[usize], strides: &[i64], offset: i64) -> Result<Self> {
        let rank = shape.len();
        if rank > MAX_RANK {
            return Err(Error::shape(name.to_owned(), shape, format!("at most {MAX_RANK} dimensions")));
        }
        if strides.len() != rank {
            return Err(Error::Strides {
                name: name.to_owned().into(),
                found: format!("{strides:?}"),
                wanted: format!("{rank} strides, one for each dimension of shape {shape:?}"),
            });
        }
        let mut geometry = Geometry { rank, shape: [1; MAX_RANK], strides: [0; MAX_RANK], offset };
        geometry.shape[MAX_RANK - rank..].copy_from_slice(shape);
        geometry.strides[MAX_RANK - rank..].copy_from_slice(strides);
        // Both ends, and each step towards them, must fit: then so does every partial sum of `index`.
        let (mut low, mut high) = (offset, offset);
        let mut count: i64 = 1;
        for (&size, &stride) in shape.iter().zip(strides) {
            let size = i64::try_from(size).map_err(|_| too_many(name, shape))?;
            count = count.checked_mul(size.max(1)).ok_or_else(|| too_many(name, shape))?;
            let reach = (size - 1).max(0).checked_mul(stride);
            let end = if stride < 0 { &mut low } else { &mut high };
            *end = reach.and_then(|r| end.checked_add(r)).ok_or_else(|| too_large(name, shape))?;
        }
        Ok(geometry)
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape[MAX_RANK - self.rank..]
    }

    /// Strides of the dimensions, in elements.
    pub fn strides(&self) -> &[i64] {
        &self.strides[MAX_RANK - self.rank..]
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Index of the first element, also where there is none.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Smallest and largest index of an element, or `None` when there is none.
    pub fn span(&self) -> Option<(i64, i64)> {
        if self.is_empty() {
            return None;
        }
        // From the offset on, as in `strided`: the reaches alone might not fit.
        let end = |negative: bool| {
            let dimensions = self.shape.iter().zip(&self.strides).filter(|(_, s)| (**s < 0) == negative);
            dimensions.fold(self.offset, |end, (&n, &s)| end + (n as i64 - 1) * s)
        };
        Some((end(true), end(false)))
    }

    /// Index of an element; dimensions that the tensor lacks come first and are ignored.
    pub fn index(&self, at: [usize; MAX_RANK]) -> i64 {
        debug_assert!((0..MAX_RANK).all(|d| at[d] < self.shape[d] || self.strides[d] == 0));
        at.iter().zip(&self.strides).fold(self.offset, |index, (&i, &s)| index + i as i64 * s)
    }

    /// The places of all elements in row-major order, as [`Geometry::index`] takes them.
    pub fn places(&self) -> impl Iterator<Item = [usize; MAX_RANK]> {
        let shape = self.shape;
        (0..self.len()).map(move |number| {
            let (mut at, mut rest) = ([0; MAX_RANK], number);
            for d in (0..MAX_RANK).rev() {
                (at[d], rest) = (rest % shape[d], rest / shape[d]);
            }
            at
        })
    }

    /// Whether elements along the last dimension are neighbours in memory.
    pub fn last_is_contiguous(&self) -> bool {
        self.shape[MAX_RANK - 1] <= 1 || self.strides[MAX_RANK - 1] == 1
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.is_empty()
            || (0..MAX_RANK).rev().all(|d| {
                let fits = self.shape[d] == 1 || self.strides[d] == expected;
                expected *= self.shape[d] as i64;
                fits
            })
    }

    /// Whether two different positions may share memory. Sufficient, not necessary: ordered by stride, each
    /// dimension must step over all of the smaller ones, as every tensor does that was sliced or permuted.
    pub fn overlaps_itself(&self) -> bool {
        let mut dims: Vec<(u64, u64)> = (0..MAX_RANK)
            .filter(|&d| self.shape[d] > 1)
            .map(|d| (self.strides[d].unsigned_abs(), self.shape[d] as u64))
            .collect();
        dims.sort_unstable();
        let mut reach = 0;
        !self.is_empty()
            && dims.iter().any(|&(stride, size)| {
                let overlaps = stride <= reach;
                reach += stride * (size - 1);
                overlaps
            })
    }

    /// The same elements with dimensions in the order `order`, given as positions among this tensor's.
    pub(crate) fn permuted(&self, order: &[usize]) -> Self {
        debug_assert_eq!(order.len(), self.rank);
        let base = MAX_RANK - self.rank;
        let mut out = *self;
        for (to, &from) in order.iter().enumerate() {
            out.shape[base + to] = self.shape[base + from];
            out.strides[base + to] = self.strides[base + from];
        }
        out
    }

    /// Elements `range` of dimension `dimension`, which must have them.
    pub(crate) fn narrowed(&self, dimension: usize, range: Range<usize>) -> Self {
        let at = MAX_RANK - self.rank + dimension;
        debug_assert!(range.start <= range.end && range.end <= self.shape[at]);
        let mut out = *self;
        out.shape[at] = range.len();
        // Of no element there is no first one, and its index might not fit.
        if !range.is_empty() {
            out.offset += range.start as i64 * self.strides[at];
        }
        out
    }

    /// The same elements with leading dimensions of size 1 added up to `rank`.
    pub(crate) fn with_rank(&self, rank: usize) -> Self {
        debug_assert!((self.rank..=MAX_RANK).contains(&rank));
        Geometry { rank, ..*self }
    }

    /// This tensor seen as `shape`: dimensions of size 1, and missing leading ones, repeat.
    /// `None` when a dimension is neither 1 nor the wanted size.
    pub(crate) fn broadcast(&self, shape: [usize; MAX_RANK]) -> Option<Self> {
        let mut out = Geometry { rank: MAX_RANK, ..*self };
        for (d, &size) in shape.iter().enumerate() {
            if self.shape[d] != size {
                if self.shape[d] != 1 {
                    return None;
                }
                out.shape[d] = size;
                out.strides[d] = 0;
            }
        }
        Some(out)
    }
}

impl fmt::Debug for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} strides {:?} offset {}", self.shape(), self.strides(), self.offset)
    }
}

/// Strides and products of sizes are formed for a tensor without elements too.
fn too_many(name: &str, shape: &[usize]) -> Error {
    Error::shape(name.to_owned(), shape, "less than 2⁶³ elements, where a size of 0 counts as 1")
}

fn too_large(name: &str, shape: &[usize]) -> Error {
    Error::shape(name.to_owned(), shape, "indices of all elements within 63 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_beyond_32_bits_are_exact() {
        // 64 Ki tokens × 64 heads × 256: the last batch starts beyond 2³² elements.
        let g = Geometry::contiguous("k", &[8, 65_536, 64, 256]).unwrap();
        assert_eq!(g.index([7, 65_535, 63, 255]), 8 * 65_536 * 64 * 256 - 1);
        assert_eq!(g.span(), Some((0, (1 << 33) - 1)));
    }

    #[test]
    fn indices_beyond_63_bits_are_refused() {
        for (shape, strides) in [
            (&[2usize, 2][..], &[i64::MAX, i64::MAX][..]),
            (&[usize::MAX, 1], &[1, 1]),
            (&[3, 1], &[i64::MIN, 1]),
            (&[1 << 40, 1 << 40], &[0, 0]),
        ] {
            assert!(Geometry::strided("q", shape, strides, 0).is_err(), "{shape:?} {strides:?}");
        }
        assert!(Geometry::contiguous("q", &[1 << 32, 1 << 32]).is_err());
    }

    #[test]
    fn reaches_that_only_fit_together_with_the_offset_do() {
        let g = Geometry::strided("q", &[2, 2], &[i64::MIN / 2, i64::MIN / 2 - 2], i64::MAX).unwrap();
        assert_eq!(g.span(), Some((-3, i64::MAX)));
        assert_eq!(g.index([0, 0, 1, 1]), -3);
    }

    #[test]
    fn negative_strides_span_downwards() {
        let g = Geometry::strided("q", &[3, 2], &[-2, 1], 4).unwrap();
        assert_eq!(g.span(), Some((0, 5)));
        assert_eq!(g.index([0, 0, 2, 1]), 1);
        assert!(!g.overlaps_itself());
    }

    #[test]
    fn overlap_is_found() {
        let overlaps = |shape: &[usize], strides: &[i64]| {
            Geometry::strided("out", shape, strides, 0).unwrap().overlaps_itself()
        };
        assert!(overlaps(&[2, 4], &[0, 1]));
        assert!(overlaps(&[2, 4], &[3, 1]));
        assert!(!overlaps(&[2, 4], &[4, 1]));
        assert!(!overlaps(&[4, 2], &[1, 4]));
        assert!(!overlaps(&[1, 4], &[0, 1]));
        assert!(!overlaps(&[2, 0], &[0, 0]));
    }

    #[test]
    fn places_come_in_row_major_order_and_ignore_strides() {
        let geometry = Geometry::strided("x", &[2, 1, 3], &[-1, 7, 0], 1).unwrap();
        let places: Vec<_> = geometry.places().collect();
        let expected = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]].map(|[a, c]| [0, a, 0, c]);
        assert_eq!(places, expected);
        assert_eq!(Geometry::contiguous("x", &[2, 0]).unwrap().places().count(), 0);
        assert_eq!(Geometry::contiguous("x", &[]).unwrap().places().count(), 1);
    }

    #[test]
    fn broadcasting_repeats_ones_only() {
        let g = Geometry::contiguous("mask", &[3, 1]).unwrap();
        let b = g.broadcast([2, 5, 3, 7]).unwrap();
        assert_eq!(b.index([1, 4, 2, 6]), 2);
        assert!(g.broadcast([2, 5, 4, 7]).is_none());
    }
}
