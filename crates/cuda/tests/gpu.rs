//! The whole way on a real GPU. Without a driver each test says that it is skipped; with one, nothing is.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use std::fs;
use std::io::{self, Write as _};
use std::ops::Deref;
use std::ptr;
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use sage_cuda::{
    Buffer, Device, DiskCache, Driver, ElementType, Error, Event, Kernel, KernelSource, L2Promotion, Origin,
    Stream, Swizzle, TensorMap, devices,
};
use sage_ptx::{Arg, Param, ParamType, Target};

/// Writes to stderr past the test harness, which would swallow the words of a test that passes.
macro_rules! say {
    ($($words:tt)*) => {{
        let _ = writeln!(io::stderr(), $($words)*);
    }};
}

/// A device for one test at a time: a capture forbids other threads to wait for the whole GPU, and times would be off.
struct Alone {
    device: Device,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Alone {
    type Target = Device;
    fn deref(&self) -> &Device {
        &self.device
    }
}

fn alone() -> Alone {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Alone { device: Device::with_cache(0, None).unwrap(), _turn: turn }
}

/// Ends the test, aloud, where there is no driver. A driver without a GPU, or a GPU that fails, fails the test.
macro_rules! device {
    () => {
        match Driver::get() {
            Ok(_) => alone(),
            Err(error) => {
                say!("skipped: no CUDA driver ({error})");
                return;
            }
        }
    };
}

const N: usize = 1000;

/// `out[i] = x[i] + scale * y[i]` for `i < n`.
const AXPY: &str = r"
.version 7.0
.target sm_75
.address_size 64

.visible .entry axpy(.param .u64 x, .param .u64 y, .param .u64 out, .param .f32 scale, .param .u32 n)
{
    .reg .pred %p;
    .reg .b32 %r<5>;
    .reg .f32 %f<5>;
    .reg .b64 %d<8>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    ld.param.u32 %r4, [n];
    setp.ge.u32 %p, %r3, %r4;
    @%p bra done;
    ld.param.u64 %d0, [x];
    ld.param.u64 %d1, [y];
    ld.param.u64 %d2, [out];
    ld.param.f32 %f0, [scale];
    mul.wide.u32 %d3, %r3, 4;
    add.u64 %d4, %d0, %d3;
    add.u64 %d5, %d1, %d3;
    add.u64 %d6, %d2, %d3;
    ld.global.f32 %f1, [%d4];
    ld.global.f32 %f2, [%d5];
    fma.rn.f32 %f3, %f0, %f2, %f1;
    st.global.f32 [%d6], %f3;
done:
    ret;
}
";

fn params() -> Vec<Param> {
    let param = |name: &str, ty| Param { name: name.into(), ty };
    let pointers = ["x", "y", "out"].map(|name| param(name, ParamType::Pointer));
    [&pointers[..], &[param("scale", ParamType::F32), param("n", ParamType::U32)]].concat()
}

fn source<'a>(ptx: &'a str, params: &'a [Param]) -> KernelSource<'a> {
    KernelSource {
        name: "axpy",
        ptx,
        target: Target::SM_75,
        params,
        block: [128, 1, 1],
        cluster: None,
        dynamic_shared_bytes: 0,
    }
}

fn load(device: &Device) -> Kernel {
    device.load(&source(AXPY, &params())).unwrap()
}

/// A text that no cache, the driver's own included, has seen before, and that takes a while to compile.
fn fresh(lines: usize) -> String {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let mark = (nanos % 1_000_000_007) as u32 | 1;
    let mut work = format!("    xor.b32 %r3, %r3, {mark};\n    xor.b32 %r3, %r3, {mark};\n");
    for i in 0..lines {
        work +=
            &format!("    fma.rn.f32 %f3, %f3, 0f3F800000, %f0;\n    ex2.approx.f32 %f4, %f{};\n", 1 + i % 3);
        work += "    add.f32 %f3, %f3, %f4;\n";
    }
    // Never taken: n is not 2^32 - 1, but the compiler does not know.
    let guarded =
        format!("    setp.ne.u32 %p, %r4, 0xffffffff;\n    @%p bra store;\n{work}store:\n    st.global");
    AXPY.replace("    st.global", &guarded)
}

fn grid() -> [u32; 3] {
    [(N as u32).div_ceil(128), 1, 1]
}

struct Case {
    x: Buffer,
    y: Buffer,
    out: Buffer,
}

impl Case {
    fn new(stream: &Stream) -> Case {
        let (x, y) = (values(1.0), values(0.5));
        let out = Buffer::from_slice(stream, &vec![f32::NAN; N]).unwrap();
        Case { x: Buffer::from_slice(stream, &x).unwrap(), y: Buffer::from_slice(stream, &y).unwrap(), out }
    }

