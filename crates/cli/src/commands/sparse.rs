//! `sageattn sparse`: what block-sparse attention costs in accuracy and gains in time, predictor by predictor.

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use sage_core::Problem;
use sageattention::sparse::{BlockMap, PvFilter, filtered};
use sageattention::{Attention, DType, MAX_HEAD_DIM, Tensor};
use sageattn_files::qkv_file::{Qkv, printable};
use serde_json::json;

use crate::compare::per_head;
use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::heads::{Head, Heads};
use crate::inputs;
use crate::map_picture::MapPicture;
use crate::options::{
    CallOptions, DTypeOption, DeviceOption, LayoutOption, PredictorOptions, SchemeName, Setting, SinksOption,
    with_sinks,
};
use crate::plot::PlotFile;
use crate::sparse_plot::sparse_plot;
use crate::sparse_row::{Found, HeadRow, Row, densities};
use crate::speed::Subject;
use crate::table::{Cell, DIM, TITLE, Table, styled};
use crate::timing::Times;
use crate::video::VideoGrid;

/// Measure what attention over predicted blocks costs in accuracy and gains in time
#[derive(Debug, Args)]
#[command(
    mut_arg("predictor", |predictor| predictor.required(true)),
    mut_arg("pooled_tail", |tail| tail.help("Also with a pooled term for each block left out")),
    mut_arg("layout", |layout| layout.conflicts_with("video")),
    mut_arg("dtype", |dtype| dtype.conflicts_with("inputs")),
    after_help = "\
Density is the share of blocks that are computed among those that the mask shows. Errors are relative L1, Σ|a − e| / \
Σ|e|, and cosines: against exact dense attention in double precision, and against dense attention of the same scheme, \
which leaves out what quantising costs. Time is that of prediction and attention together, beside dense attention of the \
same scheme in the same run. Without an amount (--topk, --cdf, --topp, --tau) a customary range is tried.

--pooled-tail measures the same once more where each block left out counts with its mean key and mean value, as in \
Sol-Attn. --pvthreshd is computed by its definition in double precision, over the same blocks, as SpargeAttn: a tile \
whose probabilities are all below 2^-X of their rows' largest is skipped, two tiles of 64 keys at the end excepted.

--video makes tensors up that resemble those of a video diffusion transformer: 3-D RoPE over a grid of tokens, heads \
that attend near by, along frames, along time and to objects, and a channel bias in K.

Examples:
  sageattn sparse --video 9x24x30 --predictor sla --topk 0.1,0.25,0.5
  sageattn sparse --video 9x24x30 --predictor sla,sparge,vsa,sol --plot error.svg --json
  sageattn sparse qkv.safetensors --predictor sparge --cdf 0.9,0.98 --simthreshd1 0.6 --causal=top-left --sink
  sageattn sparse qkv.safetensors --predictor sol --tau 1 --pooled-tail --per-head
  sageattn sparse --video 9x24x30 --predictor sla --topk 0.2 --map map.png --map-head 2"
)]
pub struct Sparse {
    /// Files of queries, keys and values (safetensors)
    #[arg(value_name = "IN", required_unless_present = "video")]
    inputs: Vec<PathBuf>,
    /// Make up tensors of a video of so many frames, rows and columns of tokens
    #[arg(long, value_name = "TxHxW", conflicts_with_all = ["inputs", "prefix"])]
    video: Option<VideoGrid>,
    /// Heads of --video
    #[arg(
        long, value_name = "N", default_value_t = 8, conflicts_with = "inputs",
        value_parser = clap::value_parser!(u16).range(1..),
    )]
    heads: u16,
    /// Channels of a head of --video: an even number
    #[arg(
        long, value_name = "N", default_value_t = 64, conflicts_with = "inputs",
        value_parser = clap::value_parser!(u16).range(2..=MAX_HEAD_DIM as i64),
    )]
    head_dim: u16,
    #[command(flatten)]
    dtype: DTypeOption,
    #[command(flatten)]
    call: CallOptions,
    #[command(flatten)]
    device: DeviceOption,
    #[command(flatten)]
    layout: LayoutOption,
    #[command(flatten)]
    sinks: SinksOption,
    /// Scheme, or "auto" for the fastest that is accurate
    #[arg(long, value_name = "NAME", default_value = SchemeName::AUTOMATIC)]
    scheme: SchemeName,
    #[command(flatten)]
    predictor: PredictorOptions,
    /// Also without the P·V of tiles that lie this many binary digits below their rows' maxima (slow: by definition)
    #[arg(long, value_delimiter = ',', value_name = "X,…")]
    pvthreshd: Vec<f32>,
    /// Only the tensors behind this prefix [default: all prefixes that have q, k and v]
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// A table for each setting with a row for each head
    #[arg(long)]
    per_head: bool,
    /// Timed repetitions
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    reps: u32,
    /// Draw error against density into a .png or .svg
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Draw the blocks that the last setting keeps of a head into a .png or .svg
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// The head that --map draws, those of all batch entries counted through
    #[arg(long, value_name = "N", default_value_t = 0, requires = "map")]
    map_head: usize,
}

