//! Loads and stores of every width, and what is wrong about them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use half::f16;
use sage_emulator::{Emulator, FaultKind};
use sage_ptx::isa::Width;
use sage_ptx::isa::{AtomicOp, LoadMode, Memory, Op, Space, StoreMode, Ty, Word};
use sage_ptx::{Arg, Program, kernel};

mod support;
use support::{Raw, Source, fault, fault_naming};

/// Copies each thread's part of `from` to `to`, through shared memory or not.
fn copy(word: Word, count: u8, through_shared: bool) -> Program {
    let mut raw = Raw::new(64);
    let (from, to) = (raw.pointer("from"), raw.pointer("to"));
    let bytes = (word.bytes() * u32::from(count)) as i32;
    let tile = raw.shared("tile", 64 * bytes as u32);
    let thread = raw.thread();
    let (from, to) = (raw.at(from, thread, bytes), raw.at(to, thread, bytes));
    let width = match word {
        Word::B64 => Width::B64,
        Word::B16 => Width::B16,
        _ => Width::B32,
    };
    let load = |space| Op::Memory(Memory::Load { space, word, count, offset: 0, mode: LoadMode::Plain });
    let store = |space| Op::Memory(Memory::Store { space, word, count, offset: 0, mode: StoreMode::Plain });
    let registers: Vec<_> = (0..count).map(|_| raw.reg(width)).collect();
    raw.emit(load(Space::Global), &registers, &[from.operand()]);
    if through_shared {
        let offset = raw.mul(thread, bytes);
        let place = raw.add(offset, tile);
        let mut src = vec![place.operand()];
        src.extend(registers.iter().map(|reg| reg.operand()));
        raw.emit(store(Space::Shared), &[], &src);
        raw.emit(load(Space::Shared), &registers, &[place.operand()]);
    }
    let mut src = vec![to.operand()];
    src.extend(registers.iter().map(|reg| reg.operand()));
    raw.emit(store(Space::Global), &[], &src);
    raw.done()
}

#[test]
fn every_width_copies() {
    for word in [Word::U8, Word::S8, Word::U16, Word::B16, Word::B32, Word::B64] {
        for count in [1, 2, 4] {
            let bytes = word.bytes() as usize * usize::from(count);
            if bytes > 16 {
                continue;
            }
            for through_shared in [false, true] {
                let mut emulator = Emulator::new();
                let data: Vec<u8> = (0..64 * bytes).map(|i| (i * 37 + i / 256) as u8).collect();
                let from = emulator.buffer("from", &data);
                let to = emulator.uninitialized("to", data.len());
                let program = copy(word, count, through_shared);
                let report = emulator.launch(&program, [1, 1, 1], &[from.arg(), to.arg()]).unwrap();
                assert_eq!(emulator.read::<u8>(to), data, "{word:?} {count}");
                assert_eq!(emulator.written_bytes(to), data.len());
                assert_eq!(report.count(&format!("ld.global.{}", 8 * bytes)), 2);
            }
        }
    }
}

#[test]
fn bytes_extend_as_their_type_says() {
    let program = kernel("extend", 32, |k| {
        let (from, signed, unsigned) =
            (k.global::<i8>("from"), k.global::<i32>("signed"), k.global::<u32>("unsigned"));
        let thread = k.thread();
        signed.at(thread).store(from.at(thread).load());
        unsigned.at(thread).store(from.cast::<u8>().at(thread).load());
    });
    let mut emulator = Emulator::new();
    let data: Vec<i8> = (0..32).map(|i| (i * 8 - 128) as i8).collect();
    let from = emulator.buffer("from", &data);
    let (signed, unsigned) = (emulator.uninitialized("signed", 128), emulator.uninitialized("unsigned", 128));
    emulator.launch(&program, [1, 1, 1], &[from.arg(), signed.arg(), unsigned.arg()]).unwrap();
    assert_eq!(emulator.read::<i32>(signed), data.iter().map(|&x| i32::from(x)).collect::<Vec<_>>());
    assert_eq!(emulator.read::<u32>(unsigned), data.iter().map(|&x| u32::from(x as u8)).collect::<Vec<_>>());
}

/// Each thread doubles the element `shift` further on.
fn double(shift: i32) -> Program {
    kernel("double", 32, |k| {
        let (x, y) = (k.global::<f32>("x"), k.global::<f32>("y"));
        let thread = k.thread();
        y.at(thread).store(x.at(thread + shift).load() * 2.0);
    })
}

