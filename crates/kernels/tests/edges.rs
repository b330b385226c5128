//! Whole passes at the edges of what a call may be: no keys, no queries, very many heads, tensors anywhere in memory.

use sage_core::metrics::Accuracy;
use sage_core::{Alignment, Band, DType, MAX_HEADS, Preset, Problem, Scheme, SmoothQ, oracle};
use sage_kernels::forward::{ForwardPlan, Request, Tensors, int8_scheme};
use sage_kernels::pass::Launcher;
use sage_kernels::{Lengths, Machine};
use sage_ptx::{Arg, BoxedTensor, Target};
use sage_testkit::{Bias, Case, CaseMask, Emulated, Extent, Runner, Sequences, check};

const WINDOW: Band = Band { left: Some(20), right: Some(71), alignment: Alignment::TopLeft };
const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };

/// The kinds of kernels: as given, INT8, INT4, FP8 with scales of all rows, of some, and with smoothed V; Q smoothed.
fn schemes(target: Target) -> Vec<Option<Scheme>> {
    let mut smooth_q = int8_scheme(DType::F16);
    smooth_q.smooth.q = SmoothQ::Block(64);
    let mut schemes = vec![None, Some(int8_scheme(DType::F16)), Some(smooth_q)];
    let presets = [
        Preset::FULL,
        Preset::SAGE1_INT8_FP16,
        Preset::SAGE2_INT8_FP16_F16F32_PER_WARP,
        Preset::INT8_FP8,
        Preset::SAGE2_INT8_FP8_PER_THREAD,
        Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD,
        Preset::SAGE2_INT4_FP8,
    ];
    let fp8 = target.sm() >= 89;
    let computed = presets.into_iter().filter(|preset| fp8 || !preset.name().contains("fp8"));
    schemes.extend(computed.map(|preset| Some(preset.scheme(64))));
    schemes
}

/// Every row is zeros with a log-sum-exp of −∞.
fn check_empty(gpu: &Emulated, case: &Case, rows: usize) {
    let computed = gpu.run(&case.build(), case.scheme);
    assert_eq!((computed.out.len(), computed.lse.len()), (rows * case.head_dim, rows), "{case:?}");
    assert!(computed.out.iter().all(|&x| x.to_bits() == 0), "{case:?}: {:?}", computed.kernels);
    assert!(computed.lse.iter().all(|&x| x == f32::NEG_INFINITY), "{case:?}: {:?}", computed.kernels);
}

#[test]
fn no_keys_at_all() {
    for target in [Target::SM_80, Target::SM_89, Target::SM_90A] {
        let gpu = Emulated::on(target);
        for scheme in schemes(target) {
            for (q_len, band) in [(1, CAUSAL), (3, Band::FULL), (150, Band::FULL), (70, CAUSAL)] {
                let case = Case { scheme, q_len, kv_len: 0, band, q_heads: 2, batch: 2, ..Case::default() };
                check_empty(&gpu, &case, 4 * q_len);
                let unaligned = Case { offset: 1, ..case.clone() };
                check_empty(&gpu.multiprocessors(40), &unaligned, 4 * q_len);
                // Keys that are all cut off.
                let sequences = Sequences::KvLens(vec![0, 0]);
                let cut = Case { kv_len: 70, sequences: sequences.clone(), ..case.clone() };
                check_empty(&gpu, &cut, 4 * q_len);
                check_empty(&gpu, &Case { sequences, ..case.clone() }, 4 * q_len);
                let sequences = Sequences::Packed(vec![0, q_len as i32, q_len as i32], vec![0, 0, 0]);
                check_empty(&gpu, &Case { sequences, ..case.clone() }, 2 * q_len);
            }
            let case = Case { scheme, q_len: 130, kv_len: 0, ..Case::default() };
            for mask in [CaseMask::bool(Extent::All), CaseMask::bias(DType::F32, Extent::All)] {
                check_empty(&gpu, &Case { mask: Some(mask), ..case.clone() }, 130);
            }
        }
    }
}

#[test]
fn no_queries_at_all() {
    for target in [Target::SM_80, Target::SM_90A] {
        for scheme in schemes(target) {
            let packed = |q: [i32; 3], k: [i32; 3]| Sequences::Packed(q.to_vec(), k.to_vec());
            for case in [
                Case { q_len: 0, ..Case::default() },
                Case { q_len: 0, kv_len: 0, ..Case::default() },
                Case { batch: 0, q_len: 130, ..Case::default() },
                Case { sequences: packed([0; 3], [0; 3]), ..Case::default() },
                Case { sequences: packed([0; 3], [0, 70, 100]), ..Case::default() },
                Case { sequences: Sequences::Packed(vec![0], vec![0]), ..Case::default() },
            ] {
                let computed = Emulated::on(target).run(&case.build(), scheme);
                assert!(computed.out.is_empty() && computed.kernels.is_empty(), "{case:?}");
            }
        }
    }
}

