//! `sageattn accuracy`: every scheme against exact attention, on tensors from files.

use std::path::{Path, PathBuf};

use clap::Args;
use sage_core::{Accumulator, Pv};
use sageattention::{Preset, Scheme};
use sageattn_files::qkv_file::{Qkv, printable};

use crate::accuracy_plot::AccuracyPlot;
use crate::accuracy_row::Row;
use crate::compare::{Comparison, Reference};
use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::metrics::Metrics;
use crate::options::{
    CallOptions, DeviceOption, LayoutOption, PredictorOptions, PresetName, Setting, SinksOption, with_sinks,
};
use crate::table::{Cell, TITLE, Table, styled};

/// Compare every scheme with exact attention on the tensors of a file
#[derive(Debug, Args)]
#[command(after_help = "\
Exact attention is computed in double precision from the numbers as they stand in the file. \"oracle\" is a scheme's \
definition, in which only what is quantised is inexact; \"cpu kernel\" and \"gpu kernel\" are what the device \
computes, rounded to the file's dtype. The oracle sums exactly, so schemes that differ in accumulators only score \
the same. relative L1 is Σ|a − e| / Σ|e|; errors are in the unit of the output. With --predictor the schemes compute \
the blocks that it predicts, and are compared with exact attention over all keys: `sageattn sparse` tells what is due \
to which.

Examples:
  sageattn accuracy qkv.safetensors
  sageattn accuracy qkv.safetensors --per-head --schemes int8,sage2-int8-fp8-per-thread
  sageattn accuracy a.safetensors b.safetensors --causal --plot accuracy.png
  sageattn accuracy qkv.safetensors --predictor sla --topk 0.25 --schemes full,int8
  sageattn accuracy qkv.safetensors --causal --sinks sinks.safetensors
  sageattn accuracy qkv.safetensors --prefix layer2. --json")]
pub struct Accuracy {
    /// Files of queries, keys and values (safetensors)
    #[arg(value_name = "IN", required = true)]
    inputs: Vec<PathBuf>,
    #[command(flatten)]
    call: CallOptions,
    #[command(flatten)]
    device: DeviceOption,
    #[command(flatten)]
    layout: LayoutOption,
    #[command(flatten)]
    sinks: SinksOption,
    #[command(flatten)]
    predictor: PredictorOptions,
    /// Schemes [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    schemes: Vec<PresetName>,
    /// Only the tensors behind this prefix [default: all prefixes that have q, k and v]
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// A table for each scheme with a row for each head
    #[arg(long)]
    per_head: bool,
    /// Draw error per head, and K before and after smoothing, into a .png or .svg
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

impl Accuracy {
    /// Compares, and shows tables, JSON and a plot.
    pub fn execute(&self, console: Console) -> Result<()> {
        let presets: Vec<Preset> = if self.schemes.is_empty() {
            Preset::ALL.to_vec()
        } else {
            self.schemes.iter().map(|name| name.0).collect()
        };
        let setting = self.predictor.single()?;
        let mut plot = self.plot.as_deref().map(AccuracyPlot::new).transpose()?;
        let mut rows = Vec::new();
        for path in &self.inputs {
            let bytes = inputs::read(path)?;
            let file = inputs::parse(path, &bytes)?;
            for layer in inputs::load(path, &file, self.prefix.as_deref())? {
                let heads = inputs::num_q_heads(&layer.q, self.layout.layout.into());
                let sinks = self.sinks.of_heads(heads, &layer.prefix)?;
                let place = || format!("{}: {}", path.display(), printable(&layer.prefix));
                let added = self
                    .compare(console, (path, &layer), sinks.as_deref(), &presets, setting.as_ref(), &mut plot)
                    .map_err(|error| {
                        Failure::Failed(format!("{}: {error}", place().trim_end_matches(": ")))
                    })?;
                if !console.json {
                    console.print(&self.tables(path, &layer, &added))?;
                }
                rows.extend(added);
            }
        }
        if console.json {
            console.print_json(&serde_json::json!({ "command": "accuracy", "rows": rows }))?;
        }
        match plot {
            Some(plot) => {
                plot.write()?;
                if console.json {
                    Ok(())
                } else {
                    console.print(&format!("plot written to {}\n", plot.path().display()))
                }
            }
            None => Ok(()),
        }
    }

