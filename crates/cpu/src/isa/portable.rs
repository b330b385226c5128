//! Plain Rust on arrays: what runs where no instruction set was detected, and the twin that the others are tested
//! against. The word layout is a parameter, so that every layout has a twin on every machine.

use half::{bf16, f16};

use super::{IntWord, Isa};

const LANES: usize = 8;

/// Arrays of eight, with words of [`IntWord::Pair`] (0), [`IntWord::Quad`] (1) or [`IntWord::QuadOffset`] (2).
pub(crate) struct Portable<const WORD: u8 = 0>;

#[inline(always)]
fn map(a: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl<const WORD: u8> Isa for Portable<WORD> {
    type F = [f32; LANES];
    type I = [u32; LANES];
    const LANES: usize = LANES;
    const WORD: IntWord = match WORD {
        0 => IntWord::Pair,
        1 => IntWord::Quad,
        _ => IntWord::QuadOffset,
    };

    #[inline(always)]
    unsafe fn prefetch<T>(_: *const T) {}
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector.
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector.
        unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector.
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector.
        let codes = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        codes.map(|code| {
            // The bits of a single, but 2¹²⁰ times too small: subnormal codes become subnormal singles.
            let bits = (u32::from(code) & 0x80) << 24 | (u32::from(code) & 0x7f) << 20;
            f32::from_bits(bits) * f32::from_bits((127 + 112) << 23)
        })
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        // SAFETY: the caller's pointer is valid for a vector.
        unsafe { p.cast::<Self::F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Two roundings: without an FMA unit `mul_add` would be a library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(x: Self::F) -> Self::F {
        // Adding 1.5 · 2²³ leaves no bits for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        map(x, |x| (x + SHIFT) - SHIFT)
    }
    #[inline(always)]
    unsafe fn scale_exponent(x: Self::F, n: Self::F) -> Self::F {
        zip(x, n, |x, n| f32::from_bits(x.to_bits().wrapping_add(((n as i32) << 23) as u32)))
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::F, limit: Self::F, y: Self::F) -> Self::F {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    unsafe fn reduce_add(x: Self::F) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }
    #[inline(always)]
    unsafe fn reduce_max(x: Self::F) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn splat_int(x: u32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_int(p: *const u32) -> Self::I {
        // SAFETY: the caller's pointer is valid for a vector.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_i8_pairs(p: *const i8) -> Self::I {
        // SAFETY: the caller's pointer is valid for two vectors of 8-bit integers.
        let values = unsafe { p.cast::<[[i8; 2]; LANES]>().read_unaligned() };
        values.map(|[low, high]| i32::from(low) as u32 & 0xffff | (i32::from(high) as u32) << 16)
    }
    #[inline(always)]
    unsafe fn add_int(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn reduce_add_int(x: Self::I) -> i32 {
        x.into_iter().fold(0, |sum, x| sum.wrapping_add(x as i32))
    }
    #[inline(always)]
    unsafe fn int_to_float(x: Self::I) -> Self::F {
        std::array::from_fn(|i| x[i] as i32 as f32)
    }
    #[inline(always)]
    unsafe fn float_to_int(x: Self::F) -> Self::I {
        // SAFETY: plain arithmetic here.
        unsafe { Self::round(x) }.map(|x| x as i32 as u32)
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, low: Self::I, high: Self::I) {
        for i in 0..LANES {
            // SAFETY: the caller's pointer is valid for two vectors of 16-bit integers.
            unsafe {
                p.add(i).write_unaligned(low[i] as i16);
                p.add(LANES + i).write_unaligned(high[i] as i16);
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_int(acc: Self::I, q: Self::I, k: Self::I) -> Self::I {
        match Self::WORD {
            // SAFETY: plain arithmetic here.
            IntWord::Pair => unsafe { Self::dot_i16(acc, q, k) },
            IntWord::Quad => std::array::from_fn(|i| {
                let (q, k) = (q[i].to_le_bytes(), k[i].to_le_bytes());
                (0..4).fold(acc[i], |sum, c| sum.wrapping_add((q[c] as i8 as i32 * k[c] as i8 as i32) as u32))
            }),
            IntWord::QuadOffset => std::array::from_fn(|i| {
                let (q, k) = (q[i].to_le_bytes(), k[i].to_le_bytes());
                (0..4).fold(acc[i], |sum, c| sum.wrapping_add((q[c] as i32 * k[c] as i8 as i32) as u32))
            }),
        }
    }
    #[inline(always)]
    unsafe fn dot_block(acc: Self::I, a: [Self::I; 4], b: [Self::I; 4]) -> Self::I {
        // Sums of 16 bits hold the products of all bytes that are even, or odd, in four words.
        let halves = |word: u32| [word as i16, (word >> 16) as i16];
        let mut sums = [[0i16; 2]; LANES];
        for (a, b) in a.iter().zip(&b) {
            for ((sums, &a), &b) in sums.iter_mut().zip(a).zip(b) {
                for ((sum, a), b) in sums.iter_mut().zip(halves(a)).zip(halves(b)) {
                    let even = (a & 0xff).wrapping_mul(b << 8 >> 8);
                    let odd = (a >> 8).wrapping_mul(b >> 8);
                    *sum = sum.wrapping_add(even).wrapping_add(odd);
                }
            }
        }
        std::array::from_fn(|i| acc[i].wrapping_add((i32::from(sums[i][0]) + i32::from(sums[i][1])) as u32))
    }
    #[inline(always)]
    unsafe fn dot_i16(acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        let low = |x: u32| x as i16 as i32;
        let high = |x: u32| (x >> 16) as i16 as i32;
        std::array::from_fn(|i| {
            (acc[i] as i32).wrapping_add(low(a[i]) * low(b[i])).wrapping_add(high(a[i]) * high(b[i])) as u32
        })
    }
}
