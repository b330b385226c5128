//! What is known of whole heads before their tiles are packed: means that are subtracted, and largest magnitudes.

use std::ops::Range;

use rayon::prelude::*;
use sage_core::oracle::E4M3_MAX;
use sage_core::{IntQuantizer, ScaleRows, SmoothK, SmoothQ, Smoothing};

use super::Unit;
use crate::forward::Attention;
use crate::kernels::{GroupMax, Load, absmax_bits, fp8_factor, hadamard};
use crate::rows::HeadRows;
use crate::seen::Seen;
use crate::tile::{PvForm, QkForm, Rounded, TILE_KEYS, TileLayout};

/// Rows that one thread looks at. A constant, so that results do not depend on the threads.
const PART_ROWS: usize = 2048;

/// What is known of one key head and the queries that read it. What a scheme has no use for is empty.
#[derive(Default)]
pub(super) struct Head {
    /// k̄.
    pub k_mean: Vec<f32>,
    /// Bits of the largest magnitude of each group of keys that share a scale, where groups are no parts of tiles.
    pub k_max: Vec<u32>,
    /// v̄.
    pub v_mean: Vec<f32>,
    /// The largest magnitude of each channel of V − v̄, NaN for one that is not finite.
    pub v_max: Vec<f32>,
    /// q̄ of each block of queries, one after the other, for each query head of the group.
    pub q_means: Vec<Vec<f32>>,
}

/// Queries that share a mean; none where nothing is subtracted from them.
pub(super) fn mean_block(smooth: SmoothQ, q_len: usize) -> Option<usize> {
    match smooth {
        SmoothQ::Off => None,
        SmoothQ::Block(block) => Some(block),
        SmoothQ::Sequence => Some(q_len.max(1)),
    }
}

