//! Softmax whose probabilities become FP4.

use sage_core::oracle::{E2M1_MAX, E4M3_MAX};
use sage_core::{Fp4Format, PLevels};

use super::super::fp4::{BLOCK, BLOCK_WORDS, ROW_WORDS, code, inverse, scale};
use super::rounded::weigh_row;
use super::{Softmax, check_softmax};
use crate::isa::Isa;
use crate::tile::TILE_KEYS;

/// A step of online softmax, and the format of its probabilities.
pub(crate) struct Fp4Softmax<'a> {
    /// The words of a row's probabilities lie [`Fp4Softmax::STRIDE`] apart in `pairs`: those of a first operand, see
    /// [`crate::kernels::fp4`].
    pub softmax: Softmax<'a>,
    /// Its groups begin with the first score.
    pub format: Fp4Format,
    pub levels: PLevels,
}

/// Blocks of a row.
const BLOCKS: usize = TILE_KEYS / BLOCK;

/// Rows whose scales are computed side by side.
const ROWS: usize = 8;

impl Fp4Softmax<'_> {
    /// Words of a row.
    pub const STRIDE: usize = BLOCKS * ROW_WORDS;
}

#[inline(always)]
pub(in super::super) unsafe fn softmax_fp4<I: Isa>(args: &mut Fp4Softmax<'_>) {
    let Fp4Softmax { softmax: args, format, levels } = args;
    check_softmax::<I>(args);
    assert!(args.pairs.len() >= args.rows * Fp4Softmax::STRIDE);
    let factor = match levels {
        PLevels::One => 1.0,
        // P is at most 448 · 6 before its groups are scaled.
        PLevels::Two => E4M3_MAX * E2M1_MAX,
    };
    for first in (0..args.rows).step_by(ROWS) {
        let rows = first..args.rows.min(first + ROWS);
        let mut max = [0f32; ROWS * BLOCKS];
        for (r, max) in rows.clone().zip(max.chunks_exact_mut(BLOCKS)) {
            // SAFETY: `check_softmax` bounds the row; the caller vouches for the instruction set.
            unsafe {
                weigh_row::<I>(args, r);
                block_maxima::<I>(&args.scores[r * TILE_KEYS..][..args.columns], max);
            }
        }
        let [scales, inverses] = match format {
            Fp4Format::Nv => group_scales::<1>(&max, *format, factor),
            Fp4Format::Mx => group_scales::<2>(&max, *format, factor),
        };
        for (at, r) in rows.enumerate() {
            let row = &args.scores[r * TILE_KEYS..][..args.columns];
            let words =
                args.pairs[r * Fp4Softmax::STRIDE..][..Fp4Softmax::STRIDE].as_chunks_mut::<ROW_WORDS>().0;
            let scales = scales[at * BLOCKS..].iter().zip(&inverses[at * BLOCKS..]);
            for ((p, words), (scale, inverse)) in row.as_chunks::<BLOCK>().0.iter().zip(words).zip(scales) {
                let (codes, scale_of) = words.split_at_mut(BLOCK_WORDS);
                let codes: &mut [u8] = bytemuck::cast_slice_mut(codes);
                codes.iter_mut().zip(p).for_each(|(to, p)| *to = code(p * inverse) as u8);
                scale_of[0] = scale.to_bits();
            }
        }
    }
    // SAFETY: the caller vouches for the instruction set.
    unsafe { args.state.update::<I>(args.rows, 1.0) }
}

/// The largest probability of each block; a NaN may be ignored, as it is in the row's sum.
#[inline(always)]
unsafe fn block_maxima<I: Isa>(row: &[f32], max: &mut [f32]) {
    const { assert!(BLOCK.is_multiple_of(I::LANES)) };
    for (block, max) in row.chunks_exact(BLOCK).zip(max) {
        // SAFETY: a block is whole vectors; the caller vouches for the instruction set.
        unsafe {
            let mut largest = I::load(block.as_ptr());
            for at in (I::LANES..BLOCK).step_by(I::LANES) {
                largest = I::max(largest, I::load(block.as_ptr().add(at)));
            }
            *max = I::reduce_max(largest);
        }
    }
}

/// Scales of groups of so many blocks, for each block, and the factors that take probabilities to E2M1's range.
#[inline(always)]
fn group_scales<const GROUP: usize>(
    max: &[f32; ROWS * BLOCKS],
    format: Fp4Format,
    factor: f32,
) -> [[f32; ROWS * BLOCKS]; 2] {
    // Loops: what maps arrays may become a function of its own, without the vectors of the set.
    let mut bits = [0; ROWS * BLOCKS];
    bits.iter_mut().zip(max).for_each(|(bits, max)| *bits = (max * factor).to_bits());
    for group in bits.as_chunks_mut::<GROUP>().0 {
        let largest = group.iter().fold(0, |largest, max| *max.max(&largest));
        group.fill(largest);
    }
    let (mut scales, mut inverses) = ([0f32; ROWS * BLOCKS], [0f32; ROWS * BLOCKS]);
    let unscaled = 1.0 / factor;
    for ((to, inverse_of), max) in scales.iter_mut().zip(&mut inverses).zip(&bits) {
        let sigma = scale(format, *max);
        (*to, *inverse_of) = (sigma * unscaled, factor * inverse(sigma));
    }
    [scales, inverses]
}
