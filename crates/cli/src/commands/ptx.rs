//! `sageattn ptx`: the GPU kernels, and what they are as PTX.

use clap::Args;
use sage_kernels::catalog::{Entry, catalog, catalog_of_all_targets};
use sage_ptx::Target;
use serde_json::json;

use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::table::Table;

/// Names that are offered in place of one that is not known.
const CLOSEST: usize = 3;

/// List the GPU kernels, or print one as PTX
#[derive(Debug, Args)]
#[command(after_help = "\
Options of a call multiply to more kernels than are listed: the list holds all that are chosen without asking, and of \
every other option each value for heads of 64, 128 and 256 channels. PTX is text that the driver compiles for its GPU.

Examples:
  sageattn ptx --list --target sm_89
  sageattn ptx combine_f16_d64
  sageattn ptx combine_f16_d64 --target sm_120 > combine.ptx
  sageattn ptx --list --json")]
pub struct Ptx {
    /// Name of the kernel to print
    #[arg(value_name = "KERNEL", required_unless_present = "list", conflicts_with = "list")]
    kernel: Option<String>,
    /// List the kernels
    #[arg(long)]
    list: bool,
    /// GPU architecture, such as sm_75, sm_89 or sm_90a [default: of a list, all; of a kernel, the oldest that has it]
    #[arg(long, value_name = "SM")]
    target: Option<Target>,
}

impl Ptx {
    /// Lists or prints.
    pub fn execute(&self, console: Console) -> Result<()> {
        match &self.kernel {
            Some(name) => self.print(console, name),
            None => self.list(console),
        }
    }

    fn list(&self, console: Console) -> Result<()> {
        let entries = match self.target {
            Some(target) => catalog(target),
            None => catalog_of_all_targets(),
        };
        if console.json {
            let kernels: Vec<_> = entries.iter().map(described).collect();
            let target = self.target.map(|target| target.to_string());
            return console.print_json(&json!({ "command": "ptx", "target": target, "kernels": kernels }));
        }
        let mut table = Table::new(&["<kernel", "<since", "<what it is"]);
        for entry in &entries {
            let minimum = entry.kernel().oldest_target();
            table.row(vec![
                entry.kernel().name().into(),
                minimum.into(),
                entry.kernel().description().into(),
            ]);
        }
        console.print(&format!("{table}\n{} kernels\n", entries.len()))
    }

    fn print(&self, console: Console, name: &str) -> Result<()> {
        let entries = catalog_of_all_targets();
        // Tile shapes, and so names, depend on the target: one that no list knows may have its own.
        let own = self.target.map(catalog).unwrap_or_default();
        let Some(entry) = entries.iter().chain(&own).find(|entry| entry.kernel().name() == name) else {
            return Err(unknown(name, &entries));
        };
        let target = self.target.unwrap_or_else(|| entry.kernel().oldest_target());
        let ptx = entry.kernel().program().ptx(target).map_err(|error| Failure::Failed(error.to_string()))?;
        if !console.json {
            return console.print(&ptx);
        }
        console.print_json(&json!({
            "command": "ptx",
            "target": target.to_string(),
            "kernel": described(entry),
            "ptx": ptx,
        }))
    }
}

fn described(entry: &Entry) -> serde_json::Value {
    json!({
        "name": entry.kernel().name(),
        "minimum_target": entry.kernel().oldest_target().to_string(),
        "description": entry.kernel().description(),
        "default": entry.is_default(),
    })
}

fn unknown(name: &str, entries: &[Entry]) -> Failure {
    let mut names: Vec<String> = entries.iter().map(|entry| entry.kernel().name()).collect();
    names.sort_by_cached_key(|known| (strsim::damerau_levenshtein(name, known), known.clone()));
    let closest = names.iter().take(CLOSEST).map(String::as_str).collect::<Vec<_>>().join(", ");
    Failure::Usage(format!(
        "KERNEL: value is `{name}`, expected a kernel of `sageattn ptx --list`; closest: {closest}"
    ))
}
