//! Many blocks: results do not depend on who runs them, and blocks can wait for each other.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Instant;

use sage_emulator::{Emulator, EmulatorOptions, FaultKind};
use sage_ptx::isa::AtomicOp;
use sage_ptx::{Program, kernel};

mod support;
use support::{fault, fault_naming};

/// Each block adds up its part, through shared memory.
fn sums() -> Program {
    kernel("sums", 128, |k| {
        let (x, y) = (k.global::<f32>("x"), k.global::<f32>("y"));
        let parts = k.shared::<f32>("parts", 4);
        let [block, ..] = k.block_index();
        let sum = x.at(block * 128 + k.thread()).load().reduce_lanes(31, |a, b| a + b);
        k.when(k.lane_index().eq(0), || parts.at(k.warp_index_of_thread()).store(sum));
        k.barrier();
        k.when(k.thread().eq(0), || {
            let all = (0..4).map(|i| parts.plus(i).load()).reduce(|a, b| a + b).unwrap();
            y.at(block).store(all);
        });
    })
}

/// The warp of a thread, without a shuffle.
trait WarpOfThread {
    fn warp_index_of_thread(&self) -> sage_ptx::Val<'_, i32>;
}

impl WarpOfThread for sage_ptx::Code {
    fn warp_index_of_thread(&self) -> sage_ptx::Val<'_, i32> {
        self.thread() >> 5
    }
}

#[test]
fn workers_and_seeds_change_nothing() {
    let data: Vec<f32> = (0..128 * 50).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut first = None;
    for workers in [1, 2, 3, 8] {
        for seed in [0, 1, 77] {
            let mut emulator =
                Emulator::with_options(EmulatorOptions { workers, seed, ..EmulatorOptions::default() });
            let (x, y) = (emulator.buffer("x", &data), emulator.uninitialized("y", 200));
            let report = emulator.launch(&sums(), [50, 1, 1], &[x.arg(), y.arg()]).unwrap();
            let result = (emulator.read::<u32>(y), report);
            assert_eq!(first.get_or_insert(result.clone()), &result);
        }
    }
}

#[test]
fn the_fault_of_the_lowest_block_is_told() {
    let program = kernel("late", 32, |k| {
        let y = k.global::<i32>("y");
        let [block, ..] = k.block_index();
        y.at(block * 32 + k.thread()).store(block);
    });
    for workers in [1, 4] {
        for max_faults in [1, 3] {
            let mut emulator =
                Emulator::with_options(EmulatorOptions { workers, max_faults, ..EmulatorOptions::default() });
            let y = emulator.uninitialized("y", 128 * 10);
            let failure = emulator.launch(&program, [40, 1, 1], &[y.arg()]).unwrap_err();
            let blocks: Vec<u32> = failure.faults.iter().map(|fault| fault.block[0]).collect();
            assert_eq!(blocks, (10..10 + max_faults as u32).collect::<Vec<_>>(), "{failure}");
        }
    }
}

/// Every block says that it is there, and waits for all others of its group of four.
fn rendezvous(arrivals: i32) -> Program {
    kernel("rendezvous", 64, |k| {
        let (counter, y) = (k.global::<i32>("counter"), k.global::<i32>("y"));
        let [block, ..] = k.block_index();
        let counter = counter.at(block >> 2);
        y.at(block).store(block + 1);
        k.barrier();
        k.when(k.thread().eq(0), || {
            counter.atomic(AtomicOp::Add, 1);
            k.while_loop(|| counter.load_acquire().lt(arrivals), || k.sleep(20));
        });
        k.barrier();
        // Everybody's numbers are there now.
        k.when(k.thread().lt(4), || {
            y.at((block & !3) + k.thread()).load();
        });
    })
}

#[test]
fn blocks_wait_for_each_other_through_global_memory() {
    for workers in [1, 2, 5] {
        let mut emulator = Emulator::with_options(EmulatorOptions { workers, ..EmulatorOptions::default() });
        let counter = emulator.buffer("counter", &[0i32; 5]);
        let y = emulator.uninitialized("y", 80);
        emulator.launch(&rendezvous(4), [20, 1, 1], &[counter.arg(), y.arg()]).unwrap();
        assert_eq!(emulator.read::<i32>(counter), [4; 5]);
    }
}

#[test]
fn blocks_that_wait_in_vain_are_a_deadlock_and_not_a_hang() {
    for workers in [1, 2, 5] {
        for (arrivals, resident_blocks) in [(5, 132), (4, 3)] {
            let options = EmulatorOptions { workers, resident_blocks, ..EmulatorOptions::default() };
            let mut emulator = Emulator::with_options(options);
            let counter = emulator.buffer("counter", &[0i32; 5]);
            let y = emulator.uninitialized("y", 80);
            let start = Instant::now();
            let result = emulator.launch(&rendezvous(arrivals), [20, 1, 1], &[counter.arg(), y.arg()]);
            fault_naming(
                result,
                FaultKind::Deadlock,
                &["global memory that nobody will change", "warp 0 polls"],
            );
            assert!(start.elapsed().as_secs() < 10);
        }
    }
}

#[test]
fn a_loop_without_end_is_caught() {
    let program = |step: i32| {
        kernel("endless", 32, |k| {
            let i = k.var(0);
            k.while_loop(|| i.get().ne(64), || i.set(i.get() + step));
        })
    };
    let emulator =
        Emulator::with_options(EmulatorOptions { step_limit: 100_000, ..EmulatorOptions::default() });
    emulator.launch(&program(2), [1, 1, 1], &[]).unwrap();
    let result = emulator.launch(&program(0), [1, 1, 1], &[]);
    fault_naming(result, FaultKind::Runaway, &["100000 steps", "in the loops at", "grid.rs"]);
    // A loop with nothing in it.
    let program = kernel("empty", 32, |k| {
        let always = k.thread().ge(0);
        k.while_loop(|| always, || {});
    });
    fault(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::Runaway);
}

#[test]
fn who_waits_for_a_faulty_block_is_not_to_blame() {
    let program = kernel("blame", 32, |k| {
        let counter = k.global::<i32>("counter");
        let [block, ..] = k.block_index();
        // The last block goes astray before it arrives.
        k.when(block.eq(3), || counter.plus(1000).store(0));
        counter.atomic(AtomicOp::Add, 1);
        k.while_loop(|| counter.load_acquire().lt(128), || {});
    });
    for workers in [1, 2, 4] {
        let mut emulator = Emulator::with_options(EmulatorOptions { workers, ..EmulatorOptions::default() });
        let counter = emulator.buffer("counter", &[0i32]);
        let fault = fault(emulator.launch(&program, [4, 1, 1], &[counter.arg()]), FaultKind::OutOfBounds);
        assert_eq!(fault.block, [3, 0, 0]);
    }
}
