//! `mbarrier`s and bulk tensor copies.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sage_emulator::{Buffer, Emulator, EmulatorOptions, Failure, FaultKind, Report, Swizzle, TensorMap};
use sage_ptx::isa::{Cmp, Control, SharedWindow, Space, Warp};
use sage_ptx::{Program, kernel};

mod support;
use support::{Raw, Source, fault_naming};

/// What a kernel leaves out, or does wrong.
#[derive(Clone, Copy, Default)]
struct Bugs {
    no_wait: bool,
    wrong_bytes: bool,
    no_init_fence: bool,
    no_barrier: bool,
    no_init: bool,
    early_write: bool,
    misaligned: bool,
    second_load_early: bool,
}

/// Loads a box of `bytes` at a corner twice, and copies shared memory as it is to `out` after each.
fn load(dims: usize, bytes: u32, corner: &[i32], bugs: Bugs) -> Program {
    let mut raw = Raw::new(64);
    let map = raw.tensor_map("map");
    let out = raw.pointer("out");
    let tile = raw.shared("tile", bytes.max(1024));
    let full = raw.shared("full", 8);
    let thread = raw.thread();
    let first = raw.compare(Cmp::Eq, thread, 0);
    raw.when(first, |raw| {
        if !bugs.no_init {
            raw.control(Control::MbarrierInit, &[full.operand(), 1.operand()]);
        }
        if !bugs.no_init_fence {
            raw.control(Control::FenceMbarrierInit, &[]);
        }
    });
    if !bugs.no_barrier {
        raw.barrier();
    }
    for round in 0..2 {
        raw.when(first, |raw| {
            let announced = if bugs.wrong_bytes { bytes + 16 } else { bytes };
            raw.control(Control::MbarrierArriveExpect, &[full.operand(), announced.operand()]);
            let mut src =
                vec![(tile + if bugs.misaligned { 64 } else { 0 }).operand(), map.operand(), full.operand()];
            src.extend(corner.iter().map(|x| x.operand()));
            raw.control(Control::BulkTensorLoad { dims: dims as u8, window: SharedWindow::Cluster }, &src);
            if bugs.early_write {
                raw.store(Space::Shared, tile, 1);
            }
        });
        if bugs.no_wait {
            raw.barrier();
        } else {
            raw.mbarrier_wait(full, round);
        }
        let limit = bytes as i32 / 4;
        let i = raw.add(thread, 0);
        raw.while_loop(
            |raw| raw.compare(Cmp::Lt, i, limit),
            |raw| {
                let offset = raw.mul(i, 4);
                let from = raw.add(offset, tile);
                let value = raw.load(Space::Shared, from);
                let to = raw.at(out, i, 4);
                raw.store(Space::Global, to, value);
                raw.emit(
                    sage_ptx::isa::Op::Lane(sage_ptx::isa::Lane::Add(sage_ptx::isa::Ty::S32)),
                    &[i],
                    &[i.operand(), 64.operand()],
                );
            },
        );
        if !bugs.second_load_early {
            raw.barrier();
        }
    }
    raw.done()
}

fn launch(
    program: &Program,
    emulator: &mut Emulator,
    map: &TensorMap,
    bytes: u32,
) -> Result<(Report, Buffer), Failure> {
    let out = emulator.uninitialized("out", bytes as usize);
    let map = emulator.tensor_map(map);
    emulator.launch(program, [1, 1, 1], &[map, out.arg()]).map(|report| (report, out))
}

/// 20 rows of 48 halves in rows of 64.
fn tensor(emulator: &mut Emulator, swizzle: Swizzle, box_shape: [u32; 2]) -> (TensorMap, Vec<u16>) {
    let data: Vec<u16> = (0..20 * 64).map(|i| i as u16 + 1).collect();
    let buffer = emulator.buffer("tensor", &data);
    let map = TensorMap {
        address: buffer.address(),
        element_bytes: 2,
        shape: vec![48, 20],
        strides: vec![128],
        box_shape: box_shape.to_vec(),
        swizzle,
    };
    (map, data)
}

