//! Sequences that are padded block by block.

use super::grid::check_block;
use crate::{Error, Mask, Result, View};

/// Which tokens count of a sequence in which every block is filled up with padding.
///
/// VSA (arXiv 2505.13389) cuts a video into cubes of at most 64 tokens and pads each to a block; its
/// `variable_block_sizes` say how many tokens of each block are real, and these come first in it. Keys of padding are
/// hidden by [`PaddedBlocks::key_mask`]. Queries of padding get an output like any other, which the caller drops.
///
/// ```
/// use sage_core::sparse::PaddedBlocks;
///
/// let keys = PaddedBlocks::new(&[2, 0, 1], 2)?;
/// let counts: Vec<bool> = (0..keys.len()).map(|token| keys.counts(token)).collect();
/// assert_eq!(counts, [true, true, false, false, true, false]);
/// # Ok::<(), sage_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaddedBlocks {
    block: usize,
    sizes: Vec<usize>,
    flags: Vec<bool>,
}

impl PaddedBlocks {
    /// Blocks of `block` tokens, of which the first `variable_block_sizes[b]` of block `b` count.
    ///
    /// # Errors
    /// When a block has no tokens, when more of it count than it has or fewer than none, or when memory does not hold
    /// a flag for each token.
    pub fn new(variable_block_sizes: &[i32], block: usize) -> Result<Self> {
        check_block("block", block)?;
        let size = |(b, &size): (usize, &i32)| {
            usize::try_from(size).ok().filter(|&size| size <= block).ok_or_else(|| {
                Error::value(format!("variable_block_sizes[{b}]"), size, format!("0 to {block}"))
            })
        };
        let sizes: Vec<usize> = variable_block_sizes.iter().enumerate().map(size).collect::<Result<_>>()?;
        let mut flags = Vec::new();
        let len = sizes.len().checked_mul(block);
        if len.and_then(|len| flags.try_reserve_exact(len).ok()).is_none() {
            let what = format!("{} blocks of {block} tokens", sizes.len());
            return Err(Error::unsupported(what, "there is not enough memory"));
        }
        sizes.iter().for_each(|&size| flags.extend((0..block).map(|token| token < size)));
        Ok(PaddedBlocks { block, sizes, flags })
    }

    /// Tokens of a block, padding included.
    pub fn block(&self) -> usize {
        self.block
    }

    /// How many tokens of each block count.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Number of tokens, padding included.
    pub fn len(&self) -> usize {
        self.flags.len()
    }

    /// Whether there is no token, not even of padding.
    pub fn is_empty(&self) -> bool {
        self.flags.is_empty()
    }

    /// Whether a token is there and no padding.
    pub fn counts(&self, token: usize) -> bool {
        self.flags.get(token).is_some_and(|&counts| counts)
    }

    /// The mask of these keys, `[1, 1, 1, tokens]`, the same for all heads and queries: padding has no
    /// influence on any result.
    pub fn key_mask(&self) -> Mask<'_> {
        let flags = View::contiguous("key_mask", &self.flags, &[1, 1, 1, self.len()]);
        Mask::Bool(flags.expect("each token has a flag"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::exact;
    use crate::{Call, Inputs, Options, Tensor};

    #[test]
    fn padding_of_keys_has_no_influence() {
        // Keys 0 and 2 are real and score alike: the mean of their values.
        let tensor = |elements: &[f32]| Tensor::new(elements.to_vec(), &[1, 1, elements.len(), 1]).unwrap();
        let (q, k, v) =
            (tensor(&[1.0]), tensor(&[1.0, f32::NAN, 1.0, 9.0]), tensor(&[4.0, f32::NAN, 8.0, 9.0]));
        let keys = PaddedBlocks::new(&[1, 1], 2).unwrap();
        let inputs = Inputs { mask: Some(keys.key_mask()), ..Inputs::new(q.view(), k.view(), v.view()) };
        let output = exact(&Call::check(&inputs, &Options::default()).unwrap());
        assert!((output.out[0] - 6.0).abs() < 1e-12);
    }

    #[test]
    fn tokens_behind_the_end_do_not_count() {
        let keys = PaddedBlocks::new(&[2], 2).unwrap();
        assert!(keys.counts(1) && !keys.counts(2));
        assert!(PaddedBlocks::new(&[], 64).unwrap().is_empty());
    }

    #[test]
    fn sizes_outside_a_block_are_refused() {
        let error = |sizes: &[i32], block| PaddedBlocks::new(sizes, block).unwrap_err().to_string();
        assert_eq!(error(&[64, 65], 64), "variable_block_sizes[1]: value is 65, expected 0 to 64");
        assert_eq!(error(&[-1], 64), "variable_block_sizes[0]: value is -1, expected 0 to 64");
        assert_eq!(error(&[], 0), "block: value is 0, expected at least 1");
        assert!(error(&[0, 0], usize::MAX).contains("not enough memory"));
    }
}
