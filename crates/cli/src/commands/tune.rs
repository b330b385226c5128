//! `sageattn tune`: the fastest tile shapes of the GPU at hand.

use std::path::PathBuf;

use clap::Args;
use sage_kernels::tuning::Key;
use sageattention::cuda::{Cuda, CudaTensor, Tiling, TunedShape, TuningTable};
use sageattention::{Call, Device, Inputs};
use serde_json::{Value, json};

use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::options::{CallOptions, DTypeOption, DeviceOption, SchemeName, SizeOptions};
use crate::speed::operations;
use crate::table::Table;
use crate::{atomic_file, inputs};

/// Gain over the kernels' own table below which a trial is noise, and the table stays.
const NOISE: f64 = 1.01;

/// Measure tile shapes on a GPU, and keep the fastest for later calls
#[derive(Debug, Args)]
#[command(
    mut_arg("device", |device| device.default_value("cuda:0")),
    mut_arg("batch", |batch| batch.default_value("2")),
    mut_arg("heads", |heads| heads.default_value("32")),
    mut_arg("seq", |seq| seq.default_value("4096")),
    after_help = "\
For each scheme and head dimension, every tile shape that fits the GPU is compiled and timed on normally distributed \
tensors. What is more than 1 % faster than the built-in choice goes into a table, which every later process reads: in \
the file that SAGEATTENTION_TUNING names, or in the cache folder. Delete the file to return to the built-in choices. \
Only the attention kernel of forward passes has tile shapes to choose from: none is tuned for KV caches.

Examples:
  sageattn tune
  sageattn tune --head-dim 128 --seq 8192 --schemes auto --dry-run
  sageattn tune --causal --heads 32 --kv-heads 8
  sageattn tune --device cuda:1 --output tuning.json"
)]
pub struct Tune {
    #[command(flatten)]
    device: DeviceOption,
    /// Schemes [default: what calls choose of their own accord, full precision, and SageAttention2's FP8]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    schemes: Vec<SchemeName>,
    #[command(flatten)]
    sizes: SizeOptions,
    /// Channels of a head
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_value = "64,128,256")]
    head_dim: Vec<usize>,
    #[command(flatten)]
    dtype: DTypeOption,
    #[command(flatten)]
    call: CallOptions,
    /// Where the table goes [default: where later processes look for it]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Only print what was measured
    #[arg(long)]
    dry_run: bool,
}

/// Tile shapes of one kind of kernel that were timed.
struct Timed {
    scheme: SchemeName,
    head_dim: usize,
    kind: Key,
    /// Operations of the call.
    operations: f64,
    /// Milliseconds of the built-in choice, or of the first tile shape where that one cannot be timed.
    built_in_ms: f64,
    /// Milliseconds of each tile shape, the fastest first.
    shapes: Vec<(f64, Tiling)>,
}

impl Tune {
    /// Measures, prints, and writes the table.
    pub fn execute(&self, console: Console) -> Result<()> {
        let Device::Cuda(ordinal) = self.device.device else {
            return Err(Failure::Failed(format!("device: value is {}, expected cuda:N", self.device.device)));
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
                let timed = self.time(&gpu, scheme, head_dim, console)?;
                timed.show(&mut shown);
                rows.extend(timed.json());
                timed.fastest().into_iter().for_each(|row| table.set(row));
            }
        }
        if console.json {
            console.print_json(&json!({
                "command": "tune", "gpu": table.gpu, "call": self.call.to_string(), "rows": rows,
            }))?;
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

    /// Times every tile shape of a scheme's attention kernel.
    fn time(&self, gpu: &Cuda, scheme: SchemeName, head_dim: usize, console: Console) -> Result<Timed> {
        let SizeOptions { batch, heads, seq, .. } = self.sizes;
        let dtype = self.dtype.dtype.into();
        let q_shape = [batch, heads, seq, head_dim];
        let kv_shape = [batch, self.sizes.kv_heads(), self.sizes.kv_len(), head_dim];
        let stream = gpu.stream()?;
        let upload = |shape: &[usize], seed| -> Result<CudaTensor> {
            Ok(CudaTensor::upload(&stream, &inputs::normal(dtype, shape, seed)?.view())?)
        };
        let (q, k, v) = (upload(&q_shape, 1)?, upload(&kv_shape, 2)?, upload(&kv_shape, 3)?);
        let out = CudaTensor::uninitialized(&stream, dtype, &q_shape)?;
        let inputs = Inputs::new(q.view(), k.view(), v.view());
        let call = Call::check(&inputs, &self.call.attention().options())?;
        let progress = console.progress("measuring", 0);
        let tuned = gpu.tune(&stream, &call, scheme.choice(), out.view(), |done, of| {
            progress.set_length(of as u64);
            progress.set_position(done as u64);
        })?;
        progress.finish_and_clear();
        let named = || format!("{} with q {q_shape:?} and k {kv_shape:?}", scheme.name());
        let Some((kind, trials)) = tuned else {
            let message = format!("{}: there is no query, and so no attention kernel to tune", named());
            return Err(Failure::Failed(message));
        };
        let (mut shapes, mut failed) = (Vec::new(), None);
        for trial in &trials {
            match &trial.time {
                Ok(time) => shapes.push((time.as_secs_f64() * 1e3, trial.tiling)),
                Err(error) => {
                    tracing::warn!("{}: {error}", trial.tiling);
                    failed = failed.or(Some(error));
                }
            }
        }
        let Some(&(built_in_ms, _)) = shapes.first() else {
            let reason = failed.map_or("none fits this GPU".to_owned(), ToString::to_string);
            return Err(Failure::Failed(format!("{}: no tile shape could be timed: {reason}", named())));
        };
        shapes.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(Timed { scheme, head_dim, kind, operations: operations(&call.problem), built_in_ms, shapes })
    }
}

impl Timed {
    /// Operations in so many milliseconds, in TFLOP/s.
    fn teraflops(&self, ms: f64) -> f64 {
        self.operations / ms / 1e9
    }

    /// Adds a row for each tile shape.
    fn show(&self, table: &mut Table) {
        for (ms, tiling) in &self.shapes {
            table.row(vec![
                self.scheme.name().into(),
                self.head_dim.to_string().into(),
                tiling.to_string().into(),
                format!("{ms:.3}").into(),
                format!("{:.0}", self.teraflops(*ms)).into(),
                format!("{:.2}×", self.built_in_ms / ms).into(),
            ]);
        }
    }

    fn json(&self) -> impl Iterator<Item = Value> {
        self.shapes.iter().map(|(ms, tiling)| {
            json!({
                "scheme": self.scheme.name(), "head_dim": self.head_dim, "tiling": tiling.to_string(), "ms": ms,
                "tflops": self.teraflops(*ms),
            })
        })
    }

    /// A row for the tuning table, where the gain is more than noise.
    fn fastest(&self) -> Option<TunedShape> {
        let &(ms, tiling) = self.shapes.first()?;
        let gain = self.built_in_ms / ms;
        let reason = format!("{:.0} TFLOP/s, {gain:.2}× the built-in choice", self.teraflops(ms));
        (gain > NOISE).then_some(TunedShape { shape: self.kind, tiling, reason })
    }
}
