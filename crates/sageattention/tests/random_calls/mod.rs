//! What a random call must have computed, whoever computes it.

use sage_core::oracle::{self, Output};
use sage_core::{Accumulator, DType, IntBits, Pv, Qk, Scheme};
use sage_testkit::{Computed, RandomCall, Runner, Tolerance};

/// Mean errors that were found, as multiples of what is allowed: of the output from the scheme's definition and from
/// exact attention.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    pub of_scheme: f64,
    pub of_exact: f64,
}

impl Found {
    /// The larger of each.
    pub fn max(self, other: Found) -> Found {
        Found { of_scheme: self.of_scheme.max(other.of_scheme), of_exact: self.of_exact.max(other.of_exact) }
    }
}

/// Computes a call and compares with the scheme's definition and with exact attention, or says what no kernel computes.
pub fn check(runner: &dyn Runner, random: &RandomCall) -> Result<Found, String> {
    let RandomCall { call, preset, .. } = random;
    let checked = call.call();
    let scheme = preset.map(|preset| preset.scheme(checked.problem.head_dim));
    runner.supports(call, scheme)?;
    let computed = runner.run(call, scheme);
    let label = format!("{random:?}, {}", computed.scheme);
    let exact = oracle::exact(&checked);
    let of_scheme = runner.expected(&checked, &computed.scheme);
    let tolerances = Tolerances::new(call.q.dtype(), &computed.scheme);
    // As in the other tests: sums of P are of rounded P, relative to another maximum than the oracle's.
    let others = Tolerance { relative_l1: f64::INFINITY, element: None, rounding: 0.0, lse: 5e-3 };
    computed.check(&of_scheme, &others).unwrap_or_else(|error| panic!("{label}: {error}"));
    let found = Found {
        of_scheme: error(&computed, &of_scheme) / tolerances.scheme,
        of_exact: error(&computed, &exact) / tolerances.exact,
    };
    assert!(found.of_scheme <= 1.0, "{label}: {} of the tolerance of the scheme", found.of_scheme);
    assert!(found.of_exact <= 1.0, "{label}: {} of the tolerance of exact attention", found.of_exact);
    Ok(found)
}

/// `Σ|found − wanted| / Σ(|wanted| + 0.1)`: a relative error where outputs are as large as V's elements, and ten times
/// an absolute one where few outputs happen to be small.
fn error(computed: &Computed, wanted: &Output) -> f64 {
    let pairs = computed.out.iter().zip(&wanted.out);
    let distance: f64 = pairs.map(|(&a, b)| (f64::from(a) - b).abs()).sum();
    let size: f64 = wanted.out.iter().map(|x| x.abs() + 0.1).sum();
    if wanted.out.is_empty() { 0.0 } else { distance / size }
}

/// How large [`error`] may be.
struct Tolerances {
    scheme: f64,
    exact: f64,
}

impl Tolerances {
    /// The largest of 800 calls of up to 150 rows in the emulator, doubled and a little more, as the exponentials and
    /// accumulators of a GPU are a little coarser: the largest were, of the scheme, 0.00026 in f16, 0.0014 in bf16 and
    /// 0.0055 with FP8 P·V; of exact attention 0.0066 with INT8 scores, 0.022 with FP8 P·V too, and 0.085 with INT4.
    fn new(dtype: DType, scheme: &Scheme) -> Self {
        let rounding: f64 = if dtype == DType::BF16 { 3e-3 } else { 1e-3 };
        let (values, of_values) = match scheme.pv {
            Pv::Fp8 { .. } => (1.5e-2, 0.03),
            Pv::F16(Accumulator::F16 | Accumulator::F16ThenF32) => (2e-3, 2e-3),
            _ => (0.0, 0.0),
        };
        let scores = match scheme.qk {
            Qk::Full => 0.0,
            Qk::Int(quantizer) if quantizer.bits == IntBits::Eight => 0.014,
            _ => 0.15,
        };
        Tolerances { scheme: rounding.max(values), exact: rounding + of_values + scores }
    }
}
