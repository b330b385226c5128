//! What can go wrong between here and the GPU. Every message names the thing, the value found and the value wanted.

use std::borrow::Cow;

use sage_core::BackendErrorKind;
use sage_ptx::Target;

use crate::driver_version::DriverVersion;
use crate::library;

/// Result of anything that talks to the driver.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A call that could not be carried out.
///
/// Trouble with the disk cache is never one of these: it is reported as a warning and the kernel is compiled again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The driver's library is missing or cannot be used.
    #[error("CUDA driver: {reason}, expected {}, which the NVIDIA driver installs", library::CALLED)]
    NoDriver {
        /// What the loader said.
        reason: String,
    },
    /// There is no such GPU.
    #[error("CUDA device: ordinal is {ordinal}, expected {}", match count {
        0 => "a GPU, but the driver finds none".to_owned(),
        1 => "0, as there is one GPU".to_owned(),
        count => format!("0 to {}, as there are {count} GPUs", count - 1),
    })]
    NoDevice {
        /// The ordinal asked for.
        ordinal: u32,
        /// GPUs that the driver finds.
        count: u32,
    },
    /// This process was forked from one that had started the driver.
    #[error(
        "CUDA: used in a process that was forked after CUDA had started, expected a process that was started anew \
        (in Python, multiprocessing's start method \"spawn\")"
    )]
    Forked,
    /// The driver is too old to have a function.
    #[error("CUDA driver: version is {version}, expected a newer one, with `{symbol}`")]
    Symbol {
        /// Function.
        symbol: &'static str,
        /// CUDA version of the driver.
        version: DriverVersion,
    },
    /// A driver call failed.
    #[error("{call}: {code} ({description})")]
    Driver {
        /// Driver function.
        call: &'static str,
        /// Name of the error code, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        code: String,
        /// The driver's description of it.
        description: String,
    },
    /// The driver cannot compile a kernel.
    #[error("kernel `{kernel}` for {target}: the driver cannot compile it: {log}")]
    Jit {
        /// Kernel.
        kernel: String,
        /// What its text was written for.
        target: Target,
        /// Why: [`BackendErrorKind::Kernel`] unless there is another reason than the kernel.
        kind: BackendErrorKind,
        /// Error code and compiler log.
        log: String,
    },
    /// A kernel is for another GPU.
    #[error("kernel `{kernel}`: GPU is {found}, expected {}", if wanted.is_specific() {
        format!("{wanted} alone")
    } else {
        format!("{wanted} or newer")
    })]
    Target {
        /// Kernel.
        kernel: String,
        /// Richest target of the GPU.
        found: Target,
        /// What the kernel was written for.
        wanted: Target,
    },
    /// A launch's arguments do not fit the kernel's parameters.
    #[error("kernel `{kernel}`: argument {index}{} is {found}, expected {wanted}",
        if name.is_empty() { String::new() } else { format!(" (`{name}`)") })]
    Argument {
        /// Kernel.
        kernel: String,
        /// Position, from 0.
        index: usize,
        /// Name of the parameter; empty where the kernel has none at the position.
        name: String,
        /// What was passed.
        found: String,
        /// What the kernel takes.
        wanted: String,
    },
    /// A kernel or a launch exceeds what the GPU can do.
    #[error("kernel `{kernel}`: {what} is {found}, expected {limit}")]
    Limit {
        /// Kernel.
        kernel: String,
        /// Grid, block or memory.
        what: Cow<'static, str>,
        /// Its value.
        found: String,
        /// The values that would do.
        limit: String,
    },
    /// Any other value is outside its range.
    #[error("{name}: value is {found}, expected {wanted}")]
    Value {
        /// What has the value.
        name: Cow<'static, str>,
        /// The value.
        found: String,
        /// The values that would do.
        wanted: String,
    },
}

