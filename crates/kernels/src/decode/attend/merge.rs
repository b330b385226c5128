//! The results of a block's warps together, as rows of the output or a part of them.

use sage_core::ValueFormat;
use sage_ptx::{Code, Half, Rows, Shared, Stored, Tile, Val, Var, lane_column};
use std::f32::consts::LN_2;

use super::codes::E4M3_UNIT;
use super::softmax::{HEADROOM, Softmax};
use super::tokens::ValueShape;
use super::work::{Row, Work};
use super::{CacheAttendConfig, CacheAttendParams, ROWS, WARPS};
use crate::combine::PART;
use crate::sinks::{inverse_with_sink, sum_with_sink};

/// Singles of a block of eight columns, of a lane and of a warp.
const OF_BLOCK: usize = 4;
const BLOCK: usize = OF_BLOCK * 32;

/// Singles of shared memory that merging takes: the outputs of half of the warps.
pub(super) fn memory(config: &CacheAttendConfig) -> usize {
    WARPS / 2 * ValueShape::new(&config.storage).blocks() * BLOCK
}

/// Where results go.
pub(super) struct Merge<'k, 'a> {
    config: &'a CacheAttendConfig,
    code: &'k Code,
    params: &'a CacheAttendParams<'k>,
    work: &'a Work<'k>,
    shape: ValueShape,
    /// Largest scores and sums of each warp's rows.
    maxima: Shared<'k, f32>,
    sums: Shared<'k, f32>,
    /// Outputs of two warps, each lane's registers as they are.
    outputs: Shared<'k, f32>,
}

impl<'k, 'a> Merge<'k, 'a> {
    /// `outputs` is memory of [`memory`] that no warp reads once it is here.
    pub fn new(
        config: &'a CacheAttendConfig,
        code: &'k Code,
        params: &'a CacheAttendParams<'k>,
        work: &'a Work<'k>,
        outputs: Shared<'k, f32>,
    ) -> Self {
        let maxima = code.shared::<f32>("maxima", WARPS * ROWS);
        let sums = code.shared::<f32>("sums", WARPS * ROWS);
        Merge { config, code, params, work, shape: ValueShape::new(&config.storage), maxima, sums, outputs }
    }

