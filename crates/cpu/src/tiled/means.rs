//! Means of keys.

use rayon::prelude::*;
use sage_core::SmoothK;

use super::Unit;
use crate::forward::Attention;
use crate::kernels::Load;
use crate::tile::TILE_KEYS;

/// Keys whose sum one thread takes. A constant, so that results do not depend on the threads.
const MEAN_KEYS: usize = 2048;

impl<E: Load> Attention<'_, '_, E> {
    /// Mean of the keys of each unit.
    pub(super) fn key_means(&self, units: &[Unit<'_>], smooth: SmoothK) -> Vec<Vec<f32>> {
        let head_dim = self.call.problem.head_dim;
        let parts: Vec<(usize, usize)> = units
            .iter()
            .enumerate()
            .flat_map(|(u, unit)| {
                let rows = smooth.rows(unit.counted());
                (0..rows).step_by(MEAN_KEYS).map(move |first| (u, first))
            })
            .collect();
        let sum = |&(u, first): &(usize, usize)| {
            let unit: &Unit<'_> = &units[u];
            let keys = self.keys(&unit.sequence, unit.kv_head);
            let mut total = vec![0f64; head_dim];
            let (mut sum, mut wide) = (vec![0f32; head_dim], vec![0f32; head_dim]);
            let counted = unit.counted();
            let last = (first + MEAN_KEYS).min(smooth.rows(counted));
            let key = |j: usize| {
                let at = smooth.row(j, counted);
                keys.row(unit.seen.map_or(at, |seen| seen.counted[at] as usize))
            };
            for start in (first..last).step_by(TILE_KEYS) {
                let rows = start..(start + TILE_KEYS).min(last);
                sum.fill(0.0);
                for j in rows.clone() {
                    E::widen(key(j), &mut wide);
                    sum.iter_mut().zip(&wide).for_each(|(sum, x)| *sum += x);
                }
                if sum.iter().all(|sum| sum.is_finite()) {
                    total.iter_mut().zip(&sum).for_each(|(total, sum)| *total += f64::from(*sum));
                    continue;
                }
                // A sum of singles overflows where the mean need not.
                for j in rows {
                    E::widen(key(j), &mut wide);
                    total.iter_mut().zip(&wide).for_each(|(total, x)| *total += f64::from(*x));
                }
            }
            total
        };
        let sums: Vec<Vec<f64>> = parts.par_iter().map(sum).collect();
        let mut totals = vec![vec![0f64; head_dim]; units.len()];
        for (&(unit, _), sum) in parts.iter().zip(&sums) {
            totals[unit].iter_mut().zip(sum).for_each(|(total, sum)| *total += sum);
        }
        let mean = |(total, unit): (&Vec<f64>, &Unit<'_>)| {
            let keys = smooth.rows(unit.counted()).max(1) as f64;
            total.iter().map(|total| (total / keys) as f32).collect()
        };
        totals.iter().zip(units).map(mean).collect()
    }
}
