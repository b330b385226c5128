//! `sageattn bench`: the speed of schemes on shapes.

use std::path::PathBuf;
use std::process;

use clap::{Args, ValueEnum};
use sageattention::Device;
use serde_json::json;

use crate::bench_plot::BenchPlot;
use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::options::{
    CallOptions, DTypeOption, DeviceOption, PredictorOptions, SchemeName, Setting, SinksOption,
};
use crate::plot::PlotFile;
use crate::shape::Shape;
use crate::speed::{Row, Subject, runnable};
use crate::table::{Cell, TITLE, Table, ratio, styled};
use crate::timing::read_bandwidth_gbs;

/// Measure the speed of schemes on shapes
#[derive(Debug, Args)]
#[command(after_help = "\
Tensors are normally distributed. Schemes take turns, repetition by repetition, so that what slows the machine for a \
while slows all of them; the first call of each is not timed. GFLOP/s count 4·B·H·Lq·Lk·D operations, halved for \
causal. \"vs full\" is full precision's median time over the scheme's, from the same run. Memory is the rise of the \
resident size of a fresh process in its first call (Linux). With one query, \"GB/s\" is K and V over the median time, \
and \"of memory\" its share of the bandwidth that reading a large buffer reaches here.

Examples:
  sageattn bench
  sageattn bench --shapes 1,8,2048,64 1,32,1x8192,128 --causal
  sageattn bench --heads 8 --seq 512,1024,2048 --head-dim 64,128 --schemes int8,full --reps 15
  sageattn bench --dtype f32 --threads 1 --json
  sageattn bench --seq 16384 --head-dim 128 --schemes int8,full --predictor sla --topk 0.1
  sageattn bench --plot speed.png")]
pub struct Bench {
    /// Shapes as batch,heads,seq,head_dim; seq may be QUERIESxKEYS, heads HEADS/KVHEADS, head_dim HEAD_DIM/VALUE_DIM
    #[arg(
        long, value_name = "B,H,S,D", num_args = 1..,
        conflicts_with_all = ["batch", "heads", "kv_heads", "seq", "kv_len", "head_dim", "value_dim"],
    )]
    shapes: Vec<Shape>,
    /// Batch sizes
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    batch: Vec<usize>,
    /// Numbers of query heads
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    heads: Vec<usize>,
    /// Key heads [default: as many as query heads]
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Numbers of queries
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    seq: Vec<usize>,
    /// Keys [default: as many as queries]
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    kv_len: Vec<usize>,
    /// Channels of a head
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    head_dim: Vec<usize>,
    /// Channels of a head of values [default: as many as of queries and keys]
    #[arg(long, value_name = "N")]
    value_dim: Option<usize>,
    #[command(flatten)]
    dtype: DTypeOption,
    #[command(flatten)]
    call: CallOptions,
    #[command(flatten)]
    device: DeviceOption,
    #[command(flatten)]
    sinks: SinksOption,
    #[command(flatten)]
    predictor: PredictorOptions,
    /// Schemes [default: all that the device computes; on the CPU, those that are our own]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    schemes: Vec<SchemeName>,
    /// Timed repetitions of each scheme
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    reps: u32,
    /// Print the bytes by which the first call raises this process's memory, and nothing else
    #[arg(long, hide = true)]
    peak_memory: bool,
    /// Draw GFLOP/s into a .png or .svg
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

impl Bench {
    /// Measures, and shows a table, JSON and a plot.
    pub fn execute(&self, console: Console) -> Result<()> {
        let plot = self.plot.as_deref().map(PlotFile::new).transpose()?;
        let shapes = self.shapes();
        let (dtype, device) = (self.dtype.dtype.into(), self.device.device);
        let setting = self.predictor.single()?;
        let attention = || {
            let attention = self.call.attention().device(device);
            match &setting {
                Some(setting) => {
                    attention.sparse(setting.predictor.clone()).pooled_tail(self.predictor.pooled_tail)
                }
                None => attention,
            }
        };
        if let (true, [shape], [scheme]) = (self.peak_memory, &shapes[..], &self.schemes[..]) {
            let sinks = self.sinks.of_heads(shape.heads, "")?;
            let peak = Subject::random(shape, dtype, attention(), sinks.as_deref())?.peak_memory(*scheme)?;
            return console.print(&peak.map(|bytes| bytes.to_string()).unwrap_or_default());
        }
        let decodes = shapes.iter().any(|shape| shape.q_len == 1);
        let limit = (decodes && device == Device::Cpu).then(read_bandwidth_gbs);
        let mut rows: Vec<Row> = Vec::new();
        let progress = console.progress("measuring", 0);
        for shape in &shapes {
            let in_shape = |error| Failure::Failed(format!("shape {}: {error}", shape));
            let sinks = self.sinks.of_heads(shape.heads, "")?;
            let subject = Subject::random(shape, dtype, attention(), sinks.as_deref()).map_err(in_shape)?;
            let subject = Subject { device, ..subject };
            let schemes = match self.schemes.as_slice() {
                [] => {
                    let mut names = runnable(&subject.attention, &subject.q, &subject.k, &subject.v);
                    // There the others are what a GPU would compute, at no gain in speed.
                    names.retain(|name| device != Device::Cpu || !name.is_of_the_original());
                    names
                }
                asked => asked.to_vec(),
            };
            progress.inc_length(self.reps as u64 * schemes.len() as u64);
            let measured =
                subject.measure(&schemes, self.reps as usize, limit, &progress).map_err(in_shape)?;
            rows.extend(measured.into_iter().zip(&schemes).map(|(row, &scheme)| Row {
                peak_memory_bytes: self.peak_memory_elsewhere(shape, scheme),
                ..row
            }));
        }
        progress.finish_and_clear();
        if console.json {
            console.print_json(&json!({
                "command": "bench",
                "device": device.to_string(),
                "call": self.call.to_string(),
                "sinks": self.sinks.sinks.as_ref().map(ToString::to_string),
                "predictor": setting.as_ref().map(Setting::to_string),
                "pooled_tail": self.predictor.pooled_tail,
                "threads": rayon::current_num_threads(),
                "reps": self.reps,
                "memory_bandwidth_gbs": limit,
                "rows": rows,
            }))?;
        } else {
            console.print(&self.text(&rows, setting.as_ref(), limit))?;
        }
        if let Some(plot) = plot {
            plot.write(&BenchPlot::new(&rows, &self.call))?;
            if !console.json {
                console.print(&format!("\nplot written to {}\n", plot.path().display()))?;
            }
        }
        Ok(())
    }

