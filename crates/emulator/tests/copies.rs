//! `cp.async`: what a copy must be waited for by, and what may not happen while it is in flight.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sage_emulator::FaultKind;
use sage_ptx::{Program, kernel};

mod support;
use support::interleaved;

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
    assert!(copy.file().ends_with("copies.rs") && text.contains("`tile` + "), "{text}");
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
