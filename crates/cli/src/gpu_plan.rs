//! What a GPU would run for a call: its passes, with the kernels and the workspace of each. No GPU is needed.

use std::fmt;

use sage_core::sparse::{ExpectedDensity, Predictor};
use sage_core::{Call, Mask};
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{Alternative, ForwardPlan, Request, Tensors};
use sage_kernels::pass::Pass;
use sage_kernels::predict::{PredictCall, PredictTensors};
use sage_kernels::{Machine, TensorArg};
use sageattention::{Error, Lengths, Problem, Result};
use serde_json::Value;

use crate::decode_plan::DecodePlan;
use crate::made_up::MadeUp;
use crate::options::ProblemOptions;
use crate::pass_summary::PassSummary;
use crate::weighed::Weighed;

/// Most scores of a call that is planned: with more, bytes of the workspace would not fit 64 bits.
const MAX_SCORES: u128 = 1 << 52;

/// A call's passes on a GPU. Prints itself, in rows.
#[derive(Debug)]
pub struct GpuPlan {
    /// What is computed.
    pub problem: Problem,
    /// The GPU.
    pub machine: Machine,
    /// How the blocks of scores are predicted that the passes compute, where they are.
    pub prediction: Option<Predicted>,
    /// The passes.
    pub passes: Passes,
}

/// A prediction of blocks.
#[derive(Debug)]
pub struct Predicted {
    /// The pass.
    pub pass: Pass<PredictTensors>,
    /// How many blocks it is expected to keep.
    pub density: ExpectedDensity,
}

/// What computes a call.
#[derive(Debug)]
pub enum Passes {
    /// Attention over tensors, and what was weighed for it.
    Forward(ForwardPlan, Weighed),
    /// Attention over a KV cache.
    Decode(DecodePlan),
}

impl GpuPlan {
    /// Plans what the options describe for a GPU.
    ///
    /// # Errors
    /// What is wrong with the call, or what the GPU has no kernels for.
    pub fn new(options: &ProblemOptions, made_up: &MadeUp<'_>, machine: Machine) -> Result<Self> {
        let inputs = made_up.inputs()?;
        let call = Call::check(&inputs, &made_up.attention()?.options())?;
        check_scores(&call.problem)?;
        let Some(cache) = &options.cache else {
            let request = request(&call, &call.problem, made_up, options);
            let forward = ForwardPlan::new(&call.problem, &request, &machine)?;
            check_target(forward.pass(), &machine)?;
            // What only the plan's nearest scheme computes has no alternatives.
            let weighed = Alternative::all(&call.problem, &request, &machine).unwrap_or_default();
            let passes = Passes::Forward(forward, Weighed::new(weighed));
            return Ok(GpuPlan { problem: call.problem, machine, prediction: None, passes });
        };
        let decode = DecodePlan::new(options, cache, made_up, &machine)?;
        decode.appends().iter().take(1).try_for_each(|append| check_target(&append.call.pass(), &machine))?;
        check_target(decode.attend(), &machine)?;
        let (problem, passes) = (*decode.problem(), Passes::Decode(decode));
        Ok(GpuPlan { problem, machine, prediction: None, passes })
    }

    /// Plans the prediction of blocks of what the options describe, and attention over them, with pooled terms for the
    /// others or without.
    ///
    /// # Errors
    /// As [`GpuPlan::new`], and when the predictor does not fit the call.
    pub fn over_predicted(
        options: &ProblemOptions,
        made_up: &MadeUp<'_>,
        machine: Machine,
        predictor: &Predictor,
        pooled_tail: bool,
    ) -> Result<Self> {
        let inputs = made_up.inputs()?;
        let call_options = made_up.attention()?.options().pooled_tail(pooled_tail);
        let call = Call::check_sparse(&inputs, &call_options, predictor)?;
        check_scores(&call.problem)?;
        let [q_rows, kv_rows] = [&call.q, &call.k].map(|tensor| tensor.shape()[2]);
        let lengths = kernel_lengths(&call);
        let predict = PredictCall { lengths, q_rows, kv_rows, ..PredictCall::new(&call.problem) };
        let prediction =
            Predicted { pass: predict.pass(predictor)?, density: predictor.expected_density(&call.problem) };
        check_target(&prediction.pass, &machine)?;
        let problem = call.problem.blocks([predictor.block_q, predictor.block_k]);
        let forward = ForwardPlan::new(&problem, &request(&call, &problem, made_up, options), &machine)?;
        check_target(forward.pass(), &machine)?;
        // Times are predicted for attention over all keys alone.
        let passes = Passes::Forward(forward, Weighed::default());
        Ok(GpuPlan { problem, machine, prediction: Some(prediction), passes })
    }

    /// What is computed: a scheme, or what a KV cache stores.
    pub fn scheme(&self) -> String {
        match &self.passes {
            Passes::Forward(plan, _) => plan.scheme().to_string(),
            Passes::Decode(plan) => plan.scheme(),
        }
    }

