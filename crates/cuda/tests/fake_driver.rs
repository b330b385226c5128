//! What happens between this crate and the driver, on machines without a GPU: a fake `libcuda.so` in place of the real
//! one. It can be loaded once per process, so every case runs in a process of its own.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use std::sync::Barrier;
use std::{env, ptr, thread};

use cudarc::driver::sys;
use sage_core::BackendErrorKind;
use sage_cuda::{
    Buffer, Device, DiskCache, Driver, Error, Event, Kernel, KernelSource, LoadCounts, Origin, Stream,
    devices,
};
use sage_ptx::{Arg, Param, ParamType, Target};

#[path = "fake_driver/forked.rs"]
mod forked;
#[path = "fake_driver/harness.rs"]
mod harness;

use forked::in_a_fork;
use harness::{ALLOCATIONS, ask, cases};

fn current() -> usize {
    let mut current = ptr::null_mut();
    // SAFETY: the fake is loaded, and the pointer is to a local.
    assert_eq!(unsafe { sys::cuCtxGetCurrent(&mut current) }, sys::CUresult::CUDA_SUCCESS);
    current.addr()
}

fn params() -> Vec<Param> {
    [("x", ParamType::Pointer), ("out", ParamType::Pointer), ("by", ParamType::F32), ("n", ParamType::U32)]
        .map(|(name, ty)| Param { name: name.into(), ty })
        .into()
}

fn source<'a>(ptx: &'a str, params: &'a [Param]) -> KernelSource<'a> {
    KernelSource {
        name: "scale",
        ptx,
        target: Target::SM_90A,
        params,
        block: [128, 1, 1],
        cluster: None,
        dynamic_shared_bytes: 100,
        needs_whole_compilation: false,
        waits_for_launches_before: false,
    }
}

fn load(device: &Device) -> Kernel {
    device.load(&source("text", &params())).unwrap()
}

fn launch(kernel: &Kernel, stream: &Stream, grid: [u32; 3], args: &[Arg]) -> sage_cuda::Result<()> {
    // SAFETY: the fake goes to none of the addresses.
    unsafe { kernel.launch(stream, grid, args) }
}

const ARGS: [Arg; 4] = [Arg::Pointer(1 << 40), Arg::Pointer(5), Arg::F32(0.5), Arg::U32(7)];

