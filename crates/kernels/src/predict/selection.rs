//! Which of the blocks that compete a row chooses: [`sage_core::sparse::Select`] inside a kernel.
//!
//! Nothing is sorted. What is sought is the image where the ranking is cut, and bisection finds it by counting, or
//! weighing, the blocks above a middle. It ends when one block alone is left between both ends, or only blocks of one
//! score; of these the first are chosen.

use sage_ptx::{Code, Val, Var};

use super::fold::{Fold, across_lanes, in_order, reversed};
use super::row::{Columns, LANES, Row};
use super::weight::{NO_SCORE, image, score};

/// Levels of the fold of a lane's eights, of which fewer than 2³¹ blocks have fewer than 2²³.
const LEVELS: usize = 23;

/// A row's choice, in variables that every lane has alike: blocks with images from `above` on, and the first `ties` of
/// those from `level` on, below `above`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen<'k> {
    pub above: Var<'k, u32>,
    pub level: Var<'k, u32>,
    pub ties: Var<'k, i32>,
}

impl<'k> Chosen<'k> {
    /// All blocks that compete.
    pub fn all(code: &'k Code) -> Self {
        Chosen { above: code.var(1u32), level: code.var(1u32), ties: code.var(0i32) }
    }

    fn set(&self, above: Val<'k, u32>, level: Val<'k, u32>, ties: Val<'k, i32>) {
        self.above.set(above);
        self.level.set(level);
        self.ties.set(ties);
    }
}

/// What is known of the blocks that compete: at least one, with finite scores.
#[derive(Clone, Copy, Debug)]
pub(super) struct Survey<'k> {
    pub code: &'k Code,
    pub count: Val<'k, i32>,
    /// The largest image.
    pub max: Val<'k, u32>,
}

/// Where bisection ended.
struct Cut<'k> {
    level: Val<'k, u32>,
    above: Val<'k, u32>,
    /// Blocks above, and between both: one, or some of one score.
    count_above: Val<'k, i32>,
    run: Val<'k, i32>,
    weight_above: Val<'k, u64>,
    weight_of_run: Val<'k, u64>,
}

impl<'k> Survey<'k> {
    /// The `wanted` blocks of the highest scores, at least one.
    #[track_caller]
    pub fn top(&self, columns: &Columns<'k>, wanted: Val<'k, i32>, chosen: &Chosen<'k>) {
        let wanted = wanted.max(1).min(self.count);
        let none = self.code.constant(0u64);
        let cut = self.bisect(columns, none, false, |count, _| count.ge(wanted));
        chosen.set(cut.above, cut.level, wanted - cut.count_above);
    }

    /// As many blocks as weigh together at most a share of all, at least one.
    #[track_caller]
    pub fn within_share(&self, columns: &Columns<'k>, share: Val<'k, f32>, chosen: &Chosen<'k>) {
        let (_, all) = columns.at_least(self.code.constant(1), true);
        let (limit, _) = share_of(all, share);
        // Where all are within the share, all are chosen already.
        self.code.when(all.gt(limit), || {
            let cut = self.bisect(columns, all, true, |_, weight| weight.gt(limit));
            // One block alone exceeds the share. Of several, each weighs as much as the others.
            let some = self.code.var(0i32);
            self.code.when(cut.run.gt(1), || {
                let fit = (limit - cut.weight_above) / cut.weight_of_each();
                some.set(fit.narrow().reinterpret::<i32>());
            });
            let least = cut.count_above.eq(0).select(1, 0);
            chosen.set(cut.above, cut.level, some.get().max(least));
        });
    }

    /// As many blocks as weigh together at least a share of all, or the `top` of the highest scores if these are more.
    #[track_caller]
    pub fn reaching_share(
        &self,
        columns: &Columns<'k>,
        share: Val<'k, f32>,
        top: Val<'k, i32>,
        chosen: &Chosen<'k>,
    ) {
        let (_, all) = columns.at_least(self.code.constant(1), true);
        let (whole, rest) = share_of(all, share);
        // A share of nothing is reached by one.
        let wanted = (whole + rest.ne(0u32).select(1, 0)).max(1);
        let cut = self.bisect(columns, all, true, |_, weight| weight.ge(wanted));
        let some = self.code.var(1i32);
        self.code.when(cut.run.gt(1), || {
            let each = cut.weight_of_each();
            let missing = wanted - cut.weight_above + (each - 1);
            some.set((missing / each).narrow().reinterpret::<i32>());
        });
        let some = some.get();
        chosen.set(cut.above, cut.level, some);
        self.code.when(top.gt(cut.count_above + some), || self.top(columns, top, chosen));
    }

