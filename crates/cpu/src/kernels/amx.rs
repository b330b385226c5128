//! Products by AMX, whose tiles of 16 rows of 64 bytes are multiplied as a whole: 16 · 16 · 64 products of 8-bit integers an
//! instruction, where VNNI has 16 · 4, or half as many of bfloat16.
//!
//! Sums of integers are exact, so that integer scores and 12-bit P·V equal the other kernels' to the last bit. 12-bit P and V
//! are two digits each ([`Fixed12Word::Digits`]): `P·V = 4096 · P₁V₁ + 64 · (P₁V₀ + P₀V₁) + P₀V₀`. Of bfloat16 the
//! instruction takes numbers below the normal range for zero.
//!
//! The last tile of rows, where they do not fill it, lies over the one before: its first rows are computed twice.
//!
//! [`Fixed12Word::Digits`]: crate::tile::Fixed12Word::Digits

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::product::{Scores, Values, check_values};
use super::softmax::{
    Softmax, StoreFixed12, check_softmax, finite_shift, row_max, softmax_fixed12 as softmax_fixed12_of,
};
use crate::isa::Avx512;
use crate::tile::TILE_KEYS;

/// Rows of a register tile of AVX-512's kernels, and of these.
pub(super) const ROWS: usize = 12;

/// Keys of a K panel, channels of a V panel: two tiles side by side.
const WIDTH: usize = 32;

/// Rows of a tile.
const TILE_ROWS: usize = 16;

/// Words of a tile's row.
const TILE_WORDS: usize = 16;

/// What packed rows of Q and K are padded to: whole rows of tiles.
pub(super) const DEPTH_STEP: usize = TILE_WORDS;

/// Bytes from one row of a panel to the next.
const PANEL_STRIDE: usize = 4 * WIDTH;

/// Bytes from one row of scores to the next.
const SCORE_STRIDE: usize = 4 * TILE_KEYS;

/// Words from a panel's upper digits to its lower ones.
const LOWER_DIGITS: usize = TILE_KEYS / 4 * WIDTH;

/// The shapes of the eight tile registers, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// `left` registers from `first_left` on for operands of `rows` rows of `depth` words, those behind them for operands of
    /// `depth` rows, and those before for sums.
    fn new(rows: usize, depth: usize, first_left: usize, left: usize) -> Self {
        debug_assert!(rows <= TILE_ROWS && depth <= TILE_WORDS);
        let mut shapes =
            Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for register in 0..8 {
            let (rows, words) = match register {
                r if r < first_left => (rows, TILE_WORDS),
                r if r < first_left + left => (rows, depth),
                _ => (depth, TILE_WORDS),
            };
            (shapes.rows[register], shapes.row_bytes[register]) = (rows as u8, 4 * words as u16);
        }
        shapes
    }

    /// Four tiles of sums, two of `rows` rows at most, and two side by side of a panel.
    fn two_by_two(rows: usize) -> Self {
        Shapes::new(rows.min(TILE_ROWS), TILE_WORDS, 4, 2)
    }
}

/// The tile registers, as long as they have shapes. Giving them back spares the system from saving them.
struct Tiles;

impl Tiles {
    /// # Safety
    /// The processor must have AMX, and the system must have allowed it.
    unsafe fn shaped(shapes: &Shapes) -> Self {
        // SAFETY: the caller's promise; `Shapes` has the form that the instruction reads.
        unsafe { asm!("ldtilecfg [{}]", in(reg) shapes, options(nostack, preserves_flags, readonly)) }
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `shaped` was called, so that the instruction is there.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// The first row of each tile of those that cover `rows` rows.
fn tiles(rows: usize) -> impl Iterator<Item = usize> {
    (0..rows).step_by(TILE_ROWS).map(move |start| start.min(rows.saturating_sub(TILE_ROWS)))
}

/// The same, two at a time; the last may be one twice.
fn pairs_of_tiles(rows: usize) -> impl Iterator<Item = [usize; 2]> {
    let mut tiles = tiles(rows);
    std::iter::from_fn(move || tiles.next().map(|first| [first, tiles.next().unwrap_or(first)]))
}

/// # Safety
/// As [`super::Kernels`] says; the system must have allowed AMX.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
pub(super) unsafe fn scores_int(args: &mut Scores<'_>) {
    let (rows, panel_words) = (args.row_groups * ROWS, (args.depth + 1) * WIDTH);
    check_scores(args, panel_words);
    assert!(args.k_scale.len() >= args.panels * WIDTH);
    // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
    unsafe {
        let _tiles = Tiles::shaped(&Shapes::two_by_two(rows));
        for pair in pairs_of_tiles(rows) {
            multiply_panels::<true>(args, pair);
            for panel in 0..args.panels {
                scale_scores(args, pair[0]..(pair[1] + TILE_ROWS).min(rows), panel);
            }
        }
    }
}

/// Makes scores of the sums of some rows and a panel.
///
/// # Safety
/// As of [`scores_int`], which has checked the sizes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
unsafe fn scale_scores(args: &mut Scores<'_>, rows: Range<usize>, panel: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let start = args.k.as_ptr().add(panel * (args.depth + 1) * WIDTH);
        let scale = args.k_scale.as_ptr().add(panel * WIDTH).cast::<f32>();
        let start = [_mm512_loadu_si512(start.cast()), _mm512_loadu_si512(start.add(TILE_WORDS).cast())];
        let scale = [_mm512_loadu_ps(scale), _mm512_loadu_ps(scale.add(TILE_WORDS))];
        for row in rows {
            let q_scale = _mm512_set1_ps(*args.q_scale.get_unchecked(row));
            for c in [0, 1] {
                let at = args.scores.as_mut_ptr().add(row * TILE_KEYS + panel * WIDTH + c * TILE_WORDS);
                let sum = _mm512_add_epi32(_mm512_loadu_si512(at.cast()), start[c]);
                let factor = _mm512_mul_ps(q_scale, scale[c]);
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor));
            }
        }
    }
}