impl<E: Load> Attention<'_, '_, E> {
    /// Looks at all of each unit's head.
    pub(super) fn heads(&self, smooth: &Smoothing, layout: &TileLayout, units: &[Unit<'_>]) -> Vec<Head> {
        let mut heads: Vec<Head> = units.iter().map(|_| Head::default()).collect();
        if smooth.k.is_on() {
            let keys = |unit: &Unit<'_>| self.keys(&unit.sequence, unit.kv_head);
            let means = self.means(units, smooth.k, keys);
            heads.iter_mut().zip(means).for_each(|(head, mean)| head.k_mean = mean);
        }
        if let QkForm::Int(quantizer) = layout.qk
            && layout.groups_cross_tiles()
        {
            let maxima: Vec<Vec<u32>> = units
                .par_iter()
                .zip(&heads)
                .map(|(unit, head)| self.group_maxima(layout, &quantizer, unit, head))
                .collect();
            heads.iter_mut().zip(maxima).for_each(|(head, maxima)| head.k_max = maxima);
        }
        if smooth.v {
            let values = |unit: &Unit<'_>| self.values(&unit.sequence, unit.kv_head);
            let means = self.means(units, SmoothK::Mean, values);
            heads.iter_mut().zip(means).for_each(|(head, mean)| head.v_mean = mean);
        }
        if let PvForm::Rounded(to) = layout.pv
            && let Some(rows) = to.channel_rows()
        {
            let maxima = self.value_maxima(units, &heads, to, rows);
            heads.iter_mut().zip(maxima).for_each(|(head, maxima)| head.v_max = maxima);
        }
        if smooth.q != SmoothQ::Off {
            heads
                .iter_mut()
                .zip(units)
                .for_each(|(head, unit)| head.q_means = self.query_means(smooth.q, unit));
        }
        heads
    }

    /// The mean of some rows of each unit.
    fn means<'s>(
        &self,
        units: &[Unit<'_>],
        smooth: SmoothK,
        rows_of: impl Fn(&Unit<'_>) -> HeadRows<'s, E> + Sync,
    ) -> Vec<Vec<f32>>
    where
        Self: 's,
    {
        let parts = parts(units, |unit| smooth.rows(unit.counted()));
        let sum = |(unit, part): &(usize, Range<usize>)| {
            let unit = &units[*unit];
            let counted = unit.counted();
            sum_rows(&rows_of(unit), part.clone().map(|index| unit.counted_key(smooth.row(index, counted))))
        };
        let sums: Vec<Vec<f64>> = parts.par_iter().map(sum).collect();
        let mut totals: Vec<Vec<f64>> = units.iter().map(|unit| vec![0.0; rows_of(unit).row_len()]).collect();
        for ((unit, _), sum) in parts.iter().zip(&sums) {
            totals[*unit].iter_mut().zip(sum).for_each(|(total, sum)| *total += sum);
        }
        totals.iter().zip(units).map(|(total, unit)| divided(total, smooth.rows(unit.counted()))).collect()
    }

    /// Bits of the largest magnitude of each group of a unit's keys.
    fn group_maxima(
        &self,
        layout: &TileLayout,
        quantizer: &IntQuantizer,
        unit: &Unit<'_>,
        head: &Head,
    ) -> Vec<u32> {
        let keys = self.keys(&unit.sequence, unit.kv_head);
        let mut groups: Vec<GroupMax> = Vec::new();
        let mut row = vec![0f32; layout.qk_dim];
        for j in 0..unit.sequence.kv_len {
            let group = quantizer.k_group(j);
            if groups.len() <= group {
                groups.resize(group + 1, GroupMax::default());
            }
            let seen = unit.seen.map_or(Seen::Counts, |seen| seen.range(j..j + 1)[0]);
            if seen == Seen::Hidden {
                continue;
            }
            let (channels, padding) = row.split_at_mut(layout.head_dim);
            E::widen(keys.row(j), channels);
            channels.iter_mut().zip(&head.k_mean).for_each(|(x, mean)| *x -= mean);
            padding.fill(0.0);
            if layout.rotate {
                hadamard(&mut row);
            }
            groups[group].measure(seen, &row);
        }
        groups.iter().map(|group| group.max).collect()
    }

    /// The means of the query heads of a unit.
    fn query_means(&self, smooth: SmoothQ, unit: &Unit<'_>) -> Vec<Vec<f32>> {
        let q_len = unit.sequence.q_len;
        let block = mean_block(smooth, q_len).unwrap_or(1);
        let group_size = self.call.problem.group_size();
        let heads = unit.kv_head * group_size..(unit.kv_head + 1) * group_size;
        let of_head = |head| {
            let queries = self.queries(&unit.sequence, head);
            let mean = |b: usize| {
                let rows = b * block..q_len.min((b + 1) * block);
                divided(&sum_rows(&queries, rows.clone()), rows.len())
            };
            (0..q_len.div_ceil(block)).into_par_iter().flat_map_iter(mean).collect()
        };
        heads.map(of_head).collect()
    }

    /// The largest magnitude of each channel of V in some of the rows that count: in all of them, where those some would
    /// not leave room for all.
    fn value_maxima(
        &self,
        units: &[Unit<'_>],
        heads: &[Head],
        to: Rounded,
        rows: ScaleRows,
    ) -> Vec<Vec<f32>> {
        let part_maxima = |(unit, part): &(usize, Range<usize>)| {
            let indices = part.clone().map(|index| units[*unit].counted_key(index));
            self.maxima(&units[*unit], &heads[*unit], indices)
        };
        let parts = parts(units, |unit| unit.counted());
        let maxima: Vec<Vec<u32>> = parts.par_iter().map(part_maxima).collect();
        let mut all = vec![vec![0u32; self.call.problem.value_dim]; units.len()];
        for ((unit, _), maxima) in parts.iter().zip(&maxima) {
            all[*unit].iter_mut().zip(maxima).for_each(|(all, max)| *all = (*max).max(*all));
        }
        let number = |bits: &u32| {
            let max = f32::from_bits(*bits);
            if max.is_finite() { max } else { f32::NAN }
        };
        let of_unit = |(at, all): (usize, &Vec<u32>)| {
            let all: Vec<f32> = all.iter().map(number).collect();
            let (Rounded::Fp8 { v_max, .. }, ScaleRows::Sampled(_)) = (to, rows) else { return all };
            let unit = &units[at];
            let sampled = rows.of(unit.counted()).map(|index| unit.counted_key(index));
            let sampled: Vec<f32> = self.maxima(unit, &heads[at], sampled).iter().map(number).collect();
            let fits = |(max, sampled): (&f32, &f32)| match fp8_factor(v_max, *sampled) {
                Some(factor) => max * factor <= E4M3_MAX,
                None => *max == 0.0,
            };
            if all.iter().zip(&sampled).all(fits) { sampled } else { all }
        };
        all.par_iter().enumerate().map(of_unit).collect()
    }

    /// Bits of the largest magnitude of each channel of V − v̄ in some rows.
    fn maxima(&self, unit: &Unit<'_>, head: &Head, rows: impl Iterator<Item = usize>) -> Vec<u32> {
        let values = self.values(&unit.sequence, unit.kv_head);
        let (mut max, mut wide) = (vec![0u32; values.row_len()], vec![0f32; values.row_len()]);
        for j in rows {
            E::widen(values.row(j), &mut wide);
            wide.iter_mut().zip(&head.v_mean).for_each(|(x, mean)| *x -= mean);
            max.iter_mut().zip(&wide).for_each(|(max, x)| *max = (*max).max(absmax_bits(&[*x])));
        }
        max
    }
}

/// Runs of at most [`PART_ROWS`] of each unit's rows.
fn parts(units: &[Unit<'_>], rows: impl Fn(&Unit<'_>) -> usize) -> Vec<(usize, Range<usize>)> {
    let of_unit = |(u, unit)| {
        let rows = rows(unit);
        (0..rows).step_by(PART_ROWS).map(move |first| (u, first..rows.min(first + PART_ROWS)))
    };
    units.iter().enumerate().flat_map(of_unit).collect()
}

/// The sum of some rows.
fn sum_rows<E: Load>(
    rows: &HeadRows<'_, E>,
    indices: impl ExactSizeIterator<Item = usize> + Clone,
) -> Vec<f64> {
    let head_dim = rows.row_len();
    let mut total = vec![0f64; head_dim];
    let (mut sum, mut wide) = (vec![0f32; head_dim], vec![0f32; head_dim]);
    for first in (0..indices.len()).step_by(TILE_KEYS) {
        let some = || indices.clone().skip(first).take(TILE_KEYS);
        sum.fill(0.0);
        for j in some() {
            E::widen(rows.row(j), &mut wide);
            sum.iter_mut().zip(&wide).for_each(|(sum, x)| *sum += x);
        }
        if sum.iter().all(|sum| sum.is_finite()) {
            total.iter_mut().zip(&sum).for_each(|(total, sum)| *total += f64::from(*sum));
            continue;
        }
        // A sum of singles overflows where the mean need not.
        for j in some() {
            E::widen(rows.row(j), &mut wide);
            total.iter_mut().zip(&wide).for_each(|(total, x)| *total += f64::from(*x));
        }
    }
    total
}

/// The mean, of a sum of so many rows.
fn divided(sum: &[f64], rows: usize) -> Vec<f32> {
    sum.iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect()
}
