//! 128-bit vectors of Armv8.2 with `sdot`, whose intrinsics are not stable: inline assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::{IntWord, Isa};

/// NEON with the dot-product extension.
pub(crate) struct Neon;

// SAFETY of the blocks below: the trait's callers vouch for the instruction set and the pointers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Isa for Neon {
    type F = float32x4_t;
    type I = uint32x4_t;
    const LANES: usize = 4;
    const WORD: IntWord = IntWord::Quad;

    #[inline(always)]
    unsafe fn prefetch<T>(p: *const T) {
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly)) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> float32x4_t {
        unsafe {
            let bits = vld1_u16(p.cast());
            let wide: float32x4_t;
            asm!("fcvtl {wide:v}.4s, {bits:v}.4h", wide = lateout(vreg) wide, bits = in(vreg) bits,
                options(pure, nomem, nostack, preserves_flags));
            wide
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> float32x4_t {
        unsafe {
            let bytes = vcreate_s8(p.cast::<u32>().read_unaligned().into());
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> float32x4_t {
        unsafe {
            let bytes = vcreate_s8(p.cast::<u32>().read_unaligned().into());
            // Each code in the upper byte; one step down leaves the sign twice, once where no exponent reaches.
            let half = vshr_n_s16::<1>(vshl_n_s16::<8>(vget_low_s16(vmovl_s8(bytes))));
            let half = vand_u16(vreinterpret_u16_s16(half), vdup_n_u16(0xbfff));
            let wide: float32x4_t;
            asm!("fcvtl {wide:v}.4s, {half:v}.4h", wide = lateout(vreg) wide, half = in(vreg) half,
                options(pure, nomem, nostack, preserves_flags));
            wide
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: float32x4_t) {
        unsafe { vst1q_f32(p, x) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // A select, not `fmax`, which would return NaN where `a` is NaN.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn round(x: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(x) }
    }
    #[inline(always)]
    unsafe fn scale_exponent(x: float32x4_t, n: float32x4_t) -> float32x4_t {
        unsafe {
            let exponent = vshlq_n_s32::<23>(vcvtq_s32_f32(n));
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), exponent))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(x: float32x4_t, limit: float32x4_t, y: float32x4_t) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit))) }
    }
    #[inline(always)]
    unsafe fn reduce_add(x: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(x) }
    }
    #[inline(always)]
    unsafe fn reduce_max(x: float32x4_t) -> f32 {
        unsafe { vmaxnmvq_f32(x) }
    }
    #[inline(always)]
    unsafe fn splat_int(x: u32) -> uint32x4_t {
        unsafe { vdupq_n_u32(x) }
    }
    #[inline(always)]
    unsafe fn load_int(p: *const u32) -> uint32x4_t {
        unsafe { vld1q_u32(p) }
    }
    #[inline(always)]
    unsafe fn load_i8_pairs(p: *const i8) -> uint32x4_t {
        unsafe { vreinterpretq_u32_s16(vmovl_s8(vld1_s8(p))) }
    }
    #[inline(always)]
    unsafe fn reduce_add_ints([a, b, c, d]: [uint32x4_t; 4]) -> [i32; 4] {
        unsafe {
            let mut sums = [0i32; 4];
            let vector = vpaddq_u32(vpaddq_u32(a, b), vpaddq_u32(c, d));
            vst1q_s32(sums.as_mut_ptr(), vreinterpretq_s32_u32(vector));
            sums
        }
    }
    #[inline(always)]
    unsafe fn add_int(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe { vaddq_u32(a, b) }
    }
    #[inline(always)]
    unsafe fn reduce_add_int(x: uint32x4_t) -> i32 {
        unsafe { vaddvq_u32(x) as i32 }
    }
    #[inline(always)]
    unsafe fn int_to_float(x: uint32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(vreinterpretq_s32_u32(x)) }
    }
    #[inline(always)]
    unsafe fn float_to_int(x: float32x4_t) -> uint32x4_t {
        unsafe { vreinterpretq_u32_s32(vcvtnq_s32_f32(x)) }
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, low: uint32x4_t, high: uint32x4_t) {
        unsafe { vst1q_u16(p.cast(), vcombine_u16(vmovn_u32(low), vmovn_u32(high))) }
    }
    #[inline(always)]
    unsafe fn dot_int(acc: uint32x4_t, q: uint32x4_t, k: uint32x4_t) -> uint32x4_t {
        let mut sum = acc;
        unsafe {
            asm!(".arch_extension dotprod", "sdot {sum:v}.4s, {q:v}.16b, {k:v}.16b",
                sum = inout(vreg) sum, q = in(vreg) q, k = in(vreg) k,
                options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }
    #[inline(always)]
    unsafe fn dot_i16(acc: uint32x4_t, a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe {
            let (a, b) = (vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b));
            // The halves, sign-extended in place: there is no 16-bit dot product.
            let low = |x| vshrq_n_s32::<16>(vshlq_n_s32::<16>(x));
            let high = |x| vshrq_n_s32::<16>(x);
            let sum = vmlaq_s32(vreinterpretq_s32_u32(acc), low(a), low(b));
            vreinterpretq_u32_s32(vmlaq_s32(sum, high(a), high(b)))
        }
    }
}
