//! Integers with a scale for each group of rows: Q and K in 8 and 4 bits.

use std::f32::consts::LOG2_E;

use super::{Matrix, SeenKeys, absmax};
use crate::{Granularity, IntQuantizer, Rounding, ZeroGroup};

/// What the original adds to, or puts under, a scale to keep it above zero.
const EPSILON: f32 = 1e-7;

/// Rows of integers, and the scale of each group of rows.
///
/// `x ≈ scales[group(i)] · values[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct IntRows {
    /// Integers, one a byte whatever their width.
    pub values: Matrix<i8>,
    /// Scale of each group. Groups of a last tile that no row belongs to have the scale of zeros.
    pub scales: Vec<f32>,
    /// Group of each row.
    pub groups: Vec<usize>,
}

impl IntRows {
    /// The real numbers that the integers stand for; exact.
    pub fn dequantize(&self) -> Matrix<f64> {
        Matrix::from_fn(self.values.rows(), self.values.width(), |i, c| {
            f64::from(self.scales[self.groups[i]]) * f64::from(self.values.row(i)[c])
        })
    }
}

impl IntQuantizer {
    /// Index of the scale of query row `i`, counted from the start of its sequence.
    ///
    /// Per thread: in a tensor core's `m16n8` accumulator, lane `l` holds rows `l / 4` and `l / 4 + 8` of every 16,
    /// so the rows of a warp that are equal modulo 8 belong to the same lanes and share a scale.
    ///
    /// # Panics
    /// When the tile has no rows.
    pub fn q_group(&self, i: usize) -> usize {
        match self.granularity {
            Granularity::PerTensor => 0,
            Granularity::PerBlock => i / self.tile.block_q,
            Granularity::PerWarp => i / self.tile.warp_q,
            Granularity::PerThread => i / self.tile.warp_q * 8 + i % 8,
            Granularity::PerToken => i,
        }
    }

    /// Index of the scale of key row `j`, counted from the start of its sequence.
    ///
    /// Per thread: lane `l` holds columns `2(l mod 4)` and `2(l mod 4) + 1` of every 8, so a warp's keys
    /// `8r + 2t` and `8r + 2t + 1` share scale `t`. Per warp, keys are grouped by block: all warps read all keys.
    ///
    /// # Panics
    /// When the tile has no rows.
    pub fn k_group(&self, j: usize) -> usize {
        match self.granularity {
            Granularity::PerTensor => 0,
            Granularity::PerBlock | Granularity::PerWarp => j / self.tile.block_k,
            Granularity::PerThread => j / self.tile.warp_k * 4 + j % 8 / 2,
            Granularity::PerToken => j,
        }
    }

    /// Number of scales for `q_len` queries: whole tiles, except that each token has its own.
    ///
    /// # Panics
    /// When the tile has no rows.
    pub fn q_groups(&self, q_len: usize) -> usize {
        let tiles = q_len.div_ceil(self.tile.block_q);
        let warps = self.tile.block_q / self.tile.warp_q;
        match self.granularity {
            Granularity::PerTensor => 1,
            Granularity::PerBlock => tiles,
            Granularity::PerWarp => tiles * warps,
            Granularity::PerThread => tiles * warps * 8,
            Granularity::PerToken => q_len,
        }
    }

    /// Number of scales for `kv_len` keys: whole tiles, except that each token has its own.
    ///
    /// # Panics
    /// When the tile has no rows.
    pub fn k_groups(&self, kv_len: usize) -> usize {
        let tiles = kv_len.div_ceil(self.tile.block_k);
        match self.granularity {
            Granularity::PerTensor => 1,
            Granularity::PerBlock | Granularity::PerWarp => tiles,
            Granularity::PerThread => tiles * (self.tile.block_k / self.tile.warp_k) * 4,
            Granularity::PerToken => kv_len,
        }
    }

    /// Quantises queries, first multiplied by `sm_scale · log₂e` where the quantiser says so.
    ///
    /// # Panics
    /// When the tile has no rows, or its blocks are not whole warps.
    pub fn quantize_q(&self, q: &Matrix<f32>, sm_scale: f32) -> IntRows {
        let groups = (0..q.rows()).map(|i| self.q_group(i)).collect();
        if self.scale_q_first {
            let factor = sm_scale * LOG2_E;
            self.quantize(&q.map(|x| x * factor), groups, self.q_groups(q.rows()), None)
        } else {
            self.quantize(q, groups, self.q_groups(q.rows()), None)
        }
    }

    /// Quantises keys, which are smoothed and zeros where no query sees them.
    ///
    /// # Panics
    /// When the tile has no rows, or its blocks are not whole warps.
    pub fn quantize_k(&self, k: &Matrix<f32>, keys: &SeenKeys) -> IntRows {
        let groups = (0..k.rows()).map(|j| self.k_group(j)).collect();
        self.quantize(k, groups, self.k_groups(k.rows()), Some(keys))
    }

