//! Times of a GPU that need not be there: instructions that the emulator counts, at the rates that its maker publishes.
//!
//! A pass's launches are emulated for small calls with the same kernels; what they execute grows with the blocks of
//! queries, with the tiles of keys, and with the pairs of both that are seen, so that four calls say what each costs
//! (`growth`). At a GPU's rates that is the time of each of its pipes, of which a launch hides a part (`work`).

mod growth;
mod slice;
mod work;

use sage_core::{Error, Problem, Result, Scheme};
use sage_kernels::forward::{ForwardPlan, Preferences, Request};
use sage_kernels::{GpuModel, KEY_TILE, Tiling};

use growth::{Extent, Growth};
use serde_json::{Value, json};
pub use work::Pipe;
use work::Work;

use crate::failure;
use crate::gpu_plan::GpuPlan;
use crate::table::{TITLE, Table, ratio, styled};

/// How long a scheme would take.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The scheme.
    pub scheme: Scheme,
    /// Its relative L1 error on N(0, 1), and why the architecture prefers it to those before it.
    pub error: f32,
    /// Why.
    pub reason: &'static str,
    /// Milliseconds of the GPU.
    pub milliseconds: f64,
    /// The attention kernel's busiest pipe.
    pub bound: Pipe,
    /// The part of the attention kernel's time that each pipe is busy.
    pub busy: Vec<(Pipe, f64)>,
}

impl Prediction {
    /// As JSON; `plan` is what the planner chose.
    pub fn json(&self, plan: &GpuPlan) -> Value {
        let busy = self.busy.iter().map(|(pipe, share)| (pipe.to_string(), json!(share)));
        json!({
            "scheme": self.scheme.to_string(),
            "error": self.error,
            "reason": self.reason,
            "predicted_ms": self.milliseconds,
            "bound": self.bound.to_string(),
            "busy": busy.collect::<serde_json::Map<_, _>>(),
            "chosen": self.is_chosen(plan),
        })
    }

    fn is_chosen(&self, plan: &GpuPlan) -> bool {
        self.scheme.to_string() == plan.scheme()
    }
}

/// Predictions in a table, beside each other.
pub fn table(model: &GpuModel, predictions: &[Prediction], plan: &GpuPlan) -> String {
    let mut table = Table::new(&["<scheme", "error", "predicted ms", "faster", "<busiest", "<"]);
    let slowest = predictions.first().map_or(0.0, |found| found.milliseconds);
    for found in predictions {
        table.row(vec![
            found.scheme.to_string().into(),
            format!("{:.4}", found.error).into(),
            format!("{:.3}", found.milliseconds).into(),
            ratio(slowest / found.milliseconds),
            found.bound.to_string().into(),
            if found.is_chosen(plan) { "planned".into() } else { "".into() },
        ]);
    }
    let mut text = format!("{}\n{table}\n", styled(TITLE, format!("Predicted for {}", model.name)));
    for Prediction { scheme, reason, .. } in predictions {
        text += &format!("{scheme}: {reason}\n");
    }
    text + "Nothing was measured: these are instructions that the emulator counts, at published rates.\n"
}

/// Times of the schemes that a GPU's architecture prefers and has kernels for, for a call without masks or packed
/// sequences. Key lengths are not looked at: all keys of the tensors count.
///
/// # Errors
/// For other calls, and what the emulator finds wrong.
pub fn predict(model: &GpuModel, problem: &Problem) -> failure::Result<Vec<Prediction>> {
    check(problem)?;
    let mut predictions = Vec::new();
    for preference in Preferences::of(model.machine.target).all() {
        let Some(scheme) = preference.on(&model.machine, problem) else { continue };
        let request = Request { scheme: Some(scheme), ..Request::new(problem) };
        let plan = ForwardPlan::new(problem, &request, &model.machine)?;
        let launches = launches(model, problem, &scheme, plan.tiling())?;
        let milliseconds = launches.iter().map(|work| work.seconds() * 1e3).sum::<f64>();
        // Of a pass's launches attention is the last and the longest.
        let attention = launches.iter().max_by(|a, b| a.seconds().total_cmp(&b.seconds()));
        let attention = attention.copied().unwrap_or_default();
        predictions.push(Prediction {
            scheme,
            error: preference.error,
            reason: preference.reason,
            milliseconds,
            bound: attention.bound(),
            busy: attention.busy(),
        });
    }
    Ok(predictions)
}

fn check(problem: &Problem) -> Result<()> {
    let unsupported = |what: &str| {
        Err(Error::unsupported(
            format!("a predicted time with {what}"),
            "leave it out, or see the plan by --target",
        ))
    };
    match problem {
        Problem { masked: true, .. } => unsupported("a mask"),
        Problem { packed: true, .. } => unsupported("packed sequences"),
        Problem { blocks: Some(_), .. } => unsupported("a block mask"),
        _ => Ok(()),
    }
}

/// The work of each launch of a scheme's pass.
fn launches(
    model: &GpuModel,
    problem: &Problem,
    scheme: &Scheme,
    tiling: Tiling,
) -> failure::Result<Vec<Work>> {
    let growths = Growth::of_launches(|blocks, tiles| {
        let slice = slice::Slice { q_len: blocks * tiling.block_q(), kv_len: tiles * KEY_TILE };
        let reports = slice.launches(model, problem, scheme, tiling)?;
        Ok(reports.iter().map(|report| Work::of(report, model)).collect())
    })?;
    let extent = Extent::of(problem, tiling.block_q());
    // Blocks do not divide evenly among multiprocessors, and the last wave leaves some idle.
    let waves = extent.blocks / model.machine.multiprocessors as f64;
    let idle = waves.ceil() / waves;
    Ok(growths.iter().map(|growth| growth.at(&extent, idle)).collect())
}
