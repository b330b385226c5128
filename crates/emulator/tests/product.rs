//! A whole kernel: `C = A · Bᵀ` of bytes, by a ring of `cp.async` stages, swizzled tiles, `ldmatrix` and `mma`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Instant;

use sage_emulator::{Emulator, EmulatorOptions, Failure, FaultKind, Report};
use sage_ptx::{Accumulator, Program, SharedTile, kernel};

const ROWS: usize = 64;
const COLUMNS: usize = 64;
const DEPTH: usize = 512;
const STAGE: usize = 64;
const STAGES: usize = 3;

/// `barrier`: whether a stage's readers are waited for before it is refilled.
fn product(barrier: bool) -> Program {
    kernel("product", 128, |k| {
        let (a, b, c) = (k.global::<i8>("a"), k.global::<i8>("b"), k.global::<i32>("c"));
        let bytes = ROWS * STAGE;
        let (a_stages, b_stages) =
            (k.shared::<i8>("a_stages", STAGES * bytes), k.shared::<i8>("b_stages", STAGES * bytes));
        let (a_tile, b_tile) = (SharedTile::new(a_stages, STAGE), SharedTile::new(b_stages, STAGE));
        let (thread, warp, lane) = (k.thread(), k.warp_index(), k.lane_index());
        let fetch = |step: sage_ptx::Val<'_, i32>| {
            let stage = step % STAGES as i32 * bytes as i32;
            for (from, tile) in [(a, a_tile), (b, b_tile)] {
                // 64 rows of 4 chunks: two for each thread.
                for half in 0..2 {
                    let (row, chunk) = ((thread >> 2) + 32 * half, thread & 3);
                    let source = from.at(row * DEPTH as i32 + step * STAGE as i32 + chunk * 16);
                    tile.at_byte(stage).chunk(row, chunk).step(0, 0).copy_async(source, 16, 16);
                }
            }
        };
        let steps = (DEPTH / STAGE) as i32;
        for step in 0..STAGES as i32 - 1 {
            fetch(k.constant(step));
            k.commit_copies();
        }
        let sums: Vec<Accumulator<'_, i32>> = (0..COLUMNS / 8).map(|_| Accumulator::filled(k, 0)).collect();
        k.range(0, steps, |step| {
            k.wait_copies(STAGES as u32 - 2);
            k.barrier();
            let stage = step % STAGES as i32 * bytes as i32;
            if !barrier {
                // Too early: the stage that is refilled is the one that other warps may still read.
                k.when((step + STAGES as i32).lt(steps), || fetch(step + STAGES as i32));
            }
            for depth in [0, 32] {
                let rows = a_tile.at_byte(stage).rows_of_a(warp * 16).a::<i8>(0, depth);
                for pair in 0..COLUMNS / 16 {
                    let [left, right] = b_tile.at_byte(stage).columns_of_b(0).b_pair::<i8>(16 * pair, depth);
                    sums[2 * pair].add_product(rows, left);
                    sums[2 * pair + 1].add_product(rows, right);
                }
            }
            if barrier {
                let next = step + (STAGES as i32 - 1);
                k.when(next.lt(steps), || fetch(next));
            }
            k.commit_copies();
        });
        for (i, sum) in sums.iter().enumerate() {
            for half in 0..2 {
                let row = warp * 16 + (lane >> 2) + 8 * half as i32;
                let place = c.at(row * COLUMNS as i32 + (lane & 3) * 2).plus(8 * i as i32);
                place.store_vector([sum.register(2 * half).get(), sum.register(2 * half + 1).get()]);
            }
        }
    })
}

fn run(program: &Program, seed: u64) -> Result<(Report, Vec<i32>, Vec<i32>), Failure> {
    let a: Vec<i8> = (0..ROWS * DEPTH).map(|i| (i * 31 % 253) as i8).collect();
    let b: Vec<i8> = (0..COLUMNS * DEPTH).map(|i| (i * 17 % 241) as i8).collect();
    let mut emulator =
        Emulator::with_options(EmulatorOptions { seed, workers: 1, ..EmulatorOptions::default() });
    let (x, y) = (emulator.buffer("a", &a), emulator.buffer("b", &b));
    let c = emulator.uninitialized("c", 4 * ROWS * COLUMNS);
    let report = emulator.launch(program, [1, 1, 1], &[x.arg(), y.arg(), c.arg()])?;
    let expected = (0..ROWS * COLUMNS).map(|i| {
        let (row, column) = (&a[i / COLUMNS * DEPTH..][..DEPTH], &b[i % COLUMNS * DEPTH..][..DEPTH]);
        row.iter().zip(column).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
    });
    Ok((report, emulator.read(c), expected.collect()))
}

#[test]
fn a_pipelined_product_is_right_in_any_order() {
    let program = product(true);
    for seed in 0..5 {
        let (report, found, expected) = run(&program, seed).unwrap();
        assert_eq!(found, expected);
        assert_eq!(report.bank_conflicts(), 0, "{report}");
        assert_eq!(report.count("mma.m16n8k32.s32.s8"), 4 * 8 * 2 * 8);
    }
    let failure = run(&product(false), 0).map(|_| ()).unwrap_err();
    assert!(matches!(failure.kind(), Some(FaultKind::Race | FaultKind::MissingWait)), "{failure}");
}

#[test]
#[ignore = "a measurement"]
fn speed_of_a_pipelined_product() {
    let program = product(true);
    let emulator_options = EmulatorOptions { workers: 1, ..EmulatorOptions::default() };
    let mut emulator = Emulator::with_options(emulator_options);
    let x = emulator.buffer("a", &[1i8; ROWS * DEPTH]);
    let c = emulator.uninitialized("c", 4 * ROWS * COLUMNS);
    let start = Instant::now();
    let report = emulator.launch(&program, [200, 1, 1], &[x.arg(), x.arg(), c.arg()]).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{report}{:.2} million warp instructions a second", report.total() as f64 / seconds / 1e6);
}