    fn quantize(
        &self,
        rows: &Matrix<f32>,
        groups: Vec<usize>,
        num_groups: usize,
        keys: Option<&SeenKeys>,
    ) -> IntRows {
        let mut members = vec![Vec::new(); num_groups];
        groups.iter().enumerate().for_each(|(row, &group)| members[group].push(row));
        let maximum = |members: Vec<usize>| {
            let measured = keys.map_or(members.clone(), |keys| keys.measured(members.iter().copied()));
            absmax(measured.iter().flat_map(|&i| rows.row(i)).copied())
        };
        let maxima: Vec<f32> = members.into_iter().map(maximum).collect();
        let scales: Vec<f32> = maxima.iter().map(|&max| self.scale(max)).collect();
        let values =
            Matrix::from_fn(rows.rows(), rows.width(), |i, c| self.round(rows.row(i)[c], maxima[groups[i]]));
        IntRows { values, scales, groups }
    }

    /// Scale of a group whose largest magnitude is `max`; NaN when that is not finite, so that the group's scores
    /// are NaN and never silently wrong.
    pub fn scale(&self, max: f32) -> f32 {
        let levels = self.bits.max() as f32;
        match self.zero_group {
            _ if !max.is_finite() => f32::NAN,
            ZeroGroup::Guard => max / levels,
            ZeroGroup::AddToScale => max / levels + EPSILON,
            ZeroGroup::ClampMaximum => max.max(EPSILON) / levels,
        }
    }

