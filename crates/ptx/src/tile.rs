//! Register tiles: matrices that lie in the registers of a warp, or of a warpgroup, as tensor cores leave their sums.
//!
//! A tile is made of blocks of 16 rows and 8 columns, the result of an `mma.sync`: strips of 16 rows, each of as many
//! blocks side by side. What `wgmma` leaves in each warp is one such strip. A lane holds two neighbouring elements in
//! each of two rows of a block; [`Rows`] says in which. Row slots and columns in here are counted from the lane's
//! first.

use std::ops::{Mul, Range};

use half::f16;

use crate::code::Code;
use crate::fragment::{Accumulator, FragmentA, FragmentB, MmaAccumulator, MmaElement, RoundedElement};
use crate::rows::Rows;
use crate::scalar::F16x2;
use crate::value::Val;
use crate::var::Var;

/// Rows of a strip, and columns of a block.
const STRIP_ROWS: usize = 16;
const BLOCK_COLUMNS: usize = 8;

/// Why a kernel cannot be written.
const NO_COLUMNS: &str = "a row is reduced, but has no columns";

/// A lane's registers of a tile: of variables, `Tile<Var<T>>`, which products are added to, or of values,
/// `Tile<Val<T>>`.
#[derive(Clone, Debug)]
pub struct Tile<V> {
    /// Strip by strip, block by block, row slot by row slot: each slot has `row_registers`, which are two elements, or
    /// one pair of them in one register.
    registers: Vec<V>,
    row_registers: usize,
    blocks: usize,
}

impl<V: Copy> Tile<V> {
    fn block_registers(&self) -> usize {
        2 * self.row_registers
    }

    fn strips(&self) -> usize {
        self.registers.len() / (self.blocks * self.block_registers()).max(1)
    }

    /// Rows: a multiple of 16.
    pub fn rows(&self) -> usize {
        STRIP_ROWS * self.strips()
    }

    /// Columns: a multiple of 8.
    pub fn columns(&self) -> usize {
        BLOCK_COLUMNS * self.blocks
    }

    /// Row slots of a lane.
    pub fn slots(&self) -> usize {
        2 * self.strips()
    }

    /// All registers, a strip's block by block.
    pub fn registers(&self) -> &[V] {
        &self.registers
    }

    /// The register with the element of a row slot at a column, which is one of the first two of a block's columns.
    pub fn at(&self, slot: usize, column: usize) -> V {
        let (block, within) = (column / BLOCK_COLUMNS, column % BLOCK_COLUMNS);
        let row = (slot / 2 * self.blocks + block) * self.block_registers() + slot % 2 * self.row_registers;
        self.registers[row + within * self.row_registers / 2]
    }

    /// A tile of the same shape whose registers are `of` these, their row slots and columns.
    pub fn map_at<U>(&self, mut of: impl FnMut(usize, usize, V) -> U) -> Tile<U> {
        let of_block = |(index, block): (usize, &[V])| {
            let (strip, column) = (index / self.blocks, index % self.blocks * BLOCK_COLUMNS);
            let registers = block.iter().enumerate().map(|(i, &register)| {
                let (half, within) = (i / self.row_registers, i % self.row_registers);
                of(2 * strip + half, column + within, register)
            });
            registers.collect::<Vec<_>>()
        };
        let registers =
            self.registers.chunks(self.block_registers()).enumerate().flat_map(of_block).collect();
        Tile { registers, row_registers: self.row_registers, blocks: self.blocks }
    }

    /// Calls `visit` with each row slot, column and register.
    pub fn for_each(&self, visit: impl FnMut(usize, usize, V)) {
        self.map_at(visit);
    }

    /// A row slot's columns and registers.
    pub fn row(&self, slot: usize) -> impl Iterator<Item = (usize, V)> {
        let columns = (0..self.blocks).flat_map(move |block| {
            (0..self.row_registers).map(move |within| BLOCK_COLUMNS * block + within * 2 / self.row_registers)
        });
        columns.map(move |column| (column, self.at(slot, column)))
    }

    /// A tile of the same shape whose strips are `of` these.
    pub fn map_strips<U>(&self, mut of: impl FnMut(usize, Tile<V>) -> Tile<U>) -> Tile<U> {
        let strips = self.registers.chunks((self.blocks * self.block_registers()).max(1)).enumerate();
        let registers = strips.flat_map(|(strip, registers)| {
            of(strip, Tile { registers: registers.to_vec(), ..*self }).registers
        });
        Tile { registers: registers.collect(), row_registers: self.row_registers, blocks: self.blocks }
    }

