//! Options that several commands have, each declared once: one word means one thing in every command.

mod call;
mod gpu;
mod names;
mod predictor;
mod problem;
mod sinks;

pub use call::{CallOptions, ForwardOptions, LayoutOption};
pub use gpu::{CacheOptions, GpuOptions};
pub use names::{DTypeName, MaskName, PresetName, SchemeName};
pub use predictor::{PredictorOptions, Setting};
pub use problem::{ProblemOptions, SizeOptions};
pub use sinks::{SinksOption, with_sinks};

use clap::Args;
use sageattention::Device;

/// Where a call is computed.
#[derive(Clone, Copy, Debug, Args)]
pub struct DeviceOption {
    /// What computes: cpu, or cuda:N for an NVIDIA GPU (f16 and bf16)
    #[arg(long, default_value_t)]
    pub device: Device,
}

/// The element type of tensors that are made up.
#[derive(Clone, Copy, Debug, Args)]
pub struct DTypeOption {
    /// Element type of queries, keys and values
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DTypeName,
}