    fn args(&self) -> [Arg; 5] {
        [self.x.arg(), self.y.arg(), self.out.arg(), Arg::F32(2.0), Arg::U32(N as u32)]
    }

    fn check(&self, x: f32, y: f32) {
        let wanted: Vec<f32> = values(x).iter().zip(values(y)).map(|(x, y)| x + 2.0 * y).collect();
        assert_eq!(self.out.to_vec::<f32>().unwrap(), wanted);
    }
}

/// Small multiples of a power of two, whose sums are exact.
fn values(unit: f32) -> Vec<f32> {
    (0..N).map(|i| unit * (i % 251) as f32).collect()
}

#[test]
fn the_device_list_describes_the_gpus() {
    let _device = device!();
    let list = devices().unwrap();
    assert!(!list.is_empty());
    for (ordinal, info) in list.iter().enumerate() {
        assert_eq!(info.ordinal, ordinal as u32);
        assert!(!info.name.is_empty() && info.uuid != [0; 16]);
        assert!(info.capability >= (7, 5) && info.memory_bytes > 1 << 30 && info.multiprocessors > 0);
        assert!(info.l2_bytes > 0 && info.shared_bytes_per_block >= 48 << 10 && info.clock_khz > 0);
        assert!(info.shared_bytes_per_multiprocessor >= info.shared_bytes_per_block);
        assert_eq!(info.registers_per_multiprocessor, 65536);
        assert!(info.driver_version.major >= 11);
        say!("{info:?}");
    }
}

#[test]
fn a_kernel_runs_on_own_borrowed_and_default_streams() {
    let device = device!();
    let kernel = load(&device);
    let attributes = kernel.attributes();
    assert!(attributes.registers > 0 && attributes.local_bytes == 0 && attributes.static_shared_bytes == 0);
    assert!(attributes.max_blocks_per_multiprocessor >= 8, "{attributes:?}");
    let own = Stream::new(&device).unwrap();
    // SAFETY: `own` outlives its borrower, and the numbers are those of the default streams.
    let [borrowed, legacy, legacy_too, thread] =
        unsafe { [own.handle(), 0, 1, 2].map(|handle| Stream::from_raw(&device, handle)) };
    assert_eq!(borrowed.handle(), own.handle());
    for stream in [&own, &borrowed, &legacy, &legacy_too, &thread] {
        let case = Case::new(stream);
        kernel.launch(stream, grid(), &case.args()).unwrap();
        stream.synchronize().unwrap();
        case.check(1.0, 0.5);
        // A grid without blocks is no work and no error.
        kernel.launch(stream, [0, 1, 1], &case.args()).unwrap();
    }
    device.synchronize().unwrap();
}

#[test]
fn buffers_hold_what_is_put_into_them() {
    let device = device!();
    let stream = Stream::new(&device).unwrap();
    let mut buffer = Buffer::new(&stream, 4 * N).unwrap();
    assert!(buffer.address().is_multiple_of(256) && buffer.bytes() == 4 * N);
    buffer.fill(0xa5).unwrap();
    assert_eq!(buffer.to_vec::<u32>().unwrap(), vec![0xa5a5_a5a5; N]);
    let error = buffer.copy_from_host(&[0_u8; 3]).unwrap_err().to_string();
    assert_eq!(error, "host memory's size in bytes: value is 3, expected the buffer's, 4000");
    assert!(buffer.to_vec::<[u64; 3]>().is_err(), "4000 bytes are no whole number of 24");
    let mut nothing = Buffer::new(&stream, 0).unwrap();
    assert_eq!(nothing.address(), 0);
    nothing.fill(1).unwrap();
    assert_eq!(nothing.to_vec::<f32>().unwrap(), []);
    let huge = Buffer::new(&stream, 1 << 50).unwrap_err().to_string();
    assert!(huge.contains("CUDA_ERROR_OUT_OF_MEMORY") || huge.contains("CUDA_ERROR_INVALID_VALUE"), "{huge}");
}

#[test]
fn wrong_launches_are_refused_before_the_driver_sees_them() {
    let device = device!();
    let kernel = load(&device);
    let stream = Stream::new(&device).unwrap();
    let case = Case::new(&stream);
    let message = |grid, args: &[Arg]| kernel.launch(&stream, grid, args).unwrap_err().to_string();
    let mut args = case.args();
    assert_eq!(message(grid(), &args[..4]), "kernel `axpy`: argument 4 (`n`) is missing, expected a u32");
    args[3] = Arg::I64(2);
    assert_eq!(message(grid(), &args), "kernel `axpy`: argument 3 (`scale`) is an i64, expected an f32");
    assert_eq!(
        message([1, 70000, 1], &case.args()),
        "kernel `axpy`: grid y is 70000, expected at most 65535"
    );
    stream.synchronize().unwrap();
    assert!(case.out.to_vec::<f32>().unwrap().iter().all(|x| x.is_nan()), "nothing ran");

    let params = params();
    let good = source(AXPY, &params);
    let shared = device.info().shared_bytes_per_block;
    let most = device.load(&KernelSource { dynamic_shared_bytes: shared, ..good }).unwrap();
    assert_eq!(most.attributes().max_blocks_per_multiprocessor, 1);
    most.launch(&stream, grid(), &case.args()).unwrap();
    case.check(1.0, 0.5);
    for wrong in [
        KernelSource { dynamic_shared_bytes: shared + 1, ..good },
        KernelSource { block: [2048, 1, 1], ..good },
    ] {
        assert!(matches!(device.load(&wrong), Err(Error::Limit { .. })), "{wrong:?}");
    }
    let gpu = device.info().target();
    let foreign = if gpu == Target::SM_90A { Target::SM_100A } else { Target::SM_90A };
    let error = device.load(&KernelSource { target: foreign, ..good }).unwrap_err();
    assert_eq!(error, Error::Target { kernel: "axpy".into(), found: gpu, wanted: foreign });
}

#[test]
fn what_the_driver_cannot_compile_comes_with_its_log() {
    let device = device!();
    let params = params();
    let wrong = AXPY.replace("fma.rn.f32 %f3", "fma.rn.f32 %nowhere");
    let Err(Error::Jit { kernel, target, log }) = device.load(&source(&wrong, &params)) else {
        panic!("a syntax error is not Error::Jit");
    };
    assert_eq!((&*kernel, target), ("axpy", Target::SM_75));
    assert!(log.contains("CUDA_ERROR_INVALID_PTX") && log.contains("nowhere"), "{log}");
    say!("syntax error: {log}");

    let other = KernelSource { name: "axpz", ..source(AXPY, &params) };
    let Err(Error::Jit { log, .. }) = device.load(&other) else {
        panic!("a missing entry is not Error::Jit")
    };
    assert!(log.contains("no such entry"), "{log}");

    // A failure leaves nothing behind.
    let counts = device.load_counts();
    assert_eq!((counts.compiled, counts.from_memory), (0, 0));
    load(&device);
}

#[test]
fn the_disk_cache_is_faster_than_compiling_and_survives_damage() {
    let _device = device!();
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path(), 1 << 20).unwrap();
    let (ptx, params) = (fresh(300), params());
    // A device of its own has no kernels in memory, like a new process.
    let cold = || {
        let device = Device::with_cache(0, Some(cache.clone())).unwrap();
        let started = Instant::now();
        let kernel = device.load(&source(&ptx, &params)).unwrap();
        let took = started.elapsed();
        let stream = Stream::new(&device).unwrap();
        let case = Case::new(&stream);
        kernel.launch(&stream, grid(), &case.args()).unwrap();
        case.check(1.0, 0.5);
        (kernel.origin(), took)
    };
    let (origin, compiled) = cold();
    assert_eq!(origin, Origin::Compiled);
    let loaded: Vec<(Origin, Duration)> = (0..3).map(|_| cold()).collect();
    assert!(loaded.iter().all(|(origin, _)| *origin == Origin::Disk), "{loaded:?}");
    let best = loaded.iter().map(|(_, took)| *took).min().unwrap();
    say!("compiled in {compiled:?}, from disk in {best:?}");
    assert!(best < compiled, "{best:?} from disk, {compiled:?} compiled");