    /// Some of the columns, whose bounds are multiples of 8, as a tile.
    pub fn slice(&self, columns: Range<usize>) -> Self {
        let (start, end) = (columns.start / BLOCK_COLUMNS, columns.end / BLOCK_COLUMNS);
        let strips = self.registers.chunks((self.blocks * self.block_registers()).max(1));
        let range = start * self.block_registers()..end * self.block_registers();
        let registers = strips.flat_map(|strip| &strip[range.clone()]).copied().collect();
        Tile { registers, blocks: end - start, ..*self }
    }

    /// A tile of one strip with the columns of `other` behind its own.
    pub fn beside(mut self, other: &Self) -> Self {
        self.registers.extend(&other.registers);
        self.blocks += other.blocks;
        self
    }
}

impl<'k, T: MmaAccumulator> Tile<Var<'k, T>> {
    /// A tile of `rows` (a multiple of 16) and `columns` (a multiple of 8), without values as yet.
    ///
    /// # Panics
    /// When they are none: the kernel cannot be written.
    pub fn new(code: &'k Code, rows: usize, columns: usize) -> Self {
        let whole = rows.is_multiple_of(STRIP_ROWS) && columns.is_multiple_of(BLOCK_COLUMNS);
        assert!(whole, "a tile of {rows} rows and {columns} columns");
        let blocks = columns / BLOCK_COLUMNS;
        let registers = rows / STRIP_ROWS * blocks * T::REGISTERS;
        let registers = (0..registers).map(|_| Var::new(code)).collect();
        Tile { registers, row_registers: T::REGISTERS / 2, blocks }
    }

    /// A tile of `rows` and `columns`, as [`Tile::new`], whose elements all are `first`.
    #[track_caller]
    pub fn filled(code: &'k Code, rows: usize, columns: usize, first: T) -> Self {
        let tile = Tile::new(code, rows, columns);
        tile.fill(first);
        tile
    }

    /// Sets all elements to `x`.
    #[track_caller]
    pub fn fill(&self, x: T) {
        self.registers.iter().for_each(|register| register.set(x));
    }

