//! Q·Kᵀ and P·V of a block of queries and a packed tile.
//!
//! All operands are 32-bit words: a number, two 16-bit integers or four 8-bit integers. So one micro-kernel
//! ([`multiply`]) serves both products, in floating point and in integers.

use super::RowState;
use crate::isa::Isa;
use crate::tile::TILE_KEYS;

/// `Q·Kᵀ` of a block of queries and a tile of keys.
pub(crate) struct Scores<'a> {
    /// `row_groups · rows` rows of `depth` words.
    pub q: &'a [u32],
    /// `panels` panels: for integers `width` sums first, then `depth` times `width` words. For FP4 see [`super::fp4`].
    pub k: &'a [u32],
    /// Words of a row.
    pub depth: usize,
    pub row_groups: usize,
    pub panels: usize,
    /// For integers: a factor for each row.
    pub q_scale: &'a [f32],
    /// As the bits of an `f32`: for integers a factor for each key, for FP4 one first of all.
    pub k_scale: &'a [u32],
    /// Rows of [`TILE_KEYS`] scores.
    pub scores: &'a mut [f32],
}

/// Adds to the scores of each query those of the mean that was subtracted from it.
pub(crate) struct AddMeans<'a> {
    /// Rows of [`TILE_KEYS`] scores, one for each mean.
    pub means: &'a [f32],
    /// The mean of each query.
    pub mean_of: &'a [u32],
    /// Scores of a row: whole vectors.
    pub columns: usize,
    /// Rows of [`TILE_KEYS`] scores.
    pub scores: &'a mut [f32],
}

/// `O ← α·O + β·(P·V)` of a block of queries and a tile of keys.
pub(crate) struct Values<'a> {
    /// Rows of `p_stride` words.
    pub p: &'a [u32],
    pub p_stride: usize,
    /// Panels, `panel_words` apart, of `depth` times `width` words that are used; for FP4 `depth` blocks.
    pub v: &'a [u32],
    pub panel_words: usize,
    pub depth: usize,
    pub row_groups: usize,
    pub panels: usize,
    /// As the bits of an `f32`: for 12 bits a factor for each channel, for numbers and FP4 one first of all.
    pub v_scale: &'a [u32],
    /// Rows of `panels · width` numbers.
    pub out: &'a mut [f32],
    pub state: &'a RowState,
}

/// The sum of products of one kind: what [`multiply`] is generic over.
trait Product<I: Isa> {
    type Acc: Copy;
    type Word: Copy;
    unsafe fn zero() -> Self::Acc;
    unsafe fn broadcast(p: *const u32) -> Self::Word;
    unsafe fn load(p: *const u32) -> Self::Word;
    unsafe fn step(acc: Self::Acc, a: Self::Word, b: Self::Word) -> Self::Acc;
}

macro_rules! product {
    ($(#[$doc:meta])* $Name:ident, $Vector:ident, $zero:expr, $broadcast:expr, $load:expr, $step:expr) => {
        $(#[$doc])*
        struct $Name;
        // SAFETY of the blocks: the callers vouch for the instruction set and the pointers.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl<I: Isa> Product<I> for $Name {
            type Acc = I::$Vector;
            type Word = I::$Vector;
            #[inline(always)]
            unsafe fn zero() -> Self::Acc {
                unsafe { $zero }
            }
            #[inline(always)]
            unsafe fn broadcast(p: *const u32) -> Self::Word {
                unsafe { $broadcast(p) }
            }
            #[inline(always)]
            unsafe fn load(p: *const u32) -> Self::Word {
                unsafe { $load(p) }
            }
            #[inline(always)]
            unsafe fn step(acc: Self::Acc, a: Self::Word, b: Self::Word) -> Self::Acc {
                unsafe { $step(acc, a, b) }
            }
        }
    };
}

product!(
    /// Numbers.
    Float, F, I::splat(0.0), |p: *const u32| I::splat(p.cast::<f32>().read()), |p: *const u32| I::load(p.cast()),
    |acc, a, b| I::fma(a, b, acc)
);
product!(
    /// Quantised Q and K.
    QuantizedQk, I, I::splat_int(0), |p: *const u32| I::splat_int(p.read()), I::load_int, I::dot_int
);
product!(
    /// 12-bit P and V.
    Fixed12, I, I::splat_int(0), |p: *const u32| I::splat_int(p.read()), I::load_int, I::dot_i16
);

/// One term of [`multiply`].
#[inline(always)]
unsafe fn step<I: Isa, O: Product<I>, const R: usize, const VECS: usize>(
    mut acc: [[O::Acc; VECS]; R],
    a: *const u32,
    stride: usize,
    b: *const u32,
) -> [[O::Acc; VECS]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [O::load(b); VECS];
        for (c, word) in row.iter_mut().enumerate().skip(1) {
            *word = O::load(b.add(c * I::LANES));
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let a = O::broadcast(a.add(r * stride));
            for (acc, &b) in acc.iter_mut().zip(&row) {
                *acc = O::step(*acc, a, b);
            }
        }
    }
    acc
}