    let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let whole = fs::read(&files[0]).unwrap();
    for damaged in
        [whole[..whole.len() / 2].to_vec(), [&whole[..100], &[!whole[100]], &whole[101..]].concat()]
    {
        fs::write(&files[0], damaged).unwrap();
        assert_eq!(cold().0, Origin::Compiled);
        assert_eq!(cold().0, Origin::Disk);
    }
    // Sound as a file, but nothing that the driver could load.
    let driver = devices().unwrap()[0].driver_version;
    let (major, minor) = devices().unwrap()[0].capability;
    let gpu = format!("driver {driver}, capability {major}.{minor}");
    let key = sage_cuda::CacheKey::of(&[ptx.as_bytes(), b"axpy", gpu.as_bytes()]);
    assert!(cache.get(&key).is_some(), "the test knows the key");
    cache.put(&key, &[0; 4096]);
    assert_eq!(cold().0, Origin::Compiled);
    assert_eq!(cold().0, Origin::Disk);
}

#[test]
fn eight_threads_that_want_a_kernel_compile_it_once() {
    let device = device!();
    let (ptx, params) = (fresh(200), params());
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                let kernel = device.load(&source(&ptx, &params)).unwrap();
                let stream = Stream::new(&device).unwrap();
                let case = Case::new(&stream);
                kernel.launch(&stream, grid(), &case.args()).unwrap();
                case.check(1.0, 0.5);
            });
        }
    });
    let counts = device.load_counts();
    assert_eq!((counts.compiled, counts.from_disk, counts.from_memory), (1, 0, 7));
}

