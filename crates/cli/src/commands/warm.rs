//! `sageattn warm`: the kernels of calls that are to come, compiled before they are made.

use std::time::{Duration, Instant};

use clap::Args;
use sageattention::cuda::{Cuda, FlagsShape, LoadedKernel, MaskShape, TensorShape, WarmUp, driver_cache};
use sageattention::{Device, Error, Geometry, KvCacheOptions, Layout};
use serde_json::{Value, json};

use crate::console::Console;
use crate::failure::{Failure, Result};
use crate::options::{
    CacheOptions, DTypeOption, DeviceOption, ForwardOptions, MaskName, PredictorOptions, with_sinks,
};
use crate::shape::Shape;
use crate::table::{TITLE, Table, styled};

/// Compile the kernels of calls that are to come, so that none of them waits for a compiler
#[derive(Debug, Args)]
#[command(
    mut_arg("device", |device| device.default_value("cuda:0")),
    mut_arg("predictor", |predictor| predictor.conflicts_with_all(["kv_cache", "mask"])),
    after_help = "\
Nothing is computed, and no memory is needed for the tensors. Calls are planned as they will be, for tensors without \
gaps that begin at multiples of 16 bytes, and their kernels are compiled side by side. What this leaves on disk, every \
later process of the same driver and GPU finds: most kernels in our own cache (SAGEATTENTION_CACHE_DIR), those for \
Hopper's warpgroups, which the driver alone can compile, in the driver's (CUDA_CACHE_PATH). Both must be where later \
processes look: warm up as the same user, with the same two variables.

Examples:
  sageattn warm 1,24,4608,128
  sageattn warm 1,32/8,8192,128 8,32/8,1x4096,128 --causal --dtype bf16
  sageattn warm 2,16,4096,64 --scheme int8-fp8 --lse --layout nhd --device cuda:1
  sageattn warm 16,32/8,1x512,128 16,32/8,1x8192,128 --causal --kv-cache int8"
)]
pub struct Warm {
    /// Shapes as batch,heads,seq,head_dim; seq may be QUERIESxKEYS, heads may be HEADS/KVHEADS
    #[arg(required = true, value_name = "SHAPE")]
    shapes: Vec<Shape>,
    #[command(flatten)]
    dtype: DTypeOption,
    #[command(flatten)]
    forward: ForwardOptions,
    /// An explicit mask, [batch, 1, seq, kv_len]
    #[arg(long, value_enum, value_name = "DTYPE", conflicts_with = "kv_cache")]
    mask: Option<MaskName>,
    #[command(flatten)]
    cache: Option<CacheOptions>,
    #[command(flatten)]
    predictor: PredictorOptions,
    #[command(flatten)]
    device: DeviceOption,
}

impl Warm {
    /// Compiles, and prints what each kernel took.
    pub fn execute(&self, console: Console) -> Result<()> {
        let Device::Cuda(ordinal) = self.device.device else {
            let wanted = "expected cuda:N, as a processor has nothing to compile";
            return Err(Failure::Failed(format!("device: value is {}, {wanted}", self.device.device)));
        };
        let setting = self.predictor.single()?;
        let predictor = setting.map(|setting| setting.predictor);
        let gpu = Cuda::new(ordinal)?;
        let warm_up = gpu.warm_up();
        let started = Instant::now();
        for shape in &self.shapes {
            let sinks = self.forward.sinks.of_heads(shape.heads, "")?;
            let mut attention = with_sinks(self.forward.attention(), sinks.as_deref());
            if let Some(predictor) = &predictor {
                attention = attention.sparse(predictor.clone()).pooled_tail(self.predictor.pooled_tail);
            }
            let noted = self.note(&warm_up, attention, shape);
            noted.map_err(|error| Failure::Failed(format!("shape {shape}: {error}")))?;
        }
        let kernels = warm_up.load()?;
        let report = Report { gpu: &gpu, device: self.device.device, kernels, took: started.elapsed() };
        match console.json {
            true => console.print_json(&report.json()),
            false => console.print(&report.text()),
        }
    }

