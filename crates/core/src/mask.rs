//! Which keys a query sees.

use std::ops::Range;

use crate::{DType, Geometry, TensorView, View};

/// How the rows of a band mask line up when `q_len != kv_len`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Alignment {
    /// The last query sees the last key: FlashAttention's rule (since 2.1), right for a KV cache.
    #[default]
    BottomRight,
    /// The first query sees the first key: PyTorch's `is_causal`, and SageAttention's CUDA kernels.
    TopLeft,
    /// The first query sees the key of this index at the diagonal, where negative ones lie before the first. Where a
    /// sequence is spread over devices, whose queries and keys pass each other, it is the position of the first query
    /// at hand less that of the first key.
    Offset(i64),
}

/// A band of visible keys around the diagonal: causal masks and sliding windows.
///
/// Query `i` sees key `j` iff `i + shift − left ≤ j ≤ i + shift + right`, where `shift` is `kv_len − q_len`
/// ([`Alignment::BottomRight`]), 0 ([`Alignment::TopLeft`]) or as it was given ([`Alignment::Offset`]), and `None`
/// stands for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Band {
    /// Keys visible before the diagonal.
    pub left: Option<usize>,
    /// Keys visible after the diagonal: 0 is causal.
    pub right: Option<usize>,
    /// Where the diagonal lies.
    pub alignment: Alignment,
}

impl Band {
    /// Every key is visible.
    pub const FULL: Band = Band { left: None, right: None, alignment: Alignment::BottomRight };

    /// No key after the diagonal is visible.
    pub const fn causal(alignment: Alignment) -> Self {
        Band { left: None, right: Some(0), alignment }
    }

    /// Whether every key is visible, whatever the lengths.
    pub fn is_full(&self) -> bool {
        self.left.is_none() && self.right.is_none()
    }

    /// The keys that query `i` of `q_len` sees among `kv_len`.
    ///
    /// ```
    /// use sage_core::{Alignment, Band};
    ///
    /// let band = Band::causal(Alignment::BottomRight);
    /// assert_eq!(band.keys(0, 2, 5), 0..4);
    /// assert_eq!(band.keys(0, 5, 2), 0..0); // no key: this row's output is zero
    /// ```
    pub fn keys(&self, i: usize, q_len: usize, kv_len: usize) -> Range<usize> {
        // i128 holds every sum of three values of 64 bits.
        let shift = match self.alignment {
            Alignment::BottomRight => kv_len as i128 - q_len as i128,
            Alignment::TopLeft => 0,
            Alignment::Offset(offset) => offset.into(),
        };
        let diagonal = i as i128 + shift;
        let clamp = |key: i128| key.clamp(0, kv_len as i128) as usize;
        let start = self.left.map_or(0, |left| clamp(diagonal - left as i128));
        let end = self.right.map_or(kv_len, |right| clamp(diagonal + right as i128 + 1));
        start..end.max(start)
    }

    /// The keys that some query of `q_len` sees among `kv_len`; none where there is no query.
    ///
    /// Among these keys alone [`Band::on_seen`] is the same mask, so what comes before and after them need not be
    /// read at all.
    ///
    /// ```
    /// use sage_core::{Alignment, Band};
    ///
    /// assert_eq!(Band::causal(Alignment::TopLeft).seen(2, 5), 0..2);
    /// let window = Band { left: Some(1), ..Band::causal(Alignment::BottomRight) };
    /// assert_eq!(window.seen(2, 5), 2..5);
    /// ```
    pub fn seen(&self, q_len: usize, kv_len: usize) -> Range<usize> {
        match q_len {
            0 => 0..0,
            // Rows begin and end further to the right from one to the next, without a gap between them.
            _ => {
                let start = self.keys(0, q_len, kv_len).start;
                start..self.keys(q_len - 1, q_len, kv_len).end.max(start)
            }
        }
    }