/// The longest keys have no query, so that no grid has blocks for all of them.
#[test]
fn keys_without_queries() {
    for target in [Target::SM_80, Target::SM_90A] {
        for scheme in schemes(target) {
            for band in [Band::FULL, CAUSAL, WINDOW] {
                let sequences = Sequences::Packed(vec![0, 0, 40, 40, 70], vec![0, 300, 390, 700, 800]);
                let case = Case { scheme, band, sequences, kv_heads: 2, q_heads: 2, ..Case::default() };
                check(&Emulated::on(target), &case);
            }
        }
    }
}

/// Lengths in device memory that exceed the longest that the caller spoke of: what is computed is nobody's concern, but
/// no block waits for one that never comes, and none reads or writes what it must not. Sequences as long as they should
/// be are right all the same.
#[test]
fn lengths_beyond_the_longest() {
    let sequences = Sequences::Packed(vec![0, 30, 230], vec![0, 90, 390]);
    let call = Case { sequences, kv_heads: 2, q_heads: 2, ..Case::default() }.build();
    for target in [Target::SM_80, Target::SM_90A] {
        for scheme in schemes(target) {
            for longest in [[200, 90], [30, 300], [30, 90]] {
                let gpu = Emulated { longest: Some(longest), ..Emulated::on(target) };
                let computed = gpu.run(&call, scheme);
                let expected = oracle::scheme(&call.call(), &computed.scheme);
                for head in 0..2 {
                    let rows = head * 230 * 64..(head * 230 + 30) * 64;
                    let accuracy = Accuracy::of(&computed.out[rows.clone()], &expected.out[rows]);
                    assert!(accuracy.relative_l1 <= 0.05, "{longest:?}, {}: {accuracy:?}", computed.scheme);
                }
            }
        }
    }
}

#[test]
fn grids_of_many_heads_are_folded() {
    let folded = |target| Emulated { folded: true, ..Emulated::on(target) };
    for target in [Target::SM_80, Target::SM_90A] {
        for scheme in schemes(target) {
            let case = Case {
                scheme,
                batch: 7,
                q_heads: 4,
                kv_heads: 2,
                q_len: 70,
                kv_len: 90,
                head_dim: 40,
                k_bias: Bias::Channels(2.0),
                band: CAUSAL,
                ..Case::default()
            };
            check(&folded(target), &case);
            let sequences = Sequences::Packed(vec![0, 3, 3, 70, 71, 100], vec![0, 64, 130, 130, 227, 228]);
            check(&folded(target), &Case { sequences, ..case });
        }
    }
    // Few queries, whose keys are in parts.
    let case = Case { batch: 5, q_heads: 2, q_len: 2, kv_len: 700, ..Case::default() };
    let kernels = check(&folded(Target::SM_80).multiprocessors(60), &case).kernels;
    assert!(kernels.last().is_some_and(|name| name.starts_with("combine")), "{kernels:?}");
}

/// Collects the grids of a pass.
struct Grids(Vec<[u32; 3]>);

impl Launcher for Grids {
    type Error = std::convert::Infallible;

    fn tensor_map(&mut self, _: &BoxedTensor) -> Result<Arg, Self::Error> {
        Ok(Arg::Pointer(0))
    }

    fn launch(&mut self, _: usize, grid: [u32; 3], _: &[Arg]) -> Result<(), Self::Error> {
        self.0.push(grid);
        Ok(())
    }
}

/// `[batch, q_heads, kv_heads, q_len, kv_len]` of dimension 64.
fn problem([batch, q_heads, kv_heads, q_len, kv_len]: [usize; 5]) -> Problem {
    Problem::dense(DType::F16, [batch, q_heads, kv_heads], [q_len, kv_len], 64)
}

fn request(problem: &Problem, scheme: Option<Scheme>) -> Request {
    Request { scheme, lse: true, ..Request::new(problem) }
}

