//! Every kernel of every instruction set of this machine against a plain loop over the same packed operands, and
//! every vector operation against its meaning.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sage_core::oracle::{Fixed12Blocks, Matrix, SeenKeys, hadamard};
use sage_core::{Element, IntQuantizer, Preset, Qk};
use sage_testkit::normal;

use crate::InstructionSet;
use crate::isa::{EXP2, IntWord, Isa, Portable, exp2, exp2_or_zero, scaled_exp2};
use crate::kernels::{
    DirectScores, DirectValues, FIXED12_MAX, Kernels, RowState, Scores, SoftCap, Softmax, TILE_KEYS, Values,
};
use crate::tile::{PackQueries, PackTile, PvForm, QkForm, TileLayout, absmax_bits};

/// Calls a function that is generic over [`Isa`] for each set of this machine, and for every word layout.
macro_rules! on_each_isa {
    ($check:ident) => {
        $check::<Portable<0>>();
        $check::<Portable<1>>();
        $check::<Portable<2>>();
        for set in InstructionSet::detected() {
            match set {
                #[cfg(target_arch = "x86_64")]
                InstructionSet::Avx2 => $check::<crate::isa::Avx2>(),
                #[cfg(target_arch = "x86_64")]
                InstructionSet::AvxVnni => $check::<crate::isa::AvxVnni>(),
                #[cfg(target_arch = "x86_64")]
                InstructionSet::Avx512Vnni => $check::<crate::isa::Avx512>(),
                #[cfg(target_arch = "aarch64")]
                InstructionSet::NeonDotprod => $check::<crate::isa::Neon>(),
                _ => {}
            }
        }
    };
}

mod cached;
mod masks;

/// The tables of this machine.
fn tables() -> impl Iterator<Item = (InstructionSet, &'static Kernels)> {
    InstructionSet::detected().into_iter().map(|set| (set, crate::kernels(set)))
}

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn close(actual: f32, expected: f64, relative: f64, absolute: f64, what: impl Fn() -> String) {
    let error = (f64::from(actual) - expected).abs();
    let bound = relative * expected.abs() + absolute;
    assert!(error <= bound, "{}: {actual}, expected {expected} ± {bound:.1e}", what());
}

// SAFETY of the helpers and checks that call vector operations: `on_each_isa` names detected sets only, and every
// slice is at least as long as the vector that is read or written.

fn vector<I: Isa>(x: &[f32]) -> I::F {
    assert!(x.len() >= I::LANES);
    // SAFETY: as above.
    unsafe { I::load(x.as_ptr()) }
}

fn words<I: Isa>(x: &[u32]) -> I::I {
    assert!(x.len() >= I::LANES);
    // SAFETY: as above.
    unsafe { I::load_int(x.as_ptr()) }
}

fn lanes<I: Isa>(x: I::F) -> Vec<f32> {
    let mut out = vec![0.0; I::LANES];
    // SAFETY: as above.
    unsafe { I::store(out.as_mut_ptr(), x) }
    out
}

fn int_lanes<I: Isa>(x: I::I) -> Vec<i32> {
    assert_eq!(size_of::<I::I>(), 4 * I::LANES);
    let mut out = vec![0i32; I::LANES];
    // SAFETY: the vector is `LANES` integers, and so is the buffer.
    unsafe { out.as_mut_ptr().cast::<I::I>().write_unaligned(x) }
    out
}

#[test]
fn arithmetic_is_that_of_the_scalars() {
    fn check<I: Isa>() {
        let (a, b, c) = (normal(1, 16), normal(2, 16), normal(3, 16));
        let (x, y, z) = (vector::<I>(&a), vector::<I>(&b), vector::<I>(&c));
        // SAFETY: as above.
        unsafe {
            for i in 0..I::LANES {
                assert_eq!(lanes::<I>(I::add(x, y))[i], a[i] + b[i]);
                assert_eq!(lanes::<I>(I::sub(x, y))[i], a[i] - b[i]);
                assert_eq!(lanes::<I>(I::mul(x, y))[i], a[i] * b[i]);
                assert_eq!(lanes::<I>(I::div(x, y))[i], a[i] / b[i]);
                let fma = f64::from(a[i]) * f64::from(b[i]) + f64::from(c[i]);
                close(lanes::<I>(I::fma(x, y, z))[i], fma, 1e-7, 2e-7, || "fma".into());
                assert_eq!(lanes::<I>(I::splat(a[i])), vec![a[i]; I::LANES]);
                assert_eq!(lanes::<I>(I::max(x, y))[i], a[i].max(b[i]));
            }
            let (nan, one) = (I::splat(f32::NAN), I::splat(1.0));
            assert_eq!(lanes::<I>(I::max(nan, one))[0], 1.0);
            assert!(lanes::<I>(I::max(one, nan))[0].is_nan());
            let sum: f64 = a[..I::LANES].iter().map(|x| f64::from(*x)).sum();
            close(I::reduce_add(x), sum, 1e-6, 1e-6, || "sum".into());
            for at in 0..I::LANES {
                let mut peak = a.clone();
                peak[at] = 9.0;
                assert_eq!(I::reduce_max(vector::<I>(&peak)), 9.0);
                peak[at] = f32::NAN;
                assert!(I::reduce_add(vector::<I>(&peak)).is_nan());
            }
            assert_eq!(I::reduce_max(I::splat(f32::NEG_INFINITY)), f32::NEG_INFINITY);
            for (limit, below) in [(0.5, true), (0.25, false), (0.125, false)] {
                let kept = lanes::<I>(I::zero_below(I::splat(0.25), I::splat(limit), y));
                assert!((0..I::LANES).all(|i| kept[i] == if below { 0.0 } else { b[i] }));
            }
            assert_eq!(lanes::<I>(I::zero_below(nan, one, y)), b[..I::LANES]);
        }
    }
    on_each_isa!(check);
}

