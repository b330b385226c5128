//! `sageattn tune`: the fastest tile shapes of the GPU at hand.

use std::path::PathBuf;

use clap::Args;
use sageattention::cuda::{Cuda, CudaTensor, TunedShape, TuningTable};
use sageattention::{Band, Call, Choice, Device, Inputs, Options};
use serde_json::{Value, json};

use crate::atomic_file;
use crate::call_options::{DTypeName, SchemeName};
use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::table::Table;

/// Gain over the kernels' own table below which a trial is noise, and the table stays.
const NOISE: f64 = 1.01;

/// Measure tile shapes on a GPU, and keep the fastest for later calls
#[derive(Debug, Args)]
#[command(after_help = "\
For each scheme and head dimension, every tile shape that fits the GPU is compiled and timed on normally distributed \
tensors. What is more than 1 % faster than the built-in choice goes into a table, which every later process reads: in \
the file that SAGEATTENTION_TUNING names, or in the cache folder. Delete the file to return to the built-in choices.

Examples:
  sageattn tune
  sageattn tune --head-dim 128 --seq 8192 --schemes auto --dry-run
  sageattn tune --device cuda:1 --output tuning.json")]
pub struct Tune {
    /// The GPU
    #[arg(long, default_value = "cuda:0")]
    device: Device,
    /// Schemes [default: what calls choose of their own accord, full precision, and SageAttention2's FP8]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    schemes: Vec<SchemeName>,
    /// Channels of a head
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_value = "64,128,256")]
    head_dim: Vec<usize>,
    /// Queries and keys
    #[arg(long, default_value_t = 4096)]
    seq: usize,
    /// Sequences
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Heads
    #[arg(long, default_value_t = 32)]
    heads: usize,
    /// Element type of queries, keys and values
    #[arg(long, value_enum, default_value = "f16")]
    dtype: DTypeName,
    /// Causal mask
    #[arg(long)]
    causal: bool,
    /// Where the table goes [default: where later processes look for it]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Only print what was measured
    #[arg(long)]
    dry_run: bool,
}

impl Tune {
    /// Measures, prints, and writes the table.
    pub fn execute(&self, console: Console) -> Result<()> {
        let Device::Cuda(ordinal) = self.device else {
            return Err(Failure::Failed(format!("device: value is {}, expected cuda:N", self.device)));
        };
        let gpu = Cuda::new(ordinal)?;
        let path = self.output.clone().or_else(|| TuningTable::path(gpu.device()));
        let path =
            path.ok_or_else(|| Failure::Failed("there is no cache folder, expected --output".into()))?;
        let mut table = match path.exists() {
            true => TuningTable::read(&path)?,
            false => TuningTable::new(gpu.device()),
        };
        table.gpu = gpu.device().info().name.clone();
        let mut shown = Table::new(&["<scheme", "head_dim", "<tile shape", "ms", "TFLOP/s", "vs built-in"]);
        let mut rows = Vec::new();
        for &scheme in &self.schemes() {
            for &head_dim in &self.head_dim {
                self.tune(&gpu, scheme, head_dim, &mut table, &mut shown, &mut rows, console)?;
            }
        }
        if console.json {
            console.print_json(&json!({ "command": "tune", "gpu": table.gpu, "rows": rows }))?;
        } else {
            console.print(&shown.to_string())?;
        }
        if self.dry_run {
            return Ok(());
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| Failure::Failed(format!("{}: {error}", folder.display())))?;
        }
        atomic_file::write(&path, table.to_json()?.as_bytes())?;
        if console.json { Ok(()) } else { console.print(&format!("\ntable written to {}\n", path.display())) }
    }

    fn schemes(&self) -> Vec<SchemeName> {
        if !self.schemes.is_empty() {
            return self.schemes.clone();
        }
        let presets = [sageattention::Preset::FULL, sageattention::Preset::SAGE2_INT8_FP8_PER_THREAD];
        [SchemeName::automatic()].into_iter().chain(presets.map(SchemeName::from)).collect()
    }

    #[allow(clippy::too_many_arguments, reason = "three of them collect results")]
    fn tune(
        &self,
        gpu: &Cuda,
        scheme: SchemeName,
        head_dim: usize,
        table: &mut TuningTable,
        shown: &mut Table,
        rows: &mut Vec<Value>,
        console: Console,
    ) -> Result<()> {
        let shape = [self.batch, self.heads, self.seq, head_dim];
        let stream = gpu.stream()?;
        let upload = |seed| -> Result<CudaTensor> {
            Ok(CudaTensor::upload(&stream, &inputs::normal(self.dtype.into(), &shape, seed)?.view())?)
        };
        let (q, k, v) = (upload(1)?, upload(2)?, upload(3)?);
        let out = CudaTensor::uninitialized(&stream, self.dtype.into(), &shape)?;
        let inputs = Inputs::new(q.view(), k.view(), v.view());
        let band = Band { right: self.causal.then_some(0), ..Band::FULL };
        let call = Call::check(&inputs, &Options { band, ..Options::default() })?;
        let progress = console.progress("measuring", 0);
        let choice: Choice = scheme.choice();
        let tuned = gpu.tune(&stream, &call, choice, out.view(), |done, of| {
            progress.set_length(of as u64);
            progress.set_position(done as u64);
        })?;
        progress.finish_and_clear();
        let Some((kind, trials)) = tuned else { return Ok(()) };
        let operations = 4.0 * (self.batch * self.heads * head_dim) as f64 * (self.seq as f64).powi(2);
        let operations = if self.causal { operations / 2.0 } else { operations };
        let mut timed = Vec::new();
        for trial in &trials {
            match &trial.time {
                Ok(time) => timed.push((time.as_secs_f64() * 1e3, trial.tiling)),
                Err(error) => tracing::warn!("{}: {error}", trial.tiling),
            }
        }
        let Some(&(own_ms, _)) = timed.first() else { return Ok(()) };
        timed.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (ms, tiling) in &timed {
            let teraflops = operations / ms / 1e9;
            shown.row(vec![
                scheme.name().into(),
                head_dim.to_string().into(),
                tiling.to_string().into(),
                format!("{ms:.3}").into(),
                format!("{teraflops:.0}").into(),
                format!("{:.2}×", own_ms / ms).into(),
            ]);
            rows.push(json!({
                "scheme": scheme.name(), "head_dim": head_dim, "tiling": tiling.to_string(), "ms": ms,
                "tflops": teraflops,
            }));
        }
        let (ms, tiling) = timed[0];
        if own_ms / ms > NOISE {
            let reason =
                format!("{:.0} TFLOP/s, {:.2}× the built-in choice", operations / ms / 1e9, own_ms / ms);
            table.set(TunedShape { shape: kind, tiling, reason });
        }
        Ok(())
    }
}