#[test]
fn a_captured_graph_replays_with_changed_inputs_and_memory_of_its_own() {
    let device = device!();
    let kernel = load(&device);
    let stream = Stream::new(&device).unwrap();
    let mut case = Case::new(&stream);
    let older = Buffer::new(&stream, 1 << 16).unwrap();

    assert!(!stream.is_capturing().unwrap());
    stream.begin_capture().unwrap();
    assert!(stream.is_capturing().unwrap());
    {
        // out = (x + 2 y) + 2 y by way of a buffer that only the graph has.
        let mut between = Buffer::new(&stream, 4 * N).unwrap();
        between.fill(0xff).unwrap();
        let (mut first, mut second) = (case.args(), case.args());
        first[2] = between.arg();
        second[0] = between.arg();
        kernel.launch(&stream, grid(), &first).unwrap();
        // Loading a kernel is allowed, though the capture forbids what it does by default.
        let other = device.load(&source(&fresh(1), &params())).unwrap();
        other.launch(&stream, grid(), &second).unwrap();
    }
    drop(older);
    let copy = case.x.copy_from_host(&values(1.0)).unwrap_err().to_string();
    assert_eq!(copy, "stream of a host copy: value is being captured, expected one that is not");
    let graph = stream.end_capture().unwrap().instantiate().unwrap();
    assert!(!stream.is_capturing().unwrap());
    assert!(case.out.to_vec::<f32>().unwrap().iter().all(|x| x.is_nan()), "recorded work ran already");

    for (x, y) in [(1.0, 0.5), (2.0, 0.25), (0.5, 4.0)] {
        case.x.copy_from_host(&values(x)).unwrap();
        case.y.copy_from_host(&values(y)).unwrap();
        case.out.fill(0xff).unwrap();
        graph.launch(&stream).unwrap();
        case.check(x, 2.0 * y);
    }
    // Back to back, without a wait between: the graph's memory is free again each time.
    for _ in 0..10 {
        graph.launch(&stream).unwrap();
    }
    case.check(0.5, 8.0);
    drop(graph);
    Buffer::new(&stream, 1 << 16).unwrap();
    stream.synchronize().unwrap();
}