    /// Merges what the warps have and stores the rows.
    pub fn store<H: Half + Stored<Value = H>>(&self, softmax: &Softmax<'k>) {
        let Merge { code, work, .. } = *self;
        code.note("merge: maxima and sums");
        let (warp, lane) = (code.warp_index(), code.lane_index());
        let [max, sum] = softmax.rows();
        code.when((lane & 3).eq(0), || {
            for slot in 0..2 {
                let at = warp * ROWS as i32 + work.lane_row(slot);
                self.maxima.at(at).store(max[slot]);
                self.sums.at(at).store(sum[slot]);
            }
        });
        code.barrier();
        let of_warps = |of: Shared<'k, f32>, slot: usize| {
            let first = of.at(work.lane_row(slot));
            (0..WARPS).map(move |warp| first.plus((warp * ROWS) as i32).load()).collect::<Vec<_>>()
        };
        let all_max = Rows::from_fn(2, |slot| {
            of_warps(self.maxima, slot).into_iter().reduce(Val::max).unwrap_or(max[slot])
        });
        let all_sum = Rows::from_fn(2, |slot| {
            let terms = of_warps(self.maxima, slot).into_iter().zip(of_warps(self.sums, slot));
            let zero = code.constant(0.0);
            terms.fold(zero, |total, (max, sum)| sum.mul_add((max - all_max[slot]).exp2(), total))
        });
        let sinks = self.params.sinks.map(|sinks| {
            let of_row = |row: Row<'k>| sinks.of_row(row.head, row.query, code.constant(0.0));
            Rows::from_fn(2, |slot| of_row(work.row(work.lane_row(slot))))
        });
        let weights = Rows::from_fn(2, |slot| {
            let inverse = match &sinks {
                None => all_sum[slot].eq(0.0).select(0.0, all_sum[slot].recip()),
                Some(sinks) => inverse_with_sink(sinks[slot], all_max[slot], all_sum[slot]),
            };
            (max[slot] - all_max[slot]).exp2() * inverse * self.unit(softmax)
        });
        self.add_outputs(softmax.output(), &weights);
        let rows = [0, 1].map(|slot| work.row(work.lane_row(slot)));
        self.store_sums(&rows, &all_max, &all_sum, sinks.as_ref());
        self.store_outputs::<H>(&rows);
    }

    /// What the output of the warp is in units of.
    fn unit(&self, softmax: &Softmax<'k>) -> Val<'k, f32> {
        match self.config.storage.values {
            ValueFormat::F16 | ValueFormat::BF16 => self.code.constant(1.0),
            ValueFormat::Int8 => softmax.unit() * (1.0 / HEADROOM),
            ValueFormat::Fp8E4M3 => softmax.unit() * (E4M3_UNIT / HEADROOM),
        }
    }

    /// Leaves the sum of all warps' outputs, times their weights, in two halves.
    fn add_outputs(&self, output: &Tile<Var<'k, f32>>, weights: &Rows<Val<'k, f32>>) {
        let Merge { code, .. } = *self;
        code.note("merge: outputs");
        let half = WARPS as i32 / 2;
        let (warp, lane) = (code.warp_index(), code.lane_index());
        output.mul_rows(weights);
        let blocks = output.registers().chunks(OF_BLOCK).enumerate();
        let place = self.outputs.at((warp & (half - 1)) * (self.shape.blocks() * BLOCK) as i32 + lane * 4);
        let store = || {
            for (block, registers) in blocks.clone() {
                let x: [_; OF_BLOCK] = std::array::from_fn(|i| registers[i].get());
                place.plus((block * BLOCK) as i32).store_vector(x);
            }
        };
        code.when(warp.ge(half), store);
        code.barrier();
        code.when(warp.lt(half), || {
            for (block, registers) in blocks.clone() {
                let other = place.plus((block * BLOCK) as i32).load_vector::<OF_BLOCK>();
                registers.iter().zip(other).for_each(|(register, x)| register.set(register.get() + x));
            }
            store();
        });
        code.barrier();
    }

    /// Stores what rows sum to.
    fn store_sums(
        &self,
        rows: &[Row<'k>; 2],
        max: &Rows<Val<'k, f32>>,
        sum: &Rows<Val<'k, f32>>,
        sinks: Option<&Rows<Val<'k, f32>>>,
    ) {
        let Merge { config, code, params: p, work, .. } = *self;
        let first_lanes = code.warp_index().eq(0) & (code.lane_index() & 3).eq(0);
        for (slot, row) in rows.iter().enumerate() {
            let (max, sum) = (max[slot], sum[slot]);
            code.when(first_lanes & row.exists, || {
                if config.split {
                    let zero = code.constant(0.0);
                    p.partial_sums.at(self.line(row) * PART as i64).store_vector([max, sum, sum, zero]);
                } else if config.lse {
                    let (sum, max) = sinks.map_or((sum, max), |sinks| sum_with_sink(sinks[slot], max, sum));
                    let lse = (sum.log2() + max) * LN_2;
                    let lse = sum.eq(0.0).select(f32::NEG_INFINITY, lse);
                    p.lse.at(work.index(p, row)).store(lse);
                }
            });
        }
    }

    /// Stores the rows' outputs, each warp some of the columns.
    fn store_outputs<H: Half + Stored<Value = H>>(&self, rows: &[Row<'k>; 2]) {
        let Merge { config, code, params: p, work, shape, .. } = *self;
        code.note("output: rows to device memory");
        let head_dim = config.storage.head_dim as i32;
        let of_warp = shape.blocks() / WARPS;
        let first = code.warp_index() * of_warp as i32;
        let half = (shape.blocks() * BLOCK) as i32;
        let from = self.outputs.at(first * BLOCK as i32 + code.lane_index() * 4);
        let lines: [_; 2] = std::array::from_fn(|slot| {
            let row = &rows[slot];
            if config.split {
                self.line(row) * i64::from(head_dim)
            } else {
                p.out.head(work.batch, row.head) + row.query.widen() * p.out.row_stride()
            }
        });
        for block in 0..of_warp as i32 {
            let [a, b] =
                [0, half].map(|half| from.plus(block * BLOCK as i32 + half).load_vector::<OF_BLOCK>());
            for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
                let (slot, within) = (i / 2, (i % 2) as i32);
                let column = lane_column(code.lane_index()) + within;
                let channel = shape.channel(first + block, column);
                code.when(rows[slot].exists & channel.lt(head_dim), || {
                    if config.split {
                        p.partial.at(lines[slot]).at(channel).store(a + b);
                    } else {
                        let to = p.out.start.cast::<H>().at(lines[slot]).at(channel);
                        to.store((a + b).narrow::<H>());
                    }
                });
            }
        }
    }

    /// The line of a row's part.
    fn line(&self, row: &Row<'k>) -> Val<'k, i64> {
        let Merge { params: p, work, .. } = *self;
        let total_rows = p.kv_heads * p.group * p.q_len * p.sequences;
        work.split.mul_wide(total_rows) + work.index(p, row).widen()
    }
}
