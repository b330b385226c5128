//! Races, barriers, `cp.async`: each planted bug is caught, and each corrected kernel passes, in any order of the
//! warps.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sage_emulator::{Emulator, EmulatorOptions, Failure, FaultKind, Report};
use sage_ptx::isa::Control;
use sage_ptx::{Program, kernel};

mod support;
use support::{Raw, Source, fault_naming};

/// Launches with several interleavings; every one must end alike.
fn interleaved(program: &Program, data: &[i32]) -> Result<(Report, Vec<i32>), Failure> {
    let mut last = None;
    for seed in 0..6 {
        let mut emulator = Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
        let (x, y) = (emulator.buffer("x", data), emulator.uninitialized("y", 4 * data.len()));
        let report = emulator.launch(program, [1, 1, 1], &[x.arg(), y.arg()][..program.params.len()])?;
        let result = emulator.read(y);
        if let Some((_, before)) = &last {
            assert_eq!(before, &result, "seed {seed}");
        }
        last = Some((report, result));
    }
    Ok(last.unwrap())
}

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

/// Copies 64 numbers to shared memory and reads them back in reverse.
fn copies(wait: Option<u32>, barrier: bool, valid: i32) -> Program {
    kernel("copies", 64, |k| {
        let (x, y) = (k.global::<i32>("x"), k.global::<i32>("y"));
        let tile = k.shared::<i32>("tile", 64);
        let thread = k.thread();
        k.when(thread.lt(16), || tile.at(thread * 4).copy_async(x.at(thread * 4), 16, valid));
        k.commit_copies();
        if let Some(pending) = wait {
            k.wait_copies(pending);
        }
        if barrier {
            k.barrier();
        }
        y.at(thread).store(tile.at(k.constant(63) - thread).load());
    })
}

#[test]
fn copies_land_when_they_are_waited_for() {
    let data: Vec<i32> = (0..64).map(|i| i * 7).collect();
    let reversed: Vec<i32> = data.iter().rev().copied().collect();
    assert_eq!(interleaved(&copies(Some(0), true, 16), &data).unwrap().1, reversed);
    // The last 4 of each 16 bytes are zeros.
    let zeros: Vec<i32> = (0..64).rev().map(|i| if i % 4 == 3 { 0 } else { i * 7 }).collect();
    assert_eq!(interleaved(&copies(Some(0), true, 12), &data).unwrap().1, zeros);

    let failure = interleaved(&copies(None, true, 16), &data).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::MissingWait));
    let text = failure.to_string();
    let copy = failure.first().unwrap().other.unwrap();
    assert!(copy.file().ends_with("ordering.rs") && text.contains("`tile` + "), "{text}");
    // Waiting for all but the latest group is not enough.
    let failure = interleaved(&copies(Some(1), true, 16), &data).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::MissingWait));
    // Waiting is not enough either: the others' reads need a barrier.
    let failure = interleaved(&copies(Some(0), false, 16), &data).unwrap_err();
    assert!(matches!(failure.kind(), Some(FaultKind::Race | FaultKind::UninitializedMemory)), "{failure}");
}

#[test]
fn a_missing_barrier_after_the_wait_is_a_race() {
    let program = |barrier: bool| {
        kernel("after", 64, |k| {
            let x = k.global::<i32>("x");
            let tile = k.shared::<i32>("tile", 64);
            tile.at(k.thread()).store(0);
            k.barrier();
            k.if_else(
                k.warp_index().eq(0),
                || {
                    tile.at(k.lane_index()).copy_async(x.at(k.lane_index()), 4, 4);
                    k.commit_copies();
                    k.wait_copies(0);
                    if barrier {
                        k.arrive(1, 64);
                    }
                },
                || {
                    if barrier {
                        k.named_barrier(1, 64);
                    }
                    k.range(0, 10_000, |_| {});
                    tile.at(k.lane_index()).load();
                },
            );
        })
    };
    interleaved(&program(true), &[1; 64]).unwrap();
    let failure = interleaved(&program(false), &[1; 64]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::Race), "{failure}");
}

#[test]
fn copies_in_flight_may_not_be_overwritten_nor_overtake_readers() {
    let data = [1; 64];
    let program = kernel("overwrite", 32, |k| {
        let x = k.global::<i32>("x");
        let tile = k.shared::<i32>("tile", 64);
        tile.at(k.thread()).copy_async(x.at(k.thread()), 4, 4);
        tile.at(k.thread()).store(0);
    });
    let failure = interleaved(&program, &data).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::MissingWait));
    assert!(failure.to_string().contains("writes `tile`"), "{failure}");
    // A second stage's copy begins while another warp may still read the first one's data.
    let program = |barrier: bool| {
        kernel("overtake", 64, |k| {
            let x = k.global::<i32>("x");
            let tile = k.shared::<i32>("tile", 64);
            k.range(0, 3, |_| {
                tile.at(k.thread()).copy_async(x.at(k.thread()), 4, 4);
                k.commit_copies();
                k.wait_copies(0);
                k.barrier();
                tile.at(k.constant(63) - k.thread()).load();
                if barrier {
                    k.barrier();
                }
            });
        })
    };
    interleaved(&program(true), &data).unwrap();
    let failure = interleaved(&program(false), &data).unwrap_err();
    // Who is behind reads either what the other has begun to overwrite, or what it should have waited for.
    assert!(matches!(failure.kind(), Some(FaultKind::Race | FaultKind::MissingWait)), "{failure}");
}

#[test]
fn groups_of_copies_are_waited_for_in_order() {
    let program = kernel("pipeline", 32, |k| {
        let (x, y) = (k.global::<i32>("x"), k.global::<i32>("y"));
        let tile = k.shared::<i32>("tile", 96);
        for stage in 0..3 {
            tile.at(k.thread() + 32 * stage).copy_async(x.at(k.thread()), 4, 4);
            k.commit_copies();
        }
        let sum = k.var(0);
        for stage in 0..3 {
            k.wait_copies(2 - stage as u32);
            sum.set(sum.get() + tile.at(k.thread() + 32 * stage).load());
        }
        y.at(k.thread()).store(sum.get());
    });
    let data: Vec<i32> = (0..32).collect();
    let (report, found) = interleaved(&program, &data).unwrap();
    assert_eq!(found, data.iter().map(|x| 3 * x).collect::<Vec<_>>());
    assert_eq!(report.instructions["cp.async"], 3);
}

#[test]
fn copies_that_are_misaligned_or_never_committed_are_caught() {
    let program = kernel("uncommitted", 32, |k| {
        let x = k.global::<i32>("x");
        let tile = k.shared::<i32>("tile", 256);
        tile.at(k.thread() * 4).copy_async(x, 16, 0);
        k.wait_copies(0);
        tile.at(k.thread() * 4).copy_async(x, 16, 8);
    });
    let failure = interleaved(&program, &[0; 64]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::MissingWait), "the first one was never committed: {failure}");
    let program = kernel("misaligned", 32, |k| {
        let x = k.global::<i32>("x");
        let tile = k.shared::<i32>("tile", 256);
        tile.at(k.thread() * 4).copy_async(x.at(k.thread()), 16, 8);
    });
    let failure = interleaved(&program, &[0; 64]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::Misaligned), "{failure}");
}

#[test]
fn registers_are_within_the_multiprocessor() {
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
    fault_naming(
        emulator.launch(&program(248, 40), [1, 1, 1], &[]),
        FaultKind::RegisterBudget,
        &["of 65536"],
    );
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
