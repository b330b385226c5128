//! The epilogue: sums of P·V become rows of the output and log-sum-exps, or parts of them where keys are split.

use std::f32::consts::LN_2;

use sage_ptx::{Code, Global, Half, Rows, SLOT_ROWS, SharedTile, Stored, Val, lane_column, lane_row};

use super::config::{AttentionConfig, AttentionParams, MaskForm, padded_dim};
use super::output::Output;
use super::place::Place;
use super::softmax::RowSum;
use crate::combine::PART;
use crate::least_bias::least_lse;
use crate::operand::Scales;
use crate::sinks::{inverse_with_sink, sum_with_sink};

/// Where a warp's rows go.
pub(super) struct Epilogue<'k, 'a> {
    code: &'k Code,
    config: &'a AttentionConfig,
    params: &'a AttentionParams<'k>,
    place: &'a Place<'k>,
    /// Index of the head's first row among all rows of log-sum-exps and of parts, where the kernel stores any.
    first_row: Option<Val<'k, i64>>,
}

impl<'k, 'a> Epilogue<'k, 'a> {
    pub fn new(
        code: &'k Code,
        config: &'a AttentionConfig,
        p: &'a AttentionParams<'k>,
        place: &'a Place<'k>,
    ) -> Self {
        let first_row = (config.lse || config.split).then(|| place.first_index(p));
        Epilogue { code, config, params: p, place, first_row }
    }

    /// Divides the output by the sums of P, which are those of `rows`, applies V's scale and mean, and writes rows and
    /// log-sum-exps: through shared memory where a tile for the block's rows is given, else from the registers, for
    /// which rows must be aligned. Smoothing has taken `taken` from the rows' scores.
    pub fn store<H: Half + Stored<Value = H>>(
        &self,
        output: &Output<'k, '_>,
        rows: &Rows<RowSum<'k>>,
        taken: &Rows<Val<'k, f32>>,
        tile: Option<&SharedTile<'k>>,
    ) {
        let with_sinks = self.with_sinks(rows, taken);
        let rows = with_sinks.as_ref().unwrap_or(rows);
        if let Some(first_row) = self.first_row {
            self.store_log_sum_exps(first_row, rows, taken);
            if self.config.split {
                self.for_each_pair(output, rows, |slot, column, pair| {
                    self.store_partial(first_row, slot, column, pair);
                });
                return;
            }
        }
        // Each row's pairs of channels, packed in words.
        let mut words = rows.map(|_| Vec::new());
        self.for_each_pair(output, rows, |slot, _, [low, high]| {
            words[slot].push(low.pack::<H>(high).reinterpret::<u32>());
        });
        match tile {
            Some(tile) => self.store_through::<H>(&words, tile),
            None => self.store_columns::<H>(&words),
        }
    }

