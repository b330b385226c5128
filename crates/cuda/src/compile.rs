//! From PTX to a loaded function: the driver's compiler, and the disk cache before it.

use std::ffi::{CStr, CString, c_uint, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::{CUfunction_attribute, CUjit_option, CUjitInputType, CUlinkState};
use sage_core::BackendErrorKind;

use crate::context::Context;
use crate::device_info::DeviceInfo;
use crate::disk_cache::DiskCache;
use crate::driver::{Driver, cu, report};
use crate::driver_cache;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, KernelAttributes, Loaded, Origin};
use crate::module::{Function, Module};
use crate::source::KernelSource;

/// Room for each of the compiler's two logs.
const LOG_BYTES: usize = 16 << 10;

/// Loads `source` from the disk cache, or compiles it and leaves it there. The context is current.
pub(crate) fn load(
    source: &KernelSource<'_>,
    gpu: &DeviceInfo,
    context: &Arc<Context>,
    disk: Option<&DiskCache>,
) -> Result<Kernel> {
    source.check_driver(Driver::get()?)?;
    let started = Instant::now();
    let entry = entry_name(source)?;
    // The linker, whose results can be kept, compiles for programs of several parts.
    if source.needs_whole_compilation {
        driver_cache::report();
        let function = entry_of(compile(source, context)?, source, &entry)?;
        tracing::debug!(
            kernel = source.name,
            ms = milliseconds(started),
            "compiled as a whole, or found, by the driver"
        );
        return finish(source, gpu, function, Origin::Driver);
    }
    let key = source.disk_key(gpu.driver_version, gpu.capability);

    if let Some(disk) = disk
        && let Some(cubin) = disk.get(&key)
    {
        match Module::load(&cubin, context).and_then(|module| module.function(&entry)) {
            Ok(function) => {
                tracing::debug!(
                    kernel = source.name,
                    ms = milliseconds(started),
                    "loaded from the disk cache"
                );
                return finish(source, gpu, function, Origin::Disk);
            }
            Err(error) => {
                tracing::warn!(
                    "disk cache: kernel `{}` does not load ({error}), it is compiled again",
                    source.name
                );
            }
        }
    }

    let cubin = link(source)?;
    let function = entry_of(Module::load(&cubin, context)?, source, &entry)?;
    if let Some(disk) = disk {
        disk.put(&key, &cubin);
    }
    tracing::debug!(kernel = source.name, ms = milliseconds(started), "compiled");
    finish(source, gpu, function, Origin::Compiled)
}

fn entry_of(module: Module, source: &KernelSource<'_>, entry: &CStr) -> Result<Function> {
    module.function(entry).map_err(|error| jit(source, error, "there is no such entry in the text"))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn entry_name(source: &KernelSource<'_>) -> Result<CString> {
    CString::new(source.name)
        .map_err(|_| Error::value("kernel's name", format!("{:?}", source.name), "a name without NUL"))
}

fn jit(source: &KernelSource<'_>, error: Error, log: &str) -> Error {
    // Whatever else the driver says here, such as an invalid value, it says of the kernel.
    let kind = match error.kind() {
        BackendErrorKind::Other => BackendErrorKind::Kernel,
        kind => kind,
    };
    let reason = match error {
        Error::Driver { code, description, .. } => format!("{code} ({description})"),
        other => other.to_string(),
    };
    let log = if log.is_empty() { reason } else { format!("{reason}\n{log}") };
    Error::Jit { kernel: source.name.to_owned(), target: source.target, kind, log }
}

/// The compiler at work; freed with its result when dropped.
struct Link(CUlinkState);

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once, while the context is current.
        report(unsafe { cu!(cuLinkDestroy(self.0)) });
    }
}

/// What the compiler writes while it works.
struct Logs {
    errors: Vec<u8>,
    notes: Vec<u8>,
}

impl Logs {
    fn new() -> Self {
        Logs { errors: vec![0; LOG_BYTES], notes: vec![0; LOG_BYTES] }
    }

    /// The options that ask for the logs, and their values: to be used while `self` is alive and not moved.
    fn options(&mut self) -> ([CUjit_option; 4], [*mut c_void; 4]) {
        // Sizes are passed by value, in the shape of a pointer.
        let size: *mut c_void = ptr::without_provenance_mut(LOG_BYTES);
        (
            [
                CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
                CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
                CUjit_option::CU_JIT_INFO_LOG_BUFFER,
                CUjit_option::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
            ],
            [self.errors.as_mut_ptr().cast(), size, self.notes.as_mut_ptr().cast(), size],
        )
    }

    /// The result with the logs in its error.
    fn explain<T>(&self, source: &KernelSource<'_>, result: Result<T>) -> Result<T> {
        let notes = log_text(&self.notes);
        if result.is_ok() && !notes.is_empty() {
            tracing::debug!(kernel = source.name, "{notes}");
        }
        result.map_err(|error| jit(source, error, [log_text(&self.errors), notes].join("\n").trim()))
    }
}

/// The text as the compiler reads it: up to a NUL.
fn text(source: &KernelSource<'_>) -> Result<CString> {
    CString::new(source.ptx).map_err(|_| {
        let error = Error::value("PTX", "a text with a NUL inside", "one without");
        jit(source, error, "")
    })
}