#[test]
fn boxes_load_with_zeros_outside_and_swizzled() {
    for (swizzle, chunks) in
        [(Swizzle::None, 1), (Swizzle::Bytes32, 2), (Swizzle::Bytes64, 4), (Swizzle::Bytes128, 8)]
    {
        let width = if chunks == 1 { 24 } else { 8 * chunks };
        for corner in [[0, 0], [8, 3], [-8, -2], [40, 16], [100, 0], [3, 1]] {
            for seed in 0..3 {
                let mut emulator =
                    Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
                let (map, data) = tensor(&mut emulator, swizzle, [width, 16]);
                let bytes = width * 16 * 2;
                let program = load(2, bytes, &corner, Bugs::default());
                let (report, out) = launch(&program, &mut emulator, &map, bytes).unwrap();
                assert_eq!(report.bulk_bytes, 2 * u64::from(bytes));
                let found = emulator.read::<u16>(out);
                for row in 0..16 {
                    for column in 0..width as i32 {
                        let (x, y) = (corner[0] + column, corner[1] + row);
                        let inside = (0..48).contains(&x) && (0..20).contains(&y);
                        let expected = if inside { data[(y * 64 + x) as usize] } else { 0 };
                        let byte = (row * width as i32 + column) * 2;
                        // The tile begins at a multiple of 1024.
                        let at = byte ^ ((byte >> 7) & (chunks as i32 - 1)) << 4;
                        assert_eq!(found[at as usize / 2], expected, "{swizzle:?} {corner:?} {row} {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn boxes_of_one_to_five_dimensions_load() {
    let shape = [32u64, 3, 4, 2, 3];
    let box_shape = [16u32, 2, 3, 1, 2];
    let corner = [16, 1, 2, 1, 2];
    for dims in 1..=5 {
        let mut emulator = Emulator::new();
        let strides: Vec<u64> = (1..dims).map(|i| shape[..i].iter().product()).collect();
        let len: u64 = shape[..dims].iter().product();
        let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let buffer = emulator.buffer("tensor", &data);
        let map = TensorMap {
            address: buffer.address(),
            element_bytes: 1,
            shape: shape[..dims].to_vec(),
            strides: strides.clone(),
            box_shape: box_shape[..dims].to_vec(),
            swizzle: Swizzle::None,
        };
        let bytes = box_shape[..dims].iter().product();
        let program = load(dims, bytes, &corner[..dims], Bugs::default());
        let (_, out) = launch(&program, &mut emulator, &map, bytes).unwrap();
        for (i, found) in emulator.read::<u8>(out).into_iter().enumerate() {
            let (mut rest, mut address, mut inside) = (i as u64, 0, true);
            for dim in 0..dims {
                let at = corner[dim] as u64 + rest % u64::from(box_shape[dim]);
                rest /= u64::from(box_shape[dim]);
                inside &= at < shape[dim];
                address += at * if dim == 0 { 1 } else { strides[dim - 1] };
            }
            assert_eq!(found, if inside { data[address as usize] } else { 0 }, "{dims} {i}");
        }
    }
}

fn with(bugs: Bugs) -> Result<Report, Failure> {
    let mut emulator = Emulator::new();
    let (map, _) = tensor(&mut emulator, Swizzle::None, [24, 16]);
    let program = load(2, 768, &[0, 0], bugs);
    launch(&program, &mut emulator, &map, 768).map(|(report, _)| report)
}

#[test]
fn what_a_load_lacks_is_told() {
    with(Bugs::default()).unwrap();
    let missing = with(Bugs { no_wait: true, ..Bugs::default() });
    fault_naming(missing, FaultKind::MissingWait, &["reads `tile`", "is in flight"]);
    let early = with(Bugs { early_write: true, ..Bugs::default() });
    fault_naming(early, FaultKind::MissingWait, &["writes `tile`"]);
    let bytes = with(Bugs { wrong_bytes: true, ..Bugs::default() });
    let words =
        ["warp 0 waits for the phase of parity 0 of the mbarrier at `full` + 0", "16 bytes outstanding"];
    fault_naming(bytes, FaultKind::Deadlock, &words);
    let fence = with(Bugs { no_init_fence: true, ..Bugs::default() });
    fault_naming(fence, FaultKind::MissingProxyFence, &["`full` + 0", "not fenced"]);
    let barrier = with(Bugs { no_barrier: true, ..Bugs::default() });
    fault_naming(barrier, FaultKind::Race, &["uses the mbarrier at `full`"]);
    let init = with(Bugs { no_init: true, ..Bugs::default() });
    fault_naming(init, FaultKind::Mbarrier, &["no initialised mbarrier"]);
    let misaligned = with(Bugs { misaligned: true, ..Bugs::default() });
    fault_naming(misaligned, FaultKind::Misaligned, &["`tile` + 64", "no multiple of 128"]);
    let overtaken = with(Bugs { second_load_early: true, ..Bugs::default() });
    assert!(matches!(overtaken.unwrap_err().kind(), Some(FaultKind::Race | FaultKind::MissingWait)));
}

#[test]
fn tensor_maps_that_hardware_refuses_are_told() {
    let refused = |change: fn(&mut TensorMap), words: &[&str]| {
        let mut emulator = Emulator::new();
        let (mut map, _) = tensor(&mut emulator, Swizzle::None, [24, 16]);
        change(&mut map);
        let program = load(2, 768, &[0, 0], Bugs::default());
        let result = launch(&program, &mut emulator, &map, 768).map(|(report, _)| report);
        let failure = result.unwrap_err();
        assert_eq!(failure.kind(), Some(FaultKind::TensorMap), "{failure}");
        words.iter().for_each(|word| assert!(failure.to_string().contains(word), "{failure}"));
    };
    refused(|map| map.strides[0] = 100, &["stride 100", "multiple of 16"]);
    refused(|map| map.address += 8, &["multiple of 16"]);
    refused(|map| map.box_shape[0] = 5, &["10 bytes"]);
    refused(|map| map.box_shape[1] = 257, &["box of 257"]);
    refused(|map| map.swizzle = Swizzle::Bytes32, &["48 bytes", "swizzle's 32"]);
    refused(|map| map.element_bytes = 3, &["elements of 3 bytes"]);
    refused(|map| map.shape.push(1), &["strides"]);
}

/// A ring of two stages: a producer warp stores, a consumer warp adds up. `release` is the consumer's arrival.
fn ring(release: bool, count: i32) -> Program {
    let mut raw = Raw::new(64);
    let out = raw.pointer("out");
    let tile = raw.shared("tile", 256);
    let full = raw.shared("full", 16);
    let empty = raw.shared("empty", 16);
    let thread = raw.thread();
    let first = raw.compare(Cmp::Eq, thread, 0);
    raw.when(first, |raw| {
        for i in 0..2 {
            raw.control(Control::MbarrierInit, &[(full + 8 * i).operand(), count.operand()]);
            raw.control(Control::MbarrierInit, &[(empty + 8 * i).operand(), 32.operand()]);
        }
    });
    raw.barrier();
    let lane = raw.lane(sage_ptx::isa::Lane::And(sage_ptx::isa::Ty::B32), &[thread.operand(), 31.operand()]);
    let producer = raw.compare(Cmp::Lt, thread, 32);
    let consumer = raw.compare(Cmp::Ge, thread, 32);
    let place = |raw: &mut Raw, stage: u32| {
        let offset = raw.mul(lane, 4);
        raw.add(offset, tile + 128 * stage)
    };
    raw.when(producer, |raw| {
        for i in 0..6u32 {
            let stage = i % 2;
            raw.mbarrier_wait(empty + 8 * stage, (i / 2 + 1) & 1);
            let place = place(raw, stage);
            let value = raw.add(lane, 100 * i as i32);
            raw.store(Space::Shared, place, value);
            raw.control(Control::MbarrierArrive, &[(full + 8 * stage).operand()]);
        }
    });
    raw.when(consumer, |raw| {
        let mut sum = raw.mov(0);
        for i in 0..6u32 {
            let stage = i % 2;
            raw.mbarrier_wait(full + 8 * stage, (i / 2) & 1);
            let place = place(raw, stage);
            let value = raw.load(Space::Shared, place);
            sum = raw.add(sum, value);
            if release {
                raw.control(Control::MbarrierArrive, &[(empty + 8 * stage).operand()]);
            }
        }
        let to = raw.at(out, lane, 4);
        raw.store(Space::Global, to, sum);
    });
    raw.done()
}

#[test]
fn a_ring_of_mbarriers_runs_in_any_order() {
    for seed in 0..8 {
        let mut emulator = Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
        let out = emulator.uninitialized("out", 128);
        emulator.launch(&ring(true, 32), [1, 1, 1], &[out.arg()]).unwrap();
        let expected: Vec<i32> = (0..32).map(|lane| 6 * lane + 1500).collect();
        assert_eq!(emulator.read::<i32>(out), expected);
        let result = emulator.launch(&ring(false, 32), [1, 1, 1], &[out.arg()]);
        fault_naming(result, FaultKind::Deadlock, &["mbarrier at `empty`", "32 of 32 arrivals"]);
        let result = emulator.launch(&ring(true, 16), [1, 1, 1], &[out.arg()]);
        assert!(matches!(
            result.unwrap_err().kind(),
            Some(FaultKind::Mbarrier | FaultKind::Race | FaultKind::Deadlock)
        ));
        let result = emulator.launch(&ring(true, 33), [1, 1, 1], &[out.arg()]);
        fault_naming(result, FaultKind::Deadlock, &["mbarrier at `full`", "1 of 33 arrivals"]);
    }
}

#[test]
fn mbarriers_are_not_data() {
    let mut raw = Raw::new(32);
    let full = raw.shared("full", 8);
    raw.warp(Warp::Sync, &[], &[]);
    let thread = raw.thread();
    let first = raw.compare(Cmp::Eq, thread, 0);
    raw.when(first, |raw| raw.control(Control::MbarrierInit, &[full.operand(), 1.operand()]));
    raw.load(Space::Shared, full);
    fault_naming(Emulator::new().launch(&raw.done(), [1, 1, 1], &[]), FaultKind::Mbarrier, &["`full` + 0"]);
}

#[test]
fn bulk_copies_may_not_outlive_their_block() {
    let mut raw = Raw::new(64);
    let map = raw.tensor_map("map");
    let tile = raw.shared("tile", 1024);
    let full = raw.shared("full", 8);
    let thread = raw.thread();
    let first = raw.compare(Cmp::Eq, thread, 0);
    raw.when(first, |raw| {
        raw.control(Control::MbarrierInit, &[full.operand(), 1.operand()]);
        raw.control(Control::FenceMbarrierInit, &[]);
        raw.control(Control::MbarrierArriveExpect, &[full.operand(), 768.operand()]);
        let src = [tile.operand(), map.operand(), full.operand(), 0.operand(), 0.operand()];
        raw.control(Control::BulkTensorLoad { dims: 2, window: SharedWindow::Block }, &src);
    });
    let mut emulator = Emulator::new();
    let (map, _) = tensor(&mut emulator, Swizzle::None, [24, 16]);
    let failure = emulator.launch(&raw.done(), [1, 1, 1], &[map.arg()]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::MissingWait));
    assert!(failure.to_string().contains("ends while a bulk load"), "{failure}");
}

#[test]
fn a_wait_may_give_up() {
    // Nobody arrives, and the kernel asks only once.
    let mut raw = Raw::new(32);
    let out = raw.pointer("out");
    let full = raw.shared("full", 8);
    let thread = raw.thread();
    let first = raw.compare(Cmp::Eq, thread, 0);
    raw.when(first, |raw| raw.control(Control::MbarrierInit, &[full.operand(), 1.operand()]));
    let done = raw.reg(sage_ptx::isa::Width::Pred);
    raw.emit(sage_ptx::isa::Op::Control(Control::MbarrierTryWait), &[done], &[full.operand(), 0.operand()]);
    let select = sage_ptx::isa::Lane::Select(sage_ptx::isa::Ty::B32);
    let result = raw.lane(select, &[1.operand(), 2.operand(), done.operand()]);
    let to = raw.at(out, thread, 4);
    raw.store(Space::Global, to, result);
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 128);
    emulator.launch(&raw.done(), [1, 1, 1], &[out.arg()]).unwrap();
    assert_eq!(emulator.read::<u32>(out), [2; 32]);
}

/// Copies `bytes` from `from` bytes behind the start of `data` to shared memory, and from there to `out`.
fn load_bytes(bytes: u32, from: i32) -> Program {
    kernel("load_bytes", 64, |k| {
        let [data, out] = ["data", "out"].map(|name| k.global::<u32>(name));
        let tile = k.shared::<u32>("tile", 256);
        let full = k.mbarriers("full", 1).plus(0);
        k.when(k.thread().eq(0), || {
            full.init(1);
            k.fence_mbarriers();
        });
        k.barrier();
        k.when(k.thread().eq(0), || {
            full.arrive_expecting(bytes as i32);
            let from = data.cast::<u8>().plus(from).cast::<u32>();
            tile.copy_bulk(from, bytes as i32, &full);
        });
        full.wait(k.constant(0));
        k.range_by(k.thread(), bytes as i32 / 4, 64, |i| out.at(i).store(tile.at(i).load()));
    })
}

#[test]
fn bytes_side_by_side_arrive() {
    let mut emulator = Emulator::new();
    let words: Vec<u32> = (0..256).map(|i| i * 3 + 1).collect();
    let data = emulator.buffer("data", &words);
    let out = emulator.uninitialized("out", 400);
    let args = [data.arg(), out.arg()];
    let report = emulator.launch(&load_bytes(400, 32), [1, 1, 1], &args).unwrap();
    assert_eq!(report.bulk_bytes, 400);
    assert_eq!(emulator.read::<u32>(out), words[8..108]);
    fault_naming(
        emulator.launch(&load_bytes(400, 8), [1, 1, 1], &args),
        FaultKind::Misaligned,
        &["bulk copy of 400 bytes", "multiples of 16"],
    );
    fault_naming(emulator.launch(&load_bytes(400, 640), [1, 1, 1], &args), FaultKind::OutOfBounds, &["data"]);
}