/// Tensors, and where they come from.
struct Source {
    name: String,
    qkv: Qkv,
}

impl Sparse {
    /// Measures, and shows tables, JSON and pictures.
    pub fn execute(&self, console: Console) -> Result<()> {
        let plot = self.plot.as_deref().map(|path| PlotFile::of("--plot", path)).transpose()?;
        let map = self.map.as_deref().map(|path| PlotFile::of("--map", path)).transpose()?;
        let mut rows = Vec::new();
        let mut picture = None;
        for source in self.sources()? {
            let heads = inputs::num_q_heads(&source.qkv.q, self.layout.layout.into());
            let sinks = self.sinks.of_heads(heads, &source.qkv.prefix)?;
            let added =
                self.measure(console, &source, sinks.as_deref(), &mut picture).map_err(|failure| {
                    match failure {
                        Failure::Failed(error) => Failure::Failed(format!("{}: {error}", source.place())),
                        other => other,
                    }
                })?;
            if !console.json {
                console.print(&self.tables(&source, &added))?;
            }
            rows.extend(added);
        }
        if console.json {
            console.print_json(&json!({
                "command": "sparse",
                "device": self.device.device.to_string(),
                "call": self.call.to_string(),
                "sinks": self.sinks.sinks.as_ref().map(ToString::to_string),
                "threads": rayon::current_num_threads(),
                "reps": self.reps,
                "rows": rows,
            }))?;
        }
        let written = |file: &PlotFile, what: &str| match console.json {
            true => Ok(()),
            false => console.print(&format!("{what} written to {}\n", file.path().display())),
        };
        if let Some(file) = &plot {
            file.write(&sparse_plot(&rows))?;
            written(file, "plot")?;
        }
        if let (Some(file), Some(picture)) = (&map, &picture) {
            file.write(picture)?;
            written(file, "map")?;
        }
        Ok(())
    }

    fn sources(&self) -> Result<Vec<Source>> {
        if let Some(grid) = &self.video {
            let dtype: DType = self.dtype.dtype.into();
            let qkv = grid.tensors(usize::from(self.heads), usize::from(self.head_dim), dtype)?;
            return Ok(vec![Source { name: format!("video {grid}"), qkv }]);
        }
        let mut sources = Vec::new();
        for path in &self.inputs {
            let bytes = inputs::read(path)?;
            let file = inputs::parse(path, &bytes)?;
            let layers = inputs::load(path, &file, self.prefix.as_deref())?;
            sources.extend(layers.into_iter().map(|qkv| Source { name: path.display().to_string(), qkv }));
        }
        Ok(sources)
    }

    fn measure(
        &self,
        console: Console,
        source: &Source,
        sinks: Option<&[f32]>,
        picture: &mut Option<MapPicture>,
    ) -> Result<Vec<Row>> {
        let Qkv { q, k, v, .. } = &source.qkv;
        let attention = self
            .call
            .attention()
            .layout(self.layout.layout.into())
            .scheme(self.scheme.choice())
            .device(self.device.device);
        let attention = with_sinks(attention, sinks);
        let plan = attention.plan(q, k, v)?;
        let problem = plan.problem();
        let settings = self.predictor.settings(problem.kv_len)?;
        let over = |setting: &Setting| attention.clone().sparse(setting.predictor.clone());
        let mut calls = vec![attention.clone()];
        calls.extend(settings.iter().map(over));
        if self.predictor.pooled_tail {
            calls.extend(settings.iter().map(|setting| over(setting).pooled_tail(true)));
        }
        // What no backend computes is refused before hours of exact attention.
        calls.iter().try_for_each(|call| call.plan(q, k, v).map(drop))?;
        let heads = Heads::new(&source.qkv, attention.options(), sinks)?;
        self.check_map_head(heads.list().len())?;

        let progress = console.progress("exact attention", heads.list().len());
        let exact = per_head(&heads, &progress, |head| heads.exact(head))?;
        progress.set_message("measuring");
        progress.inc_length(u64::from(self.reps) * calls.len() as u64);
        let subject = Subject {
            attention: attention.clone(),
            device: self.device.device,
            sinks,
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
        };
        let times = subject.time(&calls, self.reps as usize, &progress)?;
        let dense = attention.forward(q, k, v)?.out;
        let mut rows = Vec::new();
        for (i, setting) in settings.iter().enumerate() {
            let call = &calls[i + 1];
            let (out, map) = self.output(call, [q, k, v])?;
            let with_tail = calls.get(1 + settings.len() + i);
            let tail = with_tail.map(|call| self.output(call, [q, k, v])).transpose()?.map(|(out, _)| out);
            let found = self.found(&heads, setting, &progress, (&exact, &dense, &out, tail.as_ref()))?;
            let prediction = prediction_times(call, [q, k], self.reps)?;
            let scheme = call.plan(q, k, v)?.scheme().to_string();
            let row =
                row(source, setting, scheme, problem, &map, &found, [times[i + 1], times[0], prediction])?;
            let with_tail = times.get(1 + settings.len() + i);
            rows.push(Row { pooled_tail_ms: with_tail.map(|times| times.median_ms), ..row });
            if self.map.is_some() && i + 1 == settings.len() {
                *picture = Some(MapPicture::new(&map, self.map_head, &setting.to_string(), problem)?);
            }
        }
        progress.finish_and_clear();
        Ok(rows)
    }

