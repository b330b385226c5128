//! FP4 as integers: E2M1 values doubled are −12 to 12, so that byte products sum them exactly, a block of 16 at a time,
//! and each block's sum is multiplied by both of its scales.
//!
//! The first operand is rows of Q or P: of each block [`BLOCK_WORDS`] of four codes and the scale. The second is panels of
//! keys or channels: of each block what its sums start with, the same number of words of codes, and the scales, a vector
//! of each for all that stand side by side. A block of which a format's group holds several has the group's scale.
//!
//! The first operand's codes must not be negative, for the sake of `vpdpbusd` and `vpmaddubsw`: those of Q are offset by
//! 12, which the start values of K take back.

use sage_core::oracle::E2M1_MAX;
use sage_core::{Fp4Format, MAX_VALUE_DIM};

use super::narrow::{INFINITY, e2m1, e4m3};
use super::pack::magnitude_bits;
use super::product::{Scores, Values, add_rows, check_values};
use crate::isa::Isa;
use crate::tile::TILE_KEYS;

/// Members of a block.
pub(crate) const BLOCK: usize = 16;

/// Words of the codes of a block.
pub(super) const BLOCK_WORDS: usize = BLOCK / 4;

/// Words of a block of the first operand.
pub(crate) const ROW_WORDS: usize = BLOCK_WORDS + 1;

/// Words of a block of the second operand, for each of what stands side by side.
pub(crate) const PANEL_WORDS: usize = BLOCK_WORDS + 2;

/// What makes the codes of Q positive.
const OFFSET: i32 = 12;

/// Factors on the second operand's scales, and on the sums in the end.
///
/// The first has a quarter in it, as both operands are doubled. Where magnitudes are so large that a block's sum times its
/// scale might overflow before it is multiplied by the other operand's small one, the second takes part of it.
#[inline(always)]
pub(super) fn factors(largest: u32) -> [f32; 2] {
    const LARGE: f32 = f32::from_bits((127 + 100) << 23);
    const LATER: f32 = 4096.0;
    if largest < LARGE.to_bits() { [0.25, 1.0] } else { [0.25 / LATER, LATER] }
}

/// The scale of a group whose largest magnitude has these bits: [`Fp4Format::scale`] as a number.
#[inline(always)]
pub(super) fn scale(format: Fp4Format, max: u32) -> f32 {
    let scale = match format {
        Fp4Format::Nv => e4m3(f32::from_bits(max) / E2M1_MAX),
        Fp4Format::Mx => {
            // The exponent is the scale's, but two below, so that 4 is the largest power of two among the quotients.
            let exponent = (max >> 23).saturating_sub(2);
            f32::from_bits(if exponent == 0 { 1 << 22 } else { exponent << 23 })
        }
    };
    if max < INFINITY { scale } else { f32::NAN }
}

/// The factor that takes the members of a group to E2M1's range; 0 where the scale is 0 or NaN.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// The code of a number in E2M1's range: twice the nearest value, whose lowest byte is what counts.
#[inline(always)]
pub(super) fn code(x: f32) -> u32 {
    // The last place of 1.5 · 2²² is a half, so that what is added to it lies in the lowest bits.
    const SHIFT: f32 = 6_291_456.0;
    (e2m1(x) + SHIFT).to_bits()
}

/// A code as an integer.
#[inline(always)]
fn signed(code: u32) -> i32 {
    i32::from(code as i8)
}

/// The scale of a group of a row, and the factor for its codes.
#[inline(always)]
fn group_scale(group: &[f32], format: Fp4Format) -> (f32, f32) {
    let max = group.iter().fold(0, |max, x| magnitude_bits(*x).max(max));
    let scale = scale(format, max);
    (scale, inverse(scale))
}

/// The codes of a block, the last of a row padded with zeros.
#[inline(always)]
fn block_codes(block: &[f32], inverse: f32) -> [u32; BLOCK] {
    let mut padded = [0.0; BLOCK];
    padded[..block.len()].copy_from_slice(block);
    let mut codes = [0; BLOCK];
    codes.iter_mut().zip(padded).for_each(|(to, x)| *to = code(x * inverse));
    codes
}