    /// The band among the keys that it lets some query see, which is the same for sequences of any length.
    ///
    /// A band that is aligned top-left leaves out keys at the end only, one that is aligned bottom-right only keys at
    /// the start, from which it does not count. An offset counts from there, so it loses the keys that were left out:
    /// all before the first that query 0 sees.
    ///
    /// ```
    /// use sage_core::{Alignment, Band};
    ///
    /// let band = Band { left: Some(2), right: Some(0), alignment: Alignment::Offset(5) };
    /// assert_eq!((band.seen(2, 9), band.keys(1, 2, 9)), (3..7, 4..7));
    /// assert_eq!(band.on_seen().keys(1, 2, 4), 1..4);
    /// ```
    #[must_use]
    pub fn on_seen(&self) -> Band {
        match (self.alignment, self.left) {
            (Alignment::Offset(offset), Some(left)) => {
                // The keys left out are offset − left where that is above 0.
                let offset = i64::try_from(left).map_or(offset, |left| offset.min(left));
                Band { alignment: Alignment::Offset(offset), ..*self }
            }
            _ => *self,
        }
    }

    /// The limits counted from the corner that the band is aligned to, any offset added: query `i` sees key `j` iff
    /// `i + shift − left ≤ j ≤ i + shift + right`, where `shift` is `kv_len − q_len` for [`Alignment::BottomRight`]
    /// and 0 for the others. They saturate.
    pub fn limits(&self) -> (Option<i64>, Option<i64>) {
        let offset = match self.alignment {
            Alignment::BottomRight | Alignment::TopLeft => 0,
            Alignment::Offset(offset) => offset,
        };
        let limit = |side: Option<usize>| side.map(|keys| i64::try_from(keys).unwrap_or(i64::MAX));
        (
            limit(self.left).map(|left| left.saturating_sub(offset)),
            limit(self.right).map(|right| right.saturating_add(offset)),
        )
    }
}

/// An explicit mask, broadcastable to `[batch, num_q_heads, q_len, kv_len]`, on top of the band.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// `true`: the key is visible.
    Bool(View<'a, bool>),
    /// Added to the scaled scores before softmax; −∞ hides a key. Any element type.
    Additive(TensorView<'a>),
}

impl Mask<'_> {
    /// Where each element lies.
    pub fn geometry(&self) -> &Geometry {
        match self {
            Mask::Bool(view) => view.geometry(),
            Mask::Additive(view) => view.geometry(),
        }
    }

    /// The largest bias that programs write for padding: half the lowest finite value of the mask's element type.
    /// Softmax takes such a bias as it is, but a key that has no larger one in any row does not enter means and
    /// scales. −∞ for a boolean mask, which needs no such word.
    pub fn padding_bias(&self) -> f32 {
        match self {
            Mask::Bool(_) => f32::NEG_INFINITY,
            Mask::Additive(view) => padding_bias(view.dtype()),
        }
    }

    pub(crate) fn with_geometry(&self, geometry: Geometry) -> Self {
        match self {
            Mask::Bool(view) => Mask::Bool(view.with_geometry(geometry)),
            Mask::Additive(view) => Mask::Additive(view.with_geometry(geometry)),
        }
    }
}

/// [`Mask::padding_bias`] of an additive mask of this element type.
pub const fn padding_bias(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::MIN / 2.0,
        DType::F16 => -32_752.0,
        // Half of −0x1.fep127.
        DType::BF16 => f32::from_bits(0xfeff_0000),
    }
}

/// Which blocks of the score matrix are computed (block-sparse attention): `true` where the block is.
///
/// Broadcastable to `[batch, num_q_heads, ⌈q_len / block_q⌉, ⌈kv_len / block_k⌉]`.
///
/// It says what is computed, not which tokens there are: keys that it hides from every query still enter means and
/// scales of quantised K and V, as in SpargeAttn, whose maps are predicted from the smoothed K. What K and V hold
/// there must be numbers. Padding is hidden by lengths or by a [`Mask`].
///
/// `B` are the flags as the memory holds them that the tensors lie in: [`View<bool>`](View) in the host's.
#[derive(Clone, Copy, Debug)]
pub struct BlockMask<B> {
    /// One flag for each block.
    pub blocks: B,
    /// Queries in a block.
    pub block_q: usize,
    /// Keys in a block.
    pub block_k: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIGNMENTS: [Alignment; 8] = [
        Alignment::BottomRight,
        Alignment::TopLeft,
        Alignment::Offset(0),
        Alignment::Offset(2),
        Alignment::Offset(7),
        Alignment::Offset(200),
        Alignment::Offset(-3),
        Alignment::Offset(-200),
    ];

