//! A driver without a GPU behind it, built by the test as `libcuda.so`. It keeps the books that the test asks for:
//! which context is current, what is open, what a launch passed; and refuses what the real driver refuses.
//!
//! Without `--cfg whole` it lacks most functions, without `--cfg named` nearly all, as old or foreign libraries do.
//! With `--cfg any_kernel` it takes kernels of any name and arguments.

#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::cell::RefCell;
use std::sync::Mutex;

type Code = u32;
const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const NO_DEVICE: Code = 100;
const STUB_LIBRARY: Code = 34;
const DEVICE_UNAVAILABLE: Code = 46;
const NOT_INITIALIZED: Code = 3;
const INVALID_CONTEXT: Code = 201;
const INVALID_PTX: Code = 218;
const ILLEGAL_ADDRESS: Code = 700;
const LAUNCH_OUT_OF_RESOURCES: Code = 701;
const LAUNCH_FAILED: Code = 719;

#[derive(Default)]
struct Books {
    /// Handles created and not destroyed, with what they are.
    open: Vec<(usize, &'static str)>,
    next: usize,
    capturing: bool,
    /// Memory that the current capture allocated.
    of_the_capture: Vec<usize>,
    compiled: u64,
    launches: u64,
    /// Two pointers, a float and an integer: what the test's kernel takes.
    launched: (u64, u64, f32, u32),
    stream: usize,
    cluster: u32,
    early: u32,
    started: bool,
    /// What allocations, compilations, launches and waits fail with, unless it is success.
    failure: Code,
}

static BOOKS: Mutex<Option<Books>> = Mutex::new(None);

thread_local! {
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

fn books<T>(with: impl FnOnce(&mut Books) -> T) -> T {
    let mut books = BOOKS.lock().unwrap();
    with(books.get_or_insert_default())
}

fn in_context(then: impl FnOnce() -> Code) -> Code {
    if CURRENT.with_borrow(|stack| stack.last().is_some_and(|&top| top != 0)) { then() } else { INVALID_CONTEXT }
}

/// As [`in_context`], of a function that the test may want to fail.
fn fallible(then: impl FnOnce() -> Code) -> Code {
    match books(|b| b.failure) {
        SUCCESS => in_context(then),
        failure => failure,
    }
}

unsafe fn create(out: *mut usize, kind: &'static str) -> Code {
    in_context(|| {
        books(|b| {
            b.next += 1;
            let handle = 0x7000_0000 + b.next * 256;
            b.open.push((handle, kind));
            unsafe { *out = handle };
        });
        SUCCESS
    })
}

fn destroy(handle: usize, kind: &'static str) -> Code {
    in_context(|| {
        books(|b| match b.open.iter().position(|&open| open == (handle, kind)) {
            Some(at) => {
                b.open.swap_remove(at);
                SUCCESS
            }
            None => INVALID_VALUE,
        })
    })
}

macro_rules! driver {
    ($($cfg:ident: $name:ident($($argument:ident: $ty:ty),*) $body:block)*) => {
        $(
            #[cfg($cfg)]
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe, unused_variables)]
            pub unsafe extern "C" fn $name($($argument: $ty),*) -> Code {
                unsafe { $body }
            }
        )*
    };
}