    /// The same registers as variables of another type of the same width.
    pub fn reinterpret<R: MmaAccumulator>(&self) -> Tile<Var<'k, R>> {
        self.map_at(|_, _, register| register.reinterpret())
    }

    /// Replaces each register by `with` of its row slot, its column and itself.
    #[track_caller]
    pub fn update(&self, mut with: impl FnMut(usize, usize, Val<'k, T>) -> Val<'k, T>) {
        self.for_each(|slot, column, register| register.set(with(slot, column, register.get())));
    }

    /// Multiplies each row by its factor.
    #[track_caller]
    pub fn mul_rows(&self, factors: &Rows<Val<'k, T>>)
    where
        Val<'k, T>: Mul<Output = Val<'k, T>>,
    {
        self.update(|slot, _, x| x * factors[slot]);
    }

    fn block(&self, strip: usize, block: usize) -> Accumulator<'k, T> {
        let first = (strip * self.blocks + block) * T::REGISTERS;
        Accumulator::of_registers(&self.registers[first..first + T::REGISTERS])
    }

    /// `self = a · b + first` by a warp. The product is `steps` of 32 bytes deep; `a` gives a step's fragment for each
    /// 16 rows, `b` a step's two fragments of the 16 columns from a column on.
    #[track_caller]
    pub fn set_product<E: MmaElement>(
        &self,
        first: T,
        steps: usize,
        a: impl Fn(usize) -> Vec<FragmentA<'k, E>>,
        b: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
    ) {
        self.multiply(steps, a, b, |step, sum, a, b| {
            if step == 0 { sum.set_product(a, b, first) } else { sum.add_product(a, b) }
        });
    }

    /// The same with an addend for each row, of a tile of 16 rows.
    #[track_caller]
    pub fn set_product_from<E: MmaElement>(
        &self,
        first: &Rows<Val<'k, T>>,
        steps: usize,
        a: impl Fn(usize) -> Vec<FragmentA<'k, E>>,
        b: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
    ) {
        assert_eq!(first.slots(), 2, "an addend for each of a lane's rows");
        let of_slot = T::REGISTERS / 2;
        let addends: Vec<_> = first.iter().flat_map(|&addend| vec![addend; of_slot]).collect();
        self.multiply(steps, a, b, |step, sum, a, b| {
            if step == 0 { sum.set_product_from(a, b, &addends) } else { sum.add_product(a, b) }
        });
    }

    /// `self += a · b` by a warp, as [`Tile::set_product`].
    #[track_caller]
    pub fn add_product<E: MmaElement>(
        &self,
        steps: usize,
        a: impl Fn(usize) -> Vec<FragmentA<'k, E>>,
        b: impl Fn(usize, usize) -> [FragmentB<'k, E>; 2],
    ) {
        self.multiply(steps, a, b, |_, sum, a, b| sum.add_product(a, b));
    }

    /// Adds to the first eight columns the sums of the rows of `a`: its product with ones.
    #[track_caller]
    pub fn add_row_sums<E: RoundedElement>(&self, a: &[FragmentA<'k, E>]) {
        for (strip, &a) in a.iter().enumerate() {
            let ones = a.code().constant(E::ONES);
            self.block(strip, 0).add_product(a, FragmentB::new([ones, ones]));
        }
    }

    /// Calls `multiply` with each step, the sums of each block, and the fragments whose product belongs there.
    pub(crate) fn multiply<A: Copy, B: Copy>(
        &self,
        steps: usize,
        a: impl Fn(usize) -> Vec<A>,
        b: impl Fn(usize, usize) -> [B; 2],
        multiply: impl Fn(usize, Accumulator<'k, T>, A, B),
    ) {
        for step in 0..steps {
            let a = a(step);
            for pair in 0..self.blocks / 2 {
                let b = b(step, 2 * BLOCK_COLUMNS * pair);
                for (strip, &a) in a.iter().enumerate() {
                    for (block, b) in b.into_iter().enumerate() {
                        multiply(step, self.block(strip, 2 * pair + block), a, b);
                    }
                }
            }
        }
    }
}

/// Accumulators whose elements are floats.
pub trait FloatAccumulator: MmaAccumulator {
    /// Some of a register's elements in single precision.
    fn to_f32<'k>(register: Val<'k, Self>, elements: Range<usize>) -> Vec<Val<'k, f32>>;
}

impl FloatAccumulator for f32 {
    fn to_f32<'k>(register: Val<'k, f32>, _: Range<usize>) -> Vec<Val<'k, f32>> {
        vec![register]
    }
}

impl FloatAccumulator for F16x2 {
    #[track_caller]
    fn to_f32<'k>(register: Val<'k, F16x2>, elements: Range<usize>) -> Vec<Val<'k, f32>> {
        register.word().split::<f16>()[elements].iter().map(|x| x.to_f32()).collect()
    }
}

impl<'k, T: FloatAccumulator> Tile<Var<'k, T>> {
    /// The element of a row slot at a column, in single precision.
    #[track_caller]
    pub fn element(&self, slot: usize, column: usize) -> Val<'k, f32> {
        let within = column % 2;
        T::to_f32(self.at(slot, column).get(), within..within + 1)[0]
    }
}

impl<'k> Tile<Var<'k, f32>> {
    /// Adds `other`, a tile of the same shape.
    #[track_caller]
    pub fn add<T: FloatAccumulator>(&self, other: &Tile<Var<'k, T>>) {
        let other = other.registers.chunks(T::REGISTERS);
        for (sums, block) in self.registers.chunks(f32::REGISTERS).zip(other) {
            let elements: Vec<_> =
                block.iter().flat_map(|register| T::to_f32(register.get(), 0..2)).collect();
            sums.iter().zip(elements).for_each(|(sum, x)| sum.set(sum.get() + x));
        }
    }

    /// Sets the elements to `x` whose columns, or what `place` makes of them, are outside of their row's `first..end`.
    #[track_caller]
    pub fn fill_outside(&self, columns: &Rows<Range<Val<'k, i32>>>, place: impl Fn(usize) -> usize, x: f32) {
        self.for_each(|slot, column, register| {
            let Range { start, end } = columns[slot];
            let column = start.code().constant(place(column) as i32);
            let inside = column.lt(end) & column.ge(start);
            register.set(inside.select(register, x));
        });
    }
}

