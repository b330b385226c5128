//! Compiling, and not compiling again.

use std::io::{self, Write as _};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use std::{fs, thread};

use sage_core::BackendErrorKind;
use sage_cuda::{CacheKey, Device, DiskCache, Driver, Error, KernelSource, Origin, Stream, devices};
use sage_ptx::Target;

use crate::support::{AXPY, Case, alone, fresh, grid, load, params, source};

#[test]
fn what_the_driver_cannot_compile_comes_with_its_log() {
    let device = device!();
    let params = params();
    let wrong = AXPY.replace("fma.rn.f32 %f3", "fma.rn.f32 %nowhere");
    let Err(Error::Jit { kernel, target, kind, log }) = device.load(&source(&wrong, &params)) else {
        panic!("a syntax error is not Error::Jit");
    };
    assert_eq!((&*kernel, target, kind), ("axpy", Target::SM_75, BackendErrorKind::Kernel));
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
        case.launch(&kernel, &stream, grid()).unwrap();
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
    let key = CacheKey::of(&[ptx.as_bytes(), b"axpy", gpu.as_bytes()]);
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
                case.launch(&kernel, &stream, grid()).unwrap();
                case.check(1.0, 0.5);
            });
        }
    });
    let counts = device.load_counts();
    assert_eq!((counts.compiled, counts.from_disk, counts.from_memory), (1, 0, 7));
}

#[test]
fn code_for_this_chip_alone_compiles_and_comes_back() {
    let device = device!();
    let target = device.info().target();
    if !target.is_specific() {
        say!("skipped: {} has no instructions of its own", device.info().name);
        return;
    }
    let own = if target == Target::SM_90A {
        "    wgmma.fence.sync.aligned;\n    mov.u32 %r0, %ctaid.x;"
    } else {
        "    mov.u32 %r0, %ctaid.x;"
    };
    let ptx = fresh(1)
        .replace(".version 7.0", &format!(".version {}", target.version()))
        .replace(".target sm_75", &format!(".target {target}"))
        .replace("    mov.u32 %r0, %ctaid.x;", own);
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path(), 1 << 20).unwrap();
    // Such programs are the driver's alone to compile and keep.
    let needs_whole_compilation = target == Target::SM_90A;
    let origins = match needs_whole_compilation {
        true => [Origin::Driver; 2],
        false => [Origin::Compiled, Origin::Disk],
    };
    for origin in origins {
        let device = Device::with_cache(0, Some(cache.clone())).unwrap();
        let params = params();
        let source = KernelSource { target, needs_whole_compilation, ..source(&ptx, &params) };
        let kernel = device.load(&source).unwrap();
        assert_eq!(kernel.origin(), origin);
        let stream = Stream::new(&device).unwrap();
        let case = Case::new(&stream);
        case.launch(&kernel, &stream, grid()).unwrap();
        case.check(1.0, 0.5);
    }
}