    /// The rows' sums with their attention sinks, where the kernel adds them.
    fn with_sinks(&self, rows: &Rows<RowSum<'k>>, taken: &Rows<Val<'k, f32>>) -> Option<Rows<RowSum<'k>>> {
        let sinks = self.params.sinks?;
        self.code.note("attention sinks");
        Some(Rows::from_fn(rows.slots(), |slot| {
            let row = rows[slot];
            let sink = self.place.sink(&sinks, self.place.row(slot), self.still_taken(taken[slot]));
            let inverse = inverse_with_sink(sink, row.reference, row.divisor).named("inverse_sum");
            let (sum, reference) = sum_with_sink(sink, row.reference, row.sum);
            RowSum { divisor: row.divisor, inverse, reference, sum }
        }))
    }

    /// What a row's scores lack of what smoothing took from them: with a cap it was added back before that.
    fn still_taken(&self, taken: Val<'k, f32>) -> Val<'k, f32> {
        if self.config.softcap { self.code.constant(0.0) } else { taken }
    }

    /// Stores log-sum-exps, or for a part of the keys what they are made of.
    fn store_log_sum_exps(
        &self,
        first_row: Val<'k, i64>,
        rows: &Rows<RowSum<'k>>,
        taken: &Rows<Val<'k, f32>>,
    ) {
        let Epilogue { code, config, params: p, place, .. } = *self;
        code.note("log-sum-exp");
        let mut writes = (place.lane & 3).eq(0);
        if let Some(values) = place.values {
            // The other blocks of the rows have the same sums.
            writes = writes & values.block.eq(0);
        }
        code.when(writes, || {
            for (slot, sum) in rows.iter().enumerate() {
                let row = place.row(slot);
                let taken = self.still_taken(taken[slot]);
                code.when(row.lt(place.rows), || {
                    let at = place.row_index(p, first_row, row);
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

    /// A row's log-sum-exp, of whose scores smoothing has taken `taken`.
    fn log_sum_exp(&self, sum: &RowSum<'k>, taken: Val<'k, f32>) -> Val<'k, f32> {
        let lse = sum.lse2().mul_add(LN_2, taken);
        match self.config.mask {
            MaskForm::Bias(_) => least_lse(sum.reference, lse),
            _ => lse,
        }
    }

    /// Calls `visit` with each row slot, column and the lane's two channels there of the output.
    fn for_each_pair(
        &self,
        output: &Output<'k, '_>,
        rows: &Rows<RowSum<'k>>,
        mut visit: impl FnMut(usize, usize, [Val<'k, f32>; 2]),
    ) {
        let Epilogue { code, config, params: p, place, .. } = *self;
        code.note("output: scales of v, division by the sums");
        let padded = padded_dim(config.value_dim) as i32;
        let channel = place.channel(lane_column(place.lane));
        let first = place.kv_index(p) * padded + channel;
        let of_channels = |pointer: Global<'k, f32>, column: usize| {
            pointer.at(first).plus(column as i32).load_vector::<2>()
        };
        for column in (0..Output::columns(config)).step_by(8) {
            let scale =
                (config.operands.v.scales == Scales::Channels).then(|| of_channels(p.v_scale, column));
            let mean = config.smooth_v.then(|| of_channels(p.v_mean, column));
            for (slot, row) in rows.iter().enumerate() {
                let value = |i: usize| {
                    let mut x = output.element(slot, column + i) * row.inverse;
                    if let Some(scale) = scale {
                        x = x * scale[i];
                    }
                    match mean {
                        // P of all keys sums to less than 1 where a sink has a share.
                        Some(mean) if config.adds_sinks() => mean[i].mul_add(row.divisor * row.inverse, x),
                        Some(mean) => row.inverse.eq(0.0).select(0.0, x + mean[i]),
                        None => x,
                    }
                };
                visit(slot, column, [value(0), value(1)]);
            }
        }
    }

    /// Stores rows by way of shared memory.
    fn store_through<H: Half + Stored<Value = H>>(
        &self,
        words: &Rows<Vec<Val<'k, u32>>>,
        tile: &SharedTile<'k>,
    ) {
        let place = self.place;
        for (slot, words) in words.iter().enumerate() {
            let row = place.warp * self.config.tiling.rows_per_warp() as i32 + lane_row(place.lane);
            // A chunk is a block of 8 columns; the lane's two elements are one word of it.
            for (chunk, &word) in words.iter().enumerate() {
                let chunk = tile.chunk(row, 0).step(SLOT_ROWS * slot, chunk);
                chunk.cast::<u32>().at(place.lane & 3).store(word);
            }
        }
        self.store_rows::<H>(tile);
    }

    /// Stores rows from the registers: the lanes of a quad, which hold four words of a column of 8 channels,
    /// exchange them for a whole column each.
    fn store_columns<H: Half + Stored<Value = H>>(&self, words: &Rows<Vec<Val<'k, u32>>>) {
        let Epilogue { code, config, params: p, place, .. } = *self;
        code.note("output: rows to device memory");
        let quad = place.lane & 3;
        let start = place.head_start(&p.out);
        let whole = config.value_dim == config.value_columns();
        for (slot, words) in words.iter().enumerate() {
            let mut words = words.clone();
            words.resize(words.len().next_multiple_of(4), code.constant(0));
            words.chunks_mut(4).for_each(|column| transpose(quad, column));
            let row = place.row(slot);
            let target = p.out.start.cast::<H>().at(place.row_start(&p.out, start, row));
            let target = target.at(8 * quad).cast::<u32>();
            code.when(row.lt(place.rows), || {
                for (index, column) in words.chunks(4).enumerate() {
                    let store = || {
                        let target = target.plus(16 * index as i32);
                        target.store_vector([column[0], column[1], column[2], column[3]]);
                    };
                    let channel = 8 * (quad + 4 * index as i32);
                    if whole { store() } else { code.when(channel.lt(config.value_dim as i32), store) }
                }
            });
        }
    }

    /// Stores two neighbouring channels of the output for a part of the keys, in single precision.
    fn store_partial(&self, first_row: Val<'k, i64>, slot: usize, column: usize, pair: [Val<'k, f32>; 2]) {
        let Epilogue { code, config, params: p, place, .. } = *self;
        let dim = config.value_dim as i32;
        let row = place.row(slot);
        let channel = place.channel(lane_column(place.lane)) + column as i32;
        let target = p.partial.at(place.row_index(p, first_row, row) * dim as i64).at(channel);
        for (i, x) in pair.into_iter().enumerate() {
            let inside = row.lt(place.rows) & (channel + i as i32).lt(dim);
            code.when(inside, || target.plus(i as i32).store(x));
        }
    }

    /// Copies the warp's rows from shared memory to the output, whole chunks at a time.
    fn store_rows<H: Half + Stored<Value = H>>(&self, tile: &SharedTile<'k>) {
        let Epilogue { code, config, params: p, place, .. } = *self;
        code.note("output: rows to device memory");
        code.warp_sync();
        let chunks = config.block_values().div_ceil(8);
        let rows = config.tiling.rows_per_warp();
        let start = place.head_start(&p.out);
        let total = rows * chunks;
        for round in 0..total.div_ceil(32) {
            let index = place.lane + (32 * round) as i32;
            let (row, chunk) = index.split_index(chunks);
            let in_tile = place.warp * rows as i32 + row;
            let out_row = place.warp_row + row;
            let channel = || place.channel(chunk * 8);
            let mut valid = out_row.lt(place.rows) & index.lt(total as i32);
            if config.last_values_are_fewer() {
                valid = valid & channel().lt(config.value_dim as i32);
            }
            code.when(valid, || {
                let words = tile.chunk(in_tile, chunk).step(0, 0).cast::<u32>().load_vector::<4>();
                let row = place.row_start(&p.out, start, out_row);
                let target = p.out.start.cast::<H>().at(row).at(channel());
                if config.aligned {
                    target.cast::<u32>().store_vector(words);
                } else {
                    let elements = words.into_iter().flat_map(|word| word.split::<H>());
                    for (i, x) in elements.enumerate() {
                        let inside = (channel() + i as i32).lt(config.value_dim as i32);
                        code.when(inside, || target.plus(i as i32).store(x));
                    }
                }
            });
        }
    }
}

/// Transposes four words of each lane of a quad: afterwards lane `i` has what was word `i` of each.
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
