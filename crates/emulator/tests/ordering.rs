//! Races and barriers: each planted bug is caught, and each corrected kernel passes, in any order of the
//! warps.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sage_emulator::{Emulator, EmulatorOptions, FaultKind};
use sage_ptx::isa::Control;
use sage_ptx::{Program, kernel};

mod support;
use support::{Raw, Source, fault_naming, interleaved};

/// Reverses 64 numbers through shared memory.
fn reverse(barrier: bool) -> Program {
    kernel("reverse", 64, |k| {
        let (x, y) = (k.global::<i32>("x"), k.global::<i32>("y"));
        let tile = k.shared::<i32>("tile", 64);
        let thread = k.thread();
        tile.at(thread).store(x.at(thread).load());
        if barrier {
            k.barrier();
        }
        y.at(thread).store(tile.at(k.constant(63) - thread).load());
    })
}

#[test]
fn a_read_before_the_barrier_is_a_race_or_uninitialised() {
    let data: Vec<i32> = (0..64).collect();
    let (_, result) = interleaved(&reverse(true), &data).unwrap();
    assert_eq!(result, (0..64).rev().collect::<Vec<_>>());
    // Whichever warp comes first reads what is not there yet; if it is there, nobody promised.
    let result = interleaved(&reverse(false), &data).unwrap_err();
    assert_eq!(result.kind(), Some(FaultKind::UninitializedMemory));
    let program = kernel("race", 64, |k| {
        let tile = k.shared::<i32>("tile", 64);
        tile.at(k.thread()).store(1);
        k.barrier();
        tile.at(k.thread()).store(2);
        tile.at(k.constant(63) - k.thread()).load();
    });
    for seed in 0..4 {
        let emulator = Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
        let result = emulator.launch(&program, [1, 1, 1], &[]);
        let fault =
            fault_naming(result, FaultKind::Race, &["`tile` + ", "warp 0", "warp 1", "no barrier between"]);
        // The first warp's store and the second one's load, or the other way round.
        let (at, other) = (fault.at.unwrap(), fault.other.unwrap());
        assert_ne!(at.line(), other.line());
        assert_eq!(at.file(), other.file());
    }
}

#[test]
fn a_ring_buffer_needs_a_barrier_before_it_is_overwritten() {
    let program = |second: bool| {
        kernel("ring", 64, |k| {
            let y = k.global::<i32>("y");
            let stage = k.shared::<i32>("stage", 64);
            let sum = k.var(0);
            k.range(0, 4, |i| {
                stage.at(k.thread()).store(i + k.thread());
                k.barrier();
                sum.set(sum.get() + stage.at(k.constant(63) - k.thread()).load());
                if second {
                    k.barrier();
                }
            });
            y.at(k.thread()).store(sum.get());
        })
    };
    let run = |program: &Program, seed| {
        let mut emulator = Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
        let y = emulator.uninitialized("y", 256);
        emulator.launch(program, [1, 1, 1], &[y.arg()]).map(|report| (report, emulator.read::<i32>(y)))
    };
    for seed in 0..4 {
        let (_, found) = run(&program(true), seed).unwrap();
        assert_eq!(found, (0..64).map(|i| 6 + 4 * (63 - i)).collect::<Vec<_>>());
        let result = run(&program(false), seed).map(|(report, _)| report);
        fault_naming(result, FaultKind::Race, &["`stage` + ", "with no barrier between"]);
    }
}

#[test]
fn a_write_after_a_read_is_a_race() {
    let program = |barrier: bool| {
        kernel("after", 64, |k| {
            let tile = k.shared::<i32>("tile", 32);
            k.when(k.warp_index().eq(0), || tile.at(k.lane_index()).store(1));
            k.barrier();
            k.if_else(
                k.warp_index().eq(1),
                || {
                    tile.at(k.lane_index()).load();
                    if barrier {
                        k.arrive(1, 64);
                    }
                },
                || {
                    if barrier {
                        k.named_barrier(1, 64);
                    }
                    tile.at(k.lane_index()).store(2);
                },
            );
        })
    };
    interleaved(&program(true), &[]).unwrap();
    let result = Emulator::new().launch(&program(false), [1, 1, 1], &[]);
    let words = ["warp 0 writes `tile` + 0, which warp 1 read, with no barrier between"];
    fault_naming(result, FaultKind::Race, &words);
}

#[test]
fn bytes_of_one_word_are_told_apart() {
    // Two warps write the even and the odd bytes of the same words: no race.
    let program = |same: bool| {
        kernel("bytes", 64, |k| {
            let tile = k.shared::<u8>("tile", 64);
            let warp = k.warp_index();
            let byte = k.lane_index() * 2 + if same { k.constant(0) } else { warp };
            tile.at(byte).store(warp.reinterpret::<u32>());
            k.barrier();
            tile.cast::<u32>().at(k.lane_index() & 15).load();
        })
    };
    // Only the even bytes are written by both, so that the words are read unwritten or in a race.
    interleaved(&program(false), &[]).unwrap();
    let failure = interleaved(&program(true), &[]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::Race));
}

#[test]
fn named_barriers_order_only_who_takes_part() {
    // Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2; reading the neighbour's is fine, the other pair's
    // not.
    let program = |distance: i32| {
        kernel("pairs", 128, |k| {
            let tile = k.shared::<i32>("tile", 128);
            let thread = k.thread();
            tile.at(thread).store(0);
            k.barrier();
            tile.at(thread).store(thread);
            k.named_barrier((k.warp_index() >> 1) + 1, 64);
            tile.at(thread ^ distance).load();
        })
    };
    interleaved(&program(32), &[]).unwrap();
    let failure = interleaved(&program(64), &[]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::Race), "{failure}");
}

