//! The driver's library: whether it is there, what it lacks, and how its calls fail.

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};
use libloading::Library;

use crate::driver_cache::arrange_driver_cache;
use crate::driver_version::DriverVersion;
use crate::error::{Error, Result};
use crate::fork::{self, check_not_forked};
use crate::library::{LIBRARY_NAMES, has, open};

/// Calls a driver function and turns its code into an [`Error`] that names the function.
///
/// The call stays as unsafe as it is: the macro belongs inside an `unsafe` block with its reason. The name must be in
/// [`REQUIRED`], or be asked for by [`Driver::require`] first, because the bindings panic where a symbol is missing.
macro_rules! cu {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::check_not_forked().and_then(|()| {
            $crate::driver::check(stringify!($name), ::cudarc::driver::sys::$name($($argument),*))
        })
    };
}
pub(crate) use cu;

/// Functions that every driver since CUDA 11.4 has and that this crate cannot do without.
pub(crate) const REQUIRED: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetDefaultMemPool",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuLinkAddData_v2",
    "cuLinkComplete",
    "cuLinkCreate_v2",
    "cuLinkDestroy",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemPoolSetAttribute",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// Functions that came later; [`Driver::require`] asks for them where they are used.
#[cfg(test)]
const LATER: &[&str] = &["cuLaunchKernelEx", "cuTensorMapEncodeTiled"];

/// The driver, found and started.
#[derive(Debug)]
pub struct Driver {
    library: Library,
    version: DriverVersion,
    count: u32,
    /// Asked once: looking a symbol up allocates, and warm calls encode tensor maps.
    has_tensor_maps: bool,
}

impl Driver {
    /// Finds the driver at the first call and remembers the outcome, good or bad, for the life of the process.
    ///
    /// # Errors
    /// When it cannot be used, or was started before this process was forked.
    pub fn get() -> Result<&'static Driver> {
        // First, so that a forked process does not wait for a thread that it does not have.
        check_not_forked()?;
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        DRIVER.get_or_init(Driver::start).as_ref().map_err(Clone::clone)
    }

    /// The CUDA version that the driver supports.
    pub fn version(&self) -> DriverVersion {
        self.version
    }

    /// How many GPUs there are. `CUDA_VISIBLE_DEVICES` can hide some.
    pub fn device_count(&self) -> u32 {
        self.count
    }

    fn start() -> Result<Driver> {
        let library = open(LIBRARY_NAMES)?;
        let has = |symbol| has(&library, symbol);
        // Error reporting itself needs these two, so they are looked for before anything is called.
        if let Some(symbol) =
            ["cuGetErrorName", "cuGetErrorString", "cuDriverGetVersion"].into_iter().find(|s| !has(s))
        {
            return Err(Error::NoDriver { reason: format!("its library has no `{symbol}`") });
        }
        let mut version = 0;
        // SAFETY: the symbol is there, and the pointer is to a local. The call needs no `cuInit`.
        unsafe { cu!(cuDriverGetVersion(&mut version)) }.map_err(unusable)?;
        let version = version.unsigned_abs();
        let version = DriverVersion { major: version / 1000, minor: version % 1000 / 10 };
        if let Some(&symbol) = REQUIRED.iter().find(|symbol| !has(symbol)) {
            return Err(Error::Symbol { symbol, version });
        }

        arrange_driver_cache();
        // SAFETY: the symbol is there.
        let started = unsafe { sys::cuInit(0) };
        if started == CUresult::CUDA_ERROR_NO_DEVICE {
            return Ok(Driver { library, version, count: 0, has_tensor_maps: false });
        }
        // What the driver says in a process that was forked after somebody else had started it.
        if started == CUresult::CUDA_ERROR_NOT_INITIALIZED {
            return Err(Error::Forked);
        }
        check("cuInit", started).map_err(unusable)?;
        fork::watch();
        let mut count = 0;
        // SAFETY: the driver is started, and the pointer is to a local.
        unsafe { cu!(cuDeviceGetCount(&mut count)) }?;
        let has_tensor_maps = has(ENCODE_TENSOR_MAP);
        Ok(Driver { library, version, count: count.unsigned_abs(), has_tensor_maps })
    }

    /// An error unless the driver has `symbol`, which the bindings may then call without a panic.
    pub(crate) fn require(&self, symbol: &'static str) -> Result<()> {
        if has(&self.library, symbol) { Ok(()) } else { Err(Error::Symbol { symbol, version: self.version }) }
    }

    /// [`Driver::require`] of what encodes tensor maps.
    pub(crate) fn require_tensor_maps(&self) -> Result<()> {
        if self.has_tensor_maps {
            return Ok(());
        }
        Err(Error::Symbol { symbol: ENCODE_TENSOR_MAP, version: self.version })
    }

    /// Milliseconds between two events that have happened.
    ///
    /// The bindings name either this function or its second version, by the toolkit they were generated from, and only
    /// drivers since 12.8 have the second. Every driver has the first, so it is looked up here.
    ///
    /// # Safety
    /// Both events are alive.
    pub(crate) unsafe fn elapsed_ms(&self, start: sys::CUevent, end: sys::CUevent) -> Result<f32> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;
        let symbol = "cuEventElapsedTime";
        // SAFETY: the type is the one that CUDA's header gives the function.
        let elapsed = unsafe { self.library.get::<Elapsed>(symbol) }
            .map_err(|_| Error::Symbol { symbol, version: self.version })?;
        let mut milliseconds = 0.0;
        // SAFETY: the caller answers for the events, and the pointer is to a local.
        check(symbol, unsafe { elapsed(&mut milliseconds, start, end) })?;
        Ok(milliseconds)
    }
}

