//! Tiles of keys and values, and blocks of queries, packed for the products.

mod fp4_values;
mod rounded;
mod values;

use sage_core::oracle::hadamard_large;
use sage_core::{IntQuantizer, Rounding};

use super::fp4;
use crate::seen::Seen;
use crate::tile::{MAX_QK_DIM, PvForm, QkForm, TILE_KEYS, TileLayout};
use fp4_values::fp4_values;
use rounded::round_values;

pub(crate) use rounded::fp8_factor;
use values::{bf16_values, fixed12_values, float_values};

/// Packs a tile of keys and values.
pub(crate) struct PackTile<'a> {
    pub layout: TileLayout,
    /// Index of the first key in its sequence: a multiple of [`TILE_KEYS`].
    pub first: usize,
    /// Keys, up to [`TILE_KEYS`].
    pub keys: usize,
    /// What the queries see of each key; empty where all count. Keys that none sees have rows of zeros.
    pub seen: &'a [Seen],
    /// Rows of `qk_dim` numbers, smoothed; rotated here.
    pub k: &'a mut [f32],
    /// Bits of the largest magnitude of each group of keys in the sequence, where groups are no parts of tiles.
    pub k_max: &'a [u32],
    /// Rows of `value_dim` numbers, smoothed; those of padding are saturated here.
    pub v: &'a mut [f32],
    /// The largest magnitude of each of V's channels in the sequence, where their scales are of all of it.
    pub v_max: &'a [f32],
    /// [`TileLayout::words`] words.
    pub tile: &'a mut [u32],
}

/// Packs a block of queries.
pub(crate) struct PackQueries<'a> {
    pub layout: TileLayout,
    /// Index of the first query in its sequence.
    pub first: usize,
    /// Queries.
    pub rows: usize,
    /// `sm_scale · log₂e`.
    pub score_scale: f32,
    /// Rows of `qk_dim` numbers, rotated; scaled here.
    pub q: &'a mut [f32],
    /// Largest magnitude, as bits, of each group of rows from `first_group` on.
    pub group_max: &'a [u32],
    pub first_group: usize,
    /// Rows of `depth` words; rows beyond `rows` are zero.
    pub words: &'a mut [u32],
    /// A factor for each row.
    pub scale: &'a mut [f32],
}

#[inline(always)]
pub(super) fn pack_tile(args: &mut PackTile<'_>) {
    let layout = args.layout;
    assert!(args.keys <= TILE_KEYS && args.first.is_multiple_of(TILE_KEYS));
    args.tile.fill(0);
    let [k_words, k_scale_words, k_given_words, v_words, _] = layout.lengths();
    let (k, rest) = args.tile.split_at_mut(k_words);
    let (k_scale, rest) = rest.split_at_mut(k_scale_words);
    let (k_given, rest) = rest.split_at_mut(k_given_words);
    let (v, v_scale) = rest.split_at_mut(v_words);
    let k_rows = &mut args.k[..args.keys * layout.qk_dim];
    if layout.smooths_q() {
        float_keys((layout.width, layout.head_dim), k_rows, layout.qk_dim, k_given);
    }
    if layout.rotate {
        k_rows.chunks_exact_mut(layout.qk_dim).for_each(hadamard);
    }
    match layout.qk {
        QkForm::Float => float_keys((layout.width, layout.qk_dim), k_rows, layout.qk_dim, k),
        QkForm::Bf16 => bf16_keys(&layout, k_rows, k),
        QkForm::Fp4(format) => {
            let [factor, later] = fp4::factors(absmax_bits(k_rows));
            fp4::pack_keys(k_rows, layout.qk_dim, format, layout.width, factor, k);
            k_scale[0] = later.to_bits();
        }
        QkForm::Int(quantizer) => {
            let of = (args.first, args.seen, args.k_max);
            int_keys(&layout, &quantizer, of, k_rows, k, k_scale);
        }
    }
    let v_rows = &mut args.v[..args.keys * layout.value_dim];
    if let PvForm::Rounded(to) = layout.pv {
        round_values(to, layout.value_dim, args.v_max, v_rows);
    }
    match layout.pv {
        PvForm::Float | PvForm::Rounded(_) => v_scale[0] = float_values(&layout, v_rows, v).to_bits(),
        PvForm::Bf16 => v_scale[0] = bf16_values(&layout, v_rows, v).to_bits(),
        PvForm::Fp4(format, _) => {
            v_scale[0] = fp4_values(&layout, format, args.seen, v_rows, v).to_bits();
        }
        PvForm::Fixed12 => fixed12_values(&layout, args.seen, v_rows, v, v_scale),
    }
}