/// # Safety
/// As [`super::Kernels`] says; the system must have allowed AMX.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
pub(super) unsafe fn scores_bf16(args: &mut Scores<'_>) {
    let (rows, panel_words) = (args.row_groups * ROWS, args.depth * WIDTH);
    check_scores(args, panel_words);
    // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
    unsafe {
        let _tiles = Tiles::shaped(&Shapes::two_by_two(rows));
        for [first, second] in pairs_of_tiles(rows) {
            multiply_panels::<false>(args, [first, second]);
            for row in first..(second + TILE_ROWS).min(rows) {
                let q_scale = _mm512_set1_ps(*args.q_scale.get_unchecked(row));
                let scores = args.scores.as_mut_ptr().add(row * TILE_KEYS);
                for at in (0..args.panels * WIDTH).step_by(TILE_WORDS) {
                    let at = scores.add(at);
                    _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), q_scale));
                }
            }
        }
    }
}

/// Products of two tiles of queries with all panels of keys, of 8-bit integers or of bfloat16, where scores will be.
///
/// # Safety
/// As of the kernels of scores, which have checked the sizes and shaped the tiles.
#[inline(always)]
unsafe fn multiply_panels<const INT8: bool>(args: &mut Scores<'_>, [first, second]: [usize; 2]) {
    // Panels of integers begin with what their sums start from.
    let start = if INT8 { WIDTH } else { 0 };
    // SAFETY: the caller's promise.
    unsafe {
        let q = args.q.as_ptr();
        let q = [q.add(first * args.depth), q.add(second * args.depth)];
        for panel in 0..args.panels {
            let k = args.k.as_ptr().add(panel * (start + args.depth * WIDTH) + start);
            let scores = args.scores.as_mut_ptr().add(panel * WIDTH);
            let sums = [scores.add(first * TILE_KEYS), scores.add(second * TILE_KEYS)];
            let (stride, steps) = (4 * args.depth, args.depth / TILE_WORDS);
            if INT8 {
                multiply_int8(q, stride, k, steps, sums, SCORE_STRIDE);
            } else {
                multiply_bf16(q, stride, k, steps, sums, SCORE_STRIDE);
            }
        }
    }
}

fn check_scores(args: &Scores<'_>, panel_words: usize) {
    let rows = args.row_groups * ROWS;
    assert!(args.depth > 0 && args.depth.is_multiple_of(TILE_WORDS));
    assert!(args.q.len() >= rows * args.depth && args.q_scale.len() >= rows);
    assert!(args.k.len() >= args.panels * panel_words);
    assert!(args.panels * WIDTH <= TILE_KEYS && args.scores.len() >= rows * TILE_KEYS);
}

