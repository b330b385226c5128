//! What a random call must have computed.

use sage_core::{Accumulator, Call, DType, IntBits, Pv, Qk, Scheme, oracle};

use super::memory::for_each_index;
use super::{RandomCall, UNTOUCHED, widened};

/// What came out of a call: its output's memory, and the log-sum-exp where one was asked for.
pub struct Computed {
    pub scheme: Scheme,
    pub out: Vec<u16>,
    pub lse: Option<Vec<f32>>,
}

/// Mean errors that were found, as multiples of what is allowed: of the output from the scheme's definition and from
/// exact attention.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    pub of_scheme: f64,
    pub of_exact: f64,
}

/// Compares with the scheme's definition and with exact attention, and the memory around the output with what was
/// there.
pub fn check(call: &RandomCall, computed: &Computed) -> Found {
    let inputs = call.inputs();
    let checked = Call::check(&inputs, &call.options).unwrap();
    let label = format!("{call:?}, {}", computed.scheme);
    let out = elements(call, &checked, computed, &label);
    let wanted = oracle::scheme(&checked, &computed.scheme);
    let exact = oracle::exact(&checked);
    assert!(out.iter().all(|x| x.is_finite()), "{label}: not finite");
    for (row, &lse) in exact.lse.iter().enumerate() {
        let dim = call.q.geometry.shape()[call.q.geometry.rank() - 1];
        let empty = lse == f64::NEG_INFINITY;
        let zeros = || out[row * dim..(row + 1) * dim].iter().all(|&x| x == 0.0);
        assert!(!empty || zeros(), "{label}: row {row} sees no key, but is not zeros");
    }
    let tolerances = Tolerances::new(call.q.dtype, &computed.scheme);
    let found = Found {
        of_scheme: error(&out, &wanted.out) / tolerances.scheme,
        of_exact: error(&out, &exact.out) / tolerances.exact,
    };
    assert!(found.of_scheme <= 1.0, "{label}: {} of the tolerance of the scheme", found.of_scheme);
    assert!(found.of_exact <= 1.0, "{label}: {} of the tolerance of exact attention", found.of_exact);
    if let Some(lse) = &computed.lse {
        assert_eq!(lse.len(), wanted.lse.len(), "{label}");
        for (row, (&found, &wanted)) in lse.iter().zip(&wanted.lse).enumerate() {
            // As in the other tests: sums of P are of rounded P, relative to another maximum than the oracle's.
            let near = (f64::from(found) - wanted).abs() <= 5e-3 * wanted.abs().max(1.0);
            let same = f64::from(found) == wanted;
            assert!(near || same, "{label}: lse of row {row} is {found}, expected {wanted}");
        }
    }
    found
}

/// The output in the oracle's order. What lies between its elements must be as it was.
fn elements(call: &RandomCall, checked: &Call<'_>, computed: &Computed, label: &str) -> Vec<f32> {
    assert_eq!(computed.out.len(), call.out.bits.len(), "{label}");
    let geometry = checked.check_output(call.out.dtype, &call.out.geometry).unwrap();
    let wide = widened(call.out.dtype, &computed.out);
    let mut between = vec![true; wide.len()];
    let mut out = Vec::with_capacity(geometry.len());
    for_each_index(geometry.shape(), |index| {
        let at = geometry.index([index[0], index[1], index[2], index[3]]) as usize;
        between[at] = false;
        out.push(wide[at]);
    });
    for (at, &bits) in computed.out.iter().enumerate() {
        assert!(!between[at] || bits == UNTOUCHED, "{label}: element {at} beside the output is written");
    }
    out
}

/// `Σ|found − wanted| / Σ(|wanted| + 0.1)`: a relative error where outputs are as large as V's elements, and ten times
/// an absolute one where few outputs happen to be small.
fn error(found: &[f32], wanted: &[f64]) -> f64 {
    let distance: f64 = found.iter().zip(wanted).map(|(&a, b)| (f64::from(a) - b).abs()).sum();
    let size: f64 = wanted.iter().map(|x| x.abs() + 0.1).sum();
    if found.is_empty() { 0.0 } else { distance / size }
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