/// Four codes as bytes of a word.
#[inline(always)]
fn word(codes: [u32; 4]) -> u32 {
    codes[0] & 0xff | (codes[1] & 0xff) << 8 | (codes[2] & 0xff) << 16 | codes[3] << 24
}

/// Rows of Q, of `depth` channels each, times `factor`.
#[inline(always)]
pub(super) fn pack_rows(rows: &[f32], depth: usize, format: Fp4Format, factor: f32, out: &mut [u32]) {
    let row_words = depth.div_ceil(BLOCK) * ROW_WORDS;
    for (row, out) in rows.chunks_exact(depth).zip(out.chunks_exact_mut(row_words)) {
        let mut out = out.chunks_exact_mut(ROW_WORDS);
        for group in row.chunks(format.group()) {
            let (scale, inverse) = group_scale(group, format);
            for (block, out) in group.chunks(BLOCK).zip(&mut out) {
                let mut codes = block_codes(block, inverse);
                codes.iter_mut().for_each(|code| *code = code.wrapping_add(OFFSET as u32));
                out[BLOCK_WORDS] = (scale * factor).to_bits();
                out.iter_mut().zip(codes.as_chunks::<4>().0).for_each(|(to, codes)| *to = word(*codes));
            }
        }
    }
}

/// Rows of K, of `depth` channels each, as panels of `width` keys, whose scales are multiplied by `factor`.
#[inline(always)]
pub(super) fn pack_keys(
    rows: &[f32],
    depth: usize,
    format: Fp4Format,
    width: usize,
    factor: f32,
    out: &mut [u32],
) {
    let block_words = PANEL_WORDS * width;
    let panels = out.chunks_exact_mut(depth.div_ceil(BLOCK) * block_words);
    for (panel, rows) in panels.zip(rows.chunks(width * depth)) {
        for (key, row) in rows.chunks_exact(depth).enumerate() {
            let mut out = panel.chunks_exact_mut(block_words);
            for group in row.chunks(format.group()) {
                let (scale, inverse) = group_scale(group, format);
                for (block, out) in group.chunks(BLOCK).zip(&mut out) {
                    let codes = block_codes(block, inverse);
                    out[key] = (-OFFSET * codes.iter().map(|code| signed(*code)).sum::<i32>()) as u32;
                    for (words, codes) in out.chunks_exact_mut(width).skip(1).zip(codes.as_chunks::<4>().0) {
                        words[key] = word(*codes);
                    }
                    out[(1 + BLOCK_WORDS) * width + key] = (scale * factor).to_bits();
                }
            }
        }
    }
}

/// One block of keys of V, rows of as many channels as there are scales, in panels of `width` channels.
#[inline(always)]
pub(super) fn pack_values(
    rows: &[f32],
    (inverses, scales): (&[f32], &[f32]),
    width: usize,
    factor: f32,
    panels: &mut [u32],
    panel_words: usize,
) {
    let value_dim = scales.len();
    let channels = || (0..value_dim).step_by(width).map(|first| first..value_dim.min(first + width));
    let mut codes = [[0u32; MAX_VALUE_DIM]; 4];
    for (i, quad) in rows.chunks(4 * value_dim).enumerate() {
        codes[quad.len() / value_dim..].iter_mut().for_each(|codes| codes.fill(0));
        for (codes, row) in codes.iter_mut().zip(quad.chunks_exact(value_dim)) {
            codes.iter_mut().zip(row).zip(inverses).for_each(|((to, x), inverse)| *to = code(x * inverse));
        }
        let [a, b, c, d] = &codes;
        for (panel, channels) in panels.chunks_mut(panel_words).zip(channels()) {
            for (to, at) in panel[(1 + i) * width..].iter_mut().zip(channels) {
                *to = word([a[at], b[at], c[at], d[at]]);
            }
        }
    }
    for (panel, channels) in panels.chunks_mut(panel_words).zip(channels()) {
        let words = &mut panel[(1 + BLOCK_WORDS) * width..];
        words.iter_mut().zip(&scales[channels]).for_each(|(to, scale)| *to = (scale * factor).to_bits());
    }
}

