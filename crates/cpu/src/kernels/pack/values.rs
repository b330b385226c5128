//! Values as words.

use sage_core::MAX_VALUE_DIM;
use sage_core::oracle::{FIXED12_MAX, fixed12_scale};

use super::super::narrow::bfloat;
use super::{absmax_bits, magnitude_bits, nearest_even, saturated};
use crate::seen::Seen;
use crate::tile::{Fixed12Word, TILE_KEYS, TileLayout};

/// The largest magnitude of which sums over a tile cannot overflow.
const LARGE: f32 = f32::MAX / TILE_KEYS as f32;

/// Returns what the words must be multiplied by: 1, but where a sum of the tile's values might overflow.
#[inline(always)]
pub(super) fn float_values(layout: &TileLayout, rows: &mut [f32], out: &mut [u32]) -> f32 {
    let large = f32::from_bits(absmax_bits(rows)) > LARGE;
    if large {
        rows.iter_mut().for_each(|x| *x /= TILE_KEYS as f32);
    }
    for (panel, first) in out.chunks_exact_mut(layout.v_panel).zip((0..).step_by(layout.width)) {
        for (words, row) in panel.chunks_exact_mut(layout.width).zip(rows.chunks_exact(layout.value_dim)) {
            words.iter_mut().zip(&row[first..]).for_each(|(word, x)| *word = x.to_bits());
        }
    }
    if large { TILE_KEYS as f32 } else { 1.0 }
}

/// Returns what the words must be multiplied by: a power of two, other than 1 where a sum of the tile's values might overflow,
/// or where they are so small that products with them would be taken for zero.
#[inline(always)]
pub(super) fn bf16_values(layout: &TileLayout, rows: &mut [f32], out: &mut [u32]) -> f32 {
    const SMALL: f32 = 1.0 / (1u64 << 60) as f32;
    rows.iter_mut().for_each(|x| *x = bfloat(*x));
    let max = f32::from_bits(absmax_bits(rows));
    let factor = if max > LARGE {
        1.0 / TILE_KEYS as f32
    } else if max < SMALL {
        1.0 / SMALL
    } else {
        1.0
    };
    if factor != 1.0 {
        rows.iter_mut().for_each(|x| *x *= factor);
    }
    for (panel, first) in out.chunks_exact_mut(layout.v_panel).zip((0..).step_by(layout.width)) {
        let channels = first..(first + layout.width).min(layout.value_dim);
        for (words, pair) in panel.chunks_exact_mut(layout.width).zip(rows.chunks(2 * layout.value_dim)) {
            let (even, odd) = pair.split_at(layout.value_dim);
            for (word, x) in words.iter_mut().zip(&even[channels.clone()]) {
                *word = x.to_bits() >> 16;
            }
            if !odd.is_empty() {
                for (word, x) in words.iter_mut().zip(&odd[channels.clone()]) {
                    *word |= x.to_bits() & 0xffff_0000;
                }
            }
        }
    }
    1.0 / factor
}

#[inline(always)]
pub(super) fn fixed12_values(
    layout: &TileLayout,
    seen: &[Seen],
    rows: &mut [f32],
    out: &mut [u32],
    scales: &mut [u32],
) {
    let mut max = [0u32; MAX_VALUE_DIM];
    let max = &mut max[..layout.value_dim];
    // Padding is measured where the tile has nothing else.
    let best = seen.iter().max().copied().unwrap_or(Seen::Counts);
    for (j, row) in rows.chunks_exact(layout.value_dim).enumerate() {
        if seen.get(j).is_none_or(|seen| *seen == best) {
            max.iter_mut().zip(row).for_each(|(max, x)| *max = (*max).max(magnitude_bits(*x)));
        }
    }
    for (row, _) in
        rows.chunks_exact_mut(layout.value_dim).zip(seen).filter(|(_, seen)| **seen == Seen::Padding)
    {
        row.iter_mut().zip(&*max).for_each(|(x, max)| *x = saturated(*x, f32::from_bits(*max)));
    }
    let mut inverse = [0f32; MAX_VALUE_DIM];
    let mut tiny = false;
    for ((inverse, scale), &max) in inverse.iter_mut().zip(scales.iter_mut()).zip(max.iter()) {
        let max = f32::from_bits(max);
        *inverse = FIXED12_MAX / max;
        tiny |= max > 0.0 && *inverse == f32::INFINITY;
        // A channel of zeros; those of tiny values become integers below.
        *inverse = if inverse.is_finite() { *inverse } else { 0.0 };
        *scale = fixed12_scale(max).to_bits();
    }
    if tiny {
        // The integers themselves, for the inverses of such scales are not to be had.
        for row in rows.chunks_exact_mut(layout.value_dim) {
            for ((x, inverse), scale) in row.iter_mut().zip(&inverse).zip(&*scales) {
                let scale = f32::from_bits(*scale);
                if *inverse == 0.0 && scale > 0.0 {
                    *x = (*x / scale).clamp(-FIXED12_MAX, FIXED12_MAX);
                }
            }
        }
        for (inverse, scale) in inverse.iter_mut().zip(&*scales) {
            if *inverse == 0.0 && f32::from_bits(*scale) > 0.0 {
                *inverse = 1.0;
            }
        }
    }
    let rows = &*rows;
    for (panel, first) in out.chunks_exact_mut(layout.v_panel).zip((0..).step_by(layout.width)) {
        let channels = first..(first + layout.width).min(layout.value_dim);
        let inverse = &inverse[channels.clone()];
        match layout.fixed12 {
            Fixed12Word::Pair => {
                let pairs = rows.chunks(2 * layout.value_dim);
                for (words, pair) in panel.chunks_exact_mut(layout.width).zip(pairs) {
                    let (even, odd) = pair.split_at(layout.value_dim);
                    for ((word, x), inverse) in words.iter_mut().zip(&even[channels.clone()]).zip(inverse) {
                        *word = nearest_even(x * inverse) as u32 & 0xffff;
                    }
                    if !odd.is_empty() {
                        for ((word, x), inverse) in words.iter_mut().zip(&odd[channels.clone()]).zip(inverse)
                        {
                            *word |= (nearest_even(x * inverse) as u32) << 16;
                        }
                    }
                }
            }
            Fixed12Word::Digits => {
                let (upper, lower) = panel.split_at_mut(layout.v_panel / 2);
                let words = upper.chunks_exact_mut(layout.width).zip(lower.chunks_exact_mut(layout.width));
                for ((upper, lower), quad) in words.zip(rows.chunks(4 * layout.value_dim)) {
                    for (row, shift) in quad.chunks_exact(layout.value_dim).zip([0, 8, 16, 24]) {
                        let numbers = row[channels.clone()].iter().zip(inverse);
                        for ((upper, lower), (x, inverse)) in upper.iter_mut().zip(&mut *lower).zip(numbers) {
                            let x = nearest_even(x * inverse);
                            let high = (x + 32) >> 6;
                            *upper |= u32::from(high as u8) << shift;
                            *lower |= u32::from((x - (high << 6)) as u8) << shift;
                        }
                    }
                }
            }
        }
    }
}
