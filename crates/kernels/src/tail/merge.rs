//! The epilogue: a row's pooled terms and what its kept blocks made of it, weighted by their sums of exponentials.

use std::f32::consts::{LN_2, LOG2_E};

use sage_ptx::{Code, Half, Rows, Stored, Val, lane_column};

use super::kernel::{PooledTailConfig, PooledTailParams, State};
use super::rows::TailRows;

impl PooledTailConfig {
    /// Writes the rows that have a pooled term: `O = (2^(L − M)·O + 2^(r − M)·ΣPV) / (2^(L − M) + 2^(r − M)·ΣP)`, where
    /// L is the log-sum-exp of the blocks that are kept in base 2, P are relative to 2^r, and M is the larger of L and
    /// r.
    pub(super) fn merge<'k, H: Half + Stored<Value = H>>(
        &self,
        code: &'k Code,
        p: &PooledTailParams<'k>,
        rows: &TailRows<'k>,
        state: &State<'k>,
    ) {
        code.note("output: pooled terms beside the others");
        let first = (rows.index * p.heads + rows.head).mul_wide(p.lengths.q_rows);
        let start = p.out.head(rows.sequence.batch, rows.head);
        let lse = rows.row.map(|&row| p.lse.at(first + row.widen()));
        let kept = Rows::from_fn(2, |slot| {
            let kept = code.var(f32::NEG_INFINITY).named("kept");
            code.when(rows.row[slot].lt(rows.sequence.q_len), || kept.set(lse[slot].load() * LOG2_E));
            kept.get()
        });
        // All lanes of a row have read it before one of them writes.
        code.warp_sync();
        for slot in 0..2 {
            let row = rows.row[slot];
            let sum = state.sums[slot].get().reduce_quad(|a, b| a + b);
            // A sum of NaN is one as well.
            let written = row.lt(rows.sequence.q_len) & !sum.eq(0.0);
            code.when(written, || {
                let kept = kept[slot];
                let reference = state.reference[slot].get();
                let maximum = kept.max(reference);
                let (of_kept, of_pooled) = ((kept - maximum).exp2(), (reference - maximum).exp2());
                let total = of_pooled.mul_add(sum, of_kept);
                let inverse = total.recip();
                let (of_kept, of_pooled) = (of_kept * inverse, of_pooled * inverse);
                let line = (rows.sequence.q_start + row).widen() * p.out.row_stride();
                let line = p.out.start.cast::<H>().at(start + line);
                for column in (0..self.value_dim).step_by(8) {
                    let channel = lane_column(rows.lane) + column as i32;
                    let pooled = [0, 1].map(|i| state.output.element(slot, column + i) * of_pooled);
                    let merged =
                        |kept: Val<'k, H>, pooled: Val<'k, f32>| kept.to_f32().mul_add(of_kept, pooled);
                    let at = line.at(channel);
                    if self.aligned {
                        let pair = at.cast::<u32>();
                        let [low, high] = pair.load().split::<H>();
                        let low = merged(low, pooled[0]);
                        pair.store(low.pack::<H>(merged(high, pooled[1])).reinterpret::<u32>());
                    } else {
                        for (i, pooled) in pooled.into_iter().enumerate() {
                            code.when((channel + i as i32).lt(self.value_dim as i32), || {
                                let at = at.plus(i as i32);
                                at.store(merged(at.load(), pooled).narrow::<H>());
                            });
                        }
                    }
                }
                if self.lse {
                    let own = (rows.lane & 3).eq(0);
                    code.when(own, || lse[slot].store((total.log2() + maximum) * LN_2));
                }
            });
        }
    }
}