    /// The definition, key by key.
    fn visible(band: &Band, i: usize, j: usize, q_len: usize, kv_len: usize) -> bool {
        let shift = match band.alignment {
            Alignment::BottomRight => kv_len as i64 - q_len as i64,
            Alignment::TopLeft => 0,
            Alignment::Offset(offset) => offset,
        };
        let distance = j as i64 - (i as i64 + shift);
        band.left.is_none_or(|left| distance >= -(left as i64))
            && band.right.is_none_or(|right| distance <= right as i64)
    }

    #[test]
    fn a_band_is_the_interval_of_its_definition() {
        let limits = [None, Some(0), Some(1), Some(3), Some(100)];
        for (q_len, kv_len) in [(1, 1), (4, 4), (3, 8), (8, 3), (5, 0)] {
            for alignment in ALIGNMENTS {
                for (left, right) in limits.iter().flat_map(|&l| limits.iter().map(move |&r| (l, r))) {
                    let band = Band { left, right, alignment };
                    for i in 0..q_len {
                        let keys: Vec<usize> = band.keys(i, q_len, kv_len).collect();
                        let expected: Vec<usize> =
                            (0..kv_len).filter(|&j| visible(&band, i, j, q_len, kv_len)).collect();
                        assert_eq!(keys, expected, "{band:?} row {i} of {q_len}×{kv_len}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_band_on_the_keys_it_sees_is_the_same_mask() {
        let limits = [None, Some(0), Some(1), Some(3), Some(100)];
        for (q_len, kv_len) in [(1, 1), (4, 4), (3, 8), (8, 3), (5, 0), (2, 30), (0, 3)] {
            for alignment in ALIGNMENTS {
                for (left, right) in limits.iter().flat_map(|&l| limits.iter().map(move |&r| (l, r))) {
                    let band = Band { left, right, alignment };
                    let seen = band.seen(q_len, kv_len);
                    let of_rows = |j: &usize| (0..q_len).any(|i| band.keys(i, q_len, kv_len).contains(j));
                    let some: Vec<usize> = (0..kv_len).filter(of_rows).collect();
                    assert_eq!(seen.clone().collect::<Vec<_>>(), some, "{band:?} of {q_len}×{kv_len}");
                    for i in 0..q_len {
                        let keys = band.on_seen().keys(i, q_len, seen.len());
                        let shifted: Vec<usize> = keys.map(|j| j + seen.start).collect();
                        let expected: Vec<usize> = band.keys(i, q_len, kv_len).collect();
                        assert_eq!(shifted, expected, "{band:?} row {i} of {q_len}×{kv_len}");
                    }
                }
            }
        }
    }

    #[test]
    fn limits_near_the_end_of_usize_do_not_overflow() {
        let band = Band { left: Some(usize::MAX), right: Some(usize::MAX), ..Band::FULL };
        assert_eq!(band.keys(3, 4, 9), 0..9);
        for offset in [i64::MIN, i64::MAX] {
            let band = Band { alignment: Alignment::Offset(offset), ..band };
            assert_eq!(band.keys(3, 4, 9), 0..9);
            assert_eq!(band.on_seen().keys(3, 4, 9), 0..9);
            let causal = Band::causal(Alignment::Offset(offset));
            assert_eq!(causal.keys(3, 4, 9), if offset < 0 { 0..0 } else { 0..9 });
        }
    }

    #[test]
    fn limits_hold_the_offset() {
        let band = |left, right, alignment| Band { left, right, alignment }.limits();
        assert_eq!(band(Some(3), Some(0), Alignment::BottomRight), (Some(3), Some(0)));
        assert_eq!(band(Some(3), Some(0), Alignment::Offset(5)), (Some(-2), Some(5)));
        assert_eq!(band(None, Some(2), Alignment::Offset(-5)), (None, Some(-3)));
        assert_eq!(band(Some(usize::MAX), None, Alignment::Offset(-5)), (Some(i64::MAX), None));
    }
}