/// Two tiles of rows `left`, `stride` bytes apart, times a panel, of `steps` times a tile's words; the sums go to two tiles of
/// rows of `sums`, `sum_stride` bytes apart.
///
/// # Safety
/// The pointers must be valid for that, and the tiles of [`Shapes::two_by_two`].
macro_rules! two_by_two {
    ($name:ident, $instruction:literal) => {
        #[inline(always)]
        unsafe fn $name(
            left: [*const u32; 2],
            stride: usize,
            panel: *const u32,
            steps: usize,
            sums: [*mut f32; 2],
            sum_stride: usize,
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{left0} + {stride}]",
                    "tileloadd tmm6, [{panel} + {panel_stride}]",
                    "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                    "tileloadd tmm5, [{left1} + {stride}]",
                    concat!($instruction, " tmm0, tmm4, tmm6"),
                    concat!($instruction, " tmm1, tmm4, tmm7"),
                    concat!($instruction, " tmm2, tmm5, tmm6"),
                    concat!($instruction, " tmm3, tmm5, tmm7"),
                    "add {left0}, 64",
                    "add {left1}, 64",
                    "add {panel}, {panel_step}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums0} + {sum_stride}], tmm0",
                    "tilestored [{sums0} + {sum_stride} + 64], tmm1",
                    "tilestored [{sums1} + {sum_stride}], tmm2",
                    "tilestored [{sums1} + {sum_stride} + 64], tmm3",
                    left0 = inout(reg) left[0] => _,
                    left1 = inout(reg) left[1] => _,
                    panel = inout(reg) panel => _,
                    steps = inout(reg) steps => _,
                    stride = in(reg) stride,
                    panel_stride = in(reg) PANEL_STRIDE,
                    panel_step = const TILE_ROWS * PANEL_STRIDE,
                    sums0 = in(reg) sums[0],
                    sums1 = in(reg) sums[1],
                    sum_stride = in(reg) sum_stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

two_by_two!(multiply_int8, "tdpbusd");
two_by_two!(multiply_bf16, "tdpbf16ps");

/// Sums of products of two tiles of P with a panel of V.
#[repr(C, align(64))]
struct PanelSums([[f32; WIDTH]; 2 * TILE_ROWS]);

/// # Safety
/// As [`super::Kernels`] says; the system must have allowed AMX.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
pub(super) unsafe fn values_bf16(args: &mut Values<'_>) {
    let rows = args.row_groups * ROWS;
    // Softmax has left probabilities for whole panels of keys.
    args.depth = args.depth.next_multiple_of(TILE_WORDS);
    check_values(args, ROWS, WIDTH, [1, 1]);
    assert!(args.depth > 0);
    let factor = f32::from_bits(args.v_scale[0]);
    let mut sums = PanelSums([[0.0; WIDTH]; 2 * TILE_ROWS]);
    // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
    unsafe {
        let _tiles = Tiles::shaped(&Shapes::two_by_two(rows));
        let mut done = 0;
        for [first, second] in pairs_of_tiles(rows) {
            let p = args.p.as_ptr();
            let p = [p.add(first * args.p_stride), p.add(second * args.p_stride)];
            let end = (second + TILE_ROWS).min(rows);
            for panel in 0..args.panels {
                let v = args.v.as_ptr().add(panel * args.panel_words);
                let to = sums.0.as_mut_ptr();
                let to = [to.cast(), to.add(TILE_ROWS).cast()];
                multiply_bf16(p, 4 * args.p_stride, v, args.depth / TILE_WORDS, to, PANEL_STRIDE);
                for row in done..end {
                    let alpha = _mm512_set1_ps(*args.state.alpha.get_unchecked(row));
                    let beta = _mm512_set1_ps(*args.state.beta.get_unchecked(row) * factor);
                    // The second tile's rows count from its own first.
                    let at = if row < first + TILE_ROWS { row - first } else { row + TILE_ROWS - second };
                    for c in [0, TILE_WORDS] {
                        let x = _mm512_load_ps(sums.0.as_ptr().add(at).cast::<f32>().add(c));
                        let out = args.out.as_mut_ptr().add((row * args.panels + panel) * WIDTH + c);
                        let kept = _mm512_mul_ps(_mm512_loadu_ps(out), alpha);
                        _mm512_storeu_ps(out, _mm512_fmadd_ps(x, beta, kept));
                    }
                }
            }
            done = end;
        }
    }
}

/// As the softmax of [`Rounded::BF16`](crate::tile::Rounded::BF16), with the probabilities as words.
///
/// # Safety
/// As [`super::Kernels`] says; the processor must have AVX-512's bfloat16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni,avx512bf16")]
pub(super) unsafe fn softmax_bf16(args: &mut Softmax<'_>) {
    /// Two ones.
    const ONES: i32 = 0x3f80_3f80;
    check_softmax::<Avx512>(args);
    assert!(args.pairs.len() >= args.rows * TILE_KEYS / 2);
    // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
    unsafe {
        let ones: __m512bh = std::mem::transmute(_mm512_set1_epi32(ONES));
        for r in 0..args.rows {
            let row = args.scores.as_ptr().add(r * TILE_KEYS);
            let words = args.pairs.as_mut_ptr().add(r * TILE_KEYS / 2);
            // The running maximum is no NaN: `row_max` and `update` ignore those.
            let max = row_max::<Avx512>(row, args.columns).max(*args.state.max.get_unchecked(r));
            let shift = finite_shift::<Avx512>(_mm512_set1_ps(max));
            let (mut sum, mut rounded) = ([_mm512_setzero_ps(); 2], _mm512_setzero_ps());
            for c in (0..args.columns).step_by(2 * TILE_WORDS) {
                let low = exp2(_mm512_sub_ps(_mm512_loadu_ps(row.add(c)), shift));
                let high = exp2(_mm512_sub_ps(_mm512_loadu_ps(row.add(c + TILE_WORDS)), shift));
                sum = [_mm512_add_ps(sum[0], low), _mm512_add_ps(sum[1], high)];
                let pairs = _mm512_cvtne2ps_pbh(high, low);
                _mm512_storeu_si512(words.add(c / 2).cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
                rounded = _mm512_dpbf16_ps(rounded, pairs, ones);
            }
            *args.state.tile_max.get_unchecked_mut(r) = max;
            *args.state.tile_sum.get_unchecked_mut(r) = _mm512_reduce_add_ps(rounded);
            *args.state.tile_lse_sum.get_unchecked_mut(r) =
                _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
        }
        args.state.update::<Avx512>(args.rows, 1.0)
    }
}

/// `2ˣ` for `x ≤ 0`: 0 for −∞, NaN for NaN. The relative error is 3e-6, a thousandth of what bfloat16 leaves, and `2⁰` is 1.
///
/// [`isa::exp2`](crate::isa::exp2) splits `x` at the nearest integer, this one at the one below, as these instructions do:
/// one for the rest, which is 0 of −∞, and one that multiplies by the power and knows how to vanish.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
fn exp2(x: __m512) -> __m512 {
    /// Coefficients of `2^f` on 0 to 1, the highest first: minimax among those whose last is 1.
    const POLYNOMIAL: [f32; 5] = [0.013_426_684, 0.052_242_473, 0.241_280_2, 0.693_044_84, 1.0];
    let rest = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(*c));
    }
    _mm512_scalef_ps(p, x)
}

/// Sums of products of a tile of P with two tiles of V side by side, by the weights of their digits: of both upper ones, of
/// an upper and a lower, of both lower ones.
#[repr(C, align(64))]
struct DigitSums([[i32; TILE_ROWS * TILE_WORDS]; 6]);

/// # Safety
/// As [`super::Kernels`] says; the system must have allowed AMX.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
pub(super) unsafe fn values_fixed12(args: &mut Values<'_>) {
    /// Words of half a tile's row: whole panels of keys are so many words of a row of P, or twice.
    const HALF: usize = TILE_WORDS / 2;
    let rows = args.row_groups * ROWS;
    // Softmax has left probabilities for whole panels of keys.
    args.depth = args.depth.next_multiple_of(HALF);
    check_values(args, ROWS, WIDTH, [1, 1]);
    assert!(args.p_stride >= TILE_KEYS / 4 + args.depth);
    assert!(args.v.len() >= (args.panels - 1) * args.panel_words + LOWER_DIGITS + args.depth * WIDTH);
    assert!(args.v_scale.len() >= args.panels * WIDTH && args.depth > 0);
    let step = if args.depth.is_multiple_of(TILE_WORDS) { TILE_WORDS } else { HALF };
    let shapes = Shapes::new(rows.min(TILE_ROWS), step, 6, 1);
    let mut sums = DigitSums([[0; TILE_ROWS * TILE_WORDS]; 6]);
    // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
    unsafe {
        let _tiles = Tiles::shaped(&shapes);
        let mut done = 0;
        for first in tiles(rows) {
            let p = args.p.as_ptr().add(first * args.p_stride);
            for panel in 0..args.panels {
                let v = args.v.as_ptr().add(panel * args.panel_words);
                let v_scale = args.v_scale.as_ptr().add(panel * WIDTH).cast::<f32>();
                let scale = [_mm512_loadu_ps(v_scale), _mm512_loadu_ps(v_scale.add(TILE_WORDS))];
                multiply_digits(p, args.p_stride, v, [args.depth / step, step], &mut sums);
                for row in done..(first + TILE_ROWS).min(rows) {
                    let alpha = _mm512_set1_ps(*args.state.alpha.get_unchecked(row));
                    let beta = _mm512_set1_ps(*args.state.beta.get_unchecked(row));
                    for c in [0, 1] {
                        let sums = sums.0.as_ptr().add(3 * c).cast::<i32>().add((row - first) * TILE_WORDS);
                        let mut sum = _mm512_load_si512(sums.cast());
                        for digit in 1..3 {
                            let next = _mm512_load_si512(sums.add(digit * TILE_ROWS * TILE_WORDS).cast());
                            sum = _mm512_add_epi32(_mm512_slli_epi32::<6>(sum), next);
                        }
                        let out =
                            args.out.as_mut_ptr().add((row * args.panels + panel) * WIDTH + c * TILE_WORDS);
                        // In this order nothing underflows: the product of both factors of tiny values might.
                        let x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), beta);
                        let kept = _mm512_mul_ps(_mm512_loadu_ps(out), alpha);
                        _mm512_storeu_ps(out, _mm512_fmadd_ps(x, scale[c], kept));
                    }
                }
            }
            done = first + TILE_ROWS;
        }
    }
}

