//! `sageattn run`: attention of the tensors in a file, into a file.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use safetensors::tensor::{Dtype, TensorView as FileTensor};
use sageattention::{Attention, Mask, Tensor, TensorView, View};
use sageattn_files::qkv_file::{FileError, MaskTensor, Qkv, QkvFile, printable};
use serde::Serialize;

use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::options::{DeviceOption, ForwardOptions, with_sinks};
use crate::table::Table;
use crate::{atomic_file, inputs};

/// Compute attention of the queries, keys and values in a file
#[derive(Debug, Args)]
#[command(after_help = "\
The input holds tensors q, k and v, or any number of them behind prefixes such as \"layer0.\", in f32, f16 or bf16. \
The output holds {prefix}out in q's shape and dtype, and {prefix}lse (f32) with --lse. It appears whole or not at all.

Examples:
  sageattn run qkv.safetensors -o out.safetensors
  sageattn run qkv.safetensors -o out.safetensors --causal --lse --prefix layer0.
  sageattn run qkv.safetensors -o out.safetensors --causal=top-left --window 128,0 --layout nhd
  sageattn run qkv.safetensors -o out.safetensors --mask padding --scheme auto --json
  sageattn run qkv.safetensors -o out.safetensors --causal --sinks qkv.safetensors")]
pub struct Run {
    /// File of queries, keys and values (safetensors)
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// File to write (safetensors)
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    forward: ForwardOptions,
    #[command(flatten)]
    device: DeviceOption,
    /// Tensor in IN that masks the scores: BOOL or U8 (not zero is visible), or floats that are added; its name as it
    /// stands, or without the prefix
    #[arg(long, value_name = "TENSOR")]
    mask: Option<String>,
    /// Only the tensors behind this prefix [default: all prefixes that have q, k and v]
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
}

/// What was computed, for people and for JSON.
#[derive(Debug, Serialize)]
struct Row {
    prefix: String,
    shape: Vec<usize>,
    kv_shape: Vec<usize>,
    dtype: &'static str,
    scheme: String,
    milliseconds: f64,
}

/// A tensor on its way to the output file.
struct Named {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Run {
    /// Reads, computes and writes.
    pub fn execute(&self, console: Console) -> Result<()> {
        let bytes = inputs::read(&self.input)?;
        let file = inputs::parse(&self.input, &bytes)?;
        let layers = inputs::load(&self.input, &file, self.prefix.as_deref())?;
        let progress = console.progress("attention", layers.len());
        let mut named = Vec::new();
        let mut rows = Vec::new();
        for layer in &layers {
            rows.push(self.layer(&file, layer, &mut named)?);
            progress.inc(1);
        }
        progress.finish_and_clear();
        self.write(&named)?;
        if console.json {
            return console.print_json(&serde_json::json!({
                "command": "run", "input": self.input, "output": self.output, "layers": rows,
            }));
        }
        let mut table = Table::new(&["<prefix", "<q", "<k, v", "<dtype", "<scheme", "ms"]);
        for row in &rows {
            table.row(vec![
                if row.prefix.is_empty() { "(none)".into() } else { printable(&row.prefix).into() },
                format!("{:?}", row.shape).into(),
                format!("{:?}", row.kv_shape).into(),
                row.dtype.into(),
                (&row.scheme).into(),
                format!("{:.2}", row.milliseconds).into(),
            ]);
        }
        console.print(&format!("{table}\nwritten to {}\n", self.output.display()))
    }

    fn layer(&self, file: &QkvFile<'_>, layer: &Qkv, named: &mut Vec<Named>) -> Result<Row> {
        let mask = self.mask.as_deref().map(|name| mask_tensor(file, name, &layer.prefix)).transpose();
        let mask = mask.map_err(|error| Failure::file(&self.input, &error))?;
        let in_file = |error| {
            let place = if layer.prefix.is_empty() {
                String::new()
            } else {
                format!("{}: ", printable(&layer.prefix))
            };
            Failure::Failed(format!("{}: {place}{error}", self.input.display()))
        };
        let layout = self.forward.layout.layout.into();
        let sinks = self.forward.sinks.of_heads(inputs::num_q_heads(&layer.q, layout), &layer.prefix)?;
        let attention = self.attention(mask.as_ref(), sinks.as_deref()).map_err(in_file)?;
        let plan = attention.plan(&layer.q, &layer.k, &layer.v).map_err(in_file)?;
        tracing::info!(prefix = layer.prefix, "plan\n{plan}");
        let start = Instant::now();
        let output = attention.forward(&layer.q, &layer.k, &layer.v).map_err(in_file)?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        named.push(Named::new(format!("{}out", layer.prefix), &output.out));
        if let Some(lse) = &output.lse {
            named.push(Named::new(format!("{}lse", layer.prefix), lse));
        }
        Ok(Row {
            prefix: layer.prefix.clone(),
            shape: layer.q.shape().to_vec(),
            kv_shape: layer.k.shape().to_vec(),
            dtype: layer.q.dtype().name(),
            scheme: plan.scheme().to_string(),
            milliseconds,
        })
    }

    fn attention<'a>(
        &'a self,
        mask: Option<&'a MaskTensor>,
        sinks: Option<&'a [f32]>,
    ) -> Result<Attention<'a>, sageattention::Error> {
        let attention = self.forward.attention().device(self.device.device);
        let attention = with_sinks(attention, sinks);
        Ok(match mask {
            Some(MaskTensor::Bool { visible, shape }) => {
                attention.mask(Mask::Bool(View::contiguous("mask", visible, shape)?))
            }
            Some(MaskTensor::Additive(tensor)) => attention.mask(Mask::Additive(tensor.view())),
            None => attention,
        })
    }

    fn write(&self, named: &[Named]) -> Result<()> {
        let unwritable = |error: &dyn std::fmt::Display| {
            Failure::Failed(format!("{}: cannot be written: {error}", self.output.display()))
        };
        let tensors = named
            .iter()
            .map(|t| {
                FileTensor::new(t.dtype, t.shape.clone(), &t.bytes).map(|tensor| (t.name.as_str(), tensor))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unwritable(&error))?;
        let bytes = safetensors::serialize(tensors, None).map_err(|error| unwritable(&error))?;
        atomic_file::write(&self.output, &bytes)
    }
}

/// The mask named as it stands, or else behind the prefix.
fn mask_tensor(file: &QkvFile<'_>, name: &str, prefix: &str) -> Result<MaskTensor, FileError> {
    match file.mask(name) {
        Err(FileError::Missing { .. }) if !prefix.is_empty() => file.mask(&format!("{prefix}{name}")),
        found => found,
    }
}

impl Named {
    fn new(name: String, tensor: &Tensor) -> Self {
        let (dtype, bytes) = match tensor.view() {
            TensorView::F32(view) => (Dtype::F32, view.data().iter().flat_map(|x| x.to_le_bytes()).collect()),
            TensorView::F16(view) => (Dtype::F16, view.data().iter().flat_map(|x| x.to_le_bytes()).collect()),
            TensorView::BF16(view) => {
                (Dtype::BF16, view.data().iter().flat_map(|x| x.to_le_bytes()).collect())
            }
        };
        Named { name, dtype, shape: tensor.shape().to_vec(), bytes }
    }
}
