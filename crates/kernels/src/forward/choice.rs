//! Which scheme a GPU computes where the caller leaves it open.

use std::iter;

use sage_core::{Accumulator, DType, Error, Preset, Problem, Pv, Result, Scheme};

use super::alternatives::Alternative;
use super::preferences::{FULL_ERROR, INT8_ERROR, Preference, Preferences};
use super::request::Request;
use crate::machine::Machine;

/// Queries of a call up to which K and V are read as given, split between blocks: quantising would read them once more.
pub(super) const FEW_QUERIES: usize = 64;

/// Our own INT8 scheme: that of [`Preset::INT8_FP8`], but with 16-bit P·V in the inputs' element type and exact sums.
pub fn int8_scheme(dtype: DType) -> Scheme {
    let pv = match dtype {
        DType::BF16 => Pv::BF16(Accumulator::F32),
        _ => Pv::F16(Accumulator::F32),
    };
    Scheme { pv, ..Preset::INT8_FP8.scheme(64) }
}

/// By how much shorter a less accurate scheme's predicted time must be to be chosen.
const WORTH_ITS_ERROR: f64 = 0.98;

/// Keys that a query of each key head sees on average, from which 8-bit P·V repays the pass over V: on an H200 INT8 with
/// FP8 is 0.96 of INT8 with 16-bit P·V at 2048 and 1.03 at 4096. Where times are predicted they decide.
const NARROW_VALUES_KEYS: usize = 3072;

/// The planner's own choice: the fastest that the architecture prefers of those that are accurate enough and that it has
/// kernels for.
pub(super) fn choose(problem: &Problem, request: &Request, machine: &Machine) -> Result<(Scheme, String)> {
    let error = request.accuracy.unwrap_or(INT8_ERROR);
    if error.is_nan() || error < FULL_ERROR {
        let wanted = format!("at least {FULL_ERROR}, the error of 16-bit attention");
        return Err(Error::value("accuracy", error, wanted));
    }
    let Preferences { full, quantised } = Preferences::of(machine.target);
    let dtype = machine.product_dtype(problem.dtype);
    // Full precision takes products in the tensors' own type.
    let has_full = dtype == problem.dtype;
    let in_full =
        |reason: String| Ok((full.scheme(dtype, problem.head_dim), format!("full precision: {reason}")));
    let rows = problem.q_len * problem.group_size();
    if rows <= FEW_QUERIES && has_full {
        return in_full(format!(
            "{rows} query rows for each key head read K and V too seldom to repay quantising K"
        ));
    }
    match quantised.first() {
        None => return in_full(full.reason.into()),
        Some(first) if error < first.error && !has_full => {
            let wanted = format!(
                "at least {}, the error of INT8 scores, as {} has no products of {}",
                first.error, machine.target, problem.dtype
            );
            return Err(Error::value("accuracy", error, wanted));
        }
        Some(first) if error < first.error => {
            return in_full(format!("INT8 scores have an error of {}, above {error}", first.error));
        }
        Some(_) => {}
    }
    let accurate = || quantised.iter().filter(|preference| preference.error <= error);
    if let Some(choice) = fastest(problem, machine, iter::once(&full).chain(accurate())) {
        return Ok(choice);
    }
    let repays = |scheme: &Scheme| {
        seen_keys(problem) * problem.group_size() >= NARROW_VALUES_KEYS
            || matches!(scheme.pv, Pv::F16(_) | Pv::BF16(_))
    };
    let chosen = accurate()
        .rev()
        .filter_map(|preference| Some((preference.on(machine, problem)?, preference.reason)))
        .find(|(scheme, _)| repays(scheme));
    match chosen {
        Some((scheme, reason)) => Ok((scheme, format!("scheme of {}: {reason}", machine.target))),
        None => in_full(format!("nothing else is computed on {}", machine.target)),
    }
}

/// Keys that a query sees on average, about.
fn seen_keys(problem: &Problem) -> usize {
    let band = problem.band;
    let seen = if band.right == Some(0) { problem.kv_len / 2 } else { problem.kv_len };
    seen.min(band.left.map_or(usize::MAX, |left| left + band.right.unwrap_or(left)))
}

/// Of schemes, the most accurate first, the one whose predicted time is the shortest, and why; none where times are not
/// predicted. How tensors lie in memory does not count: the same values must give the same result.
fn fastest<'p>(
    problem: &Problem,
    machine: &Machine,
    preferences: impl Iterator<Item = &'p Preference>,
) -> Option<(Scheme, String)> {
    let request = Request::new(problem);
    let mut timed: Vec<(Scheme, f64)> = Vec::new();
    for scheme in preferences.filter_map(|preference| preference.on(machine, problem)) {
        let alternatives = Alternative::in_scheme(problem, &request, machine, scheme).ok()?;
        let times = alternatives.iter().filter_map(|alternative| alternative.predicted);
        timed.push((scheme, times.min_by(f64::total_cmp)?));
    }
    let faster = |chosen, other: (Scheme, f64)| match chosen {
        Some((_, time)) if other.1 > time * WORTH_ITS_ERROR => chosen,
        _ => Some(other),
    };
    let (scheme, time) = timed.iter().copied().fold(None, faster)?;
    let others = timed.iter().filter(|(other, _)| *other != scheme);
    let others: Vec<_> = others.map(|(other, time)| format!("{other} would take {time:.0}")).collect();
    Some((scheme, format!("a predicted time of {time:.0} µs; {}", others.join(", "))))
}

