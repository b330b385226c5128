//! A value for each row of a register tile of which a lane holds elements.
//!
//! Tensor cores deal the elements of a tile out to the lanes of a warp in one way, whatever the instruction: rows to
//! quads, groups of four neighbouring lanes, and the columns of a row to the lanes of its quad. Lane `l` has elements
//! of rows `l / 4`, `l / 4 + 8`, `l / 4 + 16` and so on: its row slots 0, 1, 2 …

use std::ops::{Index, IndexMut};

use crate::scalar::Scalar;
use crate::value::Val;

/// Rows of a tile from one slot of a lane to the next.
pub const SLOT_ROWS: usize = 8;

/// The row of slot 0 of a lane.
#[track_caller]
pub fn lane_row(lane: Val<'_, i32>) -> Val<'_, i32> {
    lane >> 2
}

/// The first column of a lane, of which it has two of every eight.
#[track_caller]
pub fn lane_column(lane: Val<'_, i32>) -> Val<'_, i32> {
    2 * (lane & 3)
}

/// A value for each row slot of a lane.
#[derive(Clone, Debug)]
pub struct Rows<V>(Vec<V>);

impl<V> Rows<V> {
    /// The values that `of_slot` gives each of `slots` row slots.
    pub fn from_fn(slots: usize, of_slot: impl FnMut(usize) -> V) -> Self {
        (0..slots).map(of_slot).collect()
    }

    /// Row slots.
    pub fn slots(&self) -> usize {
        self.0.len()
    }

    /// The values of all slots, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, V> {
        self.0.iter()
    }

    /// The values of all slots, to be changed.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, V> {
        self.0.iter_mut()
    }

    /// What `of_row` makes of each value.
    pub fn map<U>(&self, of_row: impl FnMut(&V) -> U) -> Rows<U> {
        self.iter().map(of_row).collect()
    }

    /// The pairs of values of the same slot.
    pub fn zip<'a, U>(&'a self, other: &'a Rows<U>) -> impl Iterator<Item = (&'a V, &'a U)> {
        self.iter().zip(other)
    }
}

impl<V: Copy> Rows<V> {
    /// The two values of strip `strip` of 16 rows.
    pub fn strip(&self, strip: usize) -> Self {
        self.iter().copied().skip(2 * strip).take(2).collect()
    }
}

impl<V> FromIterator<V> for Rows<V> {
    fn from_iter<I: IntoIterator<Item = V>>(rows: I) -> Self {
        Rows(rows.into_iter().collect())
    }
}

impl<'a, V> IntoIterator for &'a Rows<V> {
    type Item = &'a V;
    type IntoIter = std::slice::Iter<'a, V>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<V> Index<usize> for Rows<V> {
    type Output = V;
    fn index(&self, slot: usize) -> &V {
        &self.0[slot]
    }
}

impl<V> IndexMut<usize> for Rows<V> {
    fn index_mut(&mut self, slot: usize) -> &mut V {
        &mut self.0[slot]
    }
}

impl<'k, T: Scalar> Val<'k, T> {
    /// Combines the values of a quad, whose lanes share the rows of a tile, so that each has the result.
    #[track_caller]
    pub fn reduce_quad(self, combine: impl FnMut(Self, Self) -> Self) -> Self {
        self.reduce_lanes(3, combine)
    }
}
