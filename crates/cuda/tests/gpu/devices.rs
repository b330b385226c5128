//! Devices and the current context.

use std::io::{self, Write as _};
use std::{ptr, thread};

use cudarc::driver::sys;
use sage_cuda::{Device, Driver, Event, Kernel, Stream, devices};

use crate::support::{Case, alone, grid, load, source};

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
        case.launch(&kernel, &stream, grid()).unwrap();
        let event = Event::new(&device, true).unwrap();
        stream.record(&event).unwrap();
        stream.wait_event(&event).unwrap();
        event.elapsed_ms(&event).unwrap();
        stream.begin_capture().unwrap();
        case.launch(&kernel, &stream, grid()).unwrap();
        let graph = stream.end_capture().unwrap().instantiate().unwrap();
        // SAFETY: what was launched above is launched again.
        unsafe { graph.launch(&stream) }.unwrap();
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
fn several_gpus_work_side_by_side() {
    let _device = device!();
    let all: Vec<Device> = (0..devices().unwrap().len())
        .map(|ordinal| Device::with_cache(ordinal as u32, None).unwrap())
        .collect();
    let loaded: Vec<(Stream, Kernel)> =
        all.iter().map(|device| (Stream::new(device).unwrap(), load(device))).collect();
    for (i, (stream, kernel)) in loaded.iter().enumerate() {
        let case = Case::new(stream);
        case.launch(kernel, stream, grid()).unwrap();
        case.check(1.0, 0.5);
        for (j, (_, other)) in loaded.iter().enumerate().filter(|(j, _)| *j != i) {
            let error = case.launch(other, stream, grid()).unwrap_err().to_string();
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