#[test]
fn an_address_outside_of_every_buffer_names_the_nearest() {
    let mut emulator = Emulator::new();
    let data: Vec<f32> = (0..32).map(|i| i as f32).collect();
    let (x, y) = (emulator.buffer("x", &data), emulator.uninitialized("y", 128));
    let args = [x.arg(), y.arg()];
    assert_eq!(emulator.launch(&double(0), [1, 1, 1], &args).unwrap().count("ld.global"), 1);
    assert_eq!(emulator.read::<f32>(y)[5], 10.0);

    let wrong = double(1);
    let failure = emulator.launch(&wrong, [1, 1, 1], &args).unwrap_err();
    let text = failure.to_string();
    assert_eq!(failure.kind(), Some(FaultKind::OutOfBounds));
    assert_eq!(failure.first().unwrap().lanes, 1 << 31);
    assert_eq!(failure.first().unwrap().object.as_deref(), Some("x"));
    assert!(text.contains("offset 128 of `x`, which has 128 bytes"), "{text}");
    assert!(
        text.contains("lane 31") && text.contains("ld.global.b32") && text.contains("memory.rs"),
        "{text}"
    );

    let below = emulator.launch(&double(-1), [1, 1, 1], &args);
    fault_naming(below, FaultKind::OutOfBounds, &["4 bytes before `x`"]);
}

#[test]
fn an_address_cut_to_32_bits_is_caught() {
    let program = kernel("cut", 32, |k| {
        let x = k.global::<f32>("x");
        let low = x.address().reinterpret::<i64>().narrow().reinterpret::<u32>().widen();
        sage_ptx::Global::<f32>::at_address(low).store(1.0);
    });
    let mut emulator = Emulator::new();
    let x = emulator.uninitialized("x", 128);
    let result = emulator.launch(&program, [1, 1, 1], &[x.arg()]);
    fault_naming(result, FaultKind::OutOfBounds, &["only 32 bits"]);
}

#[test]
fn misaligned_accesses_are_caught() {
    let program = kernel("vector", 32, |k| {
        let (x, y) = (k.global::<f16>("x"), k.global::<f16>("y"));
        let [a, b] = x.at(k.thread() * 2).load_vector::<2>();
        y.at(k.thread() * 2).store_vector([b, a]);
    });
    let data: Vec<f16> = (0..64).map(|i| f16::from_f32(i as f32)).collect();
    let mut emulator = Emulator::new();
    let y = emulator.uninitialized("y", 128);
    let aligned = emulator.buffer_at("x", &data, 4);
    emulator.launch(&program, [1, 1, 1], &[aligned.arg(), y.arg()]).unwrap();
    assert_eq!(emulator.read::<f16>(y)[..4], [data[1], data[0], data[3], data[2]]);
    let odd = emulator.buffer_at("odd", &data, 2);
    let result = emulator.launch(&program, [1, 1, 1], &[odd.arg(), y.arg()]);
    let fault = fault_naming(result, FaultKind::Misaligned, &["`odd`", "no multiple of 4"]);
    assert_eq!(fault.object.as_deref(), Some("odd"));

    let program = kernel("shared", 32, |k| {
        let tile = k.shared::<f32>("tile", 64);
        let [x, ..] = tile.at(k.thread()).load_vector::<2>();
        tile.store(x);
    });
    fault_naming(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::UninitializedMemory, &["`tile` + 0"]);
    let program = kernel("shared", 32, |k| {
        let tile = k.shared::<f32>("tile", 64);
        tile.at(k.thread()).store_vector([k.constant(0.0f32); 2]);
    });
    fault_naming(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::Misaligned, &["`tile` + 4"]);
}

#[test]
fn memory_that_nobody_wrote_is_caught() {
    let mut emulator = Emulator::new();
    let (x, y) = (emulator.uninitialized("x", 128), emulator.uninitialized("y", 128));
    let result = emulator.launch(&double(0), [1, 1, 1], &[x.arg(), y.arg()]);
    let fault = fault(result, FaultKind::UninitializedMemory);
    assert_eq!(fault.object.as_deref(), Some("x"));
    emulator.write(x, &[1.0f32; 32]);
    emulator.launch(&double(0), [1, 1, 1], &[x.arg(), y.arg()]).unwrap();

    let half = |all: bool| {
        kernel("half", 32, |k| {
            let tile = k.shared::<u8>("tile", 64);
            tile.at(k.thread()).store(7u32);
            if all {
                tile.at(k.thread() + 32).store(8u32);
            }
            k.warp_sync();
            tile.cast::<u32>().at(k.thread() & 15).load();
        })
    };
    let result = emulator.launch(&half(false), [1, 1, 1], &[]);
    let fault = fault_naming(result, FaultKind::UninitializedMemory, &["`tile` + 32"]);
    assert_eq!(fault.lanes, 1 << 8);
    emulator.launch(&half(true), [1, 1, 1], &[]).unwrap();
}

#[test]
fn registers_that_nobody_wrote_are_caught() {
    let program = |all: bool| {
        kernel("register", 32, |k| {
            let x = sage_ptx::Var::<f32>::new(k).named("running_max");
            k.when(k.thread().lt(if all { 32 } else { 7 }), || x.set(1.0));
            x.set(x.get() + 1.0);
        })
    };
    let emulator = Emulator::new();
    emulator.launch(&program(true), [1, 1, 1], &[]).unwrap();
    let result = emulator.launch(&program(false), [1, 1, 1], &[]);
    let fault = fault_naming(result, FaultKind::UninitializedRegister, &["`running_max`", "lanes 7-31"]);
    assert_eq!(fault.lanes, !0x7f);
}