#[test]
fn halves_widen_exactly() {
    fn check<I: Isa>() {
        for start in (0..=u16::MAX as usize + 1 - 16).step_by(16) {
            let bits: Vec<u16> = (start..start + 16).map(|x| x as u16).collect();
            let (halves, brains): (Vec<f16>, Vec<bf16>) = (
                bits.iter().map(|x| f16::from_bits(*x)).collect(),
                bits.iter().map(|x| bf16::from_bits(*x)).collect(),
            );
            // SAFETY: as above.
            let (a, b) = unsafe {
                (lanes::<I>(I::load_f16(halves.as_ptr())), lanes::<I>(I::load_bf16(brains.as_ptr())))
            };
            for i in 0..I::LANES {
                let same = |a: f32, e: f32| a.to_bits() == e.to_bits() || a.is_nan() && e.is_nan();
                assert!(same(a[i], halves[i].to_f32()) && same(b[i], brains[i].to_f32()), "{:#x}", bits[i]);
            }
        }
    }
    on_each_isa!(check);
}

#[test]
fn rounding_and_conversions_go_to_the_nearest_even() {
    fn check<I: Isa>() {
        let mut numbers =
            vec![0.5f32, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, 4095.5, -4095.49, 4_000_000.0, -124.5, 1e-20];
        numbers.extend(normal(4, 20).iter().map(|x| x * 300.0));
        for x in numbers {
            // SAFETY: as above.
            unsafe {
                let wanted = x.round_ties_even();
                assert_eq!(lanes::<I>(I::round(I::splat(x))), vec![wanted; I::LANES], "{x}");
                assert_eq!(
                    int_lanes::<I>(I::float_to_int(I::splat(x))),
                    vec![wanted as i32; I::LANES],
                    "{x}"
                );
            }
        }
        for x in [0, 1, -1, 524_160, 1 << 24, -(1 << 24), 12_345] {
            // SAFETY: as above.
            unsafe {
                assert_eq!(int_lanes::<I>(I::splat_int(x as u32)), vec![x; I::LANES]);
                assert_eq!(lanes::<I>(I::int_to_float(I::splat_int(x as u32))), vec![x as f32; I::LANES]);
            }
        }
        for n in [-125.0, -1.0, 0.0, 3.0, 126.0] {
            // SAFETY: as above.
            let scaled = unsafe { I::scale_exponent(I::splat(1.25), I::splat(n)) };
            assert_eq!(lanes::<I>(scaled), vec![1.25 * n.exp2(); I::LANES]);
        }
        // SAFETY: as above.
        let nan = unsafe { I::scale_exponent(I::splat(f32::NAN), I::splat(f32::NAN)) };
        assert!(lanes::<I>(nan).iter().all(|x| x.is_nan()));
    }
    on_each_isa!(check);
}

#[test]
fn integer_operations_are_exact() {
    fn check<I: Isa>() {
        let mut rng = rng(5);
        for _ in 0..200 {
            let (a, b): (Vec<u32>, Vec<u32>) =
                (0..16).map(|_| (rng.random::<u32>(), rng.random::<u32>())).unzip();
            let acc: Vec<u32> = (0..16).map(|_| rng.random_range(0..1 << 20)).collect();
            // 12-bit halves, as P (not negative) and V are.
            let halves =
                |w: u32, mask: i32| [w as i16 as i32, (w >> 16) as i16 as i32].map(|x| (x % 4096) & mask);
            let join = |[low, high]: [i32; 2]| low as u32 & 0xffff | (high as u32) << 16;
            let p: Vec<u32> = a.iter().map(|w| join(halves(*w, 0xfff))).collect();
            let v: Vec<u32> = b.iter().map(|w| join(halves(*w, -1))).collect();
            // SAFETY: as above.
            unsafe {
                let (x, y, z) = (words::<I>(&a), words::<I>(&b), words::<I>(&acc));
                let sums = int_lanes::<I>(I::add_int(x, y));
                let dots = int_lanes::<I>(I::dot_int(z, x, y));
                let products = int_lanes::<I>(I::dot_i16(z, words::<I>(&p), words::<I>(&v)));
                for i in 0..I::LANES {
                    assert_eq!(sums[i], a[i].wrapping_add(b[i]) as i32);
                    assert_eq!(
                        dots[i],
                        (acc[i] as i32).wrapping_add(dot(I::WORD, a[i], b[i])),
                        "{:?}",
                        I::WORD
                    );
                    assert_eq!(products[i], acc[i] as i32 + dot(IntWord::Pair, p[i], v[i]));
                }
                assert_eq!(
                    I::reduce_add_int(x),
                    a[..I::LANES].iter().fold(0, |s, x| x.wrapping_add(s)) as i32
                );
                let stored: Vec<u32> = a.iter().chain(&b).map(|x| x % 32768).collect();
                let mut out = vec![-1i16; 2 * I::LANES + 1];
                let (low, high) = (words::<I>(&stored), words::<I>(&stored[I::LANES..]));
                I::store_i16(out.as_mut_ptr(), low, high);
                assert!((0..2 * I::LANES).all(|i| out[i] as u32 == stored[i]) && out[2 * I::LANES] == -1);
            }
        }
    }
    on_each_isa!(check);
}

