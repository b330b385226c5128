//! Register tiles against the matrices that they stand for: products, what is done to rows, and operands made of them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use half::f16;
use sage_emulator::Emulator;
use sage_ptx::isa::BlockScales;
use sage_ptx::{
    Code, F16x2, FloatAccumulator, FragmentA, FragmentB, MmaAccumulator, OperandTile, Rows, SLOT_ROWS,
    ScaledA, ScaledB, Tile, Val, Var, kernel, lane_column, lane_row,
};

const ROWS: usize = 32;
const COLUMNS: usize = 32;
/// Two steps of 16 elements of 16 bits.
const DEPTH: usize = 32;

/// Small integers, whose products and sums are exact in every type here.
fn a() -> Vec<f16> {
    (0..ROWS * DEPTH).map(|i| f16::from_f32((i * 7 % 5) as f32 - 2.0)).collect()
}

fn b() -> Vec<f16> {
    (0..COLUMNS * DEPTH).map(|i| f16::from_f32((i * 11 % 7) as f32 - 3.0)).collect()
}

/// `A · Bᵀ + first`, row by row.
fn product(first: f32) -> Vec<f32> {
    let (a, b) = (a(), b());
    let element = |i: usize| {
        let (row, column) = (&a[i / COLUMNS * DEPTH..][..DEPTH], &b[i % COLUMNS * DEPTH..][..DEPTH]);
        first + row.iter().zip(column).map(|(a, b)| a.to_f32() * b.to_f32()).sum::<f32>()
    };
    (0..ROWS * COLUMNS).map(element).collect()
}

/// A warp's tile of `A · Bᵀ + first`, whose fragments come straight from device memory.
fn multiplied<'k, T: MmaAccumulator>(k: &'k Code, first: T) -> Tile<Var<'k, T>> {
    let (a, b) = (k.global::<f16>("a"), k.global::<f16>("b"));
    let lane = k.lane_index();
    // The lane's word of every 16 bytes of a row.
    let words = |matrix: sage_ptx::Global<'k, f16>, row: Val<'k, i32>| {
        let words = matrix.at(row * DEPTH as i32).cast::<u32>().at(lane & 3);
        (0..DEPTH as i32 / 8).map(|chunk| words.plus(4 * chunk).load()).collect::<Vec<_>>()
    };
    let rows = Rows::from_fn(ROWS / SLOT_ROWS, |slot| words(a, lane_row(lane) + (SLOT_ROWS * slot) as i32));
    let columns: Vec<_> =
        (0..COLUMNS as i32).step_by(8).map(|column| words(b, lane_row(lane) + column)).collect();
    let operand = OperandTile::of_rows(&rows, |_, &word| word);
    let tile = Tile::new(k, ROWS, COLUMNS);
    tile.set_product(
        first,
        DEPTH / 16,
        |step| operand.fragments::<f16>(step),
        |step, column| {
            [0, 1].map(|i| FragmentB::new([0, 1].map(|half| columns[column / 8 + i][2 * step + half])))
        },
    );
    tile
}

/// Runs a warp that writes a matrix, and returns it.
fn run(columns: usize, write: impl for<'k> Fn(&'k Code, &dyn Fn(usize, usize, Val<'k, f32>))) -> Vec<f32> {
    let program = kernel("tile", 32, |k| {
        let (lane, out) = (k.lane_index(), k.global::<f32>("out"));
        let store = |slot: usize, column: usize, x: Val<'_, f32>| {
            let row = lane_row(lane) + (SLOT_ROWS * slot) as i32;
            out.at(row * columns as i32).at(lane_column(lane)).plus(column as i32).store(x);
        };
        write(k, &store);
    });
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 4 * ROWS * columns);
    let (a, b) = (emulator.buffer("a", &a()), emulator.buffer("b", &b()));
    emulator.launch(&program, [1, 1, 1], &[out.arg(), a.arg(), b.arg()]).unwrap();
    emulator.read(out)
}

/// Writes all elements of a tile.
fn store_all<'k, T: FloatAccumulator>(tile: &Tile<Var<'k, T>>, store: &dyn Fn(usize, usize, Val<'k, f32>)) {
    let columns = (0..tile.columns()).step_by(8).flat_map(|column| [column, column + 1]);
    for (slot, column) in columns.flat_map(|column| (0..tile.slots()).map(move |slot| (slot, column))) {
        store(slot, column, tile.element(slot, column));
    }
}

#[test]
fn products_in_both_precisions() {
    assert_eq!(run(COLUMNS, |k, store| store_all(&multiplied::<f32>(k, 0.5), store)), product(0.5));
    assert_eq!(run(COLUMNS, |k, store| store_all(&multiplied::<F16x2>(k, F16x2::ZERO), store)), product(0.0));
}

/// What hidden elements are set to.
const HIDDEN: f32 = -1000.0;

