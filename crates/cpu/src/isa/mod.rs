//! Instruction sets. Each is a handful of vector operations ([`Isa`]); every algorithm is written once above them.

use std::fmt;

mod portable;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

pub(crate) use portable::Portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use {
    avx2::{Avx2, AvxVnni},
    avx512::Avx512,
};

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;

/// How quantised rows of Q and K are laid out in 32-bit words, the unit of an integer dot product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IntWord {
    /// Two 16-bit integers: `madd`.
    Pair,
    /// Four signed 8-bit integers: `sdot`.
    Quad,
    /// Four 8-bit integers, those of Q offset by 128 to be unsigned: `dpbusd`. K's row sums undo the offset.
    QuadOffset,
}

impl IntWord {
    /// Channels in a word.
    pub(crate) const fn channels(self) -> usize {
        match self {
            IntWord::Pair => 2,
            IntWord::Quad | IntWord::QuadOffset => 4,
        }
    }

    /// What is added to each value of Q.
    pub(crate) const fn q_offset(self) -> i32 {
        match self {
            IntWord::Pair | IntWord::Quad => 0,
            IntWord::QuadOffset => 128,
        }
    }

    /// Packs a row's channels into words; channels beyond the end are zero.
    #[inline(always)]
    pub(crate) fn pack_row<'a>(self, channels: &[i32], words: impl Iterator<Item = &'a mut u32>) {
        match self {
            IntWord::Pair => pack_row::<2, 0xffff>(channels, words),
            IntWord::Quad | IntWord::QuadOffset => pack_row::<4, 0xff>(channels, words),
        }
    }
}

#[inline(always)]
fn pack_row<'a, const N: usize, const MASK: u32>(
    channels: &[i32],
    mut words: impl Iterator<Item = &'a mut u32>,
) {
    let pack = |channels: &[i32]| {
        channels.iter().rev().fold(0, |word, &x| (word << (32 / N as u32)) | (x as u32 & MASK))
    };
    let (whole, rest) = channels.as_chunks::<N>();
    whole.iter().zip(&mut words).for_each(|(channels, word)| *word = pack(channels));
    if !rest.is_empty()
        && let Some(word) = words.next()
    {
        *word = pack(rest);
    }
}