driver! {
    named: cuGetErrorName(code: Code, text: *mut *const u8) {
        *text = match code {
            INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
            OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
            DEVICE_UNAVAILABLE => c"CUDA_ERROR_DEVICE_UNAVAILABLE",
            ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            LAUNCH_OUT_OF_RESOURCES => c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
            LAUNCH_FAILED => c"CUDA_ERROR_LAUNCH_FAILED",
            STUB_LIBRARY => c"CUDA_ERROR_STUB_LIBRARY",
            INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
            INVALID_PTX => c"CUDA_ERROR_INVALID_PTX",
            _ => return INVALID_VALUE,
        }.as_ptr().cast();
        SUCCESS
    }
    named: cuGetErrorString(code: Code, text: *mut *const u8) {
        *text = c"as the fake puts it".as_ptr().cast();
        SUCCESS
    }
    named: cuDriverGetVersion(version: *mut i32) { *version = if cfg!(whole) { 12080 } else { 11020 }; SUCCESS }

    whole: cuInit(flags: u32) {
        match std::env::var("FAKE_CUDA").as_deref() {
            Ok("no_gpu") => NO_DEVICE,
            Ok("stub") => STUB_LIBRARY,
            Ok("forked") => NOT_INITIALIZED,
            _ => {
                books(|b| b.started = true);
                SUCCESS
            }
        }
    }
    whole: cuDeviceGetCount(count: *mut i32) { *count = 2; SUCCESS }
    whole: cuDeviceGet(device: *mut i32, ordinal: i32) { *device = ordinal; SUCCESS }
    whole: cuDeviceGetName(name: *mut u8, length: i32, device: i32) {
        std::ptr::copy_nonoverlapping(c"Fake".as_ptr().cast(), name, 5);
        SUCCESS
    }
    whole: cuDeviceGetAttribute(value: *mut i32, which: u32, device: i32) {
        *value = match which {
            75 => if std::env::var("FAKE_CUDA").as_deref() == Ok("sm_80") { 8 } else { 9 },
            76 => 0,
            97 => 232_448,
            115 => 1,
            _ => 1000,
        };
        SUCCESS
    }
    whole: cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) { *bytes = 1 << 30; SUCCESS }
    whole: cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32) { *uuid = [7; 16]; SUCCESS }
    whole: cuDeviceGetDefaultMemPool(pool: *mut usize, device: i32) { *pool = 1; SUCCESS }
    whole: cuMemPoolSetAttribute(pool: usize, which: u32, value: *mut u64) {
        if which == 4 && *value == u64::MAX { SUCCESS } else { INVALID_VALUE }
    }
    whole: cuDevicePrimaryCtxRetain(context: *mut usize, device: i32) {
        *context = 0x1000 + device as usize;
        books(|b| b.open.push((*context, "context")));
        SUCCESS
    }
    whole: cuDevicePrimaryCtxRelease_v2(device: i32) {
        books(|b| {
            let at = b.open.iter().position(|&open| open == (0x1000 + device as usize, "context")).unwrap();
            b.open.swap_remove(at);
        });
        SUCCESS
    }
    whole: cuCtxGetCurrent(context: *mut usize) {
        if !books(|b| b.started) { return NOT_INITIALIZED }
        *context = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0));
        SUCCESS
    }
    whole: cuCtxPushCurrent_v2(context: usize) { CURRENT.with_borrow_mut(|stack| stack.push(context)); SUCCESS }
    whole: cuCtxPopCurrent_v2(context: *mut usize) {
        match CURRENT.with_borrow_mut(Vec::pop) {
            Some(popped) => { *context = popped; SUCCESS }
            None => INVALID_CONTEXT,
        }
    }
    whole: cuCtxSynchronize() { in_context(|| SUCCESS) }
    whole: cuThreadExchangeStreamCaptureMode(mode: *mut u32) { *mode = 0; SUCCESS }

    whole: cuStreamCreate(stream: *mut usize, flags: u32) { create(stream, "stream") }
    whole: cuStreamDestroy_v2(stream: usize) { destroy(stream, "stream") }
    whole: cuStreamSynchronize(stream: usize) { fallible(|| SUCCESS) }
    whole: cuStreamWaitEvent(stream: usize, event: usize, flags: u32) { in_context(|| SUCCESS) }
    whole: cuStreamIsCapturing(stream: usize, status: *mut u32) {
        *status = books(|b| b.capturing).into();
        in_context(|| SUCCESS)
    }
    whole: cuStreamBeginCapture_v2(stream: usize, mode: u32) { books(|b| b.capturing = true); in_context(|| SUCCESS) }
    whole: cuStreamEndCapture(stream: usize, graph: *mut usize) {
        books(|b| { b.capturing = false; b.of_the_capture.clear(); });
        create(graph, "graph")
    }
    whole: cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: u64) {
        if flags == 1 { create(executable, "executable") } else { INVALID_VALUE }
    }
    whole: cuGraphLaunch(executable: usize, stream: usize) { in_context(|| SUCCESS) }
    whole: cuGraphDestroy(graph: usize) { destroy(graph, "graph") }
    whole: cuGraphExecDestroy(executable: usize) { destroy(executable, "executable") }

    whole: cuEventCreate(event: *mut usize, flags: u32) { create(event, "event") }
    whole: cuEventDestroy_v2(event: usize) { destroy(event, "event") }
    whole: cuEventRecord(event: usize, stream: usize) { in_context(|| SUCCESS) }
    whole: cuEventSynchronize(event: usize) { in_context(|| SUCCESS) }
    whole: cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) { *milliseconds = 1.5; SUCCESS }

    whole: cuMemAllocAsync(address: *mut usize, bytes: usize, stream: usize) {
        let code = fallible(|| create(address, "memory"));
        if code != SUCCESS { return code }
        books(|b| if b.capturing { b.of_the_capture.push(*address) });
        code
    }
    whole: cuMemFreeAsync(address: usize, stream: usize) {
        // What the real driver refuses, ending the capture.
        if books(|b| b.capturing && !b.of_the_capture.contains(&address)) { return INVALID_VALUE }
        destroy(address, "memory")
    }
    whole: cuMemAlloc_v2(address: *mut usize, bytes: usize) { INVALID_VALUE }
    whole: cuMemFree_v2(address: usize) { INVALID_VALUE }
    whole: cuMemcpy2DAsync_v2(copy: *const u8, stream: usize) { in_context(|| SUCCESS) }
    whole: cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) { in_context(|| SUCCESS) }
    whole: cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize) { in_context(|| SUCCESS) }
    whole: cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize) {
        std::ptr::write_bytes(to, 0x11, bytes);
        in_context(|| SUCCESS)
    }
    whole: cuMemsetD8Async(address: u64, byte: u8, bytes: usize, stream: usize) { in_context(|| SUCCESS) }

    whole: cuLinkCreate_v2(count: u32, options: *const u32, values: *const *mut u8, state: *mut usize) {
        if std::slice::from_raw_parts(options, count as usize) != [5, 6, 3, 4] { return INVALID_VALUE }
        if (*values.add(1)).addr() < 64 { return INVALID_VALUE }
        let log = c"line 3: the fake does not like it";
        std::ptr::copy_nonoverlapping(log.as_ptr().cast(), *values, log.count_bytes() + 1);
        create(state, "link")
    }
    whole: cuLinkAddData_v2(
        state: usize, kind: u32, text: *const u8, bytes: usize, name: usize, n: u32, o: usize, v: usize
    ) {
        let text = std::slice::from_raw_parts(text, bytes);
        if kind != 1 || text.last() != Some(&0) { return INVALID_VALUE }
        if text.starts_with(b"wrong") { INVALID_PTX } else { SUCCESS }
    }
    whole: cuLinkComplete(state: usize, cubin: *mut *const u8, bytes: *mut usize) {
        static CUBIN: [u8; 5] = *b"cubin";
        books(|b| b.compiled += 1);
        *cubin = CUBIN.as_ptr();
        *bytes = CUBIN.len();
        fallible(|| SUCCESS)
    }
    whole: cuLinkDestroy(state: usize) { destroy(state, "link") }
    whole: cuModuleLoadData(module: *mut usize, image: *const u8) {
        if std::slice::from_raw_parts(image, 5) != b"cubin" { return INVALID_VALUE }
        create(module, "module")
    }
    whole: cuModuleLoadDataEx(module: *mut usize, text: *const u8, n: u32, o: usize, v: usize) {
        books(|b| b.compiled += 1);
        fallible(|| create(module, "module"))
    }
    whole: cuModuleUnload(module: usize) { destroy(module, "module") }
    whole: cuModuleGetFunction(function: *mut usize, module: usize, name: *const std::ffi::c_char) {
        if !cfg!(any_kernel) && std::ffi::CStr::from_ptr(name) != c"scale" { return INVALID_VALUE }
        *function = module + 1;
        SUCCESS
    }
    whole: cuFuncGetAttribute(value: *mut i32, which: u32, function: usize) {
        *value = match which { 0 => 512, 1 => 1024, 4 => 40, _ => 0 };
        SUCCESS
    }
    whole: cuFuncSetAttribute(function: usize, which: u32, value: i32) {
        if which == 8 { SUCCESS } else { INVALID_VALUE }
    }
    whole: cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: *mut i32, function: usize, threads: i32, shared: usize) {
        *blocks = 2048 / threads;
        SUCCESS
    }
    whole: cuLaunchKernel(
        function: usize, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: usize,
        values: *const *const u8, extra: usize
    ) {
        books(|b| {
            b.launches += 1;
            b.stream = stream;
            if cfg!(any_kernel) { return }
            b.launched = (
                *(*values).cast(),
                *(*values.add(1)).cast(),
                *(*values.add(2)).cast(),
                *(*values.add(3)).cast(),
            );
        });
        fallible(|| SUCCESS)
    }
}