cases! {
    a_library_of_somebody_else_is_no_driver, [], "", {
        let error = Driver::get().unwrap_err();
        assert_eq!(error.kind(), BackendErrorKind::NoDevice);
        let error = error.to_string();
        assert_eq!(
            error,
            "CUDA driver: its library has no `cuGetErrorName`, expected libcuda, which the NVIDIA driver installs"
        );
    }

    an_old_driver_is_told_what_it_lacks, ["named"], "", {
        let error = Device::new(0).unwrap_err();
        assert_eq!(error.kind(), BackendErrorKind::NoDevice);
        let error = error.to_string();
        let wanted = "CUDA driver: version is 11.2, expected a newer one, with `cuCtxGetCurrent`";
        assert_eq!(error, wanted);
    }

    a_stub_library_is_no_driver, ["named", "whole"], "stub", {
        assert_eq!(
            devices().unwrap_err().to_string(),
            "CUDA driver: does not start (cuInit: CUDA_ERROR_STUB_LIBRARY (as the fake puts it)), expected libcuda, \
             which the NVIDIA driver installs"
        );
        assert_eq!(Device::new(0).unwrap_err().kind(), BackendErrorKind::NoDevice);
    }

    a_driver_without_a_gpu_has_an_empty_list, ["named", "whole"], "no_gpu", {
        assert_eq!(devices().unwrap(), []);
        let error = Device::new(0).unwrap_err();
        assert_eq!(error, Error::NoDevice { ordinal: 0, count: 0 });
        assert_eq!(error.kind(), BackendErrorKind::NoDevice);
    }

    ordinals_out_of_range_are_named, ["named", "whole"], "", {
        let list = devices().unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!((list[1].ordinal, &*list[1].name, list[1].target()), (1, "Fake", Target::SM_90A));
        for ordinal in [2, u32::MAX] {
            assert_eq!(Device::new(ordinal).unwrap_err(), Error::NoDevice { ordinal, count: 2 });
        }
    }

    everything_opened_is_closed_and_the_context_is_left_alone, ["named", "whole"], "", {
        let device = Device::with_cache(0, None).unwrap();
        for before in [0, 0x99, 0x1000] {
            // SAFETY: the fake is loaded; 0x99 is somebody else's context, 0x1000 is the device's own.
            unsafe { sys::cuCtxPushCurrent_v2(ptr::without_provenance_mut(before)) };
            let stream = Stream::new(&device).unwrap();
            let kernel = load(&device);
            assert_eq!(kernel.attributes().registers, 40);
            assert_eq!(kernel.attributes().max_blocks_per_multiprocessor, 16);
            let mut buffer = Buffer::from_slice(&stream, &[1_u32; 10]).unwrap();
            buffer.fill(1).unwrap();
            assert_eq!(buffer.to_vec::<u32>().unwrap(), [0x1111_1111; 10]);
            launch(&kernel, &stream, [1, 1, 1], &ARGS).unwrap();
            let event = Event::new(&device, true).unwrap();
            stream.record(&event).unwrap();
            stream.wait_event(&event).unwrap();
            assert_eq!(event.elapsed_ms(&event).unwrap(), 1.5);
            stream.begin_capture().unwrap();
            let graph = stream.end_capture().unwrap().instantiate().unwrap();
            // SAFETY: the graph is empty.
            unsafe { graph.launch(&stream) }.unwrap();
            device.synchronize().unwrap();
            stream.synchronize().unwrap();
            drop((graph, event, buffer, kernel, stream));
            assert_eq!(current(), before);
        }
        // The context and the loaded module.
        assert_eq!(ask("fake_open", 0), 2);
        let kernel = load(&device);
        drop(device);
        assert_eq!(ask("fake_open", 0), 2, "a kernel keeps its module and context alive");
        drop(kernel);
        assert_eq!(ask("fake_open", 0), 0);
        assert_eq!(current(), 0x1000);
    }

    a_launch_passes_what_it_was_given_and_allocates_nothing, ["named", "whole"], "", {
        let device = Device::with_cache(1, None).unwrap();
        let kernel = load(&device);
        // SAFETY: the fake takes any stream.
        let stream = unsafe { Stream::from_raw(&device, 0xabc0) };
        launch(&kernel, &stream, [3, 1, 1], &ARGS).unwrap();
        let launched: Vec<u64> = (0..5).map(|which| ask("fake_launched", which)).collect();
        assert_eq!(launched, [0xabc0, 1 << 40, 5, 0.5_f32.to_bits().into(), 7]);

        let before = ALLOCATIONS.get();
        for _ in 0..10 {
            launch(&kernel, &stream, [3, 1, 1], &ARGS).unwrap();
        }
        assert_eq!(ALLOCATIONS.get(), before, "a warm launch allocates");
        assert_eq!(ask("fake_launches", 0), 11);
        launch(&kernel, &stream, [0, 1, 1], &ARGS).unwrap();
        launch(&kernel, &stream, [1, 0, 1], &ARGS).unwrap();
        assert!(launch(&kernel, &stream, [1, 1, 1], &ARGS[..3]).is_err());
        let other = Device::with_cache(0, None).unwrap();
        assert_eq!(
            launch(&kernel, &Stream::new(&other).unwrap(), [1, 1, 1], &ARGS).unwrap_err().to_string(),
            "kernel `scale`: stream is of another GPU, expected one of the kernel's GPU"
        );
        assert_eq!(ask("fake_launches", 0), 11, "the driver sees neither empty nor wrong launches");
    }

    clusters_need_a_driver_that_has_them, ["named", "whole"], "", {
        let device = Device::with_cache(0, None).unwrap();
        let params = params();
        let clustered = KernelSource { cluster: Some([2, 1, 1]), ..source("text", &params) };
        assert_eq!(
            device.load(&clustered).unwrap_err().to_string(),
            "CUDA driver: version is 12.8, expected a newer one, with `cuLaunchKernelEx`"
        );
    }

    clusters_are_passed_on, ["named", "whole", "clusters"], "", {
        let device = Device::with_cache(0, None).unwrap();
        let (params, stream) = (params(), Stream::new(&device).unwrap());
        let clustered = KernelSource { cluster: Some([2, 1, 1]), ..source("text", &params) };
        launch(&device.load(&clustered).unwrap(), &stream, [4, 1, 1], &ARGS).unwrap();
        assert_eq!(ask("fake_cluster", 0), 2);
    }

    a_failed_compilation_keeps_the_log_and_leaves_nothing_open, ["named", "whole"], "", {
        let device = Device::with_cache(0, None).unwrap();
        let params = params();
        for _ in 0..2 {
            assert_eq!(
                device.load(&source("wrong", &params)).unwrap_err().to_string(),
                "kernel `scale` for sm_90a: the driver cannot compile it: CUDA_ERROR_INVALID_PTX (as the fake puts \
                 it)\nline 3: the fake does not like it"
            );
        }
        let other = KernelSource { name: "other", ..source("text", &params) };
        assert!(device.load(&other).unwrap_err().to_string().contains("there is no such entry in the text"));
        let wide = KernelSource { block: [1024, 1, 1], ..source("text", &params) };
        assert_eq!(
            device.load(&wide).unwrap_err().to_string(),
            "kernel `scale`: threads of a block is 1024, expected at most 512, with the registers that a thread has"
        );
        let large = KernelSource { dynamic_shared_bytes: 232_000, ..source("text", &params) };
        assert_eq!(
            device.load(&large).unwrap_err().to_string(),
            "kernel `scale`: shared memory is 1024 declared and 232000 dynamic, expected together at most 232448 bytes \
             on this GPU"
        );
        assert_eq!(ask("fake_open", 0), 1, "the context alone");
        assert_eq!(current(), 0);
    }

    errors_of_the_driver_keep_their_kind, ["named", "whole"], "", {
        use BackendErrorKind::{Kernel as OfKernel, Lost, NoDevice, Other, OutOfMemory};
        let device = Device::with_cache(0, None).unwrap();
        let stream = Stream::new(&device).unwrap();
        let (params, kernel) = (params(), load(&device));
        for (code, name, kind) in [
            (2, "CUDA_ERROR_OUT_OF_MEMORY", OutOfMemory),
            (46, "CUDA_ERROR_DEVICE_UNAVAILABLE", NoDevice),
            (700, "CUDA_ERROR_ILLEGAL_ADDRESS", Lost),
            (719, "CUDA_ERROR_LAUNCH_FAILED", Lost),
            (701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", OfKernel),
            (1, "CUDA_ERROR_INVALID_VALUE", Other),
            (998, "error 998", Other),
        ] {
            ask("fake_fail", code);
            let calls = [
                ("cuMemAllocAsync", Buffer::new(&stream, 100).err()),
                ("cuLaunchKernel", launch(&kernel, &stream, [1, 1, 1], &ARGS).err()),
                ("cuStreamSynchronize", stream.synchronize().err()),
            ];
            for (call, error) in calls {
                let error = error.unwrap();
                assert_eq!(error.kind(), kind, "{error}");
                assert_eq!(error.to_string(), format!("{call}: {name} (as the fake puts it)"));
            }
            // A compilation is the kernel's fault, unless the driver says that it is not.
            let of_kernel = if kind == Other { OfKernel } else { kind };
            for needs_whole_compilation in [false, true] {
                let new = KernelSource { needs_whole_compilation, ..source("another text", &params) };
                let error = device.load(&new).unwrap_err();
                assert!(matches!(error, Error::Jit { .. }) && error.to_string().contains(name), "{error}");
                assert_eq!(error.kind(), of_kernel, "{error}");
            }
        }
        ask("fake_fail", 0);
        assert_eq!(device.load(&source("wrong", &params)).unwrap_err().kind(), OfKernel);
        assert_eq!(launch(&kernel, &stream, [1, 1, 1], &ARGS[..3]).unwrap_err().kind(), OfKernel);
        let mut buffer = Buffer::new(&stream, 4).unwrap();
        assert_eq!(buffer.copy_from_host(&[0_u8; 3]).unwrap_err().kind(), Other);
    }

    a_kernel_is_compiled_once_per_process_and_once_per_cache, ["named", "whole"], "", {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path(), 1 << 20).unwrap();
        let device = Device::with_cache(0, Some(cache.clone())).unwrap();
        let barrier = Barrier::new(8);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    barrier.wait();
                    load(&device);
                });
            }
        });
        assert_eq!(ask("fake_compiled", 0), 1);
        assert_eq!(device.load_counts(), LoadCounts { compiled: 1, from_disk: 0, from_memory: 7 });

        let cold = || load(&Device::with_cache(0, Some(cache.clone())).unwrap()).origin();
        assert_eq!(cold(), Origin::Disk);
        let key = sage_cuda::CacheKey::of(&[b"text", b"scale", b"driver 12.8, capability 9.0"]);
        assert_eq!(cache.get(&key).as_deref(), Some(&b"cubin"[..]));
        // Sound as a file, but nothing that the driver loads.
        cache.put(&key, b"rubbish");
        assert_eq!((cold(), cold()), (Origin::Compiled, Origin::Disk));
        // Damaged as a file.
        let file = folder.path().join(format!("{key}.cubin"));
        std::fs::write(&file, b"SAGECUBN").unwrap();
        assert_eq!((cold(), cold()), (Origin::Compiled, Origin::Disk));
        assert_eq!(ask("fake_compiled", 0), 3);
    }

    a_program_that_is_compiled_as_a_whole_is_left_to_the_drivers_cache, ["named", "whole"], "", {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path(), 1 << 20).unwrap();
        let params = params();
        // What the text says is no matter.
        let linked = KernelSource { ptx: "text with wgmma. and setmaxnreg", ..source("", &params) };
        let whole = KernelSource { needs_whole_compilation: true, ..linked };
        let origin = |source| Device::with_cache(0, Some(cache.clone())).unwrap().load(source).unwrap().origin();
        assert_eq!([origin(&whole), origin(&whole)], [Origin::Driver; 2]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!([origin(&linked), origin(&linked)], [Origin::Compiled, Origin::Disk]);
        assert_eq!(origin(&whole), Origin::Driver, "linked code does not stand in for it");
    }

    a_kernel_that_waits_is_launched_early, ["named", "whole", "clusters"], "", {
        let device = Device::with_cache(0, None).unwrap();
        let (params, stream) = (params(), Stream::new(&device).unwrap());
        let plain = source("text", &params);
        let waits = KernelSource { waits_for_launches_before: true, ..plain };
        let start = |source| launch(&device.load(source).unwrap(), &stream, [1, 1, 1], &ARGS).unwrap();
        start(&plain);
        assert_eq!((ask("fake_launches", 0), ask("fake_early", 0)), (1, 0));
        start(&waits);
        assert_eq!((ask("fake_launches", 0), ask("fake_early", 0)), (1, 1));
    }

    a_capture_frees_its_own_memory_and_later_what_is_older, ["named", "whole"], "", {
        let device = Device::with_cache(0, None).unwrap();
        let stream = Stream::new(&device).unwrap();
        let older = [100, 200].map(|bytes| Buffer::new(&stream, bytes).unwrap());
        let open = ask("fake_open", 0);
        stream.begin_capture().unwrap();
        let mut own = Buffer::new(&stream, 300).unwrap();
        own.fill(0).unwrap();
        let error = own.copy_from_host(&[0_u8; 300]).unwrap_err().to_string();
        assert_eq!(error, "stream of a host copy: value is being captured, expected one that is not");
        assert_eq!(ask("fake_open", 0), open + 1);
        drop(own);
        assert_eq!(ask("fake_open", 0), open);
        drop(older);
        assert_eq!(ask("fake_open", 0), open, "they wait");
        drop(stream.end_capture().unwrap());
        assert_eq!(ask("fake_open", 0), open - 2);

        // The same where somebody else ends the capture of a borrowed stream.
        // SAFETY: `stream` outlives it.
        let borrowed = unsafe { Stream::from_raw(&device, stream.handle()) };
        let older = Buffer::new(&borrowed, 100).unwrap();
        stream.begin_capture().unwrap();
        drop(older);
        drop(stream.end_capture().unwrap());
        assert_eq!(ask("fake_open", 0), open - 1);
        Buffer::new(&borrowed, 0).unwrap();
        drop(Buffer::new(&borrowed, 100).unwrap());
        assert_eq!(ask("fake_open", 0), open - 2);
    }

    a_forked_process_is_told_that_it_cannot_use_cuda, ["named", "whole"], "", {
        let device = Device::new(0).unwrap();
        let stream = Stream::new(&device).unwrap();
        let buffer = Buffer::new(&stream, 100).unwrap();
        let open = ask("fake_open", 0);
        let mut handles = Some((buffer, stream, device));
        in_a_fork(|| {
            let (buffer, stream, device) = handles.take().unwrap();
            let errors = [
                Driver::get().err(),
                devices().err(),
                Device::new(0).err(),
                Stream::new(&device).err(),
                device.synchronize().err(),
                Buffer::new(&stream, 100).err(),
                buffer.to_vec::<u8>().err(),
                sage_cuda::check_not_forked().err(),
            ];
            // Handles are the parent's: nothing is given back here.
            drop((buffer, stream, device));
            errors.iter().all(|error| *error == Some(Error::Forked)) && ask("fake_open", 0) == open
        });
        let (buffer, ..) = handles.unwrap();
        assert!(Error::Forked.to_string().contains("\"spawn\""));
        assert!(sage_cuda::check_not_forked().is_ok() && buffer.to_vec::<u8>().is_ok());
    }

    cuda_that_somebody_else_started_before_a_fork_is_told_apart, ["named", "whole"], "forked", {
        let error = Device::new(0).unwrap_err();
        assert_eq!(error, Error::Forked);
        assert_eq!(error.kind(), BackendErrorKind::Forked);
    }

    opening_a_gpu_twice_gives_the_same_device, ["named", "whole"], "", {
        // SAFETY: this process has no other thread that reads the environment.
        unsafe { env::set_var("SAGEATTENTION_CACHE_DIR", "") };
        let first = Device::new(0).unwrap();
        assert_eq!(first.disk_cache(), None);
        load(&first);
        let again = Device::new(0).unwrap();
        load(&again);
        assert_eq!(again.load_counts(), LoadCounts { compiled: 1, from_disk: 0, from_memory: 1 });
        let other = Device::new(1).unwrap();
        assert_eq!(other.load_counts(), LoadCounts::default());
        drop((first, again));
        assert_eq!(Device::new(0).unwrap().load_counts(), LoadCounts::default(), "all clones were gone");
    }
}
