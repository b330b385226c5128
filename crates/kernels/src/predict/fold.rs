//! The order of [`sage_core::sparse::sum()`] inside a kernel.
//!
//! Eight terms that follow each other are added one by one, and the sums of the eights are folded in halves: the last
//! fold adds sum 1 to sum 0, the one before it sums 2 and 3 to these, and so on. So the sums with even places form a
//! tree by themselves, those with odd ones another, and within each it is the same again. Visiting the places with
//! their bits reversed therefore meets the leaves of that tree from left to right, and the inner sums that wait for
//! their other half are one for each level.
//!
//! A sum of nothing before the first term is left out: it would turn −0 into +0, which no score, similarity or
//! threshold can tell apart.

use sage_ptx::{Code, Val, Var};

/// A tree of sums whose leaves come from left to right, for several quantities at once.
#[derive(Debug)]
pub(super) struct Fold<'k> {
    code: &'k Code,
    /// The inner sums that wait for their other half, those of leaves first.
    waiting: Vec<Vec<Var<'k, f32>>>,
    sums: Vec<Var<'k, f32>>,
}

impl<'k> Fold<'k> {
    /// For `quantities` sums of at most 2^`levels` leaves.
    pub fn new(code: &'k Code, quantities: usize, levels: usize) -> Self {
        let sums = || (0..quantities).map(|_| Var::new(code)).collect();
        Fold { code, waiting: (0..levels).map(|_| sums()).collect(), sums: sums() }
    }

    /// Adds leaf `place`, which is the same in all lanes, of a power of two of leaves.
    #[track_caller]
    pub fn push(&self, place: Val<'k, i32>, leaf: &[Val<'k, f32>]) {
        self.sums.iter().zip(leaf).for_each(|(sum, &leaf)| sum.set(leaf));
        self.climb(place, &self.waiting);
    }

    /// A sum that is complete waits as the left half of the level above, or goes up with what waits there.
    #[track_caller]
    fn climb(&self, place: Val<'k, i32>, levels: &[Vec<Var<'k, f32>>]) {
        let Some((waiting, above)) = levels.split_first() else { return };
        let both = || waiting.iter().zip(&self.sums);
        self.code.if_else(
            (place & 1).ne(0),
            || {
                both().for_each(|(waiting, sum)| sum.set(waiting.get() + sum.get()));
                self.climb(place >> 1, above);
            },
            || both().for_each(|(waiting, sum)| waiting.set(sum.get())),
        );
    }

    /// The sums, after the last leaf.
    #[track_caller]
    pub fn totals(&self) -> Vec<Val<'k, f32>> {
        self.sums.iter().map(|sum| sum.get()).collect()
    }
}

/// Visits `0..count`, and places behind up to a power of two, with their bits reversed: `visit(leaf, place)`.
/// `count`, which is the same in all lanes, is at least 1.
#[track_caller]
pub(super) fn reversed<'k>(
    code: &'k Code,
    count: Val<'k, i32>,
    visit: impl FnOnce(Val<'k, i32>, Val<'k, i32>),
) {
    let unused = (count - 1).reinterpret::<u32>().leading_zeros();
    let leaves = code.constant(1i32) << (-unused + 32);
    code.range(0, leaves, |leaf| {
        // Where there is one leaf alone all 32 bits are shifted out.
        let place = leaf.reinterpret::<u32>().reverse_bits() >> unused;
        visit(leaf, place.reinterpret());
    });
}

/// Values added one by one.
#[track_caller]
pub(super) fn in_order<'k>(values: impl IntoIterator<Item = Val<'k, f32>>) -> Option<Val<'k, f32>> {
    values.into_iter().reduce(|sum, value| sum + value)
}

/// A power of two of sums folded in halves.
#[track_caller]
pub(super) fn halves<'k>(sums: &[Val<'k, f32>]) -> Val<'k, f32> {
    match sums {
        [sum] => *sum,
        _ => {
            let (low, high) = sums.split_at(sums.len() / 2);
            let folded: Vec<_> = low.iter().zip(high).map(|(&low, &high)| low + high).collect();
            halves(&folded)
        }
    }
}

/// Sums of `lanes` neighbouring lanes folded in halves: each lane has the result.
#[track_caller]
pub(super) fn across_lanes<'k>(sum: Val<'k, f32>, lanes: usize) -> Val<'k, f32> {
    let bits = (0..lanes.ilog2()).rev();
    bits.fold(sum, |sum, bit| sum + sum.shuffle_xor(1 << bit))
}
