//! What an older target lacks, and what takes its place there: the same bits.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sage_emulator::Emulator;
use sage_ptx::Target;
use sage_ptx::isa::{Convert, Lane, Redux, Space, Ty, Warp, Width};
use sage_ptx::program::{Program, Reg};

mod support;
use support::{Raw, Source};

/// A program in which every lane stores what `write` makes of two words of its own.
fn program(write: impl Fn(&mut Raw, [Reg; 2]) -> Reg) -> Program {
    let mut raw = Raw::new(32);
    let (from, to) = (raw.pointer("from"), raw.pointer("to"));
    let thread = raw.thread();
    let words = [0, 32].map(|first| {
        let index = raw.add(thread, first);
        let place = raw.at(from, index, 4);
        raw.load(Space::Global, place)
    });
    let result = write(&mut raw, words);
    let place = raw.at(to, thread, 4);
    raw.store(Space::Global, place, result);
    raw.done()
}

fn run(program: &Program, words: &[u32]) -> Vec<u32> {
    let mut emulator = Emulator::new();
    let (from, to) = (emulator.buffer("from", words), emulator.uninitialized("to", 128));
    emulator.launch(program, [1, 1, 1], &[from.arg(), to.arg()]).unwrap();
    emulator.read(to)
}

/// Bits that are special as singles or as halves, and then any.
const SPECIAL: [u32; 14] = [
    0,
    0x8000_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7f7f_ffff,
    1,
    0x0000_8000,
    0x7c00_fc00,
    0x7bff_0001,
    0x3f80_8000,
    0x3f80_7fff,
    0x3f81_8000,
    0x7f7f_8000,
    0x8001_03ff,
];

/// NaNs as singles, and as halves of both types.
const NANS: [u32; 4] = [0x7fff_ffff, 0xffc0_0000, 0x7e00_3c00, 0x3f80_ffff];

fn words(specials: &[u32], random: &mut u64) -> Vec<u32> {
    (0..64)
        .map(|_| {
            *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let bits = (*random >> 32) as u32;
            if bits & 3 == 0 { bits.reverse_bits() } else { specials[(bits >> 8) as usize % specials.len()] }
        })
        .collect()
}

/// Compares both forms on many words; those that `skipped` picks count as equal.
fn compare(
    name: &str,
    specials: &[u32],
    skipped: impl Fn([u32; 2]) -> bool,
    write: impl Fn(&mut Raw, [Reg; 2]) -> Reg,
) {
    let program = program(write);
    let lowered = program.lowered(Target::SM_75);
    assert!(program.missing_on(Target::SM_75).is_none(), "{name}");
    assert!(lowered.validate().is_ok(), "{name}: {:?}", lowered.validate());
    let mut random = 7;
    for _ in 0..40 {
        let words = words(specials, &mut random);
        let (expected, found) = (run(&program, &words), run(&lowered, &words));
        for lane in (0..32).filter(|&lane| !skipped([words[lane], words[32 + lane]])) {
            let (a, b) = (words[lane], words[32 + lane]);
            let (found, expected) = (found[lane], expected[lane]);
            assert_eq!(found, expected, "{name} of {a:#010x} and {b:#010x}: {found:#010x}, {expected:#010x}");
        }
    }
}

#[test]
fn extremes_are_the_same() {
    let all = [&SPECIAL[..], &NANS].concat();
    for ty in [Ty::F32, Ty::F16x2, Ty::BF16x2] {
        for op in [Lane::MinNan(ty), Lane::MaxNan(ty)] {
            compare(
                &format!("{op:?}"),
                &all,
                |_| false,
                |raw, [a, b]| raw.lane(op, &[a.operand(), b.operand()]),
            );
        }
    }
    // Of two NaNs the plain ones return some NaN.
    let some_nan = |words: [u32; 2]| {
        let nan = |half: u32| half & 0x7fff > 0x7c00;
        words.iter().any(|&word| nan(word) || nan(word >> 16))
    };
    for ty in [Ty::F16x2, Ty::BF16x2] {
        for op in [Lane::Min(ty), Lane::Max(ty)] {
            let write = |raw: &mut Raw, [a, b]: [Reg; 2]| raw.lane(op, &[a.operand(), b.operand()]);
            compare(&format!("{op:?}"), &SPECIAL, some_nan, write);
        }
    }
}

#[test]
fn conversions_are_the_same() {
    let is_nan = |word: u32| f32::from_bits(word).is_nan();
    // NaNs become NaNs, but not all of the same bits.
    let skipped = |words: [u32; 2]| words.into_iter().any(is_nan);
    for convert in [Convert::F32ToF16x2, Convert::F32ToBF16x2] {
        let write =
            |raw: &mut Raw, [a, b]: [Reg; 2]| raw.lane(Lane::Convert(convert), &[a.operand(), b.operand()]);
        compare(&format!("{convert:?}"), &SPECIAL, skipped, write);
    }
    compare("there and back", &SPECIAL, skipped, |raw, [a, _]| {
        let half = raw.lane(Lane::Convert(Convert::F32ToBF16), &[a.operand()]);
        raw.lane(Lane::Convert(Convert::BF16ToF32), &[half.operand()])
    });
    let lowered =
        program(|raw, [a, b]| raw.lane(Lane::Convert(Convert::F32ToBF16x2), &[a.operand(), b.operand()]));
    let found = run(&lowered.lowered(Target::SM_75), &[NANS[1]; 64]);
    assert_eq!(found, [0x7fff_7fff; 32]);
}

#[test]
fn reductions_are_the_same() {
    for ty in [Ty::S32, Ty::U32] {
        for redux in [Redux::Add, Redux::Min, Redux::Max] {
            compare(
                &format!("{redux:?} {ty:?}"),
                &SPECIAL,
                |_| false,
                |raw, [a, _]| {
                    let dst = raw.reg(Width::B32);
                    raw.warp(Warp::Redux(redux, ty), &[dst], &[a.operand()]);
                    dst
                },
            );
        }
    }
}
