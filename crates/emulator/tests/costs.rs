//! Bank conflicts and sectors in reports.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sage_emulator::{Emulator, Report};
use sage_ptx::isa::{Lane, Space, Ty, Warp};
use sage_ptx::{E4M3, Program, SharedTile, kernel};

mod support;
use support::{Raw, Source};

fn run(program: &Program) -> Report {
    let mut emulator = Emulator::new();
    let x = emulator.buffer("x", &[0u32; 4096]);
    emulator.launch(program, [1, 1, 1], &[x.arg()][..program.params.len()]).unwrap()
}

/// Each lane stores to every `stride`-th word.
fn strided(stride: i32) -> Program {
    kernel("strided", 32, |k| {
        let tile = k.shared::<i32>("tile", 1024);
        tile.at(k.thread() * stride).store(1);
    })
}

#[test]
fn strides_conflict_as_their_banks_do() {
    for (stride, extra) in [(1, 0), (2, 1), (3, 0), (8, 7), (31, 0), (32, 31)] {
        let report = run(&strided(stride));
        assert_eq!(report.bank_conflicts(), extra, "stride {stride}");
        assert_eq!(u64::from(report.shared[0].worst), extra);
        assert!(report.shared[0].at.file().ends_with("costs.rs"));
    }
    assert!(run(&strided(32)).to_string().contains("st.shared.32"), "{}", run(&strided(32)));
}

/// Loads 16 rows of 32 bytes by `ldmatrix` from swizzled rows of 128 bytes.
fn swizzled_matrices() -> Program {
    kernel("matrices", 32, |k| {
        let bytes = k.shared::<u8>("tile", 16 * 128);
        k.range(0, 16, |row| bytes.cast::<i32>().at(row * 32 + k.lane_index()).store(0));
        k.warp_sync();
        let tile = SharedTile::new(bytes, 128);
        for chunk in 0..4 {
            tile.rows_of_a(0).a::<E4M3>(0, 32 * chunk);
        }
    })
}

#[test]
fn swizzled_matrices_load_without_conflicts() {
    let report = run(&swizzled_matrices());
    assert_eq!(report.count("ldmatrix.x4"), 4);
    assert_eq!(report.bank_conflicts(), 0, "{report}");
}

#[test]
fn rows_of_128_bytes_conflict_sevenfold() {
    let mut raw = Raw::new(32);
    let tile = raw.shared("tile", 32 * 128);
    let thread = raw.thread();
    for i in 0..32 {
        let place =
            raw.lane(Lane::Fma(Ty::S32), &[thread.operand(), 4.operand(), (tile + 128 * i).operand()]);
        raw.store(Space::Shared, place, 0);
    }
    let row = raw.lane(Lane::Fma(Ty::S32), &[thread.operand(), 128.operand(), tile.operand()]);
    let regs: Vec<_> = (0..4).map(|_| raw.b32()).collect();
    raw.warp(Warp::LoadMatrix { count: 4, transposed: false, offset: 0 }, &regs, &[row.operand()]);
    let report = run(&raw.done());
    assert_eq!(report.bank_conflicts(), 4 * 7, "{report}");
}

#[test]
fn sectors_tell_scattered_accesses() {
    let program = |stride: i32| {
        kernel("sectors", 32, |k| {
            let x = k.global::<i32>("x");
            x.at(k.thread() * stride).load();
        })
    };
    assert_eq!(run(&program(1)).sectors(), (4, 4));
    assert_eq!(run(&program(8)).sectors(), (32, 4));
    assert!(run(&program(8)).to_string().contains("ideal 4"));
}