    /// Why the passes are what they are, a sentence for each choice.
    pub fn reasons(&self) -> &[String] {
        match &self.passes {
            Passes::Forward(plan, _) => plan.reasons(),
            Passes::Decode(plan) => plan.reasons(),
        }
    }

    /// The schemes, tile shapes and parts of the keys that were weighed, with their predicted times, as a table.
    pub fn weighed(&self) -> String {
        match &self.passes {
            Passes::Forward(plan, weighed) => weighed.table(plan),
            Passes::Decode(_) => String::new(),
        }
    }

    /// The same as JSON.
    pub fn weighed_json(&self) -> Value {
        match &self.passes {
            Passes::Forward(plan, weighed) => weighed.json(plan),
            Passes::Decode(_) => Value::Array(Vec::new()),
        }
    }

    /// Parts that keys are split into.
    pub fn splits(&self) -> usize {
        match &self.passes {
            Passes::Forward(plan, _) => plan.splits(),
            Passes::Decode(plan) => plan.splits(),
        }
    }

    /// The passes in words, each kind once.
    pub fn summaries(&self) -> Vec<PassSummary> {
        let prediction =
            self.prediction.as_ref().map(|prediction| PassSummary::new("predict", &prediction.pass));
        let others = match &self.passes {
            Passes::Forward(plan, _) => vec![PassSummary::new("forward", plan.pass())],
            Passes::Decode(plan) => plan.summaries(),
        };
        prediction.into_iter().chain(others).collect()
    }

    /// Bytes of the largest workspace.
    pub fn workspace_bytes(&self) -> usize {
        self.summaries().iter().map(|pass| pass.workspace_bytes).max().unwrap_or(0)
    }
}

/// Where kernels learn the lengths of a call's sequences.
fn kernel_lengths(call: &Call<'_>) -> sage_kernels::Lengths {
    match call.lengths {
        Lengths::KvLens(_) => sage_kernels::Lengths::KvLens,
        Lengths::Packed { .. } => sage_kernels::Lengths::Packed,
        _ => sage_kernels::Lengths::Dense,
    }
}

/// What a forward pass of tensors without gaps is asked for, which computes `problem`: the call's, or that over blocks of a
/// map that is to be predicted.
fn request(call: &Call<'_>, problem: &Problem, made_up: &MadeUp<'_>, options: &ProblemOptions) -> Request {
    let choice = options.forward.scheme.choice();
    // Of a predicted map every head of every sequence has blocks of its own.
    let blocks = TensorArg { address: 0, strides: if problem.blocks.is_some() { [1; 4] } else { [0; 4] } };
    Request {
        scheme: choice.scheme(call.problem.head_dim),
        accuracy: choice.accuracy(),
        mask: match &call.mask {
            None => MaskForm::None,
            Some(Mask::Bool(_)) => MaskForm::Bool,
            Some(Mask::Additive(bias)) => MaskForm::Bias(bias.dtype()),
        },
        lengths: kernel_lengths(call),
        q_rows: call.q.shape()[2],
        kv_rows: call.k.shape()[2],
        lse: options.forward.lse,
        ..Request::new(problem)
    }
    .with_masks_of(&Tensors { mask: made_up.mask_argument(), blocks, ..Tensors::default() })
}

/// Refuses kernels with instructions that the target lacks.
fn check_target<T>(pass: &Pass<T>, machine: &Machine) -> Result<()> {
    for program in pass.programs(machine.target) {
        if let Some(lacking) = program.missing_on(machine.target) {
            let wanted =
                format!("{} for `{}` of {}", lacking.needs.target, lacking.instruction, lacking.kernel);
            return Err(Error::value("target", machine.target, wanted));
        }
    }
    Ok(())
}

fn check_scores(problem: &Problem) -> Result<()> {
    let Problem { batch, num_q_heads, q_len, kv_len, .. } = *problem;
    let scores: u128 = [batch, num_q_heads, q_len, kv_len].map(|n| n.max(1) as u128).into_iter().product();
    if scores <= MAX_SCORES {
        return Ok(());
    }
    Err(Error::value("batch · heads · seq · kv_len", scores, format!("at most {MAX_SCORES} on a GPU")))
}

impl fmt::Display for GpuPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        writeln!(f, "scheme      {}", self.scheme())?;
        let Machine { target, multiprocessors, .. } = self.machine;
        write!(f, "device      {target}, {multiprocessors} multiprocessors")?;
        if let Some(Predicted { pass, density }) = &self.prediction {
            write!(
                f,
                "\ndensity     {density}, of the blocks that the mask shows\npass        predict\n{pass}"
            )?;
        }
        match &self.passes {
            Passes::Forward(plan, _) => write!(f, "\npass        forward\n{}", plan.pass())?,
            Passes::Decode(plan) => {
                // All appends have the same kernels.
                let append = plan.appends().first();
                append.map_or(Ok(()), |append| write!(f, "\npass        append\n{}", append.call.pass()))?;
                write!(f, "\npass        attend\n{}", plan.attend())?;
            }
        }
        self.reasons().iter().try_for_each(|reason| write!(f, "\nbecause     {reason}"))
    }
}