#[test]
fn producers_arrive_and_consumers_wait() {
    let program = |arrives: bool| {
        kernel("pipe", 64, |k| {
            let y = k.global::<i32>("y");
            let tile = k.shared::<i32>("tile", 32);
            k.if_else(
                k.warp_index().eq(0),
                || {
                    tile.at(k.lane_index()).store(k.lane_index() * 3);
                    if arrives {
                        k.arrive(1, 64);
                    }
                },
                || {
                    k.named_barrier(1, 64);
                    y.at(k.lane_index()).store(tile.at(k.constant(31) - k.lane_index()).load());
                },
            );
        })
    };
    let run = |arrives| {
        let mut emulator = Emulator::new();
        let y = emulator.uninitialized("y", 128);
        emulator
            .launch(&program(arrives), [1, 1, 1], &[y.arg()])
            .map(|report| (report, emulator.read::<i32>(y)))
    };
    assert_eq!(run(true).unwrap().1, (0..32).map(|i| 3 * (31 - i)).collect::<Vec<_>>());
    let result = run(false).map(|(report, _)| report);
    fault_naming(
        result,
        FaultKind::Deadlock,
        &["warp 1 waits at barrier 1, where 32 of 64 threads have arrived"],
    );
}

#[test]
fn a_barrier_that_half_the_warps_skip_is_a_deadlock() {
    let program = |skip: bool| {
        kernel("skip", 128, |k| {
            k.if_else(
                k.warp_index().lt(2),
                || k.barrier(),
                || if skip { k.named_barrier(3, 128) } else { k.barrier() },
            );
        })
    };
    let emulator = Emulator::new();
    emulator.launch(&program(false), [1, 1, 1], &[]).unwrap();
    let result = emulator.launch(&program(true), [1, 1, 1], &[]);
    let words = [
        "warp 0 waits at barrier 0, where 64 of 128",
        "warp 3 waits at barrier 3, where 64 of 128",
        "ordering.rs",
    ];
    fault_naming(result, FaultKind::Deadlock, &words);
}

#[test]
fn counts_of_barriers_must_agree() {
    let emulator = Emulator::new();
    let program = kernel("counts", 128, |k| {
        k.if_else(k.warp_index().lt(2), || k.named_barrier(1, 96), || k.named_barrier(1, 128));
    });
    fault_naming(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::Barrier, &["128 threads, but 96"]);
    let program = kernel("counts", 128, |k| k.named_barrier(1, 48));
    fault_naming(
        emulator.launch(&program, [1, 1, 1], &[]),
        FaultKind::Barrier,
        &["48 threads", "multiple of 32"],
    );
    let program = kernel("id", 32, |k| k.named_barrier(16, 32));
    fault_naming(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::Barrier, &["barrier 16"]);
}

#[test]
fn a_condition_of_half_the_warp_around_a_barrier_is_divergent() {
    let program = kernel("half", 64, |k| k.when(k.lane_index().lt(7), || k.named_barrier(1, 64)));
    let result = Emulator::new().launch(&program, [1, 1, 1], &[]);
    let fault = fault_naming(result, FaultKind::Divergent, &["a barrier without lanes"]);
    assert_eq!(fault.lanes, 0x7f);
}

#[test]
fn registers_are_those_that_the_block_began_with() {
    // 384 threads begin with 168 registers each.
    let program = |more: u32, fewer: u32| {
        let mut raw = Raw::new(384);
        let thread = raw.thread();
        let producer = raw.compare(sage_ptx::isa::Cmp::Lt, thread, 128);
        raw.when(producer, |raw| raw.control(Control::RegistersDecrease(fewer), &[]));
        let consumer = raw.compare(sage_ptx::isa::Cmp::Ge, thread, 128);
        raw.when(consumer, |raw| raw.control(Control::RegistersIncrease(more), &[]));
        raw.done()
    };
    let emulator = Emulator::new();
    emulator.launch(&program(240, 24), [1, 1, 1], &[]).unwrap();
    // What 384 threads cannot be started with is not theirs, though the multiprocessor has it.
    for (more, fewer) in [(248, 40), (240, 32)] {
        fault_naming(
            emulator.launch(&program(more, fewer), [1, 1, 1], &[]),
            FaultKind::RegisterBudget,
            &["of its 64512"],
        );
    }
    fault_naming(
        emulator.launch(&program(236, 24), [1, 1, 1], &[]),
        FaultKind::RegisterBudget,
        &["multiple of 8"],
    );
    fault_naming(
        emulator.launch(&program(240, 16), [1, 1, 1], &[]),
        FaultKind::RegisterBudget,
        &["24 to 256"],
    );
}

#[test]
fn atomics_on_shared_memory_do_not_race_among_themselves() {
    use sage_ptx::isa::AtomicOp;
    let program = |plain: bool| {
        kernel("histogram", 128, |k| {
            let bins = k.shared::<i32>("bins", 4);
            k.when(k.thread().lt(4), || bins.at(k.thread()).store(0));
            k.barrier();
            bins.at(k.thread() & 3).atomic(AtomicOp::Add, 1);
            if plain {
                bins.at(k.thread() & 3).load();
            }
        })
    };
    interleaved(&program(false), &[]).unwrap();
    let failure = interleaved(&program(true), &[]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::Race), "{failure}");
}

#[test]
fn operands_of_raw_instructions_are_checked() {
    let mut raw = Raw::new(64);
    let thread = raw.thread();
    raw.control(Control::Barrier { threads: None }, &[thread.operand()]);
    fault_naming(Emulator::new().launch(&raw.done(), [1, 1, 1], &[]), FaultKind::Barrier, &["the same"]);
}
