//! Which scheme a GPU computes where the caller leaves it open.

use sage_core::{Accumulator, DType, Error, Preset, Problem, Pv, Result, Scheme};
use sage_ptx::Target;

use super::preferences::{FULL_ERROR, INT8_ERROR, Preferences};
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

/// Keys of each query of a key head up to which full precision is as fast as INT8 scores on Hopper, as the pass over K
/// costs what they save: all keys of the sequence, or those that a query sees on average. On an H200 INT8 is 1.00 of it
/// at 1024 keys, 0.93 with a causal mask, and 1.1 to 1.2 at 2048.
const FULL_KEYS: usize = 1024;
const FULL_SEEN_KEYS: usize = 512;

/// Keys that a query of each key head sees on average, from which 8-bit P·V repays the pass over V: on an H200 INT8 with
/// FP8 is 0.96 of INT8 with 16-bit P·V at 2048 and 1.03 at 4096.
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
    let band = problem.band;
    let seen = (if band.right == Some(0) { problem.kv_len / 2 } else { problem.kv_len })
        .min(band.left.map_or(usize::MAX, |left| left + band.right.unwrap_or(left)));
    let keys = seen * problem.group_size();
    // Not a matter of how the tensors lie in memory: the same values must give the same result.
    let hopper = machine.target == Target::SM_90A;
    if hopper && (keys <= FULL_SEEN_KEYS || problem.kv_len * problem.group_size() <= FULL_KEYS) {
        return in_full(format!("{keys} keys for each query are too few to repay quantising K"));
    }
    let repays =
        |scheme: &Scheme| keys >= NARROW_VALUES_KEYS || matches!(scheme.pv, Pv::F16(_) | Pv::BF16(_));
    let accurate = quantised.iter().rev().filter(|preference| preference.error <= error);
    let chosen = accurate
        .filter_map(|preference| Some((preference.on(machine, problem)?, preference.reason)))
        .find(|(scheme, _)| repays(scheme));
    match chosen {
        Some((scheme, reason)) => Ok((scheme, format!("scheme of {}: {reason}", machine.target))),
        None => in_full(format!("nothing else is computed on {}", machine.target)),
    }
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
    use sage_core::{Band, Call, Inputs, Options, Qk, Tensor};

    /// The choice for `len` queries and keys of head_dim 128, or its error.
    fn chosen(len: usize, accuracy: Option<f32>, causal: bool, target: Target) -> Result<Scheme> {
        let x = Tensor::new(vec![half::f16::ZERO; len * 128], &[1, 1, len, 128])?;
        let inputs = Inputs::new(x.view(), x.view(), x.view());
        let band = Band { right: causal.then_some(0), ..Band::FULL };
        let call = Call::check(&inputs, &Options::default().band(band))?;
        let request = Request { accuracy, ..Request::new(&call.problem) };
        Ok(choose(&call.problem, &request, &Machine::typical(target))?.0)
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
    fn the_fastest_that_is_accurate_enough() {
        let int8 = int8_scheme(DType::F16);
        let fp8 = |scheme: Scheme| matches!(scheme.pv, Pv::Fp8 { .. });
        let hopper = Target::SM_90A;
        assert_eq!(chosen(8192, None, false, hopper), Ok(int8));
        assert_eq!(chosen(8192, Some(0.02), false, hopper), Ok(int8));
        assert!(chosen(8192, Some(0.05), false, hopper).is_ok_and(fp8));
        assert_eq!(chosen(2048, Some(0.05), false, hopper), Ok(int8), "too few keys repay V's pass");
        assert_eq!(chosen(4096, Some(0.05), true, hopper), Ok(int8), "half of the keys are seen");
        assert!(chosen(1024, None, false, hopper).is_ok_and(|scheme| scheme.qk == Qk::Full), "too few keys");
        assert_eq!(chosen(2048, None, true, hopper), Ok(int8));
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
