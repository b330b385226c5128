//! The command `sageattn`: run, measure and explain quantised attention.

#![forbid(unsafe_code)]

mod accuracy_plot;
mod accuracy_row;
mod args;
mod atomic_file;
mod bench_plot;
mod commands;
mod compare;
mod console;
mod decode_plan;
mod emulation;
mod failure;
mod gpu_plan;
mod heads;
mod inputs;
mod made_up;
mod map_picture;
mod memory;
mod metrics;
mod options;
mod pass_summary;
mod plot;
mod prediction;
mod shape;
mod sparse_plot;
mod sparse_row;
mod speed;
mod table;
mod timing;
mod video;
mod weighed;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::console::Console;
use crate::failure::{Failure, Result};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::ClosedPipe) {
                // Nothing is left to be done where even standard error is closed.
                let _ = writeln!(anstream::stderr(), "error: {failure}");
            }
            failure.exit_code()
        }
    }
}

fn run() -> Result<()> {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => return Err(Failure::Usage(args::one_line(&error))),
        Err(help_or_version) => {
            return Ok(anstream::stdout().write_all(help_or_version.render().ansi().to_string().as_bytes())?);
        }
    };
    init_logs(args.verbose);
    // Before there is a second thread.
    sageattention::cuda::arrange_driver_cache();
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads as usize)
            .build_global()
            .map_err(|error| Failure::Failed(format!("cannot start {threads} threads: {error}")))?;
    }
    let console = Console { json: args.json, quiet: args.quiet };
    match args.command {
        None => commands::demo::execute(console),
        Some(Command::Run(command)) => command.execute(console),
        Some(Command::Accuracy(command)) => command.execute(console),
        Some(Command::Bench(command)) => command.execute(console),
        Some(Command::Sparse(command)) => command.execute(console),
        Some(Command::Explain(command)) => command.execute(console),
        Some(Command::Tune(command)) => command.execute(console),
        Some(Command::Warm(command)) => command.execute(console),
        Some(Command::Ptx(command)) => command.execute(console),
        Some(Command::Emulate(command)) => command.execute(console),
        Some(Command::Info) => commands::info::execute(console),
    }
}

/// Logs go to standard error: warnings always, more with each `-v`.
fn init_logs(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).init();
}