/// A set of vector instructions.
///
/// # Safety
/// Every operation may use instructions that the processor lacks: call them only where the set was detected, inside
/// a function that enables it (see `kernels::table`), or the compiler cannot inline them. Loads and stores take
/// unaligned pointers that must be valid for a whole vector.
pub(crate) trait Isa: 'static {
    /// `LANES` single-precision numbers.
    type F: Copy;
    /// `LANES` 32-bit integers or words.
    type I: Copy;
    /// Numbers in a vector.
    const LANES: usize;
    /// Operands of [`Isa::dot_int`].
    const WORD: IntWord;

    /// Asks for a cache line that will be read soon; any address will do.
    unsafe fn prefetch<T>(p: *const T);

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn load_f16(p: *const half::f16) -> Self::F;
    unsafe fn load_bf16(p: *const half::bf16) -> Self::F;
    /// Loads 8-bit integers.
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// Loads E4M3 values that are not NaN, times 2⁻⁸: so their bits are those of a half, moved.
    unsafe fn load_e4m3(p: *const u8) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, for magnitudes below 2²².
    unsafe fn round(x: Self::F) -> Self::F;
    /// `x · 2ⁿ` for an integral `n` that keeps the result normal.
    unsafe fn scale_exponent(x: Self::F, n: Self::F) -> Self::F;
    /// Zero where `x < limit`, else `y`; `y` where `x` is NaN.
    unsafe fn zero_below(x: Self::F, limit: Self::F, y: Self::F) -> Self::F;
    unsafe fn reduce_add(x: Self::F) -> f32;
    /// The largest lane; NaN lanes may be ignored.
    unsafe fn reduce_max(x: Self::F) -> f32;

    unsafe fn splat_int(x: u32) -> Self::I;
    unsafe fn load_int(p: *const u32) -> Self::I;
    /// `2 · LANES` 8-bit integers as 16-bit halves of words, in order.
    unsafe fn load_i8_pairs(p: *const i8) -> Self::I;
    unsafe fn add_int(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn reduce_add_int(x: Self::I) -> i32;
    /// [`Isa::reduce_add_int`] of four vectors.
    #[inline(always)]
    unsafe fn reduce_add_ints(x: [Self::I; 4]) -> [i32; 4] {
        // SAFETY: the caller vouches for the instruction set.
        x.map(|x| unsafe { Self::reduce_add_int(x) })
    }
    /// Exact for magnitudes up to 2²⁴.
    unsafe fn int_to_float(x: Self::I) -> Self::F;
    /// To the nearest integer; anything for NaN.
    unsafe fn float_to_int(x: Self::F) -> Self::I;
    /// Stores `2 · LANES` integers between 0 and 32767 as 16-bit ones.
    unsafe fn store_i16(p: *mut i16, low: Self::I, high: Self::I);
    /// `acc + Σ q·k` over the channels of each word, Q's word first.
    unsafe fn dot_int(acc: Self::I, q: Self::I, k: Self::I) -> Self::I;
    /// `acc + Σ a·b` over the bytes of four words: those of `a` 0..=24, those of `b` −12..=12.
    #[inline(always)]
    unsafe fn dot_block(acc: Self::I, a: [Self::I; 4], b: [Self::I; 4]) -> Self::I {
        const { assert!(Self::WORD.channels() == 4) };
        // SAFETY: the caller vouches for the instruction set. So small, bytes are the same signed and unsigned.
        (0..4).fold(acc, |acc, i| unsafe { Self::dot_int(acc, a[i], b[i]) })
    }
    /// `acc + a₀b₀ + a₁b₁` over the 16-bit halves of each word.
    unsafe fn dot_i16(acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
}

/// Where [`exp2`] stops falling: `2^-125` times anything below 2¹²⁷ still rounds to nothing beside a 1.
pub(crate) const EXP2_LOWEST: f32 = -125.0;

/// Coefficients of a polynomial of `2^f` on ±½, the highest first: minimax among those whose last is 1, so that `2⁰`, a
/// row's factor where its maximum stays, is exactly 1. Its relative error is 9.2e-8, 2.4e-7 when evaluated in f32.
// Not meant to be ln 2 where they are near it.
#[allow(clippy::approx_constant)]
pub(crate) const EXP2: [f32; 6] =
    [0.001_326_472_8, 0.009_671_513, 0.055_507_336, 0.240_222_42, 0.693_147, 1.0];

/// The same of `scale · 2^f`, of one degree less: its relative error is 2.9e-6, a hundredth of what rounding to 12 bits
/// leaves. The factor rides on the coefficients, and `scale · 2⁰` is exactly `scale`.
pub(crate) const fn scaled_exp2(scale: f32) -> [f32; 5] {
    [0.009_582_856 * scale, 0.055_906_43 * scale, 0.240_241 * scale, 0.693_124_2 * scale, scale]
}

/// `2ˣ` as `polynomial` has it, for `x ≤ 115`; of −125 for lower `x`, NaN for NaN.
///
/// Several vectors at once, step by step: one alone would leave the processor waiting for each step.
#[inline(always)]
pub(crate) unsafe fn exp2<I: Isa, const N: usize>(polynomial: &[f32], mut x: [I::F; N]) -> [I::F; N] {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let mut n = x;
        for (n, x) in n.iter_mut().zip(&mut x) {
            *x = I::max(I::splat(EXP2_LOWEST), *x);
            *n = I::round(*x);
            *x = I::sub(*x, *n);
        }
        let mut p = [I::splat(polynomial[0]); N];
        for c in &polynomial[1..] {
            for (p, x) in p.iter_mut().zip(&x) {
                *p = I::fma(*p, *x, I::splat(*c));
            }
        }
        for (p, n) in p.iter_mut().zip(&n) {
            *p = I::scale_exponent(*p, *n);
        }
        p
    }
}

/// [`exp2`] of one vector, but exactly 0 for `x < −125`.
#[inline(always)]
pub(crate) unsafe fn exp2_or_zero<I: Isa>(x: I::F) -> I::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { I::zero_below(x, I::splat(EXP2_LOWEST), exp2::<I, 1>(&EXP2, [x])[0]) }
}

/// An instruction set that a machine may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InstructionSet {
    /// Plain Rust, vectorised by the compiler for the target it was built for.
    Portable,
    /// 256-bit FMA and `vpmaddwd`.
    Avx2,
    /// AVX2 with `vpdpbusd` and `vpdpwssd`.
    AvxVnni,
    /// 512-bit FMA, `vpdpbusd` and `vpdpwssd`.
    Avx512Vnni,
    /// AVX-512 with AMX's tiles of 8-bit integers and bfloat16.
    Amx,
    /// 128-bit FMA and `sdot`.
    NeonDotprod,
}

impl InstructionSet {
    /// The name that is printed and accepted.
    pub const fn name(self) -> &'static str {
        match self {
            InstructionSet::Portable => "portable",
            InstructionSet::Avx2 => "avx2",
            InstructionSet::AvxVnni => "avx-vnni",
            InstructionSet::Avx512Vnni => "avx512-vnni",
            InstructionSet::Amx => "amx",
            InstructionSet::NeonDotprod => "neon-dotprod",
        }
    }

    /// The sets of this machine, fastest first; always ends with [`InstructionSet::Portable`].
    pub fn detected() -> Vec<InstructionSet> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vnni") {
                #[cfg(target_os = "linux")]
                if has!("avx512bf16") && amx::is_allowed() {
                    found.push(InstructionSet::Amx);
                }
                found.push(InstructionSet::Avx512Vnni);
            }
            if avx2 && has!("avxvnni") {
                found.push(InstructionSet::AvxVnni);
            }
            if avx2 {
                found.push(InstructionSet::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            found.push(InstructionSet::NeonDotprod);
        }
        found.push(InstructionSet::Portable);
        found
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests;