    /// Attention over predicted blocks, and the blocks.
    fn output(&self, call: &Attention<'_>, [q, k, v]: [&Tensor; 3]) -> Result<(Tensor, BlockMap)> {
        let output = call.forward(q, k, v)?;
        let map = output.map.ok_or_else(|| Failure::Failed("the device returned no map".into()))?;
        Ok((output.out, map))
    }

    /// What was computed of each head, and what definitions say of it.
    fn found(
        &self,
        heads: &Heads<'_>,
        setting: &Setting,
        progress: &ProgressBar,
        (exact, dense, sparse, tail): (&[Vec<f64>], &Tensor, &Tensor, Option<&Tensor>),
    ) -> Result<Vec<(Head, Found)>> {
        let filters: Vec<PvFilter> = self.pvthreshd.iter().map(|&x| filter(x, setting)).collect();
        progress.inc_length((filters.len() * heads.list().len()) as u64);
        let mut without = Vec::new();
        for (filter, &threshold) in filters.iter().zip(&self.pvthreshd) {
            let of_head = |head| {
                let found = heads.over_blocks(head, &setting.predictor, |call| filtered(call, filter))??;
                Ok((threshold, found.output.out, [found.skipped, found.visited]))
            };
            without.push(per_head(heads, progress, of_head)?);
        }
        let one = |(i, &head): (usize, &Head)| {
            let found = Found {
                exact: exact[i].clone(),
                dense: heads.output(dense, head)?,
                sparse: heads.output(sparse, head)?,
                pooled_tail: tail.map(|tail| heads.output(tail, head)).transpose()?,
                filtered: without.iter().map(|heads| heads[i].clone()).collect(),
            };
            Ok((head, found))
        };
        heads.list().iter().enumerate().map(one).collect()
    }

    fn check_map_head(&self, heads: usize) -> Result<()> {
        if self.map.is_none() || self.map_head < heads {
            return Ok(());
        }
        Err(Failure::Usage(format!("--map-head: value is {}, expected one of {heads} heads", self.map_head)))
    }

    fn tables(&self, source: &Source, rows: &[Row]) -> String {
        let Qkv { q, k, .. } = &source.qkv;
        let title = format!(
            "{} · q {:?}, k {:?}, {}, {}{}",
            source.place(),
            q.shape(),
            k.shape(),
            q.dtype(),
            self.call,
            self.sinks.title()
        );
        let mut text = format!("{}\n\n{}\n", styled(TITLE, title), self.table(rows));
        if let Some(row) = rows.first() {
            let dense = row.times.median_ms / row.time_share;
            let line = format!("dense {} takes {dense:.2} ms, median of {}", row.scheme, self.reps);
            text.push_str(&format!("{}\n", styled(DIM, line)));
        }
        if self.per_head {
            for row in rows {
                let name = format!("{} {} {}x{}", row.predictor, row.amount, row.block_q, row.block_k);
                text.push_str(&format!("\n{}\n\n{}", styled(TITLE, name), self.head_table(&row.per_head)));
            }
        }
        text + "\n"
    }

