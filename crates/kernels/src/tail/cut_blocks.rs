//! Blocks that are left out and of whose keys a row sees a part: the mean is that of the keys which it sees.
//!
//! The mean of scores is the score of the mean. So the products with all keys of the block are averaged for each row, and
//! each key that the row sees has that score: n keys of weight exp(s) are one of weight n · exp(s), and their values
//! with equal weights are n times the mean value.

use sage_ptx::{Code, Half, MmaElement, OperandTile, RoundedElement, Rows, Stored, Tile, lane_column};

use super::kernel::{PooledTailConfig, PooledTailParams, State, WARP_ROWS};
use super::rows::TailRows;
use super::tiles::{TILE, Tiles};

impl PooledTailConfig {
    pub(super) fn add_cut_blocks<'k, H: Half + MmaElement + RoundedElement + Stored<Value = H>>(
        &self,
        code: &'k Code,
        p: &PooledTailParams<'k>,
        rows: &TailRows<'k>,
        tiles: &Tiles<'k, '_>,
        queries: &OperandTile<'k>,
        state: &State<'k>,
    ) {
        code.note("blocks of which rows see a part");
        let band = &rows.band;
        let first = band.start(rows.first_row).max(0) / p.block_k;
        let end = (band.end(rows.last_row).max(0) + (p.block_k - 1)) / p.block_k;
        code.range(first, end, |index| {
            let block = rows.block(index, p);
            let whole =
                band.start(rows.last_row).le(block.keys.start) & band.end(rows.first_row).ge(block.keys.end);
            // The same for all threads, which meet at barriers.
            let some = !whole & rows.some_leave_out(index, p);
            code.when(some, || {
                let cut = Rows::from_fn(2, |slot| {
                    let seen = rows.seen_of(slot, &block);
                    let is_cut = seen.start.lt(seen.end)
                        & !rows.sees_all(slot, &block)
                        & rows.leaves_out(slot, index, p);
                    // A row that pools nothing of it sees nothing of it.
                    seen.start..is_cut.select(seen.end, seen.start)
                });
                let sums = Rows::from_fn(2, |_| code.var(0.0));
                code.range_by(block.keys.start, block.keys.end, TILE as i32, |first| {
                    tiles.load_keys(&p.k, rows, [first, block.keys.end]);
                    let (keys, _) = tiles.stage(code.constant(0));
                    let products = Tile::new(code, WARP_ROWS, TILE);
                    products.set_product(
                        0.0,
                        self.steps(),
                        |step| queries.fragments::<H>(step),
                        |step, column| keys.b_pair::<H>(column, 32 * step),
                    );
                    let first = first + lane_column(rows.lane);
                    let visible = cut.map(|keys| keys.start - first..keys.end - first);
                    products.fill_outside(&visible, |column| column, 0.0);
                    let products = products.map_at(|_, _, product| product.get());
                    for slot in 0..2 {
                        sums[slot].set(sums[slot].get() + products.row_sum(slot));
                    }
                });
                let counts = cut.map(|keys| (keys.end - keys.start).to_f32());
                let scores = Rows::from_fn(2, |slot| {
                    let sum = sums[slot].get().reduce_quad(|a, b| a + b);
                    let score = self.score(sum / counts[slot], p);
                    counts[slot].eq(0.0).select(f32::NEG_INFINITY, score)
                });
                state.raise(&scores);
                let weights = Rows::from_fn(2, |slot| {
                    // As it will be multiplied, so that all keys' weights add up to what they are divided by.
                    let weight = (scores[slot] - state.reference[slot].get()).exp2().narrow::<H>().to_f32();
                    // One lane of a row adds for all.
                    let own = (rows.lane & 3).eq(0).select(counts[slot] * weight, 0.0);
                    state.sums[slot].set(state.sums[slot].get() + own);
                    weight
                });
                code.range_by(block.keys.start, block.keys.end, TILE as i32, |first| {
                    tiles.load_values(&p.v, rows, [first, block.keys.end]);
                    let (_, values) = tiles.stage(code.constant(0));
                    let first = first + lane_column(rows.lane);
                    let spread = Tile::new(code, WARP_ROWS, TILE);
                    spread.for_each(|slot, _, weight| weight.set(weights[slot]));
                    spread.fill_outside(
                        &cut.map(|keys| keys.start - first..keys.end - first),
                        |column| column,
                        0.0,
                    );
                    let p = spread.map_at(|_, _, weight| weight.get());
                    state.output.add_product(
                        TILE / H::DEPTH,
                        |step| p.operand::<H>(step),
                        |step, channel| values.b_pair::<H>(channel, 32 * step),
                    );
                });
            });
        });
    }
}