#[test]
fn launches_of_all_heads_that_a_call_may_have() {
    for target in [Target::SM_80, Target::SM_90A] {
        let gpu = Machine { multiprocessors: 132, ..Machine::typical(target) };
        for scheme in schemes(target) {
            for sizes in [
                [65_541, 1, 1, 1, 3],
                [65_541, 1, 1, 70, 70],
                [1, 65_541, 65_541, 70, 70],
                [MAX_HEADS / 32, 32, 4, 100, 300],
                [MAX_HEADS, 1, 1, 2, 1],
            ] {
                let problem = problem(sizes);
                let forward = ForwardPlan::new(&problem, &request(&problem, scheme), &gpu).unwrap();
                let mut grids = Grids(Vec::new());
                let Ok(()) = forward.pass().run(&Tensors::default(), 0, &mut grids);
                assert!(!grids.0.is_empty());
                for (grid, kernel) in grids.0.iter().zip(forward.pass().kernel_names()) {
                    let [x, y, z] = *grid;
                    let fits = (1..1 << 31).contains(&x) && [y, z].iter().all(|n| (1..65_536).contains(n));
                    assert!(fits, "{sizes:?} {kernel}: {grid:?}");
                    // Warpgroups stay, and take one piece of work after another.
                    let heads = sizes[0] * sizes[2];
                    assert!(kernel.contains("_wg") || y as usize * z as usize >= heads, "{sizes:?} {kernel}");
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_the_kernels_numbers_is_refused_or_left_to_others() {
    let gpu = Machine { multiprocessors: 132, ..Machine::typical(Target::SM_90A) };
    let message = |sizes, rows: [usize; 2]| {
        let problem = problem(sizes);
        let request = Request {
            lengths: Lengths::Packed,
            q_rows: rows[0],
            kv_rows: rows[1],
            ..request(&problem, None)
        };
        ForwardPlan::new(&problem, &request, &gpu).map(|forward| forward.pass().kernel_names().join(" "))
    };
    assert_eq!(
        message([1 << 20, 32, 4, 1, 1], [100, 100]).unwrap_err().to_string(),
        "cu_seqlens_q: value is boundaries of 1048576 sequences of 32 heads, expected at most 16777216 heads, all \
         sequences together"
    );
    assert_eq!(
        message([1, 1, 1, 1, 1 << 33], [1, 1 << 33]).unwrap_err().to_string(),
        "rows of k: value is 8589934592, expected at most 1073740800 on a GPU"
    );
    // One long sequence among a million without rows: more tiles than a counter of pieces holds.
    assert!(!message([1 << 20, 1, 1, 1 << 20, 300], [1 << 20, 300]).unwrap().contains("_wg"));
    assert!(message([1 << 10, 1, 1, 1 << 20, 300], [1 << 20, 300]).unwrap().contains("_wg"));
}

#[test]
fn a_scheme_does_not_depend_on_how_tensors_lie_in_memory() {
    let mut schemes_seen = Vec::new();
    for target in [Target::SM_80, Target::SM_89, Target::SM_90A, Target::SM_120A] {
        let gpu = Machine { multiprocessors: 132, ..Machine::typical(target) };
        for accuracy in [None, Some(0.005), Some(0.02), Some(0.05)] {
            for (q_len, kv_len) in [
                (1, 5000),
                (64, 100),
                (65, 0),
                (65, 100),
                (300, 513),
                (2000, 1024),
                (700, 2048),
                (4096, 9000),
            ] {
                for (heads, band) in [([1, 1], Band::FULL), ([8, 2], CAUSAL)] {
                    let problem = problem([2, heads[0], heads[1], q_len, kv_len]).band(band);
                    let schemes =
                        [(true, true), (true, false), (false, false)].map(|(aligned, has_tensor_map)| {
                            let request =
                                Request { accuracy, aligned, has_tensor_map, ..request(&problem, None) };
                            *ForwardPlan::new(&problem, &request, &gpu).unwrap().scheme()
                        });
                    assert_eq!(schemes[0], schemes[1], "{problem:?}");
                    assert_eq!(schemes[0], schemes[2], "{problem:?}");
                    schemes_seen.push(schemes[0].to_string());
                }
            }
        }
    }
    schemes_seen.sort();
    schemes_seen.dedup();
    assert!(schemes_seen.len() >= 3, "{schemes_seen:?}");
}

/// The kernels of warpgroups need maps of what they read: of the workspace's tiles there always are some.
#[test]
fn repeated_keys_are_quantised_for_warpgroups_too() {
    let gpu = Machine { multiprocessors: 132, ..Machine::typical(Target::SM_90A) };
    let kernels = |preset: Preset, aligned| {
        let problem = problem([2, 4, 4, 300, 300]);
        let request =
            Request { aligned, has_tensor_map: false, ..request(&problem, Some(preset.scheme(64))) };
        ForwardPlan::new(&problem, &request, &gpu).unwrap().pass().kernel_names().join(" ")
    };
    assert!(kernels(Preset::INT8_FP8, true).contains("_wg"));
    assert!(!kernels(Preset::INT8_FP8, false).contains("_wg"));
    assert!(!kernels(Preset::SAGE2_INT8_FP16_PER_WARP, true).contains("_wg"));
    assert!(!kernels(Preset::FULL, true).contains("_wg"));
}
