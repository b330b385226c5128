//! What no query sees must not count, on both engines, whatever K and V hold there: masked keys, keys outside the band,
//! and the biases that programs write for padding.

use sage_core::{Alignment, Band, DType, Preset, Scheme, oracle};
use sage_kernels::forward::int8_scheme;
use sage_ptx::Target;
use sage_testkit::{Bias, Case, CaseMask, Emulated, Extent, Runner, Sequences, check};

/// The least finite number of bf16, and about that of f32.
const LEAST: f32 = f32::from_bits(0xff7f_0000);

const TOP_LEFT: Band = Band { left: None, right: Some(0), alignment: Alignment::TopLeft };

/// Schemes that read K and V as they are, that quantise K, that rotate it first, that quantise both from all rows or
/// from some, and that convert V.
fn schemes() -> [Scheme; 6] {
    [
        Preset::FULL.scheme(64),
        int8_scheme(DType::F16),
        Scheme { rotate: true, ..int8_scheme(DType::F16) },
        Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64),
        Preset::INT8_FP8.scheme(64),
        int8_scheme(DType::BF16),
    ]
}

fn cases() -> impl Iterator<Item = (Emulated, Case)> {
    let on = |target| {
        schemes().into_iter().map(move |scheme| {
            let case = Case {
                scheme: Some(scheme),
                q_len: 100,
                kv_len: 200,
                q_heads: 2,
                kv_heads: 1,
                k_bias: Bias::Channels(3.0),
                ..Case::default()
            };
            (Emulated::on(target), case)
        })
    };
    on(Target::SM_89).chain(on(Target::SM_90A))
}

fn bias(dtype: DType) -> CaseMask {
    CaseMask::bias(dtype, Extent::All)
}

/// Keys from 130 on, and every key of the second tile but one.
fn padding([_, _, _, key]: [usize; 4]) -> f32 {
    if key < 130 && (key / 64 != 1 || key == 70) { 0.0 } else { f32::NEG_INFINITY }
}

/// Each head and batch entry hides other keys, and no row sees the last 40.
fn of_heads([batch, head, row, key]: [usize; 4]) -> f32 {
    let hidden =
        key >= 160 || (key * 7 + row * (1 + head) + batch).is_multiple_of(3) || (key / 8 + batch) % 4 == 2;
    if hidden { f32::NEG_INFINITY } else { 0.0 }
}

#[test]
fn masked_keys() {
    for ((gpu, case), spoil) in cases().zip([f32::NAN, 6e4, f32::INFINITY].into_iter().cycle()) {
        let case = Case { spoil: Some(spoil), batch: 2, ..case };
        for mask in [CaseMask::bool(Extent::All), bias(DType::F32), bias(DType::F16)] {
            // A mask of keys alone, as programs write padding.
            let of_keys = CaseMask { extent: Extent::BatchKeys, ..mask.pattern(padding) };
            check(&gpu, &Case { mask: Some(of_keys), ..case.clone() });
            check(&gpu, &Case { mask: Some(mask.pattern(of_heads)), band: TOP_LEFT, ..case.clone() });
        }
        let mask = Some(CaseMask::bool(Extent::All).pattern(of_heads));
        check(&gpu, &Case { mask, sequences: Sequences::KvLens(vec![90, 200]), ..case });
    }
}

#[test]
fn few_queries_and_split_keys() {
    for (q_len, kv_len, dtype) in [(1, 1100, DType::F16), (20, 900, DType::BF16)] {
        for target in [Target::SM_80, Target::SM_90A] {
            for mask in [CaseMask::bool(Extent::All), bias(DType::F32)] {
                let case = Case {
                    q_len,
                    kv_len,
                    dtype,
                    mask: Some(mask.pattern(padding)),
                    spoil: Some(f32::NAN),
                    q_heads: 4,
                    kv_heads: 2,
                    ..Case::default()
                };
                check(&Emulated::on(target).multiprocessors(40), &case);
            }
        }
    }
}

#[test]
fn keys_outside_the_band() {
    for ((gpu, case), spoil) in cases().zip([f32::NAN, 6e4].into_iter().cycle()) {
        let case = Case { spoil: Some(spoil), batch: 2, ..case };
        let window = Band { left: Some(20), right: Some(3), alignment: Alignment::BottomRight };
        // Of the first, the first query sees the first key: keys behind the hundredth are seen by none.
        for band in [TOP_LEFT, window, Band { alignment: Alignment::TopLeft, ..window }] {
            check(&gpu, &Case { band, ..case.clone() });
            check(&gpu, &Case { band, sequences: Sequences::KvLens(vec![190, 101]), ..case.clone() });
            let sequences = Sequences::Packed(vec![0, 70, 71, 171], vec![0, 164, 264, 300]);
            check(&gpu, &Case { band, sequences, ..case.clone() });
        }
    }
}

#[test]
fn a_static_cache_is_as_exact_as_its_filled_slots() {
    // K = N(0, 1) + 10 in the first 256 slots of each channel, zeros behind the mask.
    fn filled([_, _, _, key]: [usize; 4]) -> f32 {
        if key < 256 { 0.0 } else { f32::NEG_INFINITY }
    }
    for target in [Target::SM_89, Target::SM_90A] {
        for scheme in [int8_scheme(DType::F16), Preset::INT8_FP8.scheme(64)] {
            let sliced = Case {
                scheme: Some(scheme),
                q_len: 70,
                kv_len: 256,
                k_bias: Bias::Channels(10.0),
                lse: false,
                ..Case::default()
            };
            let mask = Some(CaseMask::bool(Extent::Keys).pattern(filled));
            let cache = Case { kv_len: 700, mask, spoil: Some(0.0), ..sliced.clone() };
            let [of_slice, of_cache] = [sliced, cache].map(|case| {
                let call = case.build();
                let computed = Emulated::on(target).run(&call.with_hidden_rows(0.0), case.scheme);
                computed.relative_l1(&oracle::exact(&call.call()))
            });
            // The same keys, the same mean and the same scales: what is left is the order of sums.
            assert!((of_cache / of_slice - 1.0).abs() < 0.02, "{of_cache} in the cache, {of_slice} sliced");
        }
    }
}

#[test]
fn a_row_of_the_least_bias_is_the_mean_of_v() {
    // The first ten rows are padding, and so are the last 50 keys.
    fn padded([_, _, row, key]: [usize; 4]) -> f32 {
        if row < 10 || key >= 150 { LEAST } else { 0.0 }
    }
    for (gpu, case) in cases() {
        for dtype in [DType::F16, DType::BF16] {
            for mask in [DType::F32, DType::BF16] {
                let case = Case { dtype, mask: Some(bias(mask).pattern(padded)), ..case.clone() };
                check(&gpu, &case);
                // Parts of the keys differ in length, and so in weight.
                let few = Case { q_len: 12, kv_len: 1100, scheme: None, ..case };
                check(&gpu.multiprocessors(60), &few);
            }
        }
    }
}