/// Products of a tile of P with a panel of V, of `steps` times `step` words of a row.
///
/// # Safety
/// The pointers must be valid for that, and the tiles shaped for it.
#[inline(always)]
unsafe fn multiply_digits(
    p: *const u32,
    p_stride: usize,
    v: *const u32,
    [steps, step]: [usize; 2],
    sums: &mut DigitSums,
) {
    // SAFETY: the caller's promise; a tile of sums is one of `DigitSums`.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "2:",
            "tileloadd tmm6, [{p} + {p_stride}]",
            "tileloadd tmm7, [{v} + {v_stride}]",
            "tdpbusd tmm0, tmm6, tmm7",
            "tileloadd tmm7, [{v} + {v_stride} + {v_lower}]",
            "tdpbusd tmm1, tmm6, tmm7",
            "tileloadd tmm7, [{v} + {v_stride} + 64]",
            "tdpbusd tmm3, tmm6, tmm7",
            "tileloadd tmm7, [{v} + {v_stride} + {v_lower} + 64]",
            "tdpbusd tmm4, tmm6, tmm7",
            "tileloadd tmm6, [{p} + {p_stride} + {p_lower}]",
            "tdpbusd tmm5, tmm6, tmm7",
            "tileloadd tmm7, [{v} + {v_stride} + {v_lower}]",
            "tdpbusd tmm2, tmm6, tmm7",
            "tileloadd tmm7, [{v} + {v_stride}]",
            "tdpbusd tmm1, tmm6, tmm7",
            "tileloadd tmm7, [{v} + {v_stride} + 64]",
            "tdpbusd tmm4, tmm6, tmm7",
            "add {p}, {p_step}",
            "add {v}, {v_step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {sum_stride}], tmm0",
            "tilestored [{sums} + {sum_stride} + {tile}], tmm1",
            "tilestored [{sums} + {sum_stride} + 2 * {tile}], tmm2",
            "tilestored [{sums} + {sum_stride} + 3 * {tile}], tmm3",
            "tilestored [{sums} + {sum_stride} + 4 * {tile}], tmm4",
            "tilestored [{sums} + {sum_stride} + 5 * {tile}], tmm5",
            p = inout(reg) p => _,
            v = inout(reg) v => _,
            steps = inout(reg) steps => _,
            p_stride = in(reg) 4 * p_stride,
            v_stride = in(reg) PANEL_STRIDE,
            p_step = in(reg) 4 * step,
            v_step = in(reg) step * PANEL_STRIDE,
            p_lower = const TILE_KEYS,
            v_lower = const 4 * LOWER_DIGITS,
            sums = in(reg) sums,
            sum_stride = in(reg) 4 * TILE_WORDS,
            tile = const 4 * TILE_ROWS * TILE_WORDS,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Probabilities as digits.
struct Digits;

// SAFETY of the block: the trait's callers vouch for the instruction set and the pointer.
#[allow(clippy::undocumented_unsafe_blocks)]
impl StoreFixed12<Avx512> for Digits {
    #[inline(always)]
    unsafe fn store(row: *mut u32, column: usize, p: [__m512i; 2]) {
        unsafe {
            let at = row.cast::<u8>().add(column);
            for (i, p) in p.into_iter().enumerate() {
                let lower = _mm512_and_si512(p, _mm512_set1_epi32(63));
                _mm_storeu_si128(at.add(16 * i).cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<6>(p)));
                _mm_storeu_si128(at.add(TILE_KEYS + 16 * i).cast(), _mm512_cvtepi32_epi8(lower));
            }
        }
    }
}

/// # Safety
/// As [`super::Kernels`] says.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vnni")]
pub(super) unsafe fn softmax_fixed12(args: &mut Softmax<'_>) {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { softmax_fixed12_of::<Avx512, Digits>(args) }
}
