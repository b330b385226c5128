//! What the planner weighs: schemes, and how the work of each may be cut.

use sage_core::{Problem, Result, Scheme};

use super::call::ForwardCall;
use super::cut::Cut;
use super::fallback::computed;
use super::forms::Forms;
use super::groups::HeadsAsRows;
use super::predicted;
use super::preferences::{INT8_ERROR, Preferences};
use super::request::Request;
use crate::machine::Machine;
use crate::tiling::Tiling;

/// A way to compute a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alternative {
    /// The scheme.
    pub scheme: Scheme,
    /// The attention kernel's tile shape.
    pub tiling: Tiling,
    /// Parts of the keys.
    pub splits: usize,
    /// Predicted microseconds of the GPU; none where the costs of its architecture were not measured.
    pub predicted: Option<f64>,
}

impl Alternative {
    /// Ways to compute a call: in the scheme asked for, or in all that the architecture prefers and that are accurate
    /// enough, the most accurate first.
    ///
    /// # Errors
    /// When no kernel computes it.
    pub fn all(problem: &Problem, request: &Request, machine: &Machine) -> Result<Vec<Self>> {
        let accuracy = request.accuracy.unwrap_or(INT8_ERROR);
        let preferences = Preferences::of(machine.target);
        let preferred = || preferences.all().filter(|preference| preference.error <= accuracy);
        let schemes: Vec<Scheme> = match request.scheme {
            Some(scheme) => vec![computed(scheme, machine.product_dtype(problem.dtype), &mut Vec::new())],
            None => preferred().filter_map(|preference| preference.on(machine, problem)).collect(),
        };
        let mut all = Vec::new();
        for scheme in schemes {
            all.extend(Alternative::in_scheme(problem, request, machine, scheme)?);
        }
        Ok(all)
    }

    /// Ways to compute a call in one scheme, the tuning table's first.
    pub(super) fn in_scheme(
        problem: &Problem,
        request: &Request,
        machine: &Machine,
        scheme: Scheme,
    ) -> Result<Vec<Self>> {
        let call = ForwardCall::new(problem, request, machine, HeadsAsRows::of(problem, request, &scheme));
        let forms = Forms::of(&call, &scheme)?;
        let cuts = Cut::all(&call, &forms);
        let of_cut = |cut: Cut| {
            let predicted = predicted::microseconds(&call, &forms, &cut);
            Alternative { scheme, tiling: cut.tuned.tiling, splits: cut.splits, predicted }
        };
        Ok(cuts.into_iter().map(of_cut).collect())
    }
}