    /// Notes what calls of a shape need.
    fn note(
        &self,
        warm_up: &WarmUp,
        attention: sageattention::Attention<'_>,
        shape: &Shape,
    ) -> sageattention::Result<()> {
        let Shape { batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim } = *shape;
        let tensor = |heads, rows, channels| {
            let shape = match Layout::from(self.forward.layout.layout) {
                Layout::Hnd => [batch, heads, rows, channels],
                Layout::Nhd => [batch, rows, heads, channels],
            };
            TensorShape::contiguous(self.dtype.dtype.into(), &shape)
        };
        let (q, k) = (tensor(heads, q_len, head_dim)?, tensor(kv_heads, kv_len, head_dim)?);
        if let Some(cache) = &self.cache {
            if value_dim != head_dim {
                let wanted = format!("{head_dim}, as of q and k: a KV cache has one for both");
                return Err(Error::value("head_dim of v", value_dim, wanted));
            }
            let pages = kv_len.div_ceil(cache.page_size).saturating_mul(batch);
            let options = KvCacheOptions::new(kv_heads, head_dim).sequences(batch).max_pages(pages);
            let options = options.values(cache.kv_cache.0).page_size(cache.page_size);
            return options.layout(self.forward.layout.layout.into()).note(warm_up, &attention, q, k);
        }
        let attention = match self.mask {
            Some(mask) => attention.mask(mask_shape(mask, &[batch, 1, q_len, kv_len])?),
            None => attention,
        };
        attention.note(warm_up, [q, k, tensor(kv_heads, kv_len, value_dim)?])
    }
}

/// A mask without gaps.
fn mask_shape(mask: MaskName, shape: &[usize]) -> sageattention::Result<MaskShape> {
    let geometry = Geometry::contiguous("mask", shape)?;
    Ok(match mask.bias() {
        None => MaskShape::Bool(FlagsShape(geometry)),
        Some(dtype) => MaskShape::Additive(TensorShape::new(dtype, geometry)),
    })
}

/// What was compiled.
struct Report<'g> {
    gpu: &'g Cuda,
    device: Device,
    kernels: Vec<LoadedKernel>,
    /// The time of all together.
    took: Duration,
}

impl Report<'_> {
    /// The folder of the disk cache.
    fn folder(&self) -> Option<String> {
        Some(self.gpu.device().disk_cache()?.folder().display().to_string())
    }

    fn text(&self) -> String {
        let mut table = Table::new(&["<kernel", "<from", "ms"]);
        for kernel in &self.kernels {
            let ms = kernel.time.as_secs_f64() * 1e3;
            table.row(vec![(&kernel.name).into(), kernel.origin_name().into(), format!("{ms:.1}").into()]);
        }
        let info = self.gpu.device().info();
        let title = styled(TITLE, format!("Kernels for {}, {}", self.device, info.name));
        let of_driver = match driver_cache() {
            Ok(folder) => folder.display().to_string(),
            Err(reason) => format!("nowhere: {reason}"),
        };
        format!(
            "{title}\n\n{table}\n{} kernels in {:.2} s. Compiled ones are kept in {}, the driver's in \
             {of_driver}.\n",
            self.kernels.len(),
            self.took.as_secs_f64(),
            self.folder().unwrap_or_else(|| "no folder: there is no disk cache".into()),
        )
    }

    fn json(&self) -> Value {
        let kernel = |kernel: &LoadedKernel| {
            let (from, ms) = (kernel.origin_name(), kernel.time.as_secs_f64() * 1e3);
            json!({ "name": kernel.name, "from": from, "ms": ms })
        };
        json!({
            "command": "warm",
            "device": self.device.to_string(),
            "gpu": self.gpu.device().info().name,
            "ms": self.took.as_secs_f64() * 1e3,
            "disk_cache": self.folder(),
            "driver_cache": driver_cache().ok(),
            "kernels": self.kernels.iter().map(kernel).collect::<Vec<_>>(),
        })
    }
}
