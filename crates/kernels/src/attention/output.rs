//! P·V: sums of the warp's rows.

use half::f16;
use sage_core::{Accumulator as Precision, Fp4Format};
use sage_ptx::{
    Code, F16x2, FloatAccumulator, FragmentA, FragmentB, FragmentSource, MmaAccumulator, MmaElement,
    RoundedElement, Rows, Tile, Val, Var,
};

use super::config::AttentionConfig;
use super::softmax::Probabilities;
use super::warps::StagedTile;
use crate::fp4::{ScaleWords, block_scales};

/// Channels of V that two fragments have, which are loaded at once.
const FRAGMENT_CHANNELS: usize = 16;

/// Sums of P·V over the keys so far: rows are queries, columns channels.
pub(super) struct Output<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    sums: Sums<'k>,
}

enum Sums<'k> {
    Single(Tile<Var<'k, f32>>),
    Half(Tile<Var<'k, F16x2>>),
}

impl<'k, 'c> Output<'k, 'c> {
    pub fn new(code: &'k Code, config: &'c AttentionConfig) -> Self {
        let (rows, columns) = (config.tiling.rows_per_warp(), Output::columns(config));
        let sums = match config.operands.sums {
            Precision::F16 => Sums::Half(Tile::filled(code, rows, columns, F16x2::ZERO)),
            _ => Sums::Single(Tile::filled(code, rows, columns, 0.0)),
        };
        Output { code, config, sums }
    }

    /// An output whose sums are complete.
    pub fn of_sums(code: &'k Code, config: &'c AttentionConfig, sums: Tile<Var<'k, f32>>) -> Self {
        Output { code, config, sums: Sums::Single(sums) }
    }

    /// Channels that are computed: sixteen at a time, as V's fragments are loaded.
    pub fn columns(config: &AttentionConfig) -> usize {
        config.block_values().next_multiple_of(FRAGMENT_CHANNELS)
    }

    /// The sum of a row slot at a column, in single precision.
    pub fn element(&self, slot: usize, column: usize) -> Val<'k, f32> {
        match &self.sums {
            Sums::Single(sums) => sums.element(slot, column),
            Sums::Half(sums) => sums.element(slot, column),
        }
    }

    /// Multiplies each row's sums.
    pub fn mul_rows(&self, alphas: &Rows<Val<'k, f32>>) {
        match &self.sums {
            Sums::Single(sums) => sums.mul_rows(alphas),
            Sums::Half(sums) => sums.mul_rows(&alphas.map(|alpha| alpha.pack::<f16>(*alpha))),
        }
    }

    /// Adds P·V, of the keys of step `step` in a tile, whose values are at `values`.
    pub fn add<E: RoundedElement>(
        &self,
        p: &Probabilities<'_, 'k>,
        values: &FragmentSource<'k>,
        step: usize,
    ) {
        self.code.note("output: exp2(scores) * v");
        let steps = self.config.tiling.step_keys() / E::DEPTH;
        let first = step * steps;
        let p = |step: usize| p.operand::<E>(step);
        let v = |step: usize, channel: usize| values.b_pair::<E>(channel, 32 * (first + step));
        match (&self.sums, self.config.operands.sums) {
            // Each step's exponentials stand directly before the products that need them, so that they can overlap with
            // the products of the step before.
            (Sums::Half(sums), _) => sums.add_product(steps, p, v),
            (Sums::Single(sums), Precision::F32 | Precision::F16) => sums.add_product(steps, p, v),
            (Sums::Single(sums), Precision::F32ThenF32) => {
                let p: Vec<_> = (0..steps).map(p).collect();
                add_two_level::<E, f32>(self.code, sums, &p, v);
            }
            (Sums::Single(sums), Precision::F16ThenF32) => {
                let p: Vec<_> = (0..steps).map(p).collect();
                add_two_level::<E, F16x2>(self.code, sums, &p, v);
            }
        }
    }
}

impl<'k> Output<'k, '_> {
    /// Adds P·V of a tile's keys, both in 4 bits with a scale for each group of keys.
    pub fn add_scaled(&self, p: &Probabilities<'_, 'k>, values: &StagedTile<'k>) {
        self.code.note("output: exp2(scores) * v");
        let Sums::Single(sums) = &self.sums else { unreachable!("sums of 4-bit values are single") };
        let format = self.config.operands.v.fp4().unwrap_or(Fp4Format::Nv);
        let words = ScaleWords::new(self.config.value_columns(), self.config.tiling.tile_keys());
        let (p, scales) = (p.scaled_operand(format), values.group_scales());
        sums.add_scaled_product(
            block_scales(format),
            1,
            |_| p.clone(),
            |_, channel| words.operands(values.fragments.b_pair(channel, 0), &scales, channel, 0),
        );
    }
}

/// `sums += p · v`, where the product, whose `p` is given for each step of the depth, is summed by itself first, in
/// `T`.
fn add_two_level<'k, E: MmaElement, T: FloatAccumulator>(
    code: &'k Code,
    sums: &Tile<Var<'k, f32>>,
    p: &[Vec<FragmentA<'k, E>>],
    v: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
) {
    for channel in (0..sums.columns()).step_by(FRAGMENT_CHANNELS) {
        let part = Tile::<Var<'k, T>>::new(code, sums.rows(), FRAGMENT_CHANNELS);
        part.set_product(T::ZERO, p.len(), |step| p[step].clone(), |step, _| v(step, channel));
        sums.slice(channel..channel + FRAGMENT_CHANNELS).add(&part);
    }
}