    /// The memory of a scheme's first call, from a process of its own: in this one, schemes that were measured before
    /// have left memory behind that the next ones reuse.
    fn peak_memory_elsewhere(&self, shape: &Shape, scheme: SchemeName) -> Option<u64> {
        if self.device.device != Device::Cpu {
            return None;
        }
        let dtype = self.dtype.dtype.to_possible_value()?;
        let mut command = process::Command::new(std::env::current_exe().ok()?);
        command.args(["bench", "--peak-memory", "--shapes", &shape.to_string(), "--schemes", scheme.name()]);
        command.args(["--dtype", dtype.get_name(), "--threads", &rayon::current_num_threads().to_string()]);
        command.args(self.call.words()).args(self.sinks.words()).args(self.predictor.words());
        let output = command.stdin(process::Stdio::null()).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    }

    /// The shapes asked for: a list, or all combinations of the lists of sizes.
    fn shapes(&self) -> Vec<Shape> {
        let sized = !(self.batch.is_empty()
            && self.heads.is_empty()
            && self.kv_heads.is_none()
            && self.seq.is_empty()
            && self.kv_len.is_empty()
            && self.head_dim.is_empty()
            && self.value_dim.is_none());
        if !self.shapes.is_empty() {
            return self.shapes.clone();
        }
        let shape = |batch, heads, q_len, kv_len, head_dim| Shape {
            batch,
            heads,
            kv_heads: self.kv_heads.unwrap_or(heads),
            q_len,
            kv_len,
            head_dim,
            value_dim: self.value_dim.unwrap_or(head_dim),
        };
        if !sized {
            return vec![
                shape(1, 8, 512, 512, 64),
                shape(1, 8, 1024, 1024, 64),
                shape(1, 8, 1024, 1024, 128),
                shape(1, 8, 1, 8192, 128),
            ];
        }
        let or = |list: &[usize], default: usize| if list.is_empty() { vec![default] } else { list.to_vec() };
        let mut shapes = Vec::new();
        for batch in or(&self.batch, 1) {
            for heads in or(&self.heads, 8) {
                for head_dim in or(&self.head_dim, 64) {
                    for q_len in or(&self.seq, 1024) {
                        for kv_len in or(&self.kv_len, q_len) {
                            shapes.push(shape(batch, heads, q_len, kv_len, head_dim));
                        }
                    }
                }
            }
        }
        shapes
    }

    fn text(&self, rows: &[Row], setting: Option<&Setting>, limit: Option<f64>) -> String {
        let first = rows.first();
        let computes = match self.device.device {
            Device::Cpu => format!("{} threads", rayon::current_num_threads()),
            gpu => gpu.to_string(),
        };
        let title = format!(
            "Speed of attention · {}, {}{}{}, {computes}, median of {}",
            first.map_or("", |row| row.dtype),
            self.call,
            self.sinks.title(),
            setting.map_or(String::new(), |setting| format!(", blocks of {setting}")),
            self.reps
        );
        let mut text = format!("{}\n\n{}", styled(TITLE, title), table(rows));
        if let Some(limit) = limit {
            text.push_str(&format!("\nReading memory reaches {limit:.1} GB/s here.\n"));
        }
        text
    }
}

/// Rows as in every table of speeds. Columns about bandwidth appear where a row has them.
pub fn table(rows: &[Row]) -> Table {
    let decodes = rows.iter().any(|row| row.bandwidth_gbs.is_some());
    let mut headings =
        vec!["<batch,heads,seq,dim", "<scheme", "median ms", "min", "max", "GFLOP/s", "vs full", "memory"];
    if decodes {
        headings.extend(["GB/s", "of memory"]);
    }
    let mut table = Table::new(&headings);
    let mut previous = String::new();
    for row in rows {
        let shape = row.shape.to_string();
        let mut cells: Vec<Cell> = vec![
            if shape == previous { "".into() } else { shape.clone().into() },
            row.scheme.into(),
            format!("{:.2}", row.times.median_ms).into(),
            format!("{:.2}", row.times.min_ms).into(),
            format!("{:.2}", row.times.max_ms).into(),
            format!("{:.1}", row.gflops).into(),
            ratio(row.ratio_to_full_precision),
            row.peak_memory_bytes.map_or("–".into(), bytes),
        ];
        if decodes {
            cells.push(row.bandwidth_gbs.map_or("".into(), |gbs| format!("{gbs:.1}").into()));
            cells.push(
                row.bandwidth_fraction.map_or("".into(), |share| format!("{:.0} %", share * 100.0).into()),
            );
        }
        table.row(cells);
        previous = shape;
    }
    table
}

fn bytes(bytes: u64) -> Cell {
    const MIB: f64 = (1 << 20) as f64;
    format!("{:.1} MiB", bytes as f64 / MIB).into()
}