#[test]
fn a_condition_that_nobody_wrote_is_caught_where_it_is_used() {
    let mut raw = Raw::new(32);
    let thread = raw.thread();
    let (p, q) = (raw.compare(sage_ptx::isa::Cmp::Lt, thread, 5), raw.reg(Width::Pred));
    raw.when(p, |raw| raw.emit(Op::Lane(sage_ptx::isa::Lane::Mov(Ty::Pred)), &[q], &[p.operand()]));
    let line = line!() + 1;
    raw.when(q, |_| {});
    let result = Emulator::new().launch(&raw.done(), [1, 1, 1], &[]);
    let fault = fault(result, FaultKind::UninitializedRegister);
    assert_eq!((fault.lanes, fault.at.unwrap().line()), (!31, line));
}

#[test]
fn shared_memory_ends_where_its_array_ends() {
    let program = |len: i32| {
        kernel("bounds", 32, |k| {
            let first = k.shared::<f32>("first", 40);
            let _second = k.shared::<f32>("second", 32);
            k.range(0, len, |i| first.at(i).store(1.0));
        })
    };
    let emulator = Emulator::new();
    emulator.launch(&program(40), [1, 1, 1], &[]).unwrap();
    let result = emulator.launch(&program(41), [1, 1, 1], &[]);
    let fault =
        fault_naming(result, FaultKind::OutOfBounds, &["offset 160 of shared array `first`, which has 160"]);
    assert_eq!(fault.object.as_deref(), Some("first"));
    let program = kernel("far", 32, |k| {
        let first = k.shared::<f32>("first", 40);
        first.at(k.thread() - 1).store(1.0);
    });
    let result = emulator.launch(&program, [1, 1, 1], &[]);
    fault_naming(result, FaultKind::OutOfBounds, &["offset -4 of shared array `first`"]);
}

#[test]
fn two_lanes_that_disagree_about_a_byte_are_caught() {
    let program = |same: bool| {
        kernel("conflict", 32, |k| {
            let tile = k.shared::<u8>("tile", 32);
            let value = if same { k.constant(3u32) } else { k.thread().reinterpret::<u32>() };
            tile.at(k.thread() & 15).store(value);
        })
    };
    let emulator = Emulator::new();
    emulator.launch(&program(true), [1, 1, 1], &[]).unwrap();
    let result = emulator.launch(&program(false), [1, 1, 1], &[]);
    let fault = fault_naming(result, FaultKind::WriteConflict, &["`tile` + 0"]);
    assert_eq!(fault.lanes, 1 << 16);
}

#[test]
fn atomics_count() {
    for space in [Space::Global, Space::Shared] {
        let cases = [
            (AtomicOp::Add, Ty::S32, 5, 2, 5 + 2 * 64),
            (AtomicOp::Max, Ty::S32, -7i32, 63, 63),
            (AtomicOp::Min, Ty::S32, 9, -3, -3),
            (AtomicOp::Or, Ty::U32, 5, 6, 7),
        ];
        for (op, ty, first, operand, expected) in cases {
            let mut raw = Raw::new(64);
            let out = raw.pointer("out");
            let place = if space == Space::Global { out.operand() } else { raw.shared("cell", 4).operand() };
            let thread = raw.thread();
            let is_first = raw.compare(sage_ptx::isa::Cmp::Eq, thread, 0);
            raw.when(is_first, |raw| raw.store(space, place, first));
            raw.barrier();
            let old = raw.b32();
            raw.emit(
                Op::Memory(Memory::Atomic { space, op, ty, offset: 0 }),
                &[old],
                &[place, operand.operand()],
            );
            raw.barrier();
            raw.when(is_first, |raw| {
                let last = raw.load(space, place);
                raw.store(Space::Global, out, last);
            });
            let mut emulator = Emulator::new();
            let out = emulator.uninitialized("out", 4);
            emulator.launch(&raw.done(), [1, 1, 1], &[out.arg()]).unwrap();
            assert_eq!(emulator.read::<i32>(out), [expected], "{space:?} {op:?}");
        }
    }
}

#[test]
fn arguments_are_checked_by_name() {
    let mut emulator = Emulator::new();
    let x = emulator.buffer("x", &[1.0f32; 32]);
    let result = emulator.launch(&double(0), [1, 1, 1], &[x.arg()]).unwrap_err();
    assert_eq!(result.kind(), Some(FaultKind::Arguments));
    assert!(result.to_string().contains("1 arguments, expected 2: x, y"), "{result}");
    let result = emulator.launch(&double(0), [1, 1, 1], &[x.arg(), Arg::F32(1.0)]).unwrap_err();
    assert!(result.to_string().contains("argument `y` is F32, expected Pointer"), "{result}");
    let result = emulator.launch(&double(0), [0, 1, 1], &[x.arg(), x.arg()]).unwrap_err();
    assert!(result.to_string().contains("grid"), "{result}");
}