    /// A row for each setting.
    fn table(&self, rows: &[Row]) -> Table {
        let mut headings = vec!["<predictor", "<amount", "blocks", "density", "ms", "of dense", "predict ms"];
        headings.extend(self.predictor.pooled_tail.then_some("ms with tail"));
        headings.extend(["relative L1", "cosine", "L1 to dense"]);
        headings.extend(self.other_headings());
        let mut table = Table::new(&headings);
        for row in rows {
            let mut cells: Vec<Cell> = vec![
                row.predictor.into(),
                row.amount.as_str().into(),
                format!("{}x{}", row.block_q, row.block_k).into(),
                format!("{:.3}", row.density).into(),
                format!("{:.2}", row.times.median_ms).into(),
                format!("{:.3}", row.time_share).into(),
                format!("{:.2}", row.prediction_ms).into(),
            ];
            cells.extend(row.pooled_tail_ms.map(|ms| Cell::from(format!("{ms:.2}"))));
            cells.extend(error_cells(&row.errors));
            table.row(cells);
        }
        table
    }

    /// A row for each head.
    fn head_table(&self, rows: &[HeadRow]) -> Table {
        let mut headings = vec!["batch", "head", "density", "relative L1", "cosine", "L1 to dense"];
        headings.extend(self.other_headings());
        let mut table = Table::new(&headings);
        for row in rows {
            let mut cells: Vec<Cell> =
                vec![row.batch.into(), row.head.into(), format!("{:.3}", row.density).into()];
            cells.extend(error_cells(&row.errors));
            table.row(cells);
        }
        table
    }

    fn other_headings(&self) -> Vec<&'static str> {
        let tail = self.predictor.pooled_tail.then_some("L1 with tail");
        let filters = self.pvthreshd.iter().flat_map(|_| ["pvthreshd", "skipped", "L1"]);
        tail.into_iter().chain(filters).collect()
    }
}

impl Source {
    fn place(&self) -> String {
        match self.qkv.prefix.as_str() {
            "" => self.name.clone(),
            prefix => format!("{}: {}", self.name, printable(prefix)),
        }
    }
}

/// The filter of kernels whose tiles are a setting's blocks: 16 rows of a warp decide together on `mma.sync`, and so
/// they do here.
fn filter(threshold: f32, setting: &Setting) -> PvFilter {
    let blocks = setting.blocks();
    let tile =
        sage_core::Tile { block_q: blocks.q, warp_q: blocks.q.min(16), block_k: blocks.k, warp_k: blocks.k };
    PvFilter::new(threshold, tile)
}

fn prediction_times(call: &Attention<'_>, [q, k]: [&Tensor; 2], reps: u32) -> Result<Times> {
    let mut durations = Vec::new();
    for _ in 0..reps {
        let start = std::time::Instant::now();
        call.predict(q, k)?;
        durations.push(start.elapsed());
    }
    Ok(Times::of(&durations))
}

fn row(
    source: &Source,
    setting: &Setting,
    scheme: String,
    problem: &Problem,
    map: &BlockMap,
    found: &[(Head, Found)],
    [times, dense, prediction]: [Times; 3],
) -> Result<Row> {
    let (density, densities) = densities(map, problem)?;
    let head = |((head, found), density): (&(Head, Found), f64)| HeadRow {
        batch: head.batch,
        head: head.head,
        density,
        errors: found.errors(),
    };
    let all: Vec<Found> = found.iter().map(|(_, found)| found.clone()).collect();
    Ok(Row {
        source: source.name.clone(),
        prefix: source.qkv.prefix.clone(),
        predictor: setting.system.name(),
        amount: setting.amount.clone(),
        block_q: setting.blocks().q,
        block_k: setting.blocks().k,
        scheme,
        dtype: problem.dtype.name(),
        density,
        times,
        prediction_ms: prediction.median_ms,
        time_share: times.median_ms / dense.median_ms,
        pooled_tail_ms: None,
        errors: Found::joined(&all).errors(),
        per_head: found.iter().zip(densities).map(head).collect(),
    })
}

/// The errors of a row, in the order of the headings.
fn error_cells(errors: &crate::sparse_row::Errors) -> Vec<Cell> {
    let mut cells: Vec<Cell> = vec![
        format!("{:.5}", errors.against_exact.relative_l1).into(),
        format!("{:.6}", errors.against_exact.cosine).into(),
        format!("{:.5}", errors.against_dense.relative_l1).into(),
    ];
    cells.extend(errors.pooled_tail.map(|tail| Cell::from(format!("{:.5}", tail.relative_l1))));
    for found in &errors.pv_filter {
        let share = 100.0 * found.skipped as f64 / found.visited.max(1) as f64;
        cells.push(found.pvthreshd.into());
        cells.push(format!("{share:.1} %").into());
        cells.push(format!("{:.5}", found.metrics.relative_l1).into());
    }
    cells
}