/// `Σ_t scale_a[r][t] · scale_b[t][c] · Σ a[r][t] · b[t][c]` of `R` rows of `a`, `stride` words apart, and a panel of
/// `blocks` blocks of `VECS` vectors.
///
/// # Safety
/// `a` and `b` must be valid for what the formula reads, and the processor must have `I`.
#[inline(always)]
unsafe fn multiply<I: Isa, const R: usize, const VECS: usize>(
    a: *const u32,
    stride: usize,
    b: *const u32,
    blocks: usize,
) -> [[I::F; VECS]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let width = VECS * I::LANES;
        let mut acc = [[I::splat(0.0); VECS]; R];
        for t in 0..blocks {
            let (a, b) = (a.add(t * ROW_WORDS), b.add(t * PANEL_WORDS * width));
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = a.add(r * stride);
                let words = [0, 1, 2, 3].map(|i| I::splat_int(a.add(i).read()));
                let a_scale = I::splat(a.add(BLOCK_WORDS).cast::<f32>().read());
                for (c, acc) in acc.iter_mut().enumerate() {
                    let b = b.add(c * I::LANES);
                    let codes = [1, 2, 3, 4].map(|i| I::load_int(b.add(i * width)));
                    let sum = I::dot_block(I::load_int(b), words, codes);
                    let b_scale = I::load(b.add((1 + BLOCK_WORDS) * width).cast());
                    *acc = I::fma(I::mul(I::int_to_float(sum), b_scale), a_scale, *acc);
                }
            }
        }
        acc
    }
}

/// `HALF`: half of the rows of a register tile, as a block's words stay in registers beside their sums.
#[inline(always)]
pub(super) unsafe fn scores_fp4<I: Isa, const HALF: usize, const VECS: usize>(args: &mut Scores<'_>) {
    let width = VECS * I::LANES;
    let blocks = args.depth / ROW_WORDS;
    let panel_words = blocks * PANEL_WORDS * width;
    assert!(args.q.len() >= args.row_groups * 2 * HALF * args.depth);
    assert!(args.k.len() >= args.panels * panel_words);
    assert!(args.panels * width <= TILE_KEYS && args.scores.len() >= args.row_groups * 2 * HALF * TILE_KEYS);
    let factor = f32::from_bits(args.k_scale[0]);
    for panel in 0..args.panels {
        for group in 0..2 * args.row_groups {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let q = args.q.as_ptr().add(group * HALF * args.depth);
                let k = args.k.as_ptr().add(panel * panel_words);
                let acc = multiply::<I, HALF, VECS>(q, args.depth, k, blocks);
                let scores = args.scores.as_mut_ptr().add(group * HALF * TILE_KEYS + panel * width);
                for (r, acc) in acc.iter().enumerate() {
                    for (c, &x) in acc.iter().enumerate() {
                        let x = I::mul(x, I::splat(factor));
                        I::store(scores.add(r * TILE_KEYS + c * I::LANES), x);
                    }
                }
            }
        }
    }
}

/// As [`scores_fp4`]; `depth` counts blocks.
#[inline(always)]
pub(super) unsafe fn values_fp4<I: Isa, const HALF: usize, const VECS: usize>(args: &mut Values<'_>) {
    let width = VECS * I::LANES;
    check_values(args, 2 * HALF, width, [ROW_WORDS, PANEL_WORDS]);
    for panel in 0..args.panels {
        for group in 0..2 * args.row_groups {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let p = args.p.as_ptr().add(group * HALF * args.p_stride);
                let v = args.v.as_ptr().add(panel * args.panel_words);
                let acc = multiply::<I, HALF, VECS>(p, args.p_stride, v, args.depth);
                add_rows::<I, HALF, VECS>(args, group * HALF, panel, &acc);
            }
        }
    }
}

#[cfg(test)]
mod tests;