/// Panels of `width` keys: of each, `depth` of the `stride` numbers of its row.
#[inline(always)]
fn float_keys((width, depth): (usize, usize), rows: &[f32], stride: usize, out: &mut [u32]) {
    for (panel, rows) in out.chunks_exact_mut(depth * width).zip(rows.chunks(width * stride)) {
        for (key, row) in rows.chunks_exact(stride).enumerate() {
            for (words, x) in panel.chunks_exact_mut(width).zip(row) {
                words[key] = x.to_bits();
            }
        }
    }
}

/// Numbers that are bfloat16, two to a word.
#[inline(always)]
fn bf16_words<'a>(row: &[f32], words: impl Iterator<Item = &'a mut u32>) {
    for (pair, word) in row.chunks(2).zip(words) {
        *word = pair[0].to_bits() >> 16 | pair.get(1).map_or(0, |x| x.to_bits() & 0xffff_0000);
    }
}

#[inline(always)]
fn bf16_keys(layout: &TileLayout, rows: &[f32], out: &mut [u32]) {
    let panels = out.chunks_exact_mut(layout.k_panel).zip(rows.chunks(layout.width * layout.qk_dim));
    for (panel, rows) in panels {
        for (key, row) in rows.chunks_exact(layout.qk_dim).enumerate() {
            bf16_words(row, panel[key..].iter_mut().step_by(layout.width));
        }
    }
}

#[inline(always)]
fn int_keys(
    layout: &TileLayout,
    quantizer: &IntQuantizer,
    (first, seen, k_max): (usize, &[Seen], &[u32]),
    rows: &mut [f32],
    out: &mut [u32],
    scales: &mut [u32],
) {
    // Groups are counted from the start of the sequence.
    let first_group = quantizer.k_group(first);
    let mut group_max = [GroupMax::default(); TILE_KEYS];
    if k_max.is_empty() {
        for (j, row) in rows.chunks_exact(layout.qk_dim).enumerate() {
            let group = quantizer.k_group(first + j) - first_group;
            group_max[group].measure(seen.get(j).copied().unwrap_or(Seen::Counts), row);
        }
    } else {
        let given = group_max.iter_mut().zip(&k_max[first_group..]);
        given.for_each(|(group, max)| group.max = *max);
    }
    for (j, row) in rows.chunks_exact_mut(layout.qk_dim).enumerate().take(seen.len()) {
        if seen[j] == Seen::Padding {
            let max = f32::from_bits(group_max[quantizer.k_group(first + j) - first_group].max);
            row.iter_mut().for_each(|x| *x = saturated(*x, max));
        }
    }
    let rows = &*rows;
    let levels = quantizer.bits.max() as f32;
    let mut ints = [0; MAX_QK_DIM];
    let ints = &mut ints[..layout.qk_dim];
    for (j, row) in rows.chunks_exact(layout.qk_dim).enumerate() {
        let max = f32::from_bits(group_max[quantizer.k_group(first + j) - first_group].max);
        let scale = quantizer.scale(max);
        scales[j] = scale.to_bits();
        quantize(row, scale, levels, quantizer.rounding, ints);
        let panel = &mut out[j / layout.width * layout.k_panel..][..layout.k_panel];
        let (start, words) = panel.split_at_mut(layout.width);
        let key = j % layout.width;
        start[key] = (-layout.word.q_offset() * ints.iter().sum::<i32>()) as u32;
        layout.word.pack_row(ints, words[key..].iter_mut().step_by(layout.width));
    }
}

/// The largest magnitude of a group of keys: of those that count, or of padding where it has nothing else.
#[derive(Clone, Copy)]
pub(crate) struct GroupMax {
    /// Its bits.
    pub max: u32,
    best: Seen,
}

impl Default for GroupMax {
    fn default() -> Self {
        GroupMax { max: 0, best: Seen::Hidden }
    }
}

impl GroupMax {
    /// Takes a key of the group into account, given what queries see of it.
    #[inline(always)]
    pub fn measure(&mut self, seen: Seen, row: &[f32]) {
        if seen > self.best {
            (self.max, self.best) = (absmax_bits(row), seen);
        } else if seen == self.best {
            self.max = absmax_bits(row).max(self.max);
        }
    }
}

