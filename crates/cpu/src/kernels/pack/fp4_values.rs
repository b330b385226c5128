//! Values in FP4: groups of neighbouring keys, of each channel.

use sage_core::{Fp4Format, MAX_VALUE_DIM};

use super::super::fp4::{BLOCK, PANEL_WORDS, factors, inverse, pack_values, scale};
use super::{absmax_bits, magnitude_bits, saturated};
use crate::seen::Seen;
use crate::tile::TileLayout;

/// Returns what sums must be multiplied by.
#[inline(always)]
pub(super) fn fp4_values(
    layout: &TileLayout,
    format: Fp4Format,
    seen: &[Seen],
    rows: &mut [f32],
    out: &mut [u32],
) -> f32 {
    let value_dim = layout.value_dim;
    let [factor, later] = factors(absmax_bits(rows));
    let mut max = [0u32; MAX_VALUE_DIM];
    let (mut scales, mut inverses) = ([0f32; MAX_VALUE_DIM], [0f32; MAX_VALUE_DIM]);
    let (scales, inverses) = (&mut scales[..value_dim], &mut inverses[..value_dim]);
    let max = &mut max[..value_dim];
    let group_keys = format.group();
    for (group, first) in rows.chunks_mut(group_keys * value_dim).zip((0..).step_by(group_keys)) {
        max.fill(0);
        let seen = seen.get(first..).map_or(&[][..], |seen| &seen[..seen.len().min(group_keys)]);
        // Padding is measured where a group has nothing else.
        let best = seen.iter().max().copied().unwrap_or(Seen::Counts);
        for (j, row) in group.chunks_exact(value_dim).enumerate() {
            if seen.get(j).is_none_or(|seen| *seen == best) {
                max.iter_mut().zip(row).for_each(|(max, x)| *max = (*max).max(magnitude_bits(*x)));
            }
        }
        for ((scale_of, inverse_of), max) in scales.iter_mut().zip(inverses.iter_mut()).zip(&*max) {
            *scale_of = scale(format, *max);
            *inverse_of = inverse(*scale_of);
        }
        for (j, row) in group.chunks_exact_mut(value_dim).enumerate() {
            if seen.get(j) == Some(&Seen::Padding) {
                row.iter_mut().zip(&*max).for_each(|(x, max)| *x = saturated(*x, f32::from_bits(*max)));
            }
        }
        for (block, at) in group.chunks(BLOCK * value_dim).zip(first / BLOCK..) {
            let panels = &mut out[at * PANEL_WORDS * layout.width..];
            pack_values(block, (inverses, scales), layout.width, factor, panels, layout.v_panel);
        }
    }
    later
}