#[test]
fn calls_leave_the_current_context_alone() {
    let device = device!();
    let current = || {
        let mut current = ptr::null_mut();
        // SAFETY: there is a driver, and the pointer is to a local.
        let code = unsafe { sys::cuCtxGetCurrent(&mut current) };
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
        current
    };
    let everything = || {
        let kernel = load(&device);
        let stream = Stream::new(&device).unwrap();
        let case = Case::new(&stream);
        kernel.launch(&stream, grid(), &case.args()).unwrap();
        let event = Event::new(&device, true).unwrap();
        stream.record(&event).unwrap();
        stream.wait_event(&event).unwrap();
        event.elapsed_ms(&event).unwrap();
        stream.begin_capture().unwrap();
        kernel.launch(&stream, grid(), &case.args()).unwrap();
        stream.end_capture().unwrap().instantiate().unwrap().launch(&stream).unwrap();
        case.check(1.0, 0.5);
        assert!(device.load(&source("rubbish", &[])).is_err());
        let again = Device::with_cache(0, None).unwrap();
        drop((load(&again), again));
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(current().is_null(), "a new thread has no context");
            everything();
            assert!(current().is_null(), "a context was left behind");

            // The primary context itself, and the context of somebody else.
            let (mut raw, mut primary) = (0, ptr::null_mut());
            // SAFETY: there is a driver and a device; the pointers are to locals.
            unsafe {
                assert_eq!(sys::cuDeviceGet(&mut raw, 0), sys::CUresult::CUDA_SUCCESS);
                assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut primary, raw), sys::CUresult::CUDA_SUCCESS);
                assert_eq!(sys::cuCtxSetCurrent(primary), sys::CUresult::CUDA_SUCCESS);
            }
            everything();
            assert_eq!(current(), primary);
            // SAFETY: undoes the above.
            unsafe {
                assert_eq!(sys::cuCtxSetCurrent(ptr::null_mut()), sys::CUresult::CUDA_SUCCESS);
                assert_eq!(sys::cuDevicePrimaryCtxRelease_v2(raw), sys::CUresult::CUDA_SUCCESS);
            }
        });
    });
}

#[test]
fn events_measure_and_order() {
    let device = device!();
    let kernel = load(&device);
    let (first, second) = (Stream::new(&device).unwrap(), Stream::new(&device).unwrap());
    let case = Case::new(&first);
    let [start, end] = [(); 2].map(|()| Event::new(&device, true).unwrap());
    first.record(&start).unwrap();
    for _ in 0..1000 {
        kernel.launch(&first, grid(), &case.args()).unwrap();
    }
    first.record(&end).unwrap();
    let ms = start.elapsed_ms(&end).unwrap();
    say!("1000 launches took {ms:.3} ms on the GPU");
    assert!(ms > 0.1 && ms < 1000.0, "{ms}");

    let order = Event::new(&device, false).unwrap();
    kernel.launch(&first, grid(), &case.args()).unwrap();
    first.record(&order).unwrap();
    second.wait_event(&order).unwrap();
    kernel.launch(&second, grid(), &case.args()).unwrap();
    second.synchronize().unwrap();
    case.check(1.0, 0.5);
    assert!(order.elapsed_ms(&end).is_err(), "an event without timing measures nothing");
}