#[inline(always)]
pub(super) fn pack_queries(args: &mut PackQueries<'_>) {
    let layout = args.layout;
    let rows = &mut args.q[..args.rows * layout.qk_dim];
    args.words.fill(0);
    args.scale.fill(0.0);
    let quantizer = match layout.qk {
        QkForm::Int(quantizer) => quantizer,
        QkForm::Float => {
            for (word, x) in args.words.iter_mut().zip(rows) {
                *word = (*x * args.score_scale).to_bits();
            }
            return;
        }
        QkForm::Bf16 => {
            args.scale.fill(args.score_scale);
            for (words, row) in
                args.words.chunks_exact_mut(layout.depth).zip(rows.chunks_exact(layout.qk_dim))
            {
                bf16_words(row, words.iter_mut());
            }
            return;
        }
        QkForm::Fp4(format) => {
            return fp4::pack_rows(rows, layout.qk_dim, format, args.score_scale, args.words);
        }
    };
    let (before, after) =
        if quantizer.scale_q_first { (args.score_scale, 1.0) } else { (1.0, args.score_scale) };
    let levels = quantizer.bits.max() as f32;
    let mut ints = [0; MAX_QK_DIM];
    let ints = &mut ints[..layout.qk_dim];
    for (i, row) in rows.chunks_exact_mut(layout.qk_dim).enumerate() {
        let max = f32::from_bits(args.group_max[quantizer.q_group(args.first + i) - args.first_group]);
        row.iter_mut().for_each(|x| *x *= before);
        let scale = quantizer.scale(max * before);
        args.scale[i] = scale * after;
        quantize(row, scale, levels, quantizer.rounding, ints);
        ints.iter_mut().for_each(|x| *x += layout.word.q_offset());
        layout.word.pack_row(ints, args.words[i * layout.depth..][..layout.depth].iter_mut());
    }
}

/// `x`, but of no magnitude above `max`, and 0 for NaN; anything where `max` is NaN.
#[inline(always)]
fn saturated(x: f32, max: f32) -> f32 {
    if x.is_nan() { 0.0 } else { x.max(-max).min(max) }
}

/// Bits of `|x|`: as integers they order like the numbers, and NaN lies above infinity, so that a maximum over them
/// loses neither.
#[inline(always)]
pub(super) fn magnitude_bits(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Bits of the largest magnitude.
#[inline(always)]
pub(crate) fn absmax_bits(row: &[f32]) -> u32 {
    row.iter().fold(0, |max, x| max.max(magnitude_bits(*x)))
}

/// `row / scale`, rounded, of magnitudes up to `levels`; zeros where the scale is zero or NaN.
#[inline(always)]
fn quantize(row: &[f32], scale: f32, levels: f32, rounding: Rounding, out: &mut [i32]) {
    let inverse = 1.0 / scale;
    if inverse.is_finite() {
        return integers(row.iter().map(|x| x * inverse), rounding, out);
    }
    if scale > 0.0 {
        // So small that it has no inverse, and coarse, so that a quotient may be too large.
        return integers(row.iter().map(|x| (x / scale).clamp(-levels, levels)), rounding, out);
    }
    out.fill(0);
}

#[inline(always)]
fn integers(quotients: impl Iterator<Item = f32>, rounding: Rounding, out: &mut [i32]) {
    match rounding {
        Rounding::NearestEven => out.iter_mut().zip(quotients).for_each(|(out, x)| *out = nearest_even(x)),
        Rounding::HalfAwayFromZero => {
            out.iter_mut().zip(quotients).for_each(|(out, x)| *out = (x + 0.5f32.copysign(x)) as i32);
        }
    }
}

/// The nearest integer of a magnitude below 2²², without a rounding instruction; anything for NaN.
#[inline(always)]
fn nearest_even(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    ((x + SHIFT).to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32)
}

/// Multiplies a row, whose length is a power of two, by the orthonormal Walsh–Hadamard matrix.
#[inline(always)]
pub(crate) fn hadamard(row: &mut [f32]) {
    let norm = 1.0 / (row.len() as f32).sqrt();
    // The product with it comes last, but where the sums would overflow before.
    let large = absmax_bits(row) > hadamard_large(row.len()).to_bits();
    if large {
        row.iter_mut().for_each(|x| *x *= norm);
    }
    let mut half = 1;
    while half < row.len() {
        for pair in row.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    if !large {
        row.iter_mut().for_each(|x| *x *= norm);
    }
}

#[cfg(test)]
mod tests;