    /// The blocks whose score exceeds the mean of all by `tau` standard deviations, at least one. `blocks` are all of
    /// the row's.
    #[track_caller]
    pub fn beyond_sigmas(
        &self,
        row: &Row<'k>,
        columns: &Columns<'k>,
        blocks: Val<'k, i32>,
        tau: Val<'k, f32>,
        chosen: &Chosen<'k>,
    ) {
        let count = self.count.to_f32();
        let mean = sum(row, blocks, |score, _| score) / count;
        let squares = sum(row, blocks, |score, competes| {
            let difference = score - mean;
            competes.select(difference * difference, 0.0)
        });
        let threshold = mean + tau * (squares / count).sqrt();
        // No score exceeds what is no number. (One that equals the threshold is not above its image.)
        let is_number = threshold.eq(threshold);
        let above = is_number.select(image(threshold), u32::MAX - 1) + 1u32;
        let (some, _) = columns.at_least(above, false);
        self.code.if_else(
            some.gt(0),
            || chosen.set(above, above, self.code.constant(0)),
            || chosen.set(self.max + 1u32, self.max, self.code.constant(1)),
        );
    }

    /// Finds the largest image from which on the blocks are `enough`: `enough(count, weight)`, which holds for all and
    /// not for none.
    #[track_caller]
    fn bisect(
        &self,
        columns: &Columns<'k>,
        all: Val<'k, u64>,
        weighed: bool,
        enough: impl Fn(Val<'k, i32>, Val<'k, u64>) -> Val<'k, bool>,
    ) -> Cut<'k> {
        let code = self.code;
        // At `low` the blocks are enough, at `high` they are not.
        let (low, high) = (code.var(1u32), code.var(self.max + 1u32));
        let [of_low, of_high] = [self.count, code.constant(0)].map(|count| code.var(count));
        let [low_weight, high_weight] = [all, code.constant(0)].map(|weight| code.var(weight));
        code.while_loop(
            || (high.get() - low.get()).gt(1u32) & (of_low.get() - of_high.get()).gt(1),
            || {
                let middle = low.get() + ((high.get() - low.get()) >> 1);
                let (count, weight) = columns.at_least(middle, weighed);
                let is_enough = enough(count, weight);
                low.set(is_enough.select(middle, low.get()));
                high.set(is_enough.select(high.get(), middle));
                of_low.set(is_enough.select(count, of_low.get()));
                of_high.set(is_enough.select(of_high.get(), count));
                if weighed {
                    low_weight.set(is_enough.select(weight, low_weight.get()));
                    high_weight.set(is_enough.select(high_weight.get(), weight));
                }
            },
        );
        Cut {
            level: low.get(),
            above: high.get(),
            count_above: of_high.get(),
            run: of_low.get() - of_high.get(),
            weight_above: high_weight.get(),
            weight_of_run: low_weight.get() - high_weight.get(),
        }
    }
}

impl<'k> Cut<'k> {
    /// What each block of the run weighs.
    #[track_caller]
    fn weight_of_each(&self) -> Val<'k, u64> {
        self.weight_of_run / self.run.reinterpret::<u32>().widen()
    }
}

/// A share of an integer: its whole part, and its fraction in units of 2⁻³². The share is counted in such units as
/// well, what is below one dropped, and one that is more than 1 is 1.
#[track_caller]
fn share_of<'k>(all: Val<'k, u64>, share: Val<'k, f32>) -> (Val<'k, u64>, Val<'k, u32>) {
    let units = (share * 4_294_967_296.0).truncate_to_u32();
    let (low, high) = (all * units.widen(), all.mul_high(units.widen()));
    let is_whole = share.ge(1.0);
    let whole = is_whole.select(all, (high << 32) | (low >> 32));
    (whole, is_whole.select(0u32, low.narrow()))
}

/// [`sage_core::sparse::sum()`] over all of a row's blocks, of what `term` makes of a score, or of 0 where the block
/// does not compete, and of whether it does.
#[track_caller]
fn sum<'k>(
    row: &Row<'k>,
    blocks: Val<'k, i32>,
    term: impl Fn(Val<'k, f32>, Val<'k, bool>) -> Val<'k, f32>,
) -> Val<'k, f32> {
    let (code, lane) = (row.code, row.code.lane_index());
    let fold = Fold::new(code, 1, LEVELS);
    reversed(code, blocks.div_ceil(8 * LANES as usize), |leaf, turn| {
        let first = (turn * LANES + lane) * 8;
        let eight = (0..8).map(|i| {
            let image = row.column(first + i).image;
            let competes = image.ne(NO_SCORE);
            term(competes.select(score(image), 0.0), competes)
        });
        fold.push(leaf, &[in_order(eight).unwrap_or(code.constant(0.0))]);
    });
    across_lanes(fold.totals()[0], LANES as usize)
}
