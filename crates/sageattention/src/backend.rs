//! The backends of this build, each looked for once in the life of the process.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use sage_core::Error;
use sage_cpu::Cpu;

/// What computes attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// This machine's processor.
    #[default]
    Cpu,
    /// The NVIDIA GPU of that number; host tensors are copied there and back.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.pad("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let wrong = || Error::value("device", name, "cpu, cuda, or cuda:N");
        match name {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => {
                let ordinal = name.strip_prefix("cuda:").ok_or_else(wrong)?;
                ordinal.parse().map(Device::Cuda).map_err(|_| wrong())
            }
        }
    }
}

/// This machine's processor.
pub(crate) fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    match CPU.get() {
        Some(cpu) => cpu,
        // Looked for outside of the lock, which a fork meanwhile would leave locked.
        None => {
            let detected = Cpu::detect();
            CPU.get_or_init(|| detected)
        }
    }
}

/// What this build computes with on this machine, in words.
pub fn backend_description() -> String {
    let cpu = cpu();
    let sets: Vec<&str> = cpu.machine().instruction_sets.iter().map(|set| set.name()).collect();
    format!("cpu, kernels for {} (of {})", cpu.instruction_set(), sets.join(", "))
}

/// A GPU as a backend of host tensors.
#[cfg(feature = "cuda")]
pub(crate) fn copying(ordinal: u32) -> Result<sage_gpu::HostTensors, Error> {
    sage_gpu::Cuda::shared(ordinal).map(sage_gpu::HostTensors)
}

/// That this build has no CUDA.
#[cfg(not(feature = "cuda"))]
pub(crate) fn no_cuda(ordinal: u32) -> Error {
    Error::unsupported(format!("device cuda:{ordinal}"), "this build lacks the feature `cuda`")
}
