//! `sageattn explain`: how a problem would be computed, and why.

use clap::Args;
use sage_kernels::GpuModel;
use sageattention::{Plan, Problem};
use serde_json::{Value, json};

use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::gpu_plan::GpuPlan;
use crate::made_up::{Content, MadeUp};
use crate::options::{DeviceOption, GpuOptions, PredictorOptions, ProblemOptions, Setting};
use crate::prediction;

/// Say how a problem would be computed, and why
#[derive(Debug, Args)]
#[command(
    mut_arg("target", |target| target.conflicts_with("device")),
    mut_arg("multiprocessors", |number| number.requires("target")),
    mut_arg("gpu", |gpu| gpu.conflicts_with_all(["target", "device", "kv_cache", "predictor"])),
    mut_arg("predictor", |predictor| predictor.conflicts_with("kv_cache")),
    after_help = "\
Nothing is computed, and no memory is needed for the tensors. Without --target it is the very plan that a call on the \
device would run; with it, the passes, kernels and workspaces of a GPU that need not be there. With --gpu they are \
those of a GPU as it is sold, and a table follows of the schemes that its architecture prefers, each with a predicted \
time: instructions that the emulator counts, at the rates that NVIDIA publishes. With a predictor and --target the \
passes are those of its prediction and of attention over the blocks that it keeps, beside their share of all blocks as \
far as it can be told without tensors.

Examples:
  sageattn explain --batch 1 --heads 32 --kv-heads 8 --seq 4096 --head-dim 128 --causal
  sageattn explain --heads 12 --seq 1 --kv-len 8192
  sageattn explain --heads 12 --seq 512 --head-dim 32 --scheme auto --json
  sageattn explain --heads 24 --seq 17550 --head-dim 128 --predictor sla --topk 0.1
  sageattn explain --heads 32 --seq 4096 --head-dim 128 --target sm_90a
  sageattn explain --heads 24 --seq 17550 --head-dim 128 --predictor sla --topk 0.1 --target sm_90a
  sageattn explain --heads 24 --seq 17776 --head-dim 128 --gpu rtx-5090
  sageattn explain --heads 32 --kv-heads 8 --seq 1 --kv-len 8192 --kv-cache fp8-e4m3 --target sm_89"
)]
pub struct Explain {
    #[command(flatten)]
    problem: ProblemOptions,
    #[command(flatten)]
    device: DeviceOption,
    #[command(flatten)]
    target: Option<GpuOptions>,
    /// A GPU as it is sold, such as t4, rtx-4090, h200, b200 or rtx-5090
    #[arg(long, value_name = "NAME", value_parser = GpuModel::named)]
    gpu: Option<GpuModel>,
    #[command(flatten)]
    predictor: PredictorOptions,
}

impl Explain {
    /// Prints the plan.
    pub fn execute(&self, console: Console) -> Result<()> {
        let setting = self.predictor.single()?;
        let made_up = MadeUp::new(&self.problem, Content::StandIn)?;
        if let Some(model) = &self.gpu {
            return self.print_model(console, model, &GpuPlan::new(&self.problem, &made_up, model.machine)?);
        }
        match self.target {
            Some(gpu) => {
                let plan = match &setting {
                    Some(Setting { predictor, .. }) => {
                        let tail = self.predictor.pooled_tail;
                        GpuPlan::over_predicted(&self.problem, &made_up, gpu.machine(), predictor, tail)?
                    }
                    None => GpuPlan::new(&self.problem, &made_up, gpu.machine())?,
                };
                if console.json {
                    let mut document = self.gpu_json(&plan);
                    document["predictor"] = json!(setting.as_ref().map(Setting::to_string));
                    return console.print_json(&document);
                }
                console.print(&format!("{plan}{}\n", plan.weighed()))
            }
            None if self.problem.cache.is_some() => Err(Failure::Usage(
                "--kv-cache: found no --target, expected one, such as sm_89: its passes are a GPU's".into(),
            )),
            None => {
                let [q, k, v] = made_up.tensors();
                let attention = made_up.attention()?.device(self.device.device);
                let attention = match &setting {
                    Some(setting) => {
                        attention.sparse(setting.predictor.clone()).pooled_tail(self.predictor.pooled_tail)
                    }
                    None => attention,
                };
                self.print(console, &attention.plan(q, k, v)?, setting.as_ref())
            }
        }
    }

    fn print(&self, console: Console, plan: &Plan, setting: Option<&Setting>) -> Result<()> {
        if !console.json {
            return console.print(&format!("{plan}\n"));
        }
        let mut document = self.json(plan.problem(), &plan.scheme().to_string(), &plan.to_string());
        document["device"] = json!(self.device.device.to_string());
        document["workspace_bytes"] = json!(plan.workspace_bytes());
        document["predictor"] = json!(setting.map(Setting::to_string));
        console.print_json(&document)
    }

    fn print_model(&self, console: Console, model: &GpuModel, plan: &GpuPlan) -> Result<()> {
        let progress = console.progress("predicting", 1);
        let predictions = prediction::predict(model, &plan.problem);
        progress.finish_and_clear();
        let predictions = predictions?;
        if console.json {
            let mut document = self.gpu_json(plan);
            document["gpu"] = json!(model.name);
            document["predictions"] = predictions.iter().map(|found| found.json(plan)).collect();
            return console.print_json(&document);
        }
        console.print(&format!(
            "{plan}{}\n\n{}",
            plan.weighed(),
            prediction::table(model, &predictions, plan)
        ))
    }

    fn gpu_json(&self, plan: &GpuPlan) -> Value {
        let mut document = self.json(&plan.problem, &plan.scheme(), &plan.to_string());
        document["target"] = json!(plan.machine.target.to_string());
        document["multiprocessors"] = json!(plan.machine.multiprocessors);
        document["workspace_bytes"] = json!(plan.workspace_bytes());
        document["splits"] = json!(plan.splits());
        document["passes"] = json!(plan.summaries());
        document["reasons"] = json!(plan.reasons());
        document["weighed"] = plan.weighed_json();
        document["density"] = json!(plan.prediction.as_ref().map(|prediction| json!({
            "expected": prediction.density.share,
            "is_least": prediction.density.is_least,
        })));
        document
    }

    /// What is known of every plan.
    fn json(&self, p: &Problem, scheme: &str, plan: &str) -> Value {
        json!({
            "command": "explain",
            "batch": p.batch,
            "heads": p.num_q_heads,
            "kv_heads": p.num_kv_heads,
            "q_len": p.q_len,
            "kv_len": p.kv_len,
            "head_dim": p.head_dim,
            "value_dim": p.value_dim,
            "dtype": p.dtype.name(),
            "causal": p.band.right == Some(0),
            "call": self.problem.forward.call.to_string(),
            "sm_scale": p.sm_scale,
            "sinks": p.sinks,
            "scheme": scheme,
            "plan": plan.lines().collect::<Vec<_>>(),
        })
    }
}