    /// The integer that stands for `x` in a group whose largest magnitude is `max`.
    ///
    /// `x / scale`, or with [`ZeroGroup::ClampMaximum`] `x · (levels / max)` as the CUDA quantisers compute it; 0 in
    /// a group whose scale is zero or NaN.
    pub fn round(&self, x: f32, max: f32) -> i8 {
        let levels = self.bits.max() as f32;
        let scale = self.scale(max);
        if scale.is_nan() || scale == 0.0 {
            return 0;
        }
        let quotient = match self.zero_group {
            ZeroGroup::ClampMaximum => x * (levels / max.max(EPSILON)),
            ZeroGroup::Guard | ZeroGroup::AddToScale => x / scale,
        };
        let rounded = match self.rounding {
            Rounding::HalfAwayFromZero => (quotient + 0.5f32.copysign(quotient)).trunc(),
            Rounding::NearestEven => quotient.round_ties_even(),
        };
        rounded.clamp(-levels, levels) as i8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::oracle::testing::{matrix, normal_matrix};
    use crate::{IntBits, Tile};

    const TILE: Tile = Tile { block_q: 128, warp_q: 32, block_k: 64, warp_k: 64 };

    fn quantizer(granularity: Granularity) -> IntQuantizer {
        IntQuantizer {
            bits: IntBits::Eight,
            granularity,
            tile: TILE,
            rounding: Rounding::NearestEven,
            zero_group: ZeroGroup::Guard,
            scale_q_first: false,
        }
    }

    #[test]
    fn numbers_worked_out_by_hand() {
        // Scale 254/127 = 2: 1 is half a step, 3 one and a half.
        let rows = matrix(4, &[254.0, 1.0, 3.0, -5.0]);
        let with = |rounding| {
            IntQuantizer { rounding, ..quantizer(Granularity::PerToken) }
                .quantize_k(&rows, &SeenKeys::all(rows.rows()))
        };
        assert_eq!(with(Rounding::NearestEven).scales, [2.0]);
        assert_eq!(with(Rounding::NearestEven).values.row(0), [127, 0, 2, -2]);
        assert_eq!(with(Rounding::HalfAwayFromZero).values.row(0), [127, 1, 2, -3]);
        // Four bits: scale 7/7 = 1.
        let four = IntQuantizer { bits: IntBits::Four, ..quantizer(Granularity::PerToken) };
        let rows = four.quantize_k(&matrix(3, &[-7.0, 2.4, 0.6]), &SeenKeys::all(1));
        assert_eq!((rows.values.row(0), rows.scales[0]), (&[-7, 2, 1][..], 1.0));
    }

    #[test]
    fn the_softmax_scale_goes_into_q_first_where_the_quantiser_says_so() {
        let q = matrix(2, &[1.0, -0.5]);
        let first = IntQuantizer { scale_q_first: true, ..quantizer(Granularity::PerToken) };
        assert_eq!(first.quantize_q(&q, 0.125).scales, [0.125 * LOG2_E / 127.0]);
        assert_eq!(first.quantize_k(&q, &SeenKeys::all(1)).scales, [1.0 / 127.0]);
        assert_eq!(quantizer(Granularity::PerToken).quantize_q(&q, 0.125).scales, [1.0 / 127.0]);
    }

    #[test]
    fn scales_are_rounded_up_to_whole_tiles() {
        for (granularity, of_q, of_k) in [
            (Granularity::PerTensor, 1, 1),
            (Granularity::PerBlock, 2, 3),
            (Granularity::PerWarp, 8, 3),
            (Granularity::PerThread, 64, 12),
            (Granularity::PerToken, 130, 129),
        ] {
            let quantizer = quantizer(granularity);
            assert_eq!((quantizer.q_groups(130), quantizer.k_groups(129)), (of_q, of_k), "{granularity:?}");
            assert_eq!(quantizer.quantize_q(&normal_matrix(1, 130, 8), 1.0).scales.len(), of_q);
            assert_eq!(
                quantizer.quantize_k(&normal_matrix(1, 129, 8), &SeenKeys::all(129)).scales.len(),
                of_k
            );
        }
    }

    /// In an `m16n8` accumulator lane `l` holds rows `l / 4` and `l / 4 + 8`, columns `2(l mod 4)` and one more. All
    /// accumulators of a warp's tile must need one scale of Q and one of K in each lane, and different lanes rows
    /// and columns of their own.
    #[test]
    fn per_thread_scales_are_one_a_lane() {
        let quantizer = quantizer(Granularity::PerThread);
        for lane in 0..32 {
            for (q_start, k_start) in [(0, 0), (96, 64), (160, 128)] {
                let rows =
                    (0..TILE.warp_q).filter(|i| i % 8 == lane / 4).map(|i| quantizer.q_group(q_start + i));
                let keys = (0..TILE.warp_k)
                    .filter(|j| j % 8 / 2 == lane % 4)
                    .map(|j| quantizer.k_group(k_start + j));
                assert!(rows.clone().all(|group| group == q_start / TILE.warp_q * 8 + lane / 4));
                assert!(keys.clone().all(|group| group == k_start / TILE.warp_k * 4 + lane % 4));
                assert_eq!((rows.count(), keys.count()), (4, 16));
            }
        }
    }

    #[test]
    fn every_rows_group_has_a_scale() {
        for granularity in [
            Granularity::PerTensor,
            Granularity::PerBlock,
            Granularity::PerWarp,
            Granularity::PerThread,
            Granularity::PerToken,
        ] {
            for tile in [TILE, Tile { block_q: 64, warp_q: 16, block_k: 128, warp_k: 128 }] {
                let quantizer = IntQuantizer { tile, ..quantizer(granularity) };
                for len in 1..300 {
                    assert!((0..len).all(|i| quantizer.q_group(i) < quantizer.q_groups(len)));
                    assert!((0..len).all(|j| quantizer.k_group(j) < quantizer.k_groups(len)));
                }
            }
        }
    }

    #[test]
    fn a_group_of_zeros_is_zeros() {
        for (zero_group, scale) in [
            (ZeroGroup::Guard, 0.0),
            (ZeroGroup::AddToScale, EPSILON),
            (ZeroGroup::ClampMaximum, EPSILON / 127.0),
        ] {
            let quantizer = IntQuantizer { zero_group, ..quantizer(Granularity::PerToken) };
            let rows = quantizer.quantize_k(&matrix(2, &[0.0, -0.0, 1.0, 2.0]), &SeenKeys::all(2));
            assert_eq!((rows.values.row(0), rows.scales[0]), (&[0, 0][..], scale));
            assert!(rows.dequantize().row(0).iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn a_group_with_a_bad_value_is_nan_and_no_other() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
                let quantizer = IntQuantizer { zero_group, ..quantizer(Granularity::PerToken) };
                let rows = matrix(2, &[1.0, bad, 1.0, 2.0]);
                let rows = quantizer.quantize_k(&rows, &SeenKeys::all(2)).dequantize();
                assert!(rows.row(0).iter().all(|x| x.is_nan()));
                assert!(rows.row(1).iter().all(|x| x.is_finite()));
            }
        }
    }

    fn quantizers() -> impl Strategy<Value = IntQuantizer> {
        (
            prop_oneof![Just(IntBits::Four), Just(IntBits::Eight)],
            prop_oneof![Just(Rounding::NearestEven), Just(Rounding::HalfAwayFromZero)],
            prop_oneof![Just(ZeroGroup::Guard), Just(ZeroGroup::AddToScale), Just(ZeroGroup::ClampMaximum)],
        )
            .prop_map(|(bits, rounding, zero_group)| IntQuantizer {
                bits,
                rounding,
                zero_group,
                ..quantizer(Granularity::PerToken)
            })
    }

    proptest! {
        #[test]
        fn the_error_is_at_most_half_a_step(
            quantizer in quantizers(),
            row in prop::collection::vec(-1e4f32..1e4, 1..40),
            exponent in -20i32..20,
        ) {
            let row: Vec<f32> = row.iter().map(|x| x * (exponent as f32).exp2()).collect();
            let rows = quantizer.quantize_k(&matrix(row.len(), &row), &SeenKeys::all(1));
            let levels = quantizer.bits.max();
            prop_assert!(rows.values.as_slice().iter().all(|&x| i32::from(x).abs() <= levels));
            // Beside half a step, the quotient is off by three single-precision roundings of at most 127.
            let bound = f64::from(rows.scales[0]) * (0.5 + 3.0 * 127.0 * f64::from(f32::EPSILON));
            for (&x, approximation) in row.iter().zip(rows.dequantize().row(0)) {
                prop_assert!((f64::from(x) - approximation).abs() <= bound, "{x} became {approximation}");
            }
        }
    }
}
