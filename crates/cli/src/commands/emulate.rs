//! `sageattn emulate`: a GPU's forward pass, run here and checked.

use std::time::Duration;

use clap::{Args, ValueEnum};
use sage_core::Call;
use sage_emulator::Report;
use sage_kernels::Machine;
use sage_ptx::Target;
use sageattention::{Choice, DType, Inputs, MAX_HEAD_DIM};
use serde_json::{Value, json};

use crate::call_options::{AlignmentName, CallOptions, SchemeName};
use crate::commands::accuracy::Metrics;
use crate::console::Console;
use crate::emulation::{self, Emulation};
use crate::failure::Result;
use crate::inputs;
use crate::table::{Cell, TITLE, Table, styled};

/// Longest sequence: the oracle takes hours beyond.
const MAX_LEN: i64 = 65536;

/// Run a GPU's forward pass here, in the emulator, and check it
#[derive(Debug, Args)]
#[command(after_help = "\
Tensors are normally distributed. The kernels are those that a GPU of the target would run, and the emulator looks for \
what a GPU would not tell: accesses out of bounds, races, missing waits, reads of what nobody wrote. It counts the \
instructions that warps execute, the turns of shared memory's banks that another layout would save, and the 32-byte \
sectors of global memory that were touched, beside those that the bytes would fill. Times are the emulator's.

Examples:
  sageattn emulate
  sageattn emulate --head-dim 128 --q-len 200 --kv-len 300 --causal --target sm_80
  sageattn emulate --scheme sage2-int8-fp8-per-thread --heads 4 --kv-heads 2 --json
  sageattn emulate --q-len 1 --kv-len 2048 --dtype bf16")]
pub struct Emulate {
    /// Scheme, or "auto" for the planner's choice
    #[arg(long, value_name = "NAME", default_value = SchemeName::AUTOMATIC)]
    scheme: SchemeName,
    /// Channels of a head
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=MAX_HEAD_DIM as i64))]
    head_dim: u16,
    /// Queries
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=MAX_LEN))]
    q_len: u32,
    /// Keys [default: as many as queries]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_LEN))]
    kv_len: Option<u32>,
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    heads: u16,
    /// Key and value heads [default: as many as query heads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    kv_heads: Option<u16>,
    /// Element type of queries, keys and values
    #[arg(long, value_enum, default_value_t)]
    dtype: HalfName,
    /// Causal mask; top-left and bottom-right differ where there are more or fewer keys than queries
    #[arg(long, value_name = "ALIGNMENT", num_args = 0..=1, require_equals = true, default_missing_value = "bottom-right")]
    causal: Option<AlignmentName>,
    /// GPU architecture, such as sm_80, sm_89 or sm_90a
    #[arg(long, value_name = "SM", default_value_t = Target::SM_89)]
    target: Target,
    /// Multiprocessors of the GPU: with many and few queries, keys are split between them
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..))]
    multiprocessors: u16,
}

/// Element types that GPU kernels take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum HalfName {
    /// Half precision
    #[default]
    F16,
    /// bfloat16
    Bf16,
}

impl From<HalfName> for DType {
    fn from(name: HalfName) -> Self {
        match name {
            HalfName::F16 => DType::F16,
            HalfName::Bf16 => DType::BF16,
        }
    }
}

impl Emulate {
    /// Runs the pass and prints what it did.
    pub fn execute(&self, console: Console) -> Result<()> {
        let (heads, q_len, head_dim) = (self.heads.into(), self.q_len as usize, self.head_dim.into());
        let kv_heads = self.kv_heads.unwrap_or(self.heads).into();
        let kv_len = self.kv_len.unwrap_or(self.q_len) as usize;
        for (heads, rows) in [(heads, q_len), (kv_heads, kv_len)] {
            emulation::check_buffer(2 * (heads * rows * head_dim) as u64)?;
        }
        let tensor = |heads, rows, seed| inputs::normal(self.dtype.into(), &[1, heads, rows, head_dim], seed);
        let (q, k, v) =
            (tensor(heads, q_len, 1)?, tensor(kv_heads, kv_len, 2)?, tensor(kv_heads, kv_len, 3)?);
        let options = CallOptions { causal: self.causal, ..CallOptions::default() }.attention().options();
        let call = Call::check(&Inputs::new(q.view(), k.view(), v.view()), &options)?;
        let scheme = match self.scheme.choice() {
            Choice::Automatic | Choice::Within(_) => None,
            Choice::Preset(preset) => Some(preset.scheme(head_dim)),
            Choice::Scheme(scheme) => Some(scheme),
        };
        let gpu = Machine { multiprocessors: self.multiprocessors.into(), ..Machine::typical(self.target) };
        let forward = emulation::plan(&call, scheme, &gpu)?;
        let progress = console.progress("emulating", forward.pass().kernel_names().len());
        let emulation = emulation::run(&call, forward, || progress.inc(1))?;
        progress.finish_and_clear();
        if console.json {
            console.print_json(&self.json(&call, &emulation))
        } else {
            console.print(&self.text(&call, &emulation))
        }
    }

    fn json(&self, call: &Call<'_>, emulation: &Emulation) -> Value {
        let p = &call.problem;
        json!({
            "command": "emulate",
            "target": self.target.to_string(),
            "multiprocessors": self.multiprocessors,
            "heads": p.num_q_heads,
            "kv_heads": p.num_kv_heads,
            "q_len": p.q_len,
            "kv_len": p.kv_len,
            "head_dim": p.head_dim,
            "dtype": p.dtype.name(),
            "causal": self.causal.is_some(),
            "scheme": emulation.forward.scheme().to_string(),
            "splits": emulation.forward.splits(),
            "workspace_bytes": emulation.forward.pass().workspace_bytes(),
            "reasons": emulation.forward.reasons(),
            "kernels": emulation.launches.iter().map(|(report, time)| kernel(report, *time)).collect::<Vec<_>>(),
            "against_scheme": Metrics::from(emulation.of_scheme),
            "against_exact": Metrics::from(emulation.of_exact),
            "ms": milliseconds(emulation.launches.iter().map(|(_, time)| *time).sum()),
        })
    }

    fn text(&self, call: &Call<'_>, emulation: &Emulation) -> String {
        let p = &call.problem;
        let title = format!(
            "Emulated {} · {}, {} query heads, {} key heads, {} queries × {} keys, head_dim {}{}",
            self.target,
            p.dtype,
            p.num_q_heads,
            p.num_kv_heads,
            p.q_len,
            p.kv_len,
            p.head_dim,
            if self.causal.is_some() { ", causal" } else { "" }
        );
        let mut text = format!("{}\n{}\n", styled(TITLE, title), emulation.forward.scheme());
        for reason in emulation.forward.reasons() {
            text.push_str(&format!("because {reason}\n"));
        }
        for (report, time) in &emulation.launches {
            text.push_str(&format!("\n{report}  emulated in {:.1} ms\n", milliseconds(*time)));
        }
        let mut headings = vec!["<accuracy against"];
        headings.extend(Metrics::HEADINGS);
        let mut table = Table::new(&headings);
        for (name, accuracy) in
            [("the scheme's definition", emulation.of_scheme), ("exact attention", emulation.of_exact)]
        {
            let mut cells: Vec<Cell> = vec![name.into()];
            cells.extend(Metrics::from(accuracy).cells());
            table.row(cells);
        }
        let time = emulation.launches.iter().map(|(_, time)| *time).sum();
        text + &format!("\n{table}\nNo fault found; emulated in {:.1} ms\n", milliseconds(time))
    }
}

/// A launch as JSON.
fn kernel(report: &Report, time: Duration) -> Value {
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