/// `acc[r][c] += Σ_t a[r][t] · b[t][c]`: `R` rows of `a`, `stride` words apart, and a panel of `depth` times
/// `VECS` vectors.
///
/// # Safety
/// `a` and `b` must be valid for what the formula reads, and the processor must have `I`.
#[inline(always)]
unsafe fn multiply<I: Isa, O: Product<I>, const R: usize, const VECS: usize>(
    mut acc: [[O::Acc; VECS]; R],
    a: *const u32,
    stride: usize,
    b: *const u32,
    depth: usize,
) -> [[O::Acc; VECS]; R] {
    // Unrolled by hand: address arithmetic would cost as much as a tenth of the products.
    const UNROLLED: usize = 4;
    let whole = depth / UNROLLED * UNROLLED;
    for t in (0..whole).step_by(UNROLLED) {
        for u in 0..UNROLLED {
            // SAFETY: the caller's promise.
            acc =
                unsafe { step::<I, O, R, VECS>(acc, a.add(t + u), stride, b.add((t + u) * VECS * I::LANES)) };
        }
    }
    for t in whole..depth {
        // SAFETY: the caller's promise.
        acc = unsafe { step::<I, O, R, VECS>(acc, a.add(t), stride, b.add(t * VECS * I::LANES)) };
    }
    acc
}

