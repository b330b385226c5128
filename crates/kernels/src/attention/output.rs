//! P·V: sums of the warp's rows, and how they become the output.

use std::f32::consts::LN_2;

use half::f16;
use sage_core::Accumulator as Precision;
use sage_ptx::{
    Accumulator, CHUNK_BYTES, Code, E4M3, F16x2, FragmentA, FragmentB, FragmentSource, Half, MmaAccumulator,
    MmaElement, SharedTile, Stored, Val, Var,
};

use super::config::{AttentionConfig, AttentionParams, MaskForm, Values};
use super::place::Place;
use super::scores::LEAST_REFERENCE;
use super::softmax::{RowSum, ScoreTile, Softmax};
use crate::combine::PART;

/// Sums of P·V over the keys so far, `[m][column]` tiles of 16×8.
pub(super) struct Output<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    sums: Sums<'k>,
}

enum Sums<'k> {
    Single(Vec<Accumulator<'k, f32>>),
    Half(Vec<Accumulator<'k, F16x2>>),
}

impl<'k, 'c> Output<'k, 'c> {
    pub fn new(code: &'k Code, config: &'c AttentionConfig) -> Self {
        let tiles = config.tiling.rows_per_warp / 16 * columns(config);
        let sums = match config.values {
            Values::F16(Precision::F16) => {
                let zero = F16x2([f16::ZERO; 2]);
                Sums::Half((0..tiles).map(|_| Accumulator::filled(code, zero)).collect())
            }
            _ => Sums::Single((0..tiles).map(|_| Accumulator::filled(code, 0.0)).collect()),
        };
        Output { code, config, sums }
    }

    /// The registers of sums in single precision, as of accumulators side by side.
    pub fn registers(&self) -> Vec<Var<'k, f32>> {
        match &self.sums {
            Sums::Single(sums) => sums.iter().flat_map(|sum| sum.registers()).copied().collect(),
            Sums::Half(_) => Vec::new(),
        }
    }

    /// Multiplies each row slot's sums.
    pub fn rescale(&self, alphas: &[Val<'k, f32>]) {
        let columns = columns(self.config);
        match &self.sums {
            Sums::Single(sums) => {
                for (index, sum) in sums.iter().enumerate() {
                    for (i, var) in sum.registers().iter().enumerate() {
                        var.set(var.get() * alphas[2 * (index / columns) + i / 2]);
                    }
                }
            }
            Sums::Half(sums) => {
                let packed: Vec<_> = alphas.iter().map(|alpha| alpha.pack::<f16>(*alpha)).collect();
                for (index, sum) in sums.iter().enumerate() {
                    for (half, var) in sum.registers().iter().enumerate() {
                        var.set(var.get() * packed[2 * (index / columns) + half]);
                    }
                }
            }
        }
    }

    /// Adds a tile: exponentials of its scores, scaled and shifted, times V.
    pub fn add<W: Half + MmaElement>(
        &self,
        softmax: &Softmax<'k>,
        scores: &ScoreTile<'k>,
        shifts: &[Val<'k, f32>],
        source: &FragmentSource<'k>,
        step: usize,
    ) {
        self.code.note("output: exp2(scores) * v");
        let step_keys = self.config.tiling.step_keys;
        match self.config.values {
            Values::Fp8(precision) => {
                let p = |step: usize| {
                    let p = softmax.exponentials(scores, shifts, 4 * step..4 * step + 4);
                    p.into_iter()
                        .map(|p| FragmentA::<E4M3>::from_accumulators([p[0], p[1], p[2], p[3]]))
                        .collect::<Vec<_>>()
                };
                let steps = step_keys / 32;
                let first = step * steps;
                let v = |depth: usize, pair: usize| source.b_pair::<E4M3>(16 * pair, 32 * (first + depth));
                self.add_products(precision, steps, p, v);
            }
            Values::F16(_) | Values::BF16 => {
                let precision = match self.config.values {
                    Values::F16(precision) => precision,
                    _ => Precision::F32,
                };
                let p = |step: usize| {
                    let p = softmax.exponentials(scores, shifts, 2 * step..2 * step + 2);
                    let fragment =
                        |p: Vec<[Val<'k, f32>; 4]>| FragmentA::<W>::from_accumulators([p[0], p[1]]);
                    let p: Vec<_> = p.into_iter().map(fragment).collect();
                    softmax.add_sums(&p);
                    p
                };
                let steps = step_keys / 16;
                let first = step * steps;
                let v = |depth: usize, pair: usize| source.b_pair::<W>(16 * pair, 32 * (first + depth));
                self.add_products(precision, steps, p, v);
            }
        }
    }

    /// Adds P·V, whose depth is `steps` of 32 bytes, in the precision asked for.
    fn add_products<E: MmaElement>(
        &self,
        precision: Precision,
        steps: usize,
        p: impl Fn(usize) -> Vec<FragmentA<'k, E>>,
        v: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
    ) {
        let columns = columns(self.config);
        match (&self.sums, precision) {
            (Sums::Half(sums), _) => accumulate(sums, columns, steps, p, v),
            // Each step's exponentials stand directly before the products that need them, so that they can overlap with
            // the products of the step before.
            (Sums::Single(sums), Precision::F32 | Precision::F16) => accumulate(sums, columns, steps, p, v),
            (Sums::Single(sums), Precision::F32ThenF32) => {
                let p: Vec<_> = (0..steps).map(p).collect();
                two_level::<E, f32>(self.code, sums, columns, &p, v, |part| {
                    part.registers().iter().map(|var| var.get()).collect()
                });
            }
            (Sums::Single(sums), Precision::F16ThenF32) => {
                let p: Vec<_> = (0..steps).map(p).collect();
                two_level::<E, F16x2>(self.code, sums, columns, &p, v, |part| {
                    let words = part.registers().iter().map(|var| var.get().word());
                    words.flat_map(|word| word.split::<f16>()).map(|x| x.to_f32()).collect()
                });
            }
        }
    }

    /// Divides by the sums of P, applies V's scale and mean, and writes rows and log-sum-exps: through shared memory where a
    /// tile for the block's rows is given, else from the registers, for which rows must be aligned.
    pub fn store<H: Half + Stored<Value = H>>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        rows: &[RowSum<'k>],
        taken: &[Val<'k, f32>],
        tile: Option<&SharedTile<'k>>,
    ) {
        let (code, config) = (self.code, self.config);
        let padded = config.padded_dim() as i32;
        let heads = p.group_size * p.kv_heads;
        let first_row = (place.sequence.batch * heads + place.head).mul_wide(p.q_rows)
            + place.sequence.q_start.widen()
            + place.split.widen() * p.total_rows;
        if config.lse || config.split {
            code.note("log-sum-exp");
            code.when((place.lane & 3).eq(0), || {
                for (slot, sum) in rows.iter().enumerate() {
                    let row = place.row(slot);
                    // With a cap, what smoothing took was added back before it.
                    let taken = if config.softcap { code.constant(0.0) } else { taken[slot] };
                    code.when(row.lt(place.sequence.q_len), || {
                        let at = first_row + row.widen();
                        if config.split {
                            let part = [sum.reference, sum.divisor, sum.sum, taken];
                            p.lse.at(at * PART as i64).store_vector(part);
                        } else {
                            p.lse.at(at).store(self.log_sum_exp(sum, taken));
                        }
                    });
                }
            });
        }

        code.note("output: scales of v, division by the sums");
        let columns = columns(config);
        let channel = 2 * (place.lane & 3);
        let first = place.kv_index(p) * padded + channel;
        let of_channels = |pointer: sage_ptx::Global<'k, f32>, column: usize| {
            pointer.at(first).plus(8 * column as i32).load_vector::<2>()
        };
        let element = |m: usize, column: usize, i: usize| match &self.sums {
            Sums::Single(sums) => sums[m * columns + column].register(i).get(),
            Sums::Half(sums) => {
                let word = sums[m * columns + column].register(i / 2).get().word();
                word.split::<f16>()[i % 2].to_f32()
            }
        };
        // Of each row slot, pairs of channels packed in a word.
        let mut words = vec![Vec::new(); rows.len()];
        for column in 0..columns {
            let scale = matches!(config.values, Values::Fp8(_)).then(|| of_channels(p.v_scale, column));
            let mean = config.smooth_v.then(|| of_channels(p.v_mean, column));
            for (slot, row) in rows.iter().enumerate() {
                let value = |i: usize| {
                    let mut x = element(slot / 2, column, 2 * (slot % 2) + i) * row.inverse;
                    if let Some(scale) = scale {
                        x = x * scale[i];
                    }
                    match mean {
                        Some(mean) => row.inverse.eq(0.0).select(0.0, x + mean[i]),
                        None => x,
                    }
                };
                let pair = [value(0), value(1)];
                if config.split {
                    self.store_partial(p, place, first_row, slot, column, pair);
                } else {
                    words[slot].push(pair[0].pack::<H>(pair[1]).reinterpret::<u32>());
                }
            }
        }
        match tile {
            _ if config.split => {}
            Some(tile) => {
                for (slot, words) in words.iter().enumerate() {
                    // A chunk is a column of 8; the lane's two elements are one word of it.
                    let row = place.warp * config.tiling.rows_per_warp as i32 + (place.lane >> 2);
                    for (column, &word) in words.iter().enumerate() {
                        let chunk = tile.chunk(row, 0).step(8 * slot, column);
                        chunk.cast::<u32>().at(place.lane & 3).store(word);
                    }
                }
                self.store_rows::<H>(p, place, tile);
            }
            None => self.store_columns::<H>(p, place, words),
        }
    }

    /// A row's log-sum-exp, of whose scores smoothing has taken `taken`.
    fn log_sum_exp(&self, sum: &RowSum<'k>, taken: Val<'k, f32>) -> Val<'k, f32> {
        let lse = sum.lse2().mul_add(LN_2, taken);
        match self.config.mask {
            MaskForm::Bias(_) => least_lse(sum.reference, lse),
            _ => lse,
        }
    }

    /// Rows from the registers to the output: the lanes of a quad, which hold four words of a column of 8 channels, exchange
    /// them for a whole column each.
    fn store_columns<H: Half + Stored<Value = H>>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        words: Vec<Vec<Val<'k, u32>>>,
    ) {
        let (code, config) = (self.code, self.config);
        code.note("output: rows to device memory");
        let quad = place.lane & 3;
        let start =
            place.sequence.batch.widen() * p.out_stride_batch + place.head.widen() * p.out_stride_head;
        let whole = config.head_dim == config.padded_dim();
        for (slot, mut words) in words.into_iter().enumerate() {
            words.resize(words.len().next_multiple_of(4), code.constant(0));
            words.chunks_mut(4).for_each(|column| transpose(quad, column));
            let row = place.row(slot);
            let target = (place.sequence.q_start + row).widen() * p.out_stride_row;
            let target = p.out.cast::<H>().at(start + target).at(8 * quad).cast::<u32>();
            code.when(row.lt(place.sequence.q_len), || {
                for (index, column) in words.chunks(4).enumerate() {
                    let store = || {
                        let target = target.plus(16 * index as i32);
                        target.store_vector([column[0], column[1], column[2], column[3]]);
                    };
                    let channel = 8 * (quad + 4 * index as i32);
                    if whole { store() } else { code.when(channel.lt(config.head_dim as i32), store) }
                }
            });
        }
    }

    /// Two neighbouring channels of a part of the keys, in single precision.
    fn store_partial(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        first_row: Val<'k, i64>,
        slot: usize,
        column: usize,
        pair: [Val<'k, f32>; 2],
    ) {
        let (code, dim) = (self.code, self.config.head_dim as i32);
        let row = place.row(slot);
        let channel = 2 * (place.lane & 3) + 8 * column as i32;
        let target = p.partial.at((first_row + row.widen()) * dim as i64).at(channel);
        for (i, x) in pair.into_iter().enumerate() {
            let inside = row.lt(place.sequence.q_len) & (channel + i as i32).lt(dim);
            code.when(inside, || target.plus(i as i32).store(x));
        }
    }

    /// The warp's rows from shared memory to the output, whole chunks at a time.
    fn store_rows<H: Half + Stored<Value = H>>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        tile: &SharedTile<'k>,
    ) {
        let (code, config) = (self.code, self.config);
        code.note("output: rows to device memory");
        code.warp_sync();
        let chunks = config.head_dim.div_ceil(8);
        let rows = config.tiling.rows_per_warp;
        let start =
            place.sequence.batch.widen() * p.out_stride_batch + place.head.widen() * p.out_stride_head;
        let total = rows * chunks;
        for round in 0..total.div_ceil(32) {
            let index = place.lane + (32 * round) as i32;
            let (row, chunk) = index.split_index(chunks);
            let in_tile = place.warp * rows as i32 + row;
            let out_row = place.warp_row + row;
            let valid = out_row.lt(place.sequence.q_len) & index.lt(total as i32);
            code.when(valid, || {
                let words = tile.chunk(in_tile, chunk).step(0, 0).cast::<u32>().load_vector::<4>();
                let row = (place.sequence.q_start + out_row).widen() * p.out_stride_row;
                let target = p.out.cast::<H>().at(start + row).at(chunk * 8);
                if config.aligned {
                    target.cast::<u32>().store_vector(words);
                } else {
                    let elements = words.into_iter().flat_map(|word| word.split::<H>());
                    for (i, x) in elements.enumerate() {
                        let inside = (chunk * 8 + i as i32).lt(config.head_dim as i32);
                        code.when(inside, || target.plus(i as i32).store(x));
                    }
                }
            });
        }
    }
}

/// `lse`, or the least finite number where a bias of about that much was on every key of the row: in base 2, where
/// `reference` is, it did not fit.
pub(crate) fn least_lse<'k>(reference: Val<'k, f32>, lse: Val<'k, f32>) -> Val<'k, f32> {
    (reference.le(-LEAST_REFERENCE / 2.0) & lse.gt(f32::NEG_INFINITY)).select(f32::MIN, lse)
}

/// Four words of each lane of a quad: afterwards lane `i` has what was word `i` of each.
fn transpose<'k>(quad: Val<'k, i32>, words: &mut [Val<'k, u32>]) {
    for bit in [1, 2] {
        let upper = (quad & bit).ne(0);
        for low in (0..4usize).filter(|i| i & bit as usize == 0) {
            let high = low | bit as usize;
            let received = upper.select(words[low], words[high]).shuffle_xor(bit);
            words[low] = upper.select(received, words[low]);
            words[high] = upper.select(words[high], received);
        }
    }
}

/// Columns of 8 channels that are computed: pairs, as V's fragments are loaded.
fn columns(config: &AttentionConfig) -> usize {
    2 * config.head_dim.div_ceil(CHUNK_BYTES)
}

/// `sums += p · v`, step by step of the depth.
fn accumulate<'k, E: MmaElement, T: MmaAccumulator>(
    sums: &[Accumulator<'k, T>],
    columns: usize,
    steps: usize,
    p: impl Fn(usize) -> Vec<FragmentA<'k, E>>,
    v: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
) {
    for step in 0..steps {
        let p = p(step);
        for pair in 0..columns / 2 {
            let v = v(step, pair);
            for (m, &p) in p.iter().enumerate() {
                for (column, v) in v.into_iter().enumerate() {
                    sums[m * columns + 2 * pair + column].add_product(p, v);
                }
            }
        }
    }
}

/// `sums += p · v`, where the tile's product is summed by itself first, in `T`.
fn two_level<'k, E: MmaElement, T: MmaAccumulator + Zero>(
    code: &'k Code,
    sums: &[Accumulator<'k, f32>],
    columns: usize,
    p: &[Vec<FragmentA<'k, E>>],
    v: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
    to_f32: impl Fn(&Accumulator<'k, T>) -> Vec<Val<'k, f32>>,
) {
    let blocks = p[0].len();
    for pair in 0..columns / 2 {
        let parts: Vec<Accumulator<'k, T>> = (0..2 * blocks).map(|_| Accumulator::new(code)).collect();
        for (step, p) in p.iter().enumerate() {
            let v = v(step, pair);
            for (m, &p) in p.iter().enumerate() {
                for (column, v) in v.into_iter().enumerate() {
                    let part = &parts[2 * m + column];
                    if step == 0 { part.set_product(p, v, T::ZERO) } else { part.add_product(p, v) }
                }
            }
        }
        for (index, part) in parts.iter().enumerate() {
            let sum = &sums[index / 2 * columns + 2 * pair + index % 2];
            for (var, x) in sum.registers().iter().zip(to_f32(part)) {
                var.set(var.get() + x);
            }
        }
    }
}

/// Accumulators' zero.
trait Zero {
    const ZERO: Self;
}

impl Zero for f32 {
    const ZERO: f32 = 0.0;
}

impl Zero for F16x2 {
    const ZERO: F16x2 = F16x2([f16::ZERO; 2]);
}