/// Compiles `source` for the GPU whose context is current.
fn link(source: &KernelSource<'_>) -> Result<Vec<u8>> {
    let text = text(source)?;
    let mut logs = Logs::new();
    let (mut options, mut values) = logs.options();
    let count = options.len() as c_uint;

    let linked = (|| {
        let mut state = ptr::null_mut();
        // SAFETY: `options` and `values` have `count` entries that go together, and they and the logs outlive `state`.
        unsafe { cu!(cuLinkCreate_v2(count, options.as_mut_ptr(), values.as_mut_ptr(), &mut state)) }?;
        let state = Link(state);
        let bytes = text.as_bytes_with_nul();
        // SAFETY: `bytes` is alive during the call, which only reads it; there are no further options.
        unsafe {
            cu!(cuLinkAddData_v2(
                state.0,
                CUjitInputType::CU_JIT_INPUT_PTX,
                bytes.as_ptr().cast_mut().cast(),
                bytes.len(),
                c"kernel.ptx".as_ptr(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
            ))
        }?;
        let (mut cubin, mut size) = (ptr::null_mut(), 0);
        // SAFETY: the pointers are to locals.
        unsafe { cu!(cuLinkComplete(state.0, &mut cubin, &mut size)) }?;
        // SAFETY: the driver owns `size` bytes there until `state` is dropped.
        Ok(unsafe { std::slice::from_raw_parts(cubin.cast::<u8>().cast_const(), size) }.to_vec())
    })();
    logs.explain(source, linked)
}

fn log_text(log: &[u8]) -> String {
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    String::from_utf8_lossy(&log[..end]).trim().to_owned()
}

/// Compiles `source` as a whole program. The driver hands no cubin out then, and keeps it in a cache of its own.
fn compile(source: &KernelSource<'_>, context: &Arc<Context>) -> Result<Module> {
    let text = text(source)?;
    let mut logs = Logs::new();
    let (mut options, mut values) = logs.options();
    let mut raw = ptr::null_mut();
    // SAFETY: the text ends in NUL; `options` and `values` go together, and they and the logs outlive the call.
    let loaded = unsafe {
        cu!(cuModuleLoadDataEx(
            &mut raw,
            text.as_ptr().cast(),
            options.len() as c_uint,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        ))
    };
    logs.explain(source, loaded)?;
    // SAFETY: the driver just handed the module over.
    Ok(unsafe { Module::from_raw(raw, context) })
}

/// Asks for what the function has, and sets what its launches need.
fn finish(source: &KernelSource<'_>, gpu: &DeviceInfo, function: Function, origin: Origin) -> Result<Kernel> {
    use CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES as LOCAL,
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC,
        CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK as THREADS, CU_FUNC_ATTRIBUTE_NUM_REGS as REGISTERS,
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as SHARED,
    };
    let get = |which| -> Result<u32> {
        let mut value = 0;
        // SAFETY: the function is alive, and the pointer is to a local.
        unsafe { cu!(cuFuncGetAttribute(&mut value, which, function.raw())) }?;
        Ok(value.unsigned_abs())
    };
    let threads: u32 = source.block.iter().product();
    let most = get(THREADS)?;
    if threads > most {
        let wanted = format!("at most {most}, with the registers that a thread has");
        return Err(Error::limit(source.name, "threads of a block", threads, wanted));
    }
    let (fixed, dynamic) = (get(SHARED)?, source.dynamic_shared_bytes);
    if u64::from(fixed) + u64::from(dynamic) > u64::from(gpu.shared_bytes_per_block) {
        let found = format!("{fixed} declared and {dynamic} dynamic");
        let wanted = format!("together at most {} bytes on this GPU", gpu.shared_bytes_per_block);
        return Err(Error::limit(source.name, "shared memory", found, wanted));
    }
    // Both fit an i32: they are at most what a GPU has.
    let (signed_threads, signed_dynamic) = (threads as i32, dynamic as i32);
    if dynamic > 0 {
        // SAFETY: the function is alive.
        unsafe { cu!(cuFuncSetAttribute(function.raw(), DYNAMIC, signed_dynamic)) }?;
    }
    let mut blocks = 0;
    // SAFETY: the function is alive, and the pointer is to a local.
    unsafe {
        cu!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
            &mut blocks,
            function.raw(),
            signed_threads,
            dynamic as usize
        ))
    }?;
    let attributes = KernelAttributes {
        registers: get(REGISTERS)?,
        local_bytes: get(LOCAL)?,
        static_shared_bytes: fixed,
        max_blocks_per_multiprocessor: blocks.unsigned_abs(),
    };
    Ok(Kernel::new(Loaded {
        name: source.name.to_owned(),
        params: source.params.into(),
        block: source.block,
        cluster: source.cluster,
        starts_early: source.starts_early(gpu.driver_version),
        dynamic_shared_bytes: dynamic,
        attributes,
        origin,
        function,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_end_at_the_nul() {
        assert_eq!(log_text(b"ptxas error: line 3\n\0rubbish"), "ptxas error: line 3");
        assert_eq!(log_text(b"full"), "full");
        assert_eq!(log_text(b""), "");
    }

    #[test]
    fn a_compiler_error_keeps_code_and_log() {
        let source = KernelSource {
            name: "k",
            ptx: "",
            target: sage_ptx::Target::SM_80,
            params: &[],
            block: [1, 1, 1],
            cluster: None,
            dynamic_shared_bytes: 0,
            needs_whole_compilation: false,
            waits_for_launches_before: false,
        };
        let error = Error::Driver {
            call: "cuLinkAddData_v2",
            code: "CUDA_ERROR_INVALID_PTX".into(),
            description: "a PTX JIT compilation failed".into(),
        };
        assert_eq!(
            jit(&source, error, "ptxas: line 3").to_string(),
            "kernel `k` for sm_80: the driver cannot compile it: CUDA_ERROR_INVALID_PTX (a PTX JIT compilation \
             failed)\nptxas: line 3"
        );
        // Found before the driver is asked.
        let nul = link(&KernelSource { ptx: "a\0b", ..source }).unwrap_err().to_string();
        assert_eq!(
            nul,
            "kernel `k` for sm_80: the driver cannot compile it: PTX: value is a text with a NUL inside, expected one \
             without"
        );
    }
}