    fn compare(
        &self,
        console: Console,
        (path, layer): (&Path, &Qkv),
        sinks: Option<&[f32]>,
        presets: &[Preset],
        setting: Option<&Setting>,
        plot: &mut Option<AccuracyPlot>,
    ) -> Result<Vec<Row>, sageattention::Error> {
        let (attention, device) =
            (self.call.attention().layout(self.layout.layout.into()), self.device.device);
        let attention = with_sinks(attention, sinks);
        let attention = match setting {
            Some(setting) => {
                attention.sparse(setting.predictor.clone()).pooled_tail(self.predictor.pooled_tail)
            }
            None => attention,
        };
        // A scheme without kernels is passed over below, but not a device that computes none at all, nor what is wrong with
        // the call.
        attention.clone().device(device).plan(&layer.q, &layer.k, &layer.v)?;
        let progress = console.progress("exact attention", 0);
        let predictor = setting.map(|setting| &setting.predictor);
        let reference = Reference::new(layer, attention, device, predictor, sinks, &progress)?;
        progress.set_message("schemes");
        let head_dim = layer.q.shape()[3];
        let mut schemes: Vec<(Scheme, Option<Comparison>)> = Vec::new();
        for preset in presets {
            let scheme = as_the_oracle_sees(preset.scheme(head_dim));
            if !schemes.iter().any(|(known, _)| *known == scheme) {
                schemes.push((scheme, None));
            }
        }
        progress.inc_length((reference.heads().list().len() * schemes.len()) as u64);
        let mut rows = Vec::new();
        for &preset in presets {
            let row = |comparison| Row {
                predictor: setting.map(Setting::to_string),
                ..Row::new(path, &layer.prefix, layer.q.dtype(), preset, comparison)
            };
            if let Some(comparison) = reference.kernel(preset)? {
                rows.push(row(comparison));
            }
            let wanted = as_the_oracle_sees(preset.scheme(head_dim));
            for (scheme, comparison) in schemes.iter_mut().filter(|(scheme, _)| *scheme == wanted) {
                let found = match comparison.take() {
                    Some(found) => found,
                    None => reference.oracle(scheme, &progress)?,
                };
                rows.push(row(found.clone()));
                *comparison = Some(found);
            }
        }
        progress.finish_and_clear();
        if let Some(plot) = plot {
            plot.add(&reference, &rows)?;
        }
        Ok(rows)
    }

    fn tables(&self, path: &Path, layer: &Qkv, rows: &[Row]) -> String {
        let predictor = rows.first().and_then(|row| row.predictor.as_ref());
        let title = format!(
            "{} {}· q {:?}, k {:?}, {}{}{}",
            path.display(),
            if layer.prefix.is_empty() { String::new() } else { format!("{} ", printable(&layer.prefix)) },
            layer.q.shape(),
            layer.k.shape(),
            layer.q.dtype(),
            self.sinks.title(),
            predictor.map_or(String::new(), |setting| format!(", blocks of {setting}"))
        );
        let mut text = format!("{}\n\n", styled(TITLE, title));
        let mut headings = vec!["<scheme", "<computed by"];
        headings.extend(Metrics::HEADINGS);
        let mut table = Table::new(&headings);
        for row in rows {
            let mut cells: Vec<Cell> = vec![row.scheme.into(), row.computed_by.name().into()];
            cells.extend(row.overall.cells());
            table.row(cells);
        }
        text.push_str(&format!("{table}\n"));
        if self.per_head {
            rows.iter().for_each(|row| text.push_str(&head_table(row)));
        }
        text
    }
}

/// The scheme without what the oracle leaves out, so that the many presets that differ in nothing else are computed
/// once.
fn as_the_oracle_sees(scheme: Scheme) -> Scheme {
    let pv = match scheme.pv {
        Pv::F16(_) => Pv::F16(Accumulator::F32),
        Pv::BF16(_) => Pv::BF16(Accumulator::F32),
        Pv::Fp8 { v_max, rows, .. } => Pv::Fp8 { v_max, rows, accumulator: Accumulator::F32 },
        other => other,
    };
    Scheme { pv, ..scheme }
}

/// A row for each head.
fn head_table(row: &Row) -> String {
    let mut headings = vec!["batch", "head"];
    headings.extend(Metrics::HEADINGS);
    let mut table = Table::new(&headings);
    for head in &row.per_head {
        let mut cells: Vec<Cell> = vec![head.batch.into(), head.head.into()];
        cells.extend(head.metrics.cells());
        table.row(cells);
    }
    format!("{}\n\n{table}\n", styled(TITLE, format!("{} ({})", row.scheme, row.computed_by.name())))
}
