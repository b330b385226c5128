//! What the tests of instruction sets and kernels share: each set and each table of this machine, vectors as slices,
//! and the scalars that they are compared with.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::InstructionSet;
use crate::isa::{IntWord, Isa};
use crate::kernels::{Kernels, RowState};
use crate::tile::{Fixed12Word, TILE_KEYS};

/// Calls a function that is generic over [`Isa`] for each set of this machine, and for every word layout.
macro_rules! on_each_isa {
    ($check:ident) => {
        $check::<crate::isa::Portable<0>>();
        $check::<crate::isa::Portable<1>>();
        $check::<crate::isa::Portable<2>>();
        for set in crate::InstructionSet::detected() {
            match set {
                #[cfg(target_arch = "x86_64")]
                crate::InstructionSet::Avx2 => $check::<crate::isa::Avx2>(),
                #[cfg(target_arch = "x86_64")]
                crate::InstructionSet::AvxVnni => $check::<crate::isa::AvxVnni>(),
                #[cfg(target_arch = "x86_64")]
                crate::InstructionSet::Avx512Vnni => $check::<crate::isa::Avx512>(),
                #[cfg(target_arch = "aarch64")]
                crate::InstructionSet::NeonDotprod => $check::<crate::isa::Neon>(),
                _ => {}
            }
        }
    };
}
pub(crate) use on_each_isa;

/// The tables of this machine.
pub(crate) fn tables() -> impl Iterator<Item = (InstructionSet, &'static Kernels)> {
    InstructionSet::detected().into_iter().map(|set| (set, crate::kernels(set)))
}

pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Asserts that `actual` is `expected` within a relative and an absolute error, together.
pub(crate) fn close(actual: f32, expected: f64, relative: f64, absolute: f64, what: impl Fn() -> String) {
    let error = (f64::from(actual) - expected).abs();
    let bound = relative * expected.abs() + absolute;
    assert!(error <= bound, "{}: {actual}, expected {expected} ± {bound:.1e}", what());
}

pub(crate) fn vector<I: Isa>(x: &[f32]) -> I::F {
    assert!(x.len() >= I::LANES);
    // SAFETY: `on_each_isa` names detected sets only, and the assertion bounds what is read.
    unsafe { I::load(x.as_ptr()) }
}

pub(crate) fn words<I: Isa>(x: &[u32]) -> I::I {
    assert!(x.len() >= I::LANES);
    // SAFETY: `on_each_isa` names detected sets only, and the assertion bounds what is read.
    unsafe { I::load_int(x.as_ptr()) }
}

pub(crate) fn lanes<I: Isa>(x: I::F) -> Vec<f32> {
    let mut out = vec![0.0; I::LANES];
    // SAFETY: `on_each_isa` names detected sets only, and the buffer holds a vector.
    unsafe { I::store(out.as_mut_ptr(), x) }
    out
}

pub(crate) fn int_lanes<I: Isa>(x: I::I) -> Vec<i32> {
    assert_eq!(size_of::<I::I>(), 4 * I::LANES);
    let mut out = vec![0i32; I::LANES];
    // SAFETY: the vector is `LANES` integers, and so is the buffer.
    unsafe { out.as_mut_ptr().cast::<I::I>().write_unaligned(x) }
    out
}

/// `Σ q·k` over a word's channels.
pub(crate) fn dot(word: IntWord, q: u32, k: u32) -> i32 {
    let pairs = |x: u32| [x as i16 as i32, (x >> 16) as i16 as i32];
    let signed = |x: u32| x.to_le_bytes().map(|x| i32::from(x as i8));
    let unsigned = |x: u32| x.to_le_bytes().map(i32::from);
    let sum =
        |q: &[i32], k: &[i32]| q.iter().zip(k).fold(0i32, |sum, (q, k)| sum.wrapping_add(q.wrapping_mul(*k)));
    match word {
        IntWord::Pair => sum(&pairs(q), &pairs(k)),
        IntWord::Quad => sum(&signed(q), &signed(k)),
        IntWord::QuadOffset => sum(&unsigned(q), &signed(k)),
    }
}

/// A state with factors for `rows` rows: some keep the output, some drop it.
pub(crate) fn factors(rows: usize) -> RowState {
    let mut state = RowState::default();
    state.reset(rows);
    for r in 0..rows {
        state.alpha[r] = if r % 3 == 0 { 0.0 } else { 0.5 + r as f32 };
        state.beta[r] = 1.0 / (1.0 + r as f32);
    }
    state
}

/// The 12-bit probability of a column in a row of words.
pub(crate) fn fixed12_p(word: Fixed12Word, row: &[u32], column: usize) -> i32 {
    let byte = |at: usize| i32::from(row[at / 4].to_le_bytes()[at % 4]);
    match word {
        Fixed12Word::Pair => (row[column / 2] >> (16 * (column % 2))) as u16 as i32,
        Fixed12Word::Digits => 64 * byte(column) + byte(TILE_KEYS + column),
    }
}

/// The 12-bit value of a key in a panel of V, in the panel's channel `at`.
pub(crate) fn fixed12_v((form, width): (Fixed12Word, usize), panel: &[u32], key: usize, at: usize) -> i32 {
    let byte = |word: u32| i32::from(word.to_le_bytes()[key % 4] as i8);
    let word = |row: usize| panel[row * width + at];
    match form {
        Fixed12Word::Pair => i32::from((word(key / 2) >> (16 * (key % 2))) as i16),
        Fixed12Word::Digits => 64 * byte(word(key / 4)) + byte(word((TILE_KEYS + key) / 4)),
    }
}
