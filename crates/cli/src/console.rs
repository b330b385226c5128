//! What all commands share on the terminal: output, progress, JSON.

use std::io::Write;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::failure::Result;

/// How a command talks.
#[derive(Clone, Copy, Debug)]
pub struct Console {
    /// Machine-readable output only.
    pub json: bool,
    /// No progress on standard error.
    pub quiet: bool,
}

impl Console {
    /// Prints text for people; colours are dropped unless standard output is a terminal.
    pub fn print(self, text: &str) -> Result<()> {
        let mut out = anstream::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    /// Prints one JSON document.
    pub fn print_json(self, value: &impl Serialize) -> Result<()> {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, value)?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    }

    /// A bar for `steps` of long work: on standard error, and only where that is a terminal.
    pub fn progress(self, what: &'static str, steps: usize) -> ProgressBar {
        if self.json || self.quiet {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(steps as u64).with_message(what);
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar:.cyan/dim} {pos}/{len} {eta}") {
            bar.set_style(style.progress_chars("━━─"));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}