/// The real driver of this version has it.
#[cfg(all(whole, any_kernel))]
#[unsafe(no_mangle)]
pub extern "C" fn cuTensorMapEncodeTiled() -> Code {
    in_context(|| SUCCESS)
}

/// As above.
#[cfg(all(whole, clusters))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(config: *const u32, function: usize, values: usize, extra: usize) -> Code {
    // Grid, block, shared bytes, padding, then the stream, the attributes and their count; id 4 is the cluster, and 6
    // lets the launch start early.
    let attribute = unsafe { *config.add(10).cast::<*const u32>() };
    let (id, x, count) = unsafe { (*attribute, *attribute.add(2), *config.add(12)) };
    books(|b| {
        b.cluster = if id == 4 && count == 1 { x } else { 0 };
        b.early = if id == 6 && count == 1 { x } else { 0 };
    });
    fallible(|| SUCCESS)
}

#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_open() -> u64 {
    books(|b| b.open.len() as u64)
}

#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_compiled() -> u64 {
    books(|b| b.compiled)
}

#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_launches() -> u64 {
    books(|b| b.launches)
}

#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_cluster() -> u64 {
    books(|b| b.cluster.into())
}

#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_fail(code: u64) -> u64 {
    books(|b| b.failure = code as Code);
    0
}

#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_early() -> u64 {
    books(|b| b.early.into())
}

/// Stream, two pointers, a float's bits and an integer of the last launch.
#[cfg(whole)]
#[unsafe(no_mangle)]
pub extern "C" fn fake_launched(which: u64) -> u64 {
    books(|b| {
        [b.stream as u64, b.launched.0, b.launched.1, b.launched.2.to_bits().into(), b.launched.3.into()]
            [which as usize]
    })
}
