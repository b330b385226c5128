//! On a real GPU: what a warm-up compiles is what calls then need, and what later devices find. Without a driver each
//! test prints that it is skipped.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use sage_testkit::gpu;
use sageattention::cuda::{Cuda, CudaTensor, Device, DiskCache, LoadedKernel, Origin, TensorShape};
use sageattention::{Attention, DType, KvCacheOptions, Preset};

const SHAPE: [usize; 4] = [1, 8, 1000, 128];

/// The calls that are warmed up, by name.
fn calls() -> [(&'static str, Attention<'static>); 3] {
    let new = Attention::new;
    [("auto", new()), ("causal", new().causal(true)), ("full", new().scheme(Preset::FULL))]
}

fn warm(gpu: &Cuda) -> (Vec<LoadedKernel>, Duration) {
    let shape = TensorShape::contiguous(DType::BF16, &SHAPE).unwrap();
    let started = Instant::now();
    let warm_up = gpu.warm_up();
    calls().iter().for_each(|(_, attention)| attention.note(&warm_up, [shape; 3]).unwrap());
    (warm_up.load().unwrap(), started.elapsed())
}

#[test]
fn a_warmed_up_call_loads_nothing() {
    let Some(shared) = gpu::first("a_warmed_up_call_loads_nothing") else { return };
    let ordinal = shared.device().info().ordinal;
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path(), 64 << 20).unwrap();
    // Devices of their own have no kernels in memory, like new processes.
    let gpu = || Cuda::of_device(Device::with_cache(ordinal, Some(cache.clone())).unwrap());
    let (first, second) = (gpu(), gpu());
    let (compiled, cold) = warm(&first);
    let (found, again) = warm(&second);
    for kernel in &compiled {
        eprintln!("{:>9.1} ms  {:<9} {}", kernel.time.as_secs_f64() * 1e3, kernel.origin_name(), kernel.name);
    }
    eprintln!("cold {cold:?}, from disk {again:?}");
    let names =
        |kernels: &[LoadedKernel]| kernels.iter().map(|kernel| kernel.name.clone()).collect::<Vec<_>>();
    assert!(!compiled.is_empty() && names(&compiled) == names(&found));
    for (first, second) in compiled.iter().zip(&found) {
        match first.origin {
            Some(Origin::Compiled) => assert_eq!(second.origin, Some(Origin::Disk), "{}", second.name),
            origin => assert_eq!((origin, second.origin), (Some(Origin::Driver), origin), "{}", second.name),
        }
    }

    let stream = second.stream().unwrap();
    let x = CudaTensor::uninitialized(&stream, DType::BF16, &SHAPE).unwrap();
    let out = CudaTensor::uninitialized(&stream, DType::BF16, &SHAPE).unwrap();
    let counts = second.device().load_counts();
    for (name, attention) in calls() {
        let started = Instant::now();
        attention.forward_on(&second, &stream, [x.view(); 3], out.view(), None).unwrap();
        let took = started.elapsed();
        eprintln!("the first call of {name}, after a warm-up, takes the host {took:?}");
        assert!(took < Duration::from_millis(50), "{name}: {took:?}");
    }
    stream.synchronize().unwrap();
    assert_eq!(second.device().load_counts(), counts, "a call asked for a kernel that was not warmed up");
}

#[test]
fn a_warmed_up_cache_loads_nothing() {
    let Some(shared) = gpu::first("a_warmed_up_cache_loads_nothing") else { return };
    let ordinal = shared.device().info().ordinal;
    let gpu = Cuda::of_device(Device::with_cache(ordinal, None).unwrap());
    let options = KvCacheOptions::new(2, 128).sequences(2).max_pages(20);
    let attention = Attention::new().causal(true);
    let (q_shape, k_shape) = ([2, 8, 1, 128], [2, 2, 500, 128]);
    let shape = |shape| TensorShape::contiguous(DType::BF16, shape).unwrap();
    let warm_up = gpu.warm_up();
    options.note(&warm_up, &attention, shape(&q_shape), shape(&k_shape)).unwrap();
    assert!(!warm_up.load().unwrap().is_empty());

    let counts = gpu.device().load_counts();
    let stream = gpu.stream().unwrap();
    let tensor = |shape: &[usize]| CudaTensor::uninitialized(&stream, DType::BF16, shape).unwrap();
    let (q, k, out) = (tensor(&q_shape), tensor(&k_shape), tensor(&q_shape));
    let mut cache = options.build_on(gpu.clone(), &stream).unwrap();
    cache.append(k.view(), k.view()).unwrap();
    cache.attend_into(&[0, 1], q.view(), &attention, out.view(), None).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(gpu.device().load_counts(), counts);
}