/// `Σ q·k` over a word's channels.
fn dot(word: IntWord, q: u32, k: u32) -> i32 {
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

#[test]
fn exp2_is_right_over_its_whole_range() {
    fn check<I: Isa>() {
        let step = 16.0 / 65_536.0;
        // Errors of the two polynomials as documented, and of their evaluation in single precision.
        for (polynomial, bound) in [(&EXP2[..], 2.4e-7), (&scaled_exp2(1.0)[..], 3.2e-6)] {
            let mut last = 0.0;
            let mut x = -125.0f32;
            while x <= 127.0 - 16.0 * step {
                let xs: Vec<f32> = (0..16).map(|i| x + i as f32 * step * 0.97).collect();
                // SAFETY: as above.
                let [y] = unsafe { exp2::<I, 1>(polynomial, [vector::<I>(&xs)]) };
                for (x, y) in xs.iter().zip(lanes::<I>(y)) {
                    close(y, f64::from(*x).exp2(), bound, 0.0, || format!("exp2({x})"));
                    assert!(f64::from(y) >= last * (1.0 - 2.0 * bound), "falls at {x}");
                    last = f64::from(y);
                }
                x += I::LANES as f32 * step;
            }
        }
        // SAFETY: as above.
        unsafe {
            let of = |x: f32| lanes::<I>(exp2::<I, 1>(&EXP2, [I::splat(x)])[0])[0];
            let or_zero = |x: f32| lanes::<I>(exp2_or_zero::<I>(I::splat(x)))[0];
            // A row's factor where its maximum stays: anything else would compound from tile to tile.
            assert_eq!((of(0.0), or_zero(0.0)), (1.0, 1.0));
            for x in [-125.5, -1e4, f32::MIN, f32::NEG_INFINITY] {
                close(of(x), (-125f64).exp2(), 2.4e-7, 0.0, || format!("exp2({x})"));
                assert_eq!(or_zero(x), 0.0);
            }
            assert!(or_zero(-125.0) > 0.0 && of(f32::NAN).is_nan() && or_zero(f32::NAN).is_nan());
        }
    }
    on_each_isa!(check);
}

/// Sizes of a block of queries and a tile of keys that leave every kind of remainder.
const DEPTHS: [usize; 6] = [1, 2, 3, 5, 8, 65];

#[test]
fn scores_are_sums_of_products() {
    for (set, kernels) in tables() {
        let (rows, width) = (2 * kernels.rows, kernels.width);
        for depth in DEPTHS {
            for panels in [1, TILE_KEYS / width] {
                let q = normal(1, rows * depth);
                let k: Vec<u32> = normal(2, panels * depth * width).iter().map(|x| x.to_bits()).collect();
                let mut scores = vec![-7.0; rows * TILE_KEYS];
                let (q_scale, k_scale) = (&[][..], &[][..]);
                let (row_groups, out) = (2, &mut scores);
                kernels.scores_float(Scores {
                    q: &q,
                    k: &k,
                    depth,
                    row_groups,
                    panels,
                    q_scale,
                    k_scale,
                    scores: out,
                });
                for (at, &score) in scores.iter().enumerate() {
                    let (row, key) = (at / TILE_KEYS, at % TILE_KEYS);
                    if key >= panels * width {
                        assert_eq!(score, -7.0, "{set} wrote beyond its panels");
                        continue;
                    }
                    let term = |d: usize| {
                        let word = k[key / width * depth * width + d * width + key % width];
                        f64::from(q[row * depth + d]) * f64::from(f32::from_bits(word))
                    };
                    let bound = 1e-7 * (0..depth).map(|d| term(d).abs()).sum::<f64>() * depth as f64;
                    close(score, (0..depth).map(term).sum(), 0.0, bound, || format!("{set}, depth {depth}"));
                }
            }
        }
    }
}

#[test]
fn integer_scores_are_exact() {
    for (set, kernels) in tables() {
        let (rows, width, mut rng) = (2 * kernels.rows, kernels.width, rng(3));
        for depth in DEPTHS {
            for extreme in [false, true] {
                let panels = TILE_KEYS / width;
                // Channels of −127..=127 in K, with the offset in Q.
                let mut draw = |offset: i32, of: usize| {
                    let channel =
                        if extreme { 127 - 254 * (of % 2) as i32 } else { rng.random_range(-127..=127) };
                    channel + offset
                };
                let mut pack = |offset: i32, len: usize| -> Vec<u32> {
                    let word = |at: usize| {
                        let channels: Vec<i32> =
                            (0..kernels.word.channels()).map(|_| draw(offset, at)).collect();
                        let mut word = 0;
                        kernels.word.pack_row(&channels, [&mut word].into_iter());
                        word
                    };
                    (0..len).map(word).collect()
                };
                let q = pack(kernels.word.q_offset(), rows * depth);
                let mut k = pack(0, panels * (depth + 1) * width);
                for panel in k.chunks_exact_mut((depth + 1) * width) {
                    panel[..width]
                        .iter_mut()
                        .enumerate()
                        .for_each(|(key, x)| *x = (key as i32 * 1000 - 9) as u32);
                }
                let q_scale: Vec<f32> = normal(4, rows);
                let k_scale: Vec<u32> = normal(5, TILE_KEYS).iter().map(|x| x.to_bits()).collect();
                let mut scores = vec![-7.0; rows * TILE_KEYS];
                let (row_groups, out) = (2, &mut scores);
                let (q_scales, k_scales) = (&q_scale[..], &k_scale[..]);
                kernels.scores_int(Scores {
                    q: &q,
                    k: &k,
                    depth,
                    row_groups,
                    panels,
                    q_scale: q_scales,
                    k_scale: k_scales,
                    scores: out,
                });
                for (at, &score) in scores.iter().enumerate() {
                    let (row, key) = (at / TILE_KEYS, at % TILE_KEYS);
                    let panel = &k[key / width * (depth + 1) * width..][..(depth + 1) * width];
                    let sum = (0..depth).fold(panel[key % width] as i32, |sum, d| {
                        sum + dot(kernels.word, q[row * depth + d], panel[(d + 1) * width + key % width])
                    });
                    let wanted = sum as f32 * (q_scale[row] * f32::from_bits(k_scale[key]));
                    assert_eq!(score, wanted, "{set}, depth {depth}, row {row}, key {key}");
                }
            }
        }
    }
}

/// Rows of scores: plain ones, one that falls steeply, hidden keys, only hidden keys, a NaN, +∞.
fn score_rows(seed: u64, columns: usize) -> Vec<f32> {
    let mut scores: Vec<f32> = normal(seed, 7 * TILE_KEYS).iter().map(|x| 4.0 * x).collect();
    for c in 0..columns {
        scores[TILE_KEYS + c] = 30.0 - 3.0 * c as f32;
        scores[2 * TILE_KEYS + c] *=
            if c % 3 == 0 { f32::INFINITY.copysign(-scores[2 * TILE_KEYS + c]) } else { 1.0 };
        scores[3 * TILE_KEYS + c] = f32::NEG_INFINITY;
        scores[6 * TILE_KEYS + c] -= 1e4;
    }
    scores[4 * TILE_KEYS + columns / 2] = f32::NAN;
    scores[5 * TILE_KEYS + columns - 1] = f32::INFINITY;
    scores
}

#[test]
fn softmax_keeps_maximum_sum_and_factors() {
    for (set, kernels) in tables() {
        for fixed12 in [false, true] {
            let mut state = RowState::default();
            state.reset(7);
            let mut totals = [(f64::NEG_INFINITY, 0f64); 7];
            for (tile, columns) in
                [kernels.width, TILE_KEYS, TILE_KEYS - kernels.width].into_iter().enumerate()
            {
                let given = score_rows(10 + tile as u64, columns.max(kernels.width));
                let columns = columns.max(kernels.width);
                let (mut scores, mut pairs) = (given.clone(), vec![0xdead_beef; 7 * TILE_KEYS / 2]);
                let old_sum = state.sum.clone();
                let args =
                    Softmax { rows: 7, columns, scores: &mut scores, pairs: &mut pairs, state: &mut state };
                if fixed12 {
                    kernels.softmax_fixed12(args)
                } else {
                    kernels.softmax_float(args)
                }
                for r in 0..7 {
                    let what = || format!("{set}, 12 bits {fixed12}, tile {tile}, row {r}");
                    let row = &given[r * TILE_KEYS..][..columns];
                    let (total_max, total_sum) = &mut totals[r];
                    if r == 4 || r == 5 {
                        assert!(state.sum[r].is_nan(), "{}", what());
                        continue;
                    }
                    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let new = total_max.max(f64::from(max));
                    let relative =
                        |x: f64, to: f64| if x == f64::NEG_INFINITY { 0.0 } else { (x - to).exp2() };
                    let (alpha, beta) = (relative(*total_max, new), relative(f64::from(max), new));
                    let unit = if fixed12 { 1.0 / f64::from(FIXED12_MAX) } else { 1.0 };
                    assert_eq!(f64::from(state.max[r]), new, "{}", what());
                    let mut tile_sum = 0.0;
                    for (c, &score) in row.iter().enumerate() {
                        let p = relative(f64::from(score), f64::from(max));
                        if fixed12 {
                            let word = pairs[(r * TILE_KEYS + c) / 2];
                            let level = if c % 2 == 0 { word & 0xffff } else { word >> 16 };
                            let wanted = 4095.0 * p;
                            // The nearest integer; 0.02 more for the polynomial of degree 4 and a rounded difference.
                            let near = (f64::from(level) - wanted).abs() <= 0.52;
                            assert!(near, "{}, column {c}: {level}, expected {wanted}", what());
                            tile_sum += f64::from(level);
                        } else {
                            let p_kernel = scores[r * TILE_KEYS + c];
                            close(p_kernel, p, 3e-6, 1e-37, || format!("{}, column {c}", what()));
                            tile_sum += f64::from(p_kernel);
                        }
                    }
                    // In 12 bits the tile's sum is exact, and one product and one sum of singles follow.
                    let (kept, added) = (f64::from(old_sum[r]) * alpha, tile_sum * beta * unit);
                    let rounding = if fixed12 { 4e-7 } else { 1.3e-6 };
                    close(state.sum[r], kept + added, rounding, 1e-30, || format!("sum of {}", what()));
                    // The factors are shares of the new sum; a row without keys has none.
                    let share = |x: f64| if kept + added == 0.0 { 0.0 } else { x / (kept + added) };
                    let bound = rounding + 6e-7;
                    close(state.alpha[r], share(kept), bound, 1e-35, || format!("alpha of {}", what()));
                    close(state.beta[r], share(beta * unit), bound, 1e-35, || format!("beta of {}", what()));
                    *total_sum = *total_sum * alpha
                        + beta * row.iter().map(|x| relative(f64::from(*x), f64::from(max))).sum::<f64>();
                    *total_max = new;
                    close(state.sum[r], *total_sum, if fixed12 { 5e-3 } else { 3e-6 }, 1e-30, || {
                        format!("total of {}", what())
                    });
                }
            }
        }
    }
}

/// A state with factors for `rows` rows: some keep the output, some drop it.
fn factors(rows: usize) -> RowState {
    let mut state = RowState::default();
    state.reset(rows);
    for r in 0..rows {
        state.alpha[r] = if r % 3 == 0 { 0.0 } else { 0.5 + r as f32 };
        state.beta[r] = 1.0 / (1.0 + r as f32);
    }
    state
}

#[test]
fn values_are_rescaled_sums_of_products() {
    for (set, kernels) in tables() {
        let (rows, width, panels) = (2 * kernels.rows, kernels.width, 2);
        for depth in [1, 2, 3, 7, TILE_KEYS] {
            let p = normal(1, rows * TILE_KEYS);
            let v: Vec<u32> = normal(2, panels * TILE_KEYS * width).iter().map(|x| x.to_bits()).collect();
            let before = normal(3, rows * panels * width);
            let (mut out, state) = (before.clone(), factors(rows));
            kernels.values_float(Values {
                p: &p,
                p_stride: TILE_KEYS,
                v: &v,
                panel_words: TILE_KEYS * width,
                depth,
                row_groups: 2,
                panels,
                v_scale: &[4f32.to_bits()],
                out: &mut out,
                state: &state,
            });
            for (at, &x) in out.iter().enumerate() {
                let (row, channel) = (at / (panels * width), at % (panels * width));
                let term = |t: usize| {
                    let word = v[channel / width * TILE_KEYS * width + t * width + channel % width];
                    f64::from(p[row * TILE_KEYS + t])
                        * f64::from(f32::from_bits(word))
                        * f64::from(4.0 * state.beta[row])
                };
                let kept = f64::from(before[at]) * f64::from(state.alpha[row]);
                let size = (0..depth).map(|t| term(t).abs()).sum::<f64>() * depth as f64 + kept.abs();
                let what = || format!("{set}, depth {depth}, row {row}, channel {channel}");
                close(x, kept + (0..depth).map(term).sum::<f64>(), 0.0, 2e-7 * size, what);
            }
        }
    }
}

#[test]
fn twelve_bit_values_are_exact() {
    for (set, kernels) in tables() {
        let (rows, width, panels, mut rng) = (2 * kernels.rows, kernels.width, 2, rng(6));
        for (depth, extreme) in [(1, false), (2, false), (5, false), (64, false), (64, true)] {
            let mut word = |low: i32| {
                let mut draw = || if extreme { 4095 } else { rng.random_range(low..=4095) };
                draw() as u32 & 0xffff | (draw() as u32) << 16
            };
            let p: Vec<u32> = (0..rows * 64).map(|_| word(0)).collect();
            let v: Vec<u32> = (0..panels * 64 * width).map(|_| word(-4095)).collect();
            let v_scale: Vec<u32> = normal(7, panels * width).iter().map(|x| x.to_bits()).collect();
            let before = normal(3, rows * panels * width);
            let (mut out, state) = (before.clone(), factors(rows));
            kernels.values_fixed12(Values {
                p: &p,
                p_stride: 64,
                v: &v,
                panel_words: 64 * width,
                depth,
                row_groups: 2,
                panels,
                v_scale: &v_scale,
                out: &mut out,
                state: &state,
            });
            for (at, &x) in out.iter().enumerate() {
                let (row, channel) = (at / (panels * width), at % (panels * width));
                let sum = (0..depth).fold(0, |sum, t| {
                    let word = v[channel / width * 64 * width + t * width + channel % width];
                    sum + dot(IntWord::Pair, p[row * 64 + t], word)
                });
                let product = sum as f32 * state.beta[row] * f32::from_bits(v_scale[channel]);
                let what = || format!("{set}, depth {depth}, row {row}, channel {channel}");
                if state.alpha[row] == 0.0 {
                    assert_eq!(x, product, "{}", what());
                }
                let kept = f64::from(before[at]) * f64::from(state.alpha[row]);
                close(
                    x,
                    f64::from(product) + kept,
                    2e-7,
                    2e-7 * kept.abs() + 2e-7 * f64::from(product.abs()),
                    what,
                );
            }
        }
    }
}

/// The direct kernels of one element type against plain loops.
macro_rules! direct {
    ($test:ident, $E:ty, $scores:ident, $values:ident) => {
        #[test]
        fn $test() {
            for (set, kernels) in tables() {
                for (rows, keys, head_dim, gap) in [
                    (1, 1, 1, 0),
                    (3, 5, 7, 2),
                    (8, 128, 64, 0),
                    (2, 127, 40, 64),
                    (5, 6, 33, 1),
                    (1, 0, 8, 0),
                    (4, 4, 17, 3),
                ] {
                    let stride = head_dim + gap;
                    let data: Vec<$E> = normal(1, 129 * stride).into_iter().map(Element::from_f32).collect();
                    let data = &data[..if keys == 0 { 0 } else { (keys - 1) * stride + head_dim }];
                    let (q, p) = (normal(2, rows * head_dim), normal(3, rows * TILE_KEYS));
                    let at = |key: usize, d: usize| f64::from(Element::to_f32(data[key * stride + d]));
                    let mut scores = vec![-7.0; rows * TILE_KEYS];
                    kernels.$scores(DirectScores {
                        q: &q,
                        rows,
                        k: data,
                        stride,
                        keys,
                        seen: &[],
                        head_dim,
                        scores: &mut scores,
                    });
                    for (n, &x) in scores.iter().enumerate() {
                        let (row, key) = (n / TILE_KEYS, n % TILE_KEYS);
                        if key < keys {
                            let term = |d: usize| f64::from(q[row * head_dim + d]) * at(key, d);
                            let size: f64 = (0..head_dim).map(|d| term(d).abs()).sum();
                            close(x, (0..head_dim).map(term).sum(), 0.0, 2e-6 * size, || {
                                format!("{set}, key {key}")
                            });
                        } else {
                            assert_eq!(x, -7.0, "{set} wrote beyond its {keys} keys");
                        }
                    }
                    let before = normal(4, rows * head_dim);
                    let (mut out, state) = (before.clone(), factors(rows));
                    let (o, state_ref) = (&mut out, &state);
                    kernels.$values(DirectValues {
                        p: &p,
                        rows,
                        v: data,
                        stride,
                        keys,
                        seen: &[],
                        head_dim,
                        out: o,
                        state: state_ref,
                    });
                    for (n, &x) in out.iter().enumerate() {
                        let (row, d) = (n / head_dim, n % head_dim);
                        let beta = f64::from(state.beta[row]);
                        let term = |key: usize| beta * f64::from(p[row * TILE_KEYS + key]) * at(key, d);
                        let kept = f64::from(before[n]) * f64::from(state.alpha[row]);
                        let size = kept.abs() + (0..keys).map(|key| term(key).abs()).sum::<f64>();
                        let wanted = kept + (0..keys).map(term).sum::<f64>();
                        close(x, wanted, 0.0, 4e-6 * size, || format!("{set}, row {row}, channel {d}"));
                    }
                }
            }
        }
    };
}
direct!(direct_kernels_read_f32, f32, direct_scores_f32, direct_values_f32);
direct!(direct_kernels_read_f16, f16, direct_scores_f16, direct_values_f16);
direct!(direct_kernels_read_bf16, bf16, direct_scores_bf16, direct_values_bf16);

#[test]
fn a_soft_cap_is_a_scaled_tanh() {
    for (set, kernels) in tables() {
        for cap in [0.5f32, 20.0, 70.0] {
            let mut given: Vec<f32> = normal(1, 64).iter().map(|x| x * 1.5 * cap).collect();
            given.extend([0.0, -0.0, 1e-6, -1e-3, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30]);
            given.resize(96, 0.25);
            let mut capped = given.clone();
            kernels.soft_cap(SoftCap { scores: &mut capped, cap });
            for (s, x) in given.iter().zip(capped) {
                if s.is_nan() {
                    assert!(x.is_nan(), "{set}");
                    continue;
                }
                let wanted = f64::from(cap) * (f64::from(*s) / f64::from(cap)).tanh();
                close(x, wanted, 0.0, 3e-7 * f64::from(cap), || format!("{set}, cap {cap}, score {s}"));
            }
        }
    }
}

fn matrix(rows: usize, width: usize, data: &[f32]) -> Matrix<f32> {
    Matrix::from_fn(rows, width, |i, c| data[i * width + c])
}

const WORDS: [IntWord; 3] = [IntWord::Pair, IntWord::Quad, IntWord::QuadOffset];

/// A word's channels.
fn channels(word: IntWord, x: u32, unsigned: bool) -> Vec<i32> {
    match word {
        IntWord::Pair => vec![x as i16 as i32, (x >> 16) as i16 as i32],
        _ if unsigned => x.to_le_bytes().map(i32::from).to_vec(),
        _ => x.to_le_bytes().map(|x| i32::from(x as i8)).to_vec(),
    }
}

/// Quantisers of the four granularities, both roundings and two widths, on the original's tiles.
fn quantizers() -> Vec<IntQuantizer> {
    let of = |preset: Preset| match preset.scheme(64).qk {
        Qk::Int(quantizer) => quantizer,
        _ => unreachable!("an integer scheme"),
    };
    vec![
        of(Preset::INT8),
        of(Preset::INT8_PER_TOKEN),
        of(Preset::SAGE1_INT8_FP16),
        of(Preset::SAGE2_INT8_FP8_PER_WARP),
        of(Preset::SAGE2_INT8_FP8_SM90_PER_THREAD),
        of(Preset::SAGE2_INT4_FP8),
    ]
}

/// Whether integers are those of the oracle, but for a few that a tie moved by 1.
fn nearly_equal(actual: &[i32], expected: &[i32], what: &str) {
    assert_eq!(actual.len(), expected.len());
    let differing = actual.iter().zip(expected).filter(|(a, e)| a != e);
    assert!(differing.clone().all(|(a, e)| (a - e).abs() == 1), "{what}");
    assert!(differing.count() * 500 <= actual.len(), "{what}");
}

#[test]
fn packed_keys_and_values_are_the_oracles_in_every_word_layout() {
    for (set, kernels) in tables() {
        for (word, width) in WORDS.into_iter().zip([16, 32, 16]).chain([(kernels.word, kernels.width)]) {
            for (keys, head_dim, rotate) in
                [(1, 1, false), (128, 64, false), (77, 40, true), (100, 6, false), (127, 33, false)]
            {
                for (n, quantizer) in quantizers().into_iter().enumerate() {
                    let (qk, pv) = (QkForm::Int(quantizer), [PvForm::Fixed12, PvForm::Float][n % 2]);
                    let layout = TileLayout::new((width, word), head_dim, qk, pv, rotate);
                    let first = 256;
                    let what =
                        format!("{set}, {word:?} of {width}, {keys} keys of {head_dim}, {quantizer:?}");
                    let (given, v) = (normal(1, keys * head_dim), normal(2, keys * head_dim));
                    let padded = Matrix::from_fn(keys, layout.qk_dim, |j, c| {
                        if c < head_dim { given[j * head_dim + c] } else { 0.0 }
                    });
                    let mut k = padded.as_slice().to_vec();
                    let mut tile = vec![0xdead_beef; layout.words()];
                    kernels.pack_tile(PackTile {
                        layout,
                        first,
                        keys,
                        seen: &[],
                        k: &mut k,
                        v: &mut v.clone(),
                        tile: &mut tile,
                    });
                    let parts = layout.parts(&tile);

                    // The tile begins a group of every granularity, so the oracle may count from 0.
                    let rows = if rotate { hadamard(&padded) } else { padded };
                    let oracle = quantizer.quantize_k(&rows, &SeenKeys::all(rows.rows()));
                    let mut ints = Vec::new();
                    for key in 0..TILE_KEYS {
                        let panel = &parts.k[key / width * layout.k_panel..][..layout.k_panel];
                        let start = panel[key % width] as i32;
                        let row: Vec<i32> = (0..layout.depth)
                            .flat_map(|d| channels(word, panel[(d + 1) * width + key % width], false))
                            .collect();
                        assert_eq!(start, -word.q_offset() * row.iter().sum::<i32>(), "{what}");
                        assert!(row[layout.qk_dim..].iter().all(|x| *x == 0), "{what}: padding");
                        if key < keys {
                            close(
                                f32::from_bits(parts.k_scale[key]),
                                f64::from(oracle.scales[oracle.groups[key]]),
                                1e-6,
                                0.0,
                                || what.clone(),
                            );
                            ints.extend_from_slice(&row[..layout.qk_dim]);
                        } else {
                            assert!(
                                parts.k_scale[key] == 0 && row.iter().all(|x| *x == 0),
                                "{what}: keys beyond the end"
                            );
                        }
                    }
                    let expected: Vec<i32> = oracle.values.as_slice().iter().map(|x| i32::from(*x)).collect();
                    nearly_equal(&ints, &expected, &what);

                    let blocks =
                        Fixed12Blocks::quantize(&matrix(keys, head_dim, &v), TILE_KEYS, &SeenKeys::all(keys));
                    for c in 0..layout.padded_dim() {
                        let panel = &parts.v[c / width * layout.v_panel..][..layout.v_panel];
                        let seen = c < head_dim;
                        if pv == PvForm::Fixed12 {
                            let scale = if seen { blocks.scales.row(0)[c] } else { 0.0 };
                            assert_eq!(f32::from_bits(parts.v_scale[c]), scale, "{what}");
                        }
                        for j in 0..TILE_KEYS {
                            let inside = seen && j < keys;
                            match pv {
                                PvForm::Float => {
                                    let wanted = if inside { v[j * head_dim + c] } else { 0.0 };
                                    assert_eq!(
                                        f32::from_bits(panel[j * width + c % width]),
                                        wanted,
                                        "{what}"
                                    );
                                }
                                PvForm::Fixed12 => {
                                    let wanted = if inside { i32::from(blocks.values.row(j)[c]) } else { 0 };
                                    let pair =
                                        channels(IntWord::Pair, panel[j / 2 * width + c % width], false);
                                    assert_eq!(pair[j % 2], wanted, "{what}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn packed_queries_are_the_oracles_and_their_products_with_keys_exact() {
    fn check<I: Isa>() {
        let word = I::WORD;
        for (rows, head_dim, first, q_len) in
            [(1, 1, 0, 1), (13, 40, 256, 300), (40, 7, 96, 200), (33, 64, 120, 160)]
        {
            for quantizer in quantizers() {
                let width = 2 * I::LANES;
                let layout =
                    TileLayout::new((width, word), head_dim, QkForm::Int(quantizer), PvForm::Float, false);
                let score_scale = 0.3;
                let all = normal(1, q_len * head_dim);
                let oracle = quantizer
                    .quantize_q(&matrix(q_len, head_dim, &all), score_scale / std::f32::consts::LOG2_E);
                let first_group = quantizer.q_group(first / 128 * 128);
                let mut group_max = vec![0; quantizer.q_group(q_len - 1) + 8];
                for i in first / 128 * 128..q_len {
                    let max = &mut group_max[quantizer.q_group(i) - first_group];
                    *max = absmax_bits(&all[i * head_dim..][..head_dim]).max(*max);
                }
                let mut q = all[first * head_dim..][..rows * head_dim].to_vec();
                let mut packed = vec![0xdead_beef; (rows + 3) * layout.depth];
                let mut scale = vec![f32::NAN; rows + 3];
                crate::kernels(InstructionSet::detected()[0]).pack_queries(PackQueries {
                    layout,
                    first,
                    rows,
                    score_scale,
                    q: &mut q,
                    group_max: &group_max,
                    first_group,
                    words: &mut packed,
                    scale: &mut scale,
                });
                let what = format!("{word:?}, {rows} rows of {head_dim} from {first}, {quantizer:?}");
                let after = if quantizer.scale_q_first { 1.0 } else { f64::from(score_scale) };
                let (mut ints, mut expected) = (Vec::new(), Vec::new());
                for i in 0..rows {
                    let wanted = f64::from(oracle.scales[oracle.groups[first + i]]) * after;
                    close(scale[i], wanted, 1e-6, 0.0, || what.clone());
                    let row = &packed[i * layout.depth..][..layout.depth];
                    let row = row.iter().flat_map(|x| channels(word, *x, word == IntWord::QuadOffset));
                    ints.extend(row.take(head_dim).map(|x| x - word.q_offset()));
                    expected.extend(oracle.values.row(first + i).iter().map(|x| i32::from(*x)));
                }
                nearly_equal(&ints, &expected, &what);
                assert!(
                    packed[rows * layout.depth..].iter().all(|x| *x == 0)
                        && scale[rows..].iter().all(|x| *x == 0.0)
                );

                // A panel of keys: what the words multiply to is what the integers multiply to.
                let keys = width.min(TILE_KEYS);
                let mut k = normal(2, keys * head_dim);
                let mut tile = vec![0; layout.words()];
                let v = vec![0.0; keys * head_dim];
                crate::kernels(InstructionSet::detected()[0]).pack_tile(PackTile {
                    layout,
                    first: 0,
                    keys,
                    seen: &[],
                    k: &mut k.clone(),
                    v: &mut v.clone(),
                    tile: &mut tile,
                });
                let k_ints = quantizer.quantize_k(&matrix(keys, head_dim, &k), &SeenKeys::all(keys)).values;
                k.clear();
                let panel = layout.parts(&tile).k;
                for i in 0..rows {
                    for lane in [0, I::LANES] {
                        // SAFETY: as above.
                        let sums = unsafe {
                            let start = words::<I>(&panel[lane..]);
                            (0..layout.depth).fold(start, |acc, d| {
                                let q = I::splat_int(packed[i * layout.depth + d]);
                                I::dot_int(acc, q, words::<I>(&panel[(d + 1) * width + lane..]))
                            })
                        };
                        for (key, sum) in int_lanes::<I>(sums).into_iter().enumerate() {
                            let k = k_ints.row(lane + key);
                            let wanted: i32 = ints[i * head_dim..][..head_dim]
                                .iter()
                                .zip(k)
                                .map(|(q, k)| q * i32::from(*k))
                                .sum();
                            // A tie in one key channel is worth one query channel.
                            assert!((sum - wanted).abs() <= 127, "{what}: {sum}, expected {wanted}");
                        }
                    }
                }
            }
        }
    }
    on_each_isa!(check);
}

#[test]
fn a_group_that_is_not_finite_has_a_scale_of_nan() {
    for (set, kernels) in tables() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for quantizer in quantizers() {
                for head_dim in [1, 64] {
                    let layout = TileLayout::new(
                        (kernels.width, kernels.word),
                        head_dim,
                        QkForm::Int(quantizer),
                        PvForm::Fixed12,
                        false,
                    );
                    let mut k = normal(1, TILE_KEYS * head_dim);
                    k[70 * head_dim..71 * head_dim].fill(bad);
                    let mut v = normal(2, TILE_KEYS * head_dim);
                    v[70 * head_dim] = bad;
                    let mut tile = vec![0; layout.words()];
                    kernels.pack_tile(PackTile {
                        layout,
                        first: 0,
                        keys: TILE_KEYS,
                        seen: &[],
                        k: &mut k,
                        v: &mut v.clone(),
                        tile: &mut tile,
                    });
                    let parts = layout.parts(&tile);
                    for key in 0..TILE_KEYS {
                        let wanted = quantizer.k_group(key) == quantizer.k_group(70);
                        assert_eq!(
                            f32::from_bits(parts.k_scale[key]).is_nan(),
                            wanted,
                            "{set}, {bad}, key {key}, {quantizer:?}"
                        );
                    }
                    let nan: Vec<bool> = parts.v_scale.iter().map(|x| f32::from_bits(*x).is_nan()).collect();
                    assert!(nan[0] && nan[1..].iter().all(|x| !x), "{set}, {bad}");
                }
            }
        }
    }
}