#[test]
fn a_warm_launch_costs_the_host_little() {
    let device = device!();
    let kernel = load(&device);
    let stream = Stream::new(&device).unwrap();
    let case = Case::new(&stream);
    let args = case.args();
    let rounds = 200;
    let time = |work: &dyn Fn()| {
        let best = (0..20).map(|_| {
            stream.synchronize().unwrap();
            let started = Instant::now();
            (0..rounds).for_each(|_| work());
            started.elapsed()
        });
        best.min().unwrap().as_secs_f64() * 1e6 / f64::from(rounds)
    };
    let launch = time(&|| kernel.launch(&stream, grid(), &args).unwrap());
    let memory = time(&|| drop(Buffer::new(&stream, 1 << 20).unwrap()));
    let check = time(&|| drop(kernel.launch(&stream, [0, 1, 1], &args)));
    say!(
        "warm launch {launch:.2} us, of it our checks {check:.3} us; allocate and free 1 MiB {memory:.2} us"
    );
    assert!(launch < 100.0 && memory < 100.0);
    case.check(1.0, 0.5);
}

#[test]
fn clusters_launch_where_there_are_any() {
    let device = device!();
    let params = params();
    let clustered = KernelSource { cluster: Some([2, 1, 1]), ..source(AXPY, &params) };
    if device.info().capability.0 < 9 {
        assert!(matches!(device.load(&clustered), Err(Error::Limit { .. })));
        say!("skipped: {} has no clusters", device.info().name);
        return;
    }
    // The kernel returns at once unless it runs in a cluster of two.
    let ptx = AXPY.replace(".version 7.0", ".version 7.8").replace(".target sm_75", ".target sm_90").replace(
        "    mov.u32 %r0, %ctaid.x;",
        "    mov.u32 %r0, %cluster_nctaid.x;\n    setp.ne.u32 %p, %r0, 2;\n    @%p bra done;\n    mov.u32 %r0, %ctaid.x;",
    );
    let clustered = KernelSource { ptx: &ptx, target: Target::SM_90, ..clustered };
    let kernel = device.load(&clustered).unwrap();
    let stream = Stream::new(&device).unwrap();
    let case = Case::new(&stream);
    kernel.launch(&stream, grid(), &case.args()).unwrap();
    case.check(1.0, 0.5);
    let odd = kernel.launch(&stream, [7, 1, 1], &case.args()).unwrap_err().to_string();
    assert_eq!(odd, "kernel `axpy`: grid x is 7, expected a multiple of the cluster's 2");
}

/// Copies a tile of 64 × 8 halves, swizzled within 128 bytes, to shared memory and from there, as it lies, to `out`.
const TILE: &str = r"
.version 8.0
.target sm_90
.address_size 64

.visible .entry tile(.param .align 64 .b8 map[128], .param .u64 out)
{
    .reg .pred %p, %q;
    .reg .b32 %r<8>;
    .reg .b64 %d<6>;
    .shared .align 1024 .b8 data[1024];
    .shared .align 8 .b64 bar;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, data;
    mov.u32 %r2, bar;
    setp.ne.u32 %p, %r0, 0;
    @%p bra ready;
    mbarrier.init.shared.b64 [%r2], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared.b64 %d0, [%r2], 1024;
    mov.b64 %d1, map;
    cvta.param.u64 %d1, %d1;
    mov.u32 %r3, 64;
    mov.u32 %r4, 4;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d1, {%r3, %r4}], [%r2];