impl<'k, T: MmaAccumulator> Tile<Var<'k, T>> {
    /// The largest of the lane's elements of a row slot, by chains short enough not to wait for each other.
    ///
    /// # Panics
    /// When the tile has no columns.
    #[track_caller]
    pub fn row_max(&self, slot: usize) -> Val<'k, T> {
        self.row_reduce(slot, Val::max)
    }

    #[track_caller]
    fn row_reduce(&self, slot: usize, larger: fn(Val<'k, T>, Val<'k, T>) -> Val<'k, T>) -> Val<'k, T> {
        let row: Vec<_> = self.row(slot).map(|(_, register)| register.get()).collect();
        let chains = row.chunks(8).filter_map(|chain| chain.iter().copied().reduce(larger));
        chains.reduce(larger).expect(NO_COLUMNS)
    }
}

impl<'k> Tile<Var<'k, f32>> {
    /// The same, but NaN where one of them is.
    ///
    /// # Panics
    /// When the tile has no columns.
    #[track_caller]
    pub fn row_max_nan(&self, slot: usize) -> Val<'k, f32> {
        self.row_reduce(slot, Val::max_nan)
    }
}

impl<'k> Tile<Val<'k, f32>> {
    /// The sum of the lane's elements of a row slot.
    ///
    /// # Panics
    /// When the tile has no columns.
    #[track_caller]
    pub fn row_sum(&self, slot: usize) -> Val<'k, f32> {
        let row: Vec<_> = self.row(slot).map(|(_, x)| x).collect();
        row.chunks(2).map(|pair| pair[0] + pair[1]).reduce(|a, b| a + b).expect(NO_COLUMNS)
    }

    /// The elements rounded to operands of the next product, for step `step` of its depth: a fragment for each strip.
    #[track_caller]
    pub fn operand<E: RoundedElement>(&self, step: usize) -> Vec<FragmentA<'k, E>> {
        let first = step * E::DEPTH;
        let strip = |strip: usize| E::round(|slot, column| self.at(2 * strip + slot, first + column));
        (0..self.strips()).map(strip).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two strips of three blocks whose registers are numbered as they lie.
    fn numbered(row_registers: usize) -> Tile<usize> {
        Tile { registers: (0..2 * 3 * 2 * row_registers).collect(), row_registers, blocks: 3 }
    }

    #[test]
    fn a_register_is_found_by_its_row_slot_and_column() {
        for row_registers in [1, 2] {
            let tile = numbered(row_registers);
            let mut seen = Vec::new();
            tile.for_each(|slot, column, register| {
                assert_eq!(tile.at(slot, column), register, "slot {slot}, column {column}");
                seen.push((slot, column));
            });
            let columns = if row_registers == 2 { vec![0, 1, 8, 9, 16, 17] } else { vec![0, 8, 16] };
            for slot in 0..4 {
                let row: Vec<_> = tile.row(slot).map(|(column, _)| column).collect();
                assert_eq!(row, columns, "slot {slot}");
                assert_eq!(seen.iter().filter(|(s, _)| *s == slot).count(), columns.len());
            }
        }
        // The second strip's lower rows, in its last block: a pair shares a register.
        assert_eq!((numbered(2).at(3, 16), numbered(2).at(3, 17)), (22, 23));
        assert_eq!((numbered(1).at(3, 16), numbered(1).at(3, 17)), (11, 11));
    }

    #[test]
    fn parts_of_a_tile_have_its_registers() {
        let tile = numbered(2);
        let last = tile.slice(16..24);
        assert_eq!((last.rows(), last.slots(), last.columns()), (32, 4, 8));
        assert_eq!(last.registers(), [8, 9, 10, 11, 20, 21, 22, 23]);
        assert_eq!(tile.slice(0..0).registers(), [0; 0]);
        let mut strips = Vec::new();
        let same = tile.map_strips(|index, strip| {
            assert_eq!(strip.at(0, 0), tile.at(2 * index, 0));
            strips.push(strip.clone());
            strip
        });
        assert_eq!(same.registers(), tile.registers());
        let wide = strips[0].clone().beside(&strips[1]);
        assert_eq!((wide.rows(), wide.columns()), (16, 48));
        assert_eq!(wide.at(1, 25), tile.at(3, 1));
    }
}