/// What encodes tensor maps: drivers since CUDA 12 have it.
const ENCODE_TENSOR_MAP: &str = "cuTensorMapEncodeTiled";

/// A driver that does not start (a stub, a mismatch with the kernel module) is as good as none.
fn unusable(error: Error) -> Error {
    Error::NoDriver { reason: format!("does not start ({error})") }
}

/// An error that names the driver function `call`, unless `code` is success.
pub(crate) fn check(call: &'static str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failure(call, code)) }
}

#[cold]
fn failure(call: &'static str, code: CUresult) -> Error {
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult, otherwise: String| {
        let mut text = std::ptr::null();
        // SAFETY: both functions take any code and point at a static string, or at nothing.
        let found = unsafe { get(code, &mut text) };
        if found != CUresult::CUDA_SUCCESS || text.is_null() {
            return otherwise;
        }
        // SAFETY: not null, and such strings are static and end in NUL.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    Error::Driver {
        call,
        code: text(sys::cuGetErrorName, format!("error {}", code as u32)),
        description: text(sys::cuGetErrorString, "without a description".into()),
    }
}

/// What a destructor does with an error: nobody can receive it. At the end of a process the driver is often gone
/// before the last handle, which is nobody's mistake.
pub(crate) fn report(result: Result<()>) {
    match result {
        Ok(()) => {}
        // A fork leaves the handles to the parent, whose they are.
        Err(Error::Forked) => {}
        Err(Error::Driver { code, .. }) if code == "CUDA_ERROR_DEINITIALIZED" => {}
        Err(error) => tracing::warn!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_function_that_is_called_is_looked_for_first() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut called = BTreeSet::new();
        for file in fs::read_dir(sources).unwrap() {
            let text = fs::read_to_string(file.unwrap().path()).unwrap();
            for (at, pattern) in text.match_indices("cu!(").chain(text.match_indices("sys::cu")) {
                let start = if pattern == "cu!(" { at + 4 } else { at + 5 };
                let name: String =
                    text[start..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                if name.len() > 2 {
                    called.insert(name);
                }
            }
        }
        assert!(called.len() > 40, "the search finds only {called:?}");
        let known: BTreeSet<String> = REQUIRED.iter().chain(LATER).map(|name| (*name).to_owned()).collect();
        let looked_up_by_name = ["cuEventElapsedTime".to_owned()].into();
        called = &called | &looked_up_by_name;
        assert_eq!(called, known);
    }
}
