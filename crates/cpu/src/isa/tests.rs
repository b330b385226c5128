//! Every vector operation of every instruction set of this machine against its meaning.
//!
//! SAFETY of the blocks: `on_each_isa` names detected sets only, and what operations read or write holds whole vectors.

use half::{bf16, f16};
use rand::RngExt;
use sage_testkit::normal;

use super::*;
use crate::testing::{close, dot, int_lanes, lanes, on_each_isa, rng, vector, words};

#[test]
fn arithmetic_is_that_of_the_scalars() {
    fn check<I: Isa>() {
        let (a, b, c) = (normal(1, 16), normal(2, 16), normal(3, 16));
        let (x, y, z) = (vector::<I>(&a), vector::<I>(&b), vector::<I>(&c));
        // SAFETY: as for every block here.
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
            // SAFETY: as for every block here.
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
            // SAFETY: as for every block here.
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
            // SAFETY: as for every block here.
            unsafe {
                assert_eq!(int_lanes::<I>(I::splat_int(x as u32)), vec![x; I::LANES]);
                assert_eq!(lanes::<I>(I::int_to_float(I::splat_int(x as u32))), vec![x as f32; I::LANES]);
            }
        }
        for n in [-125.0, -1.0, 0.0, 3.0, 126.0] {
            // SAFETY: as for every block here.
            let scaled = unsafe { I::scale_exponent(I::splat(1.25), I::splat(n)) };
            assert_eq!(lanes::<I>(scaled), vec![1.25 * n.exp2(); I::LANES]);
        }
        // SAFETY: as for every block here.
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
            // SAFETY: as for every block here.
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
                // SAFETY: as for every block here.
                let [y] = unsafe { exp2::<I, 1>(polynomial, [vector::<I>(&xs)]) };
                for (x, y) in xs.iter().zip(lanes::<I>(y)) {
                    close(y, f64::from(*x).exp2(), bound, 0.0, || format!("exp2({x})"));
                    assert!(f64::from(y) >= last * (1.0 - 2.0 * bound), "falls at {x}");
                    last = f64::from(y);
                }
                x += I::LANES as f32 * step;
            }
        }
        // SAFETY: as for every block here.
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

#[test]
fn bytes_widen_exactly() {
    fn check<I: Isa>() {
        let bytes: Vec<i8> = (-128..=127).collect();
        for bytes in bytes.chunks_exact(2 * I::LANES) {
            // SAFETY: `on_each_isa` names detected sets only, and the chunk is two vectors long.
            let (singles, pairs) = unsafe { (I::load_i8(bytes.as_ptr()), I::load_i8_pairs(bytes.as_ptr())) };
            let expected: Vec<f32> = bytes[..I::LANES].iter().map(|&x| f32::from(x)).collect();
            assert_eq!(lanes::<I>(singles), expected);
            let expected: Vec<i32> = bytes
                .chunks_exact(2)
                .map(|pair| (i32::from(pair[0]) & 0xffff) | i32::from(pair[1]) << 16)
                .collect();
            assert_eq!(int_lanes::<I>(pairs), expected);
        }
    }
    on_each_isa!(check);
}

#[test]
fn e4m3_codes_are_read_as_what_they_stand_for() {
    fn check<I: Isa>() {
        // All but NaN, which the quantiser never writes, in a multiple of every vector's length.
        let codes: Vec<u8> = (0..=255).map(|code: u8| if code & 0x7f == 0x7f { 0 } else { code }).collect();
        for codes in codes.chunks_exact(I::LANES) {
            // SAFETY: `on_each_isa` names detected sets only, and the chunk is a vector long.
            let found = unsafe { lanes::<I>(I::load_e4m3(codes.as_ptr())) };
            for (code, found) in codes.iter().zip(found) {
                let bits = (u16::from(*code) & 0x80) << 8 | (u16::from(*code) & 0x7f) << 7;
                let expected = f16::from_bits(bits).to_f32();
                assert_eq!(found.to_bits(), expected.to_bits(), "{code:#x}");
                assert_eq!(sage_core::oracle::round_e4m3(found * 256.0), found * 256.0, "{code:#x}");
            }
        }
    }
    on_each_isa!(check);
}

#[test]
fn four_sums_are_those_of_one_each() {
    fn check<I: Isa>() {
        let words: Vec<u32> = (0..4 * I::LANES as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        // SAFETY: `on_each_isa` names detected sets only, and each vector lies within the words.
        unsafe {
            let vectors = std::array::from_fn(|i| I::load_int(words[i * I::LANES..].as_ptr()));
            let expected: Vec<i32> = words
                .chunks_exact(I::LANES)
                .map(|words| words.iter().fold(0i32, |sum, &x| sum.wrapping_add(x as i32)))
                .collect();
            assert_eq!(I::reduce_add_ints(vectors).to_vec(), expected);
        }
    }
    on_each_isa!(check);
}

#[test]
fn products_of_a_block_are_exact() {
    fn check<I: Isa>() {
        let mut rng = rng(11);
        for round in 0..50 {
            // All extreme, or anything.
            let mut word = |low: i32, high: i32| {
                let mut byte =
                    || if round < 4 { [low, high][round % 2] } else { rng.random_range(low..=high) };
                u32::from_le_bytes([byte() as u8, byte() as u8, byte() as u8, byte() as u8])
            };
            let mut vectors =
                |low, high| [0; 4].map(|_| (0..I::LANES).map(|_| word(low, high)).collect::<Vec<u32>>());
            let (a, b) = (vectors(0, 24), vectors(-12, 12));
            let acc: Vec<u32> = (0..I::LANES).map(|_| rng.random_range(-5000..5000) as u32).collect();
            // SAFETY: `on_each_isa` names detected sets only.
            let sums = unsafe {
                let vector = |x: &Vec<u32>| words::<I>(x);
                int_lanes::<I>(I::dot_block(
                    words::<I>(&acc),
                    a.each_ref().map(vector),
                    b.each_ref().map(vector),
                ))
            };
            for i in 0..I::LANES {
                let wanted =
                    (0..4).fold(acc[i] as i32, |sum, w| sum + dot(IntWord::QuadOffset, a[w][i], b[w][i]));
                assert_eq!(sums[i], wanted);
            }
        }
    }
    on_each_isa!(check);
}