/// P·V in single precision on tensor cores rounds P to 16 bits of type `dtype`, as every 16-bit attention does; and so
/// does the CPU's own form of 12 bits, which serves integer units.
pub(super) fn with_own_values(scheme: Scheme, dtype: DType, reasons: &mut Vec<String>) -> Scheme {
    let given = match scheme.pv {
        Pv::F32 => "single precision",
        Pv::Fixed12 { .. } => "12 bits",
        _ => return scheme,
    };
    reasons.push(format!("P·V in {dtype} with f32 sums, not in {given}: tensor cores take 16-bit operands"));
    Scheme { pv: int8_scheme(dtype).pv, ..scheme }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_core::{Band, Qk};
    use sage_ptx::Target;

    /// The choice for 4 x 32 heads of `len` queries and keys of head_dim 128, or its error.
    fn chosen(len: usize, accuracy: Option<f32>, causal: bool, target: Target) -> Result<Scheme> {
        let mut problem = Problem::dense(DType::F16, [4, 32, 32], [len, len], 128);
        problem.band = Band { right: causal.then_some(0), ..Band::FULL };
        let request = Request { accuracy, ..Request::new(&problem) };
        Ok(choose(&problem, &request, &Machine::typical(target))?.0)
    }

    #[test]
    fn tensors_of_bf16_have_integer_scores_and_values_of_f16_on_turing() {
        let choice = |q_len, accuracy| {
            let problem = Problem::dense(DType::BF16, [1, 1, 1], [q_len, 8192], 128);
            let request = Request { accuracy, ..Request::new(&problem) };
            Ok::<_, Error>(choose(&problem, &request, &Machine::typical(Target::SM_75))?.0)
        };
        for q_len in [1, 8192] {
            assert_eq!(choice(q_len, None), Ok(int8_scheme(DType::F16)));
        }
        assert_eq!(
            choice(8192, Some(0.005)).unwrap_err().to_string(),
            "accuracy: value is 0.005, expected at least 0.0135, the error of INT8 scores, as sm_75 has no products \
             of bf16"
        );
        assert!(chosen(8192, Some(0.005), false, Target::SM_75).is_ok_and(|scheme| scheme.qk == Qk::Full));
    }

    #[test]
    fn a_choice_says_what_others_would_take() {
        let problem = Problem::dense(DType::BF16, [1, 24, 24], [8448, 8448], 128);
        let machine = Machine::typical(Target::SM_90A);
        let (scheme, reason) = choose(&problem, &Request::new(&problem), &machine).unwrap();
        assert_eq!(scheme, int8_scheme(DType::BF16));
        let number = |text: &str| text.trim().parse::<f64>().ok();
        let (own, other) = reason.split_once(" µs; full QK · BF16 PV (f32) would take ").unwrap();
        let own = own.strip_prefix("a predicted time of ").and_then(number);
        // Measured on an H200: 957 and, in another run, 1086 µs.
        assert!(own.is_some_and(|time| (900.0..1050.0).contains(&time)), "{reason}");
        assert!(number(other).is_some_and(|time| (1050.0..1250.0).contains(&time)), "{reason}");
    }

    #[test]
    fn the_fastest_that_is_accurate_enough() {
        let int8 = int8_scheme(DType::F16);
        let fp8 = |scheme: Scheme| matches!(scheme.pv, Pv::Fp8 { .. });
        let hopper = Target::SM_90A;
        assert_eq!(chosen(8192, None, false, hopper), Ok(int8));
        assert_eq!(chosen(8192, Some(0.02), false, hopper), Ok(int8));
        assert!(chosen(8192, Some(0.05), false, hopper).is_ok_and(fp8));
        assert_eq!(chosen(2048, None, false, hopper), Ok(int8));
        assert!(chosen(2048, Some(0.05), false, hopper).is_ok_and(fp8));
        assert!(chosen(8192, Some(0.05), true, hopper).is_ok_and(fp8));
        assert!(chosen(1024, None, false, hopper).is_ok_and(|scheme| scheme.qk == Qk::Full), "too few keys");
        assert_eq!(chosen(8192, None, true, hopper), Ok(int8));
        assert_eq!(chosen(1024, None, false, Target::SM_80), Ok(int8));
        assert_eq!(chosen(8192, Some(0.05), false, Target::SM_80), Ok(int8), "no FP8 there");
        let narrow = Preset::SAGE2PP_INT8_FP8_PER_THREAD.scheme(128);
        assert_eq!(chosen(8192, Some(0.05), false, Target::SM_89), Ok(narrow), "GeForce doubles f16 sums");
        assert_eq!(chosen(8192, Some(0.05), false, Target::SM_120), Ok(narrow));
        let b300 = Target::of_capability(10, 3);
        assert!(chosen(8192, Some(0.05), false, b300).is_ok_and(|scheme| scheme.qk == Qk::Full), "no INT8");
        assert!(chosen(8192, Some(0.005), false, hopper).is_ok_and(|scheme| scheme.qk == Qk::Full));
        assert!(chosen(16, None, false, hopper).is_ok_and(|scheme| scheme.qk == Qk::Full));
        let refused = chosen(8192, Some(0.001), false, hopper).unwrap_err().to_string();
        assert_eq!(
            refused,
            "accuracy: value is 0.001, expected at least 0.0025, the error of 16-bit attention"
        );
    }
}
