//! `sageattn emulate`: a GPU's passes, run here and checked.

use std::time::Duration;

use clap::Args;
use sage_emulator::Report;
use serde_json::{Value, json};

use crate::console::Console;
use crate::emulation::{self, Distances, Emulation};
use crate::failure::{Failure, Result};
use crate::gpu_plan::GpuPlan;
use crate::made_up::{Content, MadeUp};
use crate::metrics::Metrics;
use crate::options::{GpuOptions, ProblemOptions};
use crate::table::{Cell, TITLE, Table, styled};

/// Longest sequence, and most rows of packed ones: the oracle takes hours beyond.
const MAX_LEN: usize = 65536;

/// Most sequences, and most heads of each.
const MAX_HEADS: usize = 65535;

/// Run a GPU's passes here, in the emulator, and check them
#[derive(Debug, Args)]
#[command(
    mut_arg("target", |target| target.default_value("sm_89")),
    after_help = "\
Tensors are normally distributed. The kernels are those that a GPU of the target would run, and the emulator looks for \
what a GPU would not tell: accesses out of bounds, races, missing waits, reads of what nobody wrote. It counts the \
instructions that warps execute, the turns of shared memory's banks that another layout would save, and the 32-byte \
sectors of global memory that were touched, beside those that the bytes would fill. Times are the emulator's. With \
--kv-cache, all tokens but the queries' are appended first, then those of the queries, which attend to them all.

Examples:
  sageattn emulate
  sageattn emulate --head-dim 128 --seq 200 --kv-len 300 --causal --target sm_80 --lse
  sageattn emulate --scheme sage2-int8-fp8-per-thread --heads 4 --kv-heads 2 --json
  sageattn emulate --batch 2 --seq 100 --padding 30 --softcap 20
  sageattn emulate --cu-seqlens 0,50,128 --window 32,0
  sageattn emulate --seq 1 --kv-len 500 --heads 8 --kv-heads 2 --kv-cache int8 --causal"
)]
pub struct Emulate {
    #[command(flatten)]
    problem: ProblemOptions,
    #[command(flatten)]
    gpu: GpuOptions,
}

impl Emulate {
    /// Runs the passes and prints what they did.
    pub fn execute(&self, console: Console) -> Result<()> {
        self.check_sizes()?;
        let made_up = MadeUp::new(&self.problem, Content::Normal)?;
        let plan = GpuPlan::new(&self.problem, &made_up, self.gpu.machine())?;
        let progress = console.progress("emulating", emulation::launches(&plan));
        let emulation = emulation::run(&plan, &made_up, self.problem.forward.lse, &mut || progress.inc(1))?;
        progress.finish_and_clear();
        if console.json {
            console.print_json(&self.json(&plan, &emulation))
        } else {
            console.print(&text(&plan, &emulation))
        }
    }

    /// Refuses sizes that would take hours, or more memory than the emulator has, before tensors are made up.
    fn check_sizes(&self) -> Result<()> {
        let (problem, sizes) = (&self.problem, &self.problem.sizes);
        for (option, found, most) in [
            ("--batch", sizes.batch, MAX_HEADS),
            ("--heads", sizes.heads, MAX_HEADS),
            ("--kv-heads", sizes.kv_heads(), MAX_HEADS),
            ("--seq", sizes.seq, MAX_LEN),
            ("--kv-len", sizes.kv_len(), MAX_LEN),
        ] {
            if !(1..=most).contains(&found) {
                let wanted = format!("expected 1 to {most} in the emulator");
                return Err(Failure::Usage(format!("{option}: value is {found}, {wanted}")));
            }
        }
        for (option, boundaries) in
            [("--cu-seqlens", &problem.cu_seqlens), ("--cu-seqlens-k", &problem.cu_seqlens_k)]
        {
            let total = boundaries.iter().flatten().last().copied().unwrap_or(0);
            if usize::try_from(total).is_ok_and(|total| total > MAX_LEN) {
                let wanted = format!("expected at most {MAX_LEN} in the emulator");
                return Err(Failure::Usage(format!("{option}: total is {total}, {wanted}")));
            }
        }
        for shape in problem.shapes()? {
            emulation::check_buffer(2 * product(&shape))?;
        }
        if problem.mask.is_some() {
            emulation::check_buffer(4 * product(&[sizes.batch, sizes.seq, sizes.kv_len()]))?;
        }
        Ok(())
    }

    fn json(&self, plan: &GpuPlan, emulation: &Emulation) -> Value {
        let p = &plan.problem;
        json!({
            "command": "emulate",
            "target": plan.machine.target.to_string(),
            "multiprocessors": plan.machine.multiprocessors,
            "batch": p.batch,
            "heads": p.num_q_heads,
            "kv_heads": p.num_kv_heads,
            "q_len": p.q_len,
            "kv_len": p.kv_len,
            "head_dim": p.head_dim,
            "value_dim": p.value_dim,
            "dtype": p.dtype.name(),
            "causal": self.problem.forward.call.causal.is_some(),
            "call": self.problem.forward.call.to_string(),
            "scheme": plan.scheme(),
            "splits": plan.splits(),
            "reasons": plan.reasons(),
            "passes": plan.summaries(),
            "launches": emulation.launches.iter().map(|(report, time)| launch(report, *time)).collect::<Vec<_>>(),
            "against_scheme": Metrics::from(emulation.out.definition),
            "against_exact": Metrics::from(emulation.out.exact),
            "lse": emulation.lse.map(|Distances { definition, exact }| json!({
                "against_scheme": Metrics::from(definition),
                "against_exact": Metrics::from(exact),
            })),
            "ms": milliseconds(emulation.launches.iter().map(|(_, time)| *time).sum()),
        })
    }
}

fn product(sizes: &[usize]) -> u128 {
    sizes.iter().map(|&size| size as u128).product()
}

fn text(plan: &GpuPlan, emulation: &Emulation) -> String {
    let mut text = format!("{}\n{plan}\n", styled(TITLE, "Emulated"));
    for (report, time) in &emulation.launches {
        text.push_str(&format!("\n{report}  emulated in {:.1} ms\n", milliseconds(*time)));
    }
    let mut headings = vec!["<of", "<against"];
    headings.extend(Metrics::HEADINGS);
    let mut table = Table::new(&headings);
    let out = Some(("output", emulation.out));
    let lse = emulation.lse.map(|distances| ("log-sum-exp", distances));
    for (name, Distances { definition, exact }) in out.into_iter().chain(lse) {
        for (against, accuracy) in [("definition", definition), ("exact attention", exact)] {
            let mut cells: Vec<Cell> = vec![name.into(), against.into()];
            cells.extend(Metrics::from(accuracy).cells());
            table.row(cells);
        }
    }
    let time = emulation.launches.iter().map(|(_, time)| *time).sum();
    text + &format!("\n{table}\nNo fault found; emulated in {:.1} ms\n", milliseconds(time))
}

/// A launch as JSON.
fn launch(report: &Report, time: Duration) -> Value {
    let (sectors, ideal_sectors) = report.sectors();
    json!({
        "kernel": report.program,
        "grid": report.grid,
        "block": report.block,
        "shared_bytes": report.shared_bytes,
        "bulk_bytes": report.bulk_bytes,
        "instructions": report.instructions,
        "instructions_total": report.total(),
        "bank_conflicts": report.bank_conflicts(),
        "sectors": sectors,
        "ideal_sectors": ideal_sectors,
        "ms": milliseconds(time),
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