/// The product whose rows are multiplied by their indices, counted from 1, and of which each shows some columns only.
fn cut(k: &Code) -> Tile<Var<'_, f32>> {
    let (tile, lane) = (multiplied::<f32>(k, 1.0), k.lane_index());
    let row = |slot: usize| lane_row(lane) + (SLOT_ROWS * slot) as i32;
    tile.mul_rows(&Rows::from_fn(tile.slots(), |slot| (row(slot) + 1).to_f32()));
    let first = lane_column(lane);
    let visible = Rows::from_fn(tile.slots(), |slot| (row(slot) >> 2) - first..row(slot) + 2 - first);
    tile.fill_outside(&visible, |column| column, HIDDEN);
    tile
}

#[test]
fn rows_are_scaled_cut_and_reduced() {
    let expected = product(1.0).into_iter().enumerate().map(|(i, x)| {
        let (row, column) = (i / COLUMNS, i % COLUMNS);
        if (row / 4..row + 2).contains(&column) { x * (row + 1) as f32 } else { HIDDEN }
    });
    let expected: Vec<f32> = expected.collect();
    assert_eq!(run(COLUMNS, |k, store| store_all(&cut(k), store)), expected);
    // The largest element of each row and their sum.
    let reduced = run(8, |k, store| {
        let tile = cut(k);
        let values = tile.map_at(|_, _, register| register.get());
        for slot in 0..tile.slots() {
            store(slot, 0, tile.row_max(slot).reduce_quad(Val::max));
            store(slot, 1, values.row_sum(slot).reduce_quad(|a, b| a + b));
        }
    });
    for (row, (found, values)) in reduced.chunks(8).zip(expected.chunks(COLUMNS)).enumerate() {
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = values.iter().sum();
        assert_eq!(found[0], largest, "row {row}");
        assert_eq!(found[1], sum, "row {row}");
    }
}

#[test]
fn a_tile_is_an_operand_and_its_rows_have_sums() {
    // P·1 adds rows up: by products with ones, into a tile of one block whose columns are alike.
    let sums = run(8, |k, store| {
        let p = multiplied::<f32>(k, 0.0).map_at(|_, _, register| register.get());
        let sums = Tile::filled(k, ROWS, 8, 0.25);
        for step in 0..COLUMNS / 16 {
            sums.add_row_sums(&p.operand::<f16>(step));
        }
        store_all(&sums, store);
    });
    let expected: Vec<f32> =
        product(0.0).chunks(COLUMNS).flat_map(|row| [0.25 + row.iter().sum::<f32>(); 8]).collect();
    assert_eq!(sums, expected);
}

/// A product 128 deep whose operands are 1.5 and 2, with scales that tell rows, columns and steps apart.
#[test]
fn scaled_products_take_the_scales_of_their_rows_columns_and_steps() {
    // Of E4M3 codes from 0x28 on every eighth is a power of two, from 2⁻² on.
    let value = |exponent: usize| f32::exp2(exponent as f32 - 2.0);
    let of_row = |row: usize, step: usize| (row + 3 * step) % 4;
    let of_column = |column: usize, step: usize| (column + 5 * step) % 8;
    let program = kernel("scaled", 32, |k| {
        let (lane, out) = (k.lane_index(), k.global::<f32>("out"));
        let (a, b) = (k.constant(0x3333_3333u32), k.constant(0x4444_4444u32));
        // The lane's word is the scales of the row or column that it has for the product.
        fn word(exponent: Val<'_, i32>) -> Val<'_, u32> {
            (((exponent << 3) + 0x28) * 0x0101_0101).reinterpret()
        }
        let of_a = |step: usize| {
            let row = lane_row(lane) + ((lane & 1) << 3) + (3 * step) as i32;
            word(row & 3)
        };
        let of_b = |step: usize| {
            let column = ((lane & 3) << 3) + lane_row(lane) + (5 * step) as i32;
            word(column & 7)
        };
        let tile = Tile::filled(k, 16, COLUMNS, 1.0);
        tile.add_scaled_product(
            BlockScales::Ue4m3,
            2,
            |step| vec![ScaledA { fragment: FragmentA::new([a; 4]), scales: of_a(step) }],
            |step, column| {
                [0, 1].map(|i| ScaledB {
                    fragment: FragmentB::new([b; 2]),
                    scales: of_b(step),
                    scales_lane: (column / 8 + i) as u8,
                })
            },
        );
        tile.for_each(|slot, column, sum| {
            let row = lane_row(lane) + (SLOT_ROWS * slot) as i32;
            out.at(row * COLUMNS as i32).at(lane_column(lane)).plus(column as i32).store(sum.get());
        });
    });
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 4 * 16 * COLUMNS);
    emulator.launch(&program, [1, 1, 1], &[out.arg()]).unwrap();
    let found: Vec<f32> = emulator.read(out);
    for (at, &found) in found.iter().enumerate() {
        let (row, column) = (at / COLUMNS, at % COLUMNS);
        let of_step = |step: usize| 64.0 * 3.0 * value(of_row(row, step)) * value(of_column(column, step));
        assert_eq!(found, 1.0 + of_step(0) + of_step(1), "row {row}, column {column}");
    }
}