#[inline(always)]
pub(super) unsafe fn scores_float<I: Isa, const R: usize, const VECS: usize>(args: &mut Scores<'_>) {
    let width = VECS * I::LANES;
    assert!(args.q.len() >= args.row_groups * R * args.depth);
    assert!(args.k.len() >= args.panels * args.depth * width);
    assert!(args.panels * width <= TILE_KEYS && args.scores.len() >= args.row_groups * R * TILE_KEYS);
    for panel in 0..args.panels {
        for group in 0..args.row_groups {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let q = args.q.as_ptr().add(group * R * args.depth);
                let k = args.k.as_ptr().add(panel * args.depth * width);
                let zero = [[<Float as Product<I>>::zero(); VECS]; R];
                let acc = multiply::<I, Float, R, VECS>(zero, q, args.depth, k, args.depth);
                let scores = args.scores.as_mut_ptr().add(group * R * TILE_KEYS + panel * width);
                for (r, acc) in acc.iter().enumerate() {
                    for (c, &x) in acc.iter().enumerate() {
                        I::store(scores.add(r * TILE_KEYS + c * I::LANES), x);
                    }
                }
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn scores_int<I: Isa, const R: usize, const VECS: usize>(args: &mut Scores<'_>) {
    let width = VECS * I::LANES;
    let panel_words = (args.depth + 1) * width;
    assert!(args.q.len() >= args.row_groups * R * args.depth && args.q_scale.len() >= args.row_groups * R);
    assert!(args.k.len() >= args.panels * panel_words && args.k_scale.len() >= args.panels * width);
    assert!(args.panels * width <= TILE_KEYS && args.scores.len() >= args.row_groups * R * TILE_KEYS);
    for panel in 0..args.panels {
        for group in 0..args.row_groups {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let q = args.q.as_ptr().add(group * R * args.depth);
                let k = args.k.as_ptr().add(panel * panel_words);
                let mut start = [[I::load_int(k); VECS]; R];
                for acc in &mut start {
                    for (c, x) in acc.iter_mut().enumerate().skip(1) {
                        *x = I::load_int(k.add(c * I::LANES));
                    }
                }
                let acc = multiply::<I, QuantizedQk, R, VECS>(start, q, args.depth, k.add(width), args.depth);
                let k_scale = args.k_scale.as_ptr().add(panel * width).cast::<f32>();
                let scores = args.scores.as_mut_ptr().add(group * R * TILE_KEYS + panel * width);
                for (r, acc) in acc.iter().enumerate() {
                    let q_scale = I::splat(*args.q_scale.get_unchecked(group * R + r));
                    for (c, &x) in acc.iter().enumerate() {
                        let scale = I::mul(q_scale, I::load(k_scale.add(c * I::LANES)));
                        I::store(scores.add(r * TILE_KEYS + c * I::LANES), I::mul(I::int_to_float(x), scale));
                    }
                }
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn add_means<I: Isa>(args: &mut AddMeans<'_>) {
    assert!(args.columns <= TILE_KEYS && args.columns.is_multiple_of(I::LANES));
    for (row, mean) in args.scores.chunks_exact_mut(TILE_KEYS).zip(args.mean_of) {
        let mean = &args.means[*mean as usize * TILE_KEYS..][..TILE_KEYS];
        for at in (0..args.columns).step_by(I::LANES) {
            // SAFETY: both rows hold the columns, whole vectors of them; the caller vouches for the instruction set.
            unsafe {
                let score = row.as_mut_ptr().add(at);
                I::store(score, I::add(I::load(score), I::load(mean.as_ptr().add(at))));
            }
        }
    }
}

/// `words`: those of a step of `depth`, of a row of P and of a panel of V for each of its channels.
#[inline(always)]
pub(super) fn check_values(args: &Values<'_>, rows: usize, width: usize, words: [usize; 2]) {
    let rows = args.row_groups * rows;
    assert!(args.depth * words[0] <= args.p_stride && args.p.len() >= rows * args.p_stride);
    // The last panel may end with what is used of it.
    let used = args.depth * words[1] * width;
    assert!(
        used <= args.panel_words && args.v.len() >= args.panels.saturating_sub(1) * args.panel_words + used
    );
    assert!(args.out.len() >= rows * args.panels * width);
    assert!(args.state.alpha.len() >= rows && args.state.beta.len() >= rows);
}

/// Adds products of rows from `first` on with a panel of V to the output, by the one scale of the tile's values and the
/// rows' factors.
#[inline(always)]
pub(super) unsafe fn add_rows<I: Isa, const R: usize, const VECS: usize>(
    args: &mut Values<'_>,
    first: usize,
    panel: usize,
    products: &[[I::F; VECS]; R],
) {
    let factor = f32::from_bits(args.v_scale[0]);
    for (r, products) in products.iter().enumerate() {
        let row = first + r;
        // SAFETY: the caller has bounded rows and panels by `check_values`, and vouches for the instruction set.
        unsafe {
            let alpha = I::splat(*args.state.alpha.get_unchecked(row));
            let beta = I::splat(*args.state.beta.get_unchecked(row) * factor);
            let out = args.out.as_mut_ptr().add((row * args.panels + panel) * VECS * I::LANES);
            for (c, &x) in products.iter().enumerate() {
                let out = out.add(c * I::LANES);
                I::store(out, I::fma(x, beta, I::mul(I::load(out), alpha)));
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn values_float<I: Isa, const R: usize, const VECS: usize>(args: &mut Values<'_>) {
    let width = VECS * I::LANES;
    check_values(args, R, width, [1, 1]);
    for panel in 0..args.panels {
        for group in 0..args.row_groups {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let p = args.p.as_ptr().add(group * R * args.p_stride);
                let v = args.v.as_ptr().add(panel * args.panel_words);
                let zero = [[<Float as Product<I>>::zero(); VECS]; R];
                let acc = multiply::<I, Float, R, VECS>(zero, p, args.p_stride, v, args.depth);
                add_rows::<I, R, VECS>(args, group * R, panel, &acc);
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn values_fixed12<I: Isa, const R: usize, const VECS: usize>(args: &mut Values<'_>) {
    let width = VECS * I::LANES;
    check_values(args, R, width, [1, 1]);
    assert!(args.v_scale.len() >= args.panels * width);
    for panel in 0..args.panels {
        for group in 0..args.row_groups {
            // SAFETY: the assertions bound every index; the caller vouches for the instruction set.
            unsafe {
                let p = args.p.as_ptr().add(group * R * args.p_stride);
                let v = args.v.as_ptr().add(panel * args.panel_words);
                let v_scale = args.v_scale.as_ptr().add(panel * width).cast::<f32>();
                let zero = [[<Fixed12 as Product<I>>::zero(); VECS]; R];
                let acc = multiply::<I, Fixed12, R, VECS>(zero, p, args.p_stride, v, args.depth);
                for (r, acc) in acc.iter().enumerate() {
                    let row = group * R + r;
                    let alpha = I::splat(*args.state.alpha.get_unchecked(row));
                    let beta = I::splat(*args.state.beta.get_unchecked(row));
                    let out = args.out.as_mut_ptr().add((row * args.panels + panel) * width);
                    for (c, &x) in acc.iter().enumerate() {
                        let out = out.add(c * I::LANES);
                        // In this order nothing underflows: the product of both factors of tiny values might.
                        let x = I::mul(I::int_to_float(x), beta);
                        let scale = I::load(v_scale.add(c * I::LANES));
                        I::store(out, I::fma(x, scale, I::mul(I::load(out), alpha)));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
