//! The command line as a whole.

use clap::{ArgAction, Parser, Subcommand};

use crate::commands::{accuracy, bench, emulate, explain, ptx, run, sparse, tune, warm};

/// Attention in 8 and 4 bits.
#[derive(Debug, Parser)]
#[command(name = "sageattn", version, after_help = AFTER, max_term_width = 110, disable_help_subcommand = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Print one JSON document instead of tables
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub json: bool,
    /// Show no progress
    #[arg(short, long, global = true, help_heading = EVERYWHERE)]
    pub quiet: bool,
    /// Threads to compute with [default: one for each core]
    #[arg(
        long, global = true, help_heading = EVERYWHERE, value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=1024),
    )]
    pub threads: Option<u16>,
    /// Log what happens to standard error; twice or thrice for more
    #[arg(short, long, global = true, help_heading = EVERYWHERE, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Heading of the options that every command has.
const EVERYWHERE: &str = "With every command";

const AFTER: &str = "\
Without a command: accuracy and speed on a shipped example, in a few seconds.

Exit codes: 0 done; 1 the work could not be done (a bad file, tensors that do not go together, nothing that can \
compute it); 2 the command line is wrong. The last line on standard error is then `error: …`.

Examples:
  sageattn
  sageattn run qkv.safetensors -o out.safetensors --causal
  sageattn accuracy qkv.safetensors --plot accuracy.png
  sageattn bench --causal --json";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compute attention of the queries, keys and values in a file
    Run(run::Run),
    /// Compare every scheme with exact attention on the tensors of a file
    Accuracy(accuracy::Accuracy),
    /// Measure the speed of schemes on shapes
    Bench(bench::Bench),
    /// Measure what attention over predicted blocks costs in accuracy and gains in time
    Sparse(sparse::Sparse),
    /// Say how a problem would be computed, and why
    Explain(explain::Explain),
    /// List the GPU kernels, or print one as PTX
    Ptx(ptx::Ptx),
    /// Measure tile shapes on a GPU, and keep the fastest for later calls
    Tune(tune::Tune),
    /// Compile the kernels of calls that are to come, so that none of them waits for a compiler
    Warm(warm::Warm),
    /// Run a GPU's passes here, in the emulator, and check them
    Emulate(emulate::Emulate),
    /// Show what this machine offers
    #[command(after_help = "Examples:\n  sageattn info\n  sageattn info --json")]
    Info,
}

/// clap's message of many lines as one: its first paragraph, and where to read more.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let message = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")).map(|tip| format!("; {tip}"));
    format!("{message}{} (see --help)", tip.unwrap_or_default())
}