ready:
    bar.sync 0;
wait:
    mbarrier.try_wait.parity.shared.b64 %q, [%r2], 0;
    @!%q bra wait;
    shl.b32 %r5, %r0, 2;
    add.u32 %r6, %r1, %r5;
    ld.shared.b32 %r7, [%r6];
    ld.param.u64 %d2, [out];
    cvt.u64.u32 %d3, %r5;
    add.u64 %d4, %d2, %d3;
    st.global.b32 [%d4], %r7;
    ret;
}
";

#[test]
fn a_tensor_map_leads_the_copy_engine() {
    let device = device!();
    if device.info().capability.0 < 9 {
        say!("skipped: {} has no bulk tensor copies", device.info().name);
        return;
    }
    let stream = Stream::new(&device).unwrap();
    // 10 rows of 128 halves: the tile from row 4 has six rows inside, and two outside that read as zeros.
    let halves: Vec<u16> = (0..10 * 128).map(|i| i as u16 + 1).collect();
    let tensor = Buffer::from_slice(&stream, &halves).unwrap();
    let out = Buffer::from_slice(&stream, &[0xffff_u16; 512]).unwrap();
    let map = TensorMap {
        name: "x",
        element: ElementType::F16,
        address: tensor.address(),
        shape: &[128, 10],
        strides: &[256],
        tile: &[64, 8],
        swizzle: Swizzle::B128,
        promotion: L2Promotion::B128,
    };
    let param = |name: &str, ty| Param { name: name.into(), ty };
    let kernel = device
        .load(&KernelSource {
            name: "tile",
            ptx: TILE,
            target: Target::SM_90,
            params: &[param("map", ParamType::TensorMap), param("out", ParamType::Pointer)],
            block: [256, 1, 1],
            cluster: None,
            dynamic_shared_bytes: 0,
        })
        .unwrap();
    kernel.launch(&stream, [1, 1, 1], &[map.encode(&device).unwrap(), out.arg()]).unwrap();
    let found = out.to_vec::<u16>().unwrap();
    for row in 0..8 {
        for column in 0..64 {
            let wanted = if row < 6 { halves[(4 + row) * 128 + 64 + column] } else { 0 };
            // Chunks of eight halves change places with the row.
            let at = row * 64 + ((column / 8) ^ row) * 8 + column % 8;
            assert_eq!(found[at], wanted, "row {row}, column {column}");
        }
    }
    let wrong = TensorMap { address: tensor.address() + 8, ..map }.encode(&device).unwrap_err().to_string();
    assert!(wrong.starts_with("tensor map of `x`: address: value is 0x"), "{wrong}");
}

#[test]
fn several_gpus_work_side_by_side() {
    let _device = device!();
    let all: Vec<Device> = (0..devices().unwrap().len())
        .map(|ordinal| Device::with_cache(ordinal as u32, None).unwrap())
        .collect();
    let loaded: Vec<(Stream, Kernel)> =
        all.iter().map(|device| (Stream::new(device).unwrap(), load(device))).collect();
    for (i, (stream, kernel)) in loaded.iter().enumerate() {
        let case = Case::new(stream);
        kernel.launch(stream, grid(), &case.args()).unwrap();
        case.check(1.0, 0.5);
        for (j, (_, other)) in loaded.iter().enumerate().filter(|(j, _)| *j != i) {
            let error = other.launch(stream, grid(), &case.args()).unwrap_err().to_string();
            assert_eq!(
                error, "kernel `axpy`: stream is of another GPU, expected one of the kernel's GPU",
                "{i} {j}"
            );
        }
    }
    say!("{} GPU(s)", all.len());
    let (first, again) = (Device::new(0).unwrap(), Device::new(0).unwrap());
    load(&first);
    load(&again);
    assert_eq!(first.load_counts(), again.load_counts(), "the same device");
    assert!(again.load_counts().from_memory >= 1);
}