/// What the driver's codes tell a caller. A code that is not listed is [`BackendErrorKind::Other`].
///
/// Codes are listed by their names: which of them the bindings know depends on the toolkit that they were made from,
/// and a driver knows the name of each that it returns.
const KINDS: &[(BackendErrorKind, &[&str])] = &[
    (BackendErrorKind::OutOfMemory, &["CUDA_ERROR_OUT_OF_MEMORY"]),
    (
        BackendErrorKind::NoDevice,
        &[
            "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER",
            "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
            "CUDA_ERROR_DEVICE_NOT_LICENSED",
            "CUDA_ERROR_DEVICE_UNAVAILABLE",
            "CUDA_ERROR_INVALID_DEVICE",
            "CUDA_ERROR_MPS_CONNECTION_FAILED",
            "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED",
            "CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED",
            "CUDA_ERROR_MPS_SERVER_NOT_READY",
            "CUDA_ERROR_NO_DEVICE",
            "CUDA_ERROR_STUB_LIBRARY",
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "CUDA_ERROR_SYSTEM_NOT_READY",
        ],
    ),
    // Those of which CUDA's manual says that the context, or the process, cannot go on.
    (
        BackendErrorKind::Lost,
        &[
            "CUDA_ERROR_ASSERT",
            "CUDA_ERROR_CONTAINED",
            "CUDA_ERROR_CONTEXT_IS_DESTROYED",
            "CUDA_ERROR_DEINITIALIZED",
            "CUDA_ERROR_ECC_UNCORRECTABLE",
            "CUDA_ERROR_EXTERNAL_DEVICE",
            "CUDA_ERROR_HARDWARE_STACK_ERROR",
            "CUDA_ERROR_ILLEGAL_ADDRESS",
            "CUDA_ERROR_ILLEGAL_INSTRUCTION",
            "CUDA_ERROR_INVALID_ADDRESS_SPACE",
            "CUDA_ERROR_INVALID_PC",
            "CUDA_ERROR_LAUNCH_FAILED",
            "CUDA_ERROR_LAUNCH_TIMEOUT",
            "CUDA_ERROR_MISALIGNED_ADDRESS",
            "CUDA_ERROR_MPS_CLIENT_TERMINATED",
            "CUDA_ERROR_MPS_RPC_FAILURE",
            "CUDA_ERROR_NVLINK_UNCORRECTABLE",
            "CUDA_ERROR_TENSOR_MEMORY_LEAK",
        ],
    ),
    (
        BackendErrorKind::Kernel,
        &[
            "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE",
            "CUDA_ERROR_FUNCTION_NOT_LOADED",
            "CUDA_ERROR_INVALID_CLUSTER_SIZE",
            "CUDA_ERROR_INVALID_IMAGE",
            "CUDA_ERROR_INVALID_PTX",
            "CUDA_ERROR_INVALID_SOURCE",
            "CUDA_ERROR_JIT_COMPILATION_DISABLED",
            "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
            "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
            "CUDA_ERROR_NO_BINARY_FOR_GPU",
            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        ],
    ),
];

impl Error {
    /// What a caller can tell apart.
    pub fn kind(&self) -> BackendErrorKind {
        match self {
            Error::NoDriver { .. } | Error::NoDevice { .. } | Error::Symbol { .. } => {
                BackendErrorKind::NoDevice
            }
            Error::Forked => BackendErrorKind::Forked,
            Error::Driver { code, .. } => {
                let found = KINDS.iter().find(|(_, codes)| codes.contains(&code.as_str()));
                found.map_or(BackendErrorKind::Other, |(kind, _)| *kind)
            }
            Error::Jit { kind, .. } => *kind,
            Error::Target { .. } | Error::Argument { .. } | Error::Limit { .. } => BackendErrorKind::Kernel,
            Error::Value { .. } => BackendErrorKind::Other,
        }
    }

    pub(crate) fn value(
        name: impl Into<Cow<'static, str>>,
        found: impl ToString,
        wanted: impl Into<String>,
    ) -> Self {
        Error::Value { name: name.into(), found: found.to_string(), wanted: wanted.into() }
    }

    pub(crate) fn limit(
        kernel: &str,
        what: impl Into<Cow<'static, str>>,
        found: impl ToString,
        limit: impl Into<String>,
    ) -> Self {
        let (kernel, found) = (kernel.to_owned(), found.to_string());
        Error::Limit { kernel, what: what.into(), found, limit: limit.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_of_the_driver_has_one_kind() {
        let codes: Vec<&str> = KINDS.iter().flat_map(|(_, codes)| *codes).copied().collect();
        for (i, code) in codes.iter().enumerate() {
            assert!(code.starts_with("CUDA_ERROR_") && !codes[..i].contains(code), "{code}");
        }
        let kind = |code: &str| {
            Error::Driver { call: "cuInit", code: code.into(), description: String::new() }.kind()
        };
        for (wanted, codes) in KINDS {
            assert!(codes.iter().all(|code| kind(code) == *wanted), "{wanted:?}");
        }
        for code in ["CUDA_ERROR_UNKNOWN", "CUDA_ERROR_NOT_READY", "error 998", ""] {
            assert_eq!(kind(code), BackendErrorKind::Other, "{code}");
        }
    }

    #[test]
    fn messages_name_the_thing_the_value_found_and_the_value_wanted() {
        let missing = |ordinal, count| Error::NoDevice { ordinal, count }.to_string();
        assert_eq!(missing(0, 0), "CUDA device: ordinal is 0, expected a GPU, but the driver finds none");
        assert_eq!(missing(1, 1), "CUDA device: ordinal is 1, expected 0, as there is one GPU");
        assert_eq!(missing(8, 4), "CUDA device: ordinal is 8, expected 0 to 3, as there are 4 GPUs");

        let gpu = |found, wanted| Error::Target { kernel: "k".into(), found, wanted }.to_string();
        assert_eq!(gpu(Target::SM_86, Target::SM_90A), "kernel `k`: GPU is sm_86, expected sm_90a alone");
        assert_eq!(gpu(Target::SM_75, Target::SM_80), "kernel `k`: GPU is sm_75, expected sm_80 or newer");

        let version = DriverVersion { major: 11, minor: 4 };
        assert_eq!(
            Error::Symbol { symbol: "cuTensorMapEncodeTiled", version }.to_string(),
            "CUDA driver: version is 11.4, expected a newer one, with `cuTensorMapEncodeTiled`"
        );
        let call = Error::Driver {
            call: "cuMemAllocAsync",
            code: "CUDA_ERROR_OUT_OF_MEMORY".into(),
            description: "out of memory".into(),
        };
        assert_eq!(call.to_string(), "cuMemAllocAsync: CUDA_ERROR_OUT_OF_MEMORY (out of memory)");
    }
}
