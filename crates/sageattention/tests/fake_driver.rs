//! Calls with a fake driver in place of the GPU's: what the driver fails with reaches the caller as what it is, and a
//! warm call allocates nothing on the host, from the options to the last launch. A check of host tensors allocates
//! nothing either.

#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../cuda/tests/fake_driver/harness.rs"]
mod harness;

use harness::{ALLOCATIONS, ask, cases};
use sageattention::cuda::{
    Buffer, Cuda, CudaTensor, Device, DeviceCall, DeviceInts, DeviceLse, DeviceMask, HostTensors, MaskShape,
    Origin, Stream, TensorShape,
};
use sageattention::sparse::Predictor;
use sageattention::{
    Alignment, Attention, Backend, BackendErrorKind, Call, Choice, DType, Inputs, KvCacheOptions, Lengths,
    Options, Preset, Result, Tensor,
};

const FAKE: [&str; 4] = ["named", "whole", "clusters", "any_kernel"];

/// Allocations of this thread while `run` runs.
fn allocations(run: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    run();
    ALLOCATIONS.get() - before
}

/// Tensors on the fake GPU: `[2, 8, 300, 64]`, and a thing of each kind that may lie beside them.
struct There {
    gpu: Cuda,
    stream: Stream,
    tensors: [CudaTensor; 3],
    out: CudaTensor,
    lse: Buffer,
    mask: CudaTensor,
    lens: Buffer,
}

impl There {
    fn new() -> Self {
        let gpu = Cuda::of_device(Device::with_cache(0, None).unwrap());
        let stream = gpu.stream().unwrap();
        let tensor = |shape: &[usize]| CudaTensor::uninitialized(&stream, DType::F16, shape).unwrap();
        let shape = [2, 8, 300, 64];
        There {
            tensors: [tensor(&shape), tensor(&shape), tensor(&shape)],
            out: tensor(&shape),
            lse: Buffer::new(&stream, 4 * 2 * 8 * 300).unwrap(),
            mask: tensor(&[300, 300]),
            lens: Buffer::from_slice(&stream, &[300i32, 200]).unwrap(),
            stream,
            gpu,
        }
    }

    fn run(&self, attention: &Attention<'_>) -> Result<()> {
        let tensors = self.tensors.each_ref().map(CudaTensor::view);
        let lse = Some(DeviceLse::of(&self.lse));
        attention.forward_on(&self.gpu, &self.stream, tensors, self.out.view(), lse).map(drop)
    }
}

fn warm_calls_allocate_nothing() {
    let there = There::new();
    let new = Attention::new;
    let calls = [
        ("dense", new()),
        ("causal", new().causal(true).return_lse(true)),
        ("offset", new().causal_alignment(Alignment::Offset(17)).window(40, None)),
        ("full", new().scheme(Preset::FULL)),
        ("FP8", new().scheme(Preset::SAGE2_INT8_FP8_PER_THREAD).nearest(true)),
        ("without smoothing", new().smooth_k(false)),
        ("within an error", new().accuracy(0.05)),
        ("mask", new().mask(DeviceMask::Additive(there.mask.view()))),
        ("kv_lens", new().lengths(Lengths::DeviceKvLens(DeviceInts::of(&there.lens)))),
    ];
    for (name, attention) in &calls {
        if *name == "FP8" && there.gpu.device().info().capability < (8, 9) {
            continue;
        }
        // The first compiles; what the second allocates, if anything, the driver keeps.
        (0..2).for_each(|_| there.run(attention).unwrap());
        assert_eq!(allocations(|| (0..3).for_each(|_| there.run(attention).unwrap())), 0, "{name}");
    }
}

/// Codes of the driver, and what a caller can tell them by.
const FAILURES: [(u64, BackendErrorKind); 4] = [
    (2, BackendErrorKind::OutOfMemory),
    (46, BackendErrorKind::NoDevice),
    (700, BackendErrorKind::Lost),
    (701, BackendErrorKind::Kernel),
];

fn failures_keep_their_kind() {
    let attention = Attention::new().causal(true);
    let options = KvCacheOptions::new(8, 64).sequences(2).max_pages(20);
    let host = Tensor::zeros(DType::F16, &[2, 8, 300, 64]).unwrap();
    for (code, kind) in FAILURES {
        let there = There::new();
        let [q, k, v] = there.tensors.each_ref().map(CudaTensor::view);
        let mut cache = options.build_on(there.gpu.clone(), &there.stream).unwrap();
        let fails = |what: &str, call: &mut dyn FnMut() -> Result<()>| {
            ask("fake_fail", code);
            let error = call().unwrap_err();
            ask("fake_fail", 0);
            assert_eq!(error.backend_kind(), Some(kind), "{what}: {error}");
        };
        fails("a kernel's first compilation", &mut || there.run(&attention));
        there.run(&attention).unwrap();
        fails("a call", &mut || there.run(&attention));
        fails("a call of host tensors", &mut || {
            let (gpu, mut out) = (HostTensors(there.gpu.clone()), host.clone());
            attention.forward_on(&gpu, &(), [host.view(); 3], out.view_mut(), None).map(drop)
        });
        fails("a new cache", &mut || options.build_on(there.gpu.clone(), &there.stream).map(drop));
        fails("new tokens", &mut || cache.append(k, v));
        cache.append(k, v).unwrap();
        fails("attention over a cache", &mut || {
            cache.attend_into(&[0, 1], q, &attention, there.out.view(), None)
        });
    }
}

/// Calls of [`There`] by name, and what stands for them where there are no tensors.
fn warmed_up_calls_compile_nothing() {
    let there = There::new();
    let new = Attention::new;
    let mask = MaskShape::Additive(TensorShape::contiguous(DType::F16, &[300, 300]).unwrap());
    let lens = Lengths::DeviceKvLens(DeviceInts::of(&there.lens));
    let calls = [
        ("dense", new(), new()),
        ("causal", new().causal(true), new().causal(true)),
        ("full", new().scheme(Preset::FULL), new().scheme(Preset::FULL)),
        ("without smoothing", new().smooth_k(false), new().smooth_k(false)),
        ("mask", new().mask(mask), new().mask(DeviceMask::Additive(there.mask.view()))),
        ("kv_lens", new().kv_lens(&[300, 200]), new().lengths(lens)),
        ("sparse", new().sparse(Predictor::sla(0.25)), new().sparse(Predictor::sla(0.25))),
    ];
    // What the first calls of a process allocate, of any GPU, the driver and its bindings keep.
    let elsewhere = There::new();
    calls.iter().for_each(|(_, _, real)| elsewhere.run(real).unwrap());
    let before = ask("fake_compiled", 0);
    let shape = TensorShape::contiguous(DType::F16, &[2, 8, 300, 64]).unwrap();
    let warm_up = there.gpu.warm_up();
    for (name, shaped, _) in &calls {
        shaped.clone().return_lse(true).note(&warm_up, [shape; 3]).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let options = KvCacheOptions::new(8, 64).sequences(2).max_pages(20);
    let cached = new().causal(true);
    options.note(&warm_up, &cached, shape, shape).unwrap();
    assert_eq!(ask("fake_compiled", 0), before, "nothing is compiled before all is known");
    let kernels = warm_up.load().unwrap();
    assert_eq!(warm_up.load().unwrap(), []);

    let compiled = ask("fake_compiled", 0);
    assert_eq!(kernels.len() as u64, compiled - before);
    let names: Vec<&str> = kernels.iter().map(|kernel| &*kernel.name).collect();
    assert!(names.iter().enumerate().all(|(i, name)| !names[..i].contains(name)), "each once: {names:?}");
    assert!(kernels.iter().all(|kernel| matches!(kernel.origin, Some(Origin::Compiled | Origin::Driver))));
    let counts = there.gpu.device().load_counts();
    for (name, _, real) in &calls {
        let real = real.clone().return_lse(true);
        let allocated = allocations(|| there.run(&real).unwrap());
        assert_eq!(ask("fake_compiled", 0), compiled, "{name}");
        // Not even the plan is made anew; a predicted map has memory of its own.
        assert!(allocated == 0 || *name == "sparse", "{name}: {allocated}");
    }
    let mut cache = options.build_on(there.gpu.clone(), &there.stream).unwrap();
    let [q, k, v] = there.tensors.each_ref().map(CudaTensor::view);
    cache.append(k, v).unwrap();
    cache.attend_into(&[0, 1], q, &cached, there.out.view(), None).unwrap();
    assert_eq!(there.gpu.device().load_counts(), counts, "no call asks for a kernel any more");

    // Later warm-ups say that all is there.
    calls[0].1.clone().return_lse(true).note(&warm_up, [shape; 3]).unwrap();
    let again = warm_up.load().unwrap();
    assert!(!again.is_empty() && again.iter().all(|kernel| kernel.origin.is_none()));
}

cases! {
    warmed_up_calls_compile_nothing_on_sm_90, FAKE, "", { super::warmed_up_calls_compile_nothing() }

    warmed_up_calls_compile_nothing_on_sm_80, FAKE, "sm_80", { super::warmed_up_calls_compile_nothing() }

    what_cannot_be_warmed_up_is_refused_before_anything_is_compiled, FAKE, "", {
        let there = There::new();
        let on = |device| Attention::new().device(device).warm_up(&[]);
        assert_eq!(on(sageattention::Device::Cpu), Ok(Vec::new()), "a processor has nothing to compile");
        assert_eq!(on(sageattention::Device::Cuda(0)), Ok(Vec::new()));
        assert_eq!(
            Attention::new().warm_up(&[]).unwrap_err().to_string(),
            "device: value is none, expected cuda:N, or cpu, which has nothing to compile"
        );
        let warm_up = there.gpu.warm_up();
        let shape = |dtype, shape: &[usize]| TensorShape::contiguous(dtype, shape).unwrap();
        let error = |attention: Attention<'_>, q, k| attention.note(&warm_up, [q, k, k]).unwrap_err().to_string();
        let x = shape(DType::F16, &[2, 8, 300, 64]);
        assert_eq!(
            error(Attention::new(), x, shape(DType::F16, &[2, 3, 300, 64])),
            "k: shape is [2, 3, 300, 64], expected a number of heads that divides q's 8"
        );
        assert!(error(Attention::new(), shape(DType::F32, &[1, 1, 4, 64]), shape(DType::F32, &[1, 1, 4, 64]))
            .contains("f32"));
        assert_eq!(
            error(Attention::new().mask(DeviceMask::Additive(there.mask.view())), x, x),
            "mask: value is in a GPU's memory, expected in this machine's, as q"
        );
        let shaped = Attention::new().mask(MaskShape::Additive(shape(DType::F16, &[300, 300])));
        assert_eq!(
            there.run(&shaped).unwrap_err().to_string(),
            "mask: value is a shape without memory, expected one with memory, where q's is"
        );
        let cache = KvCacheOptions::new(8, 64).sequences(2);
        assert_eq!(
            cache.note(&warm_up, &Attention::new(), x, x).unwrap_err().to_string(),
            "max_pages: value is none, expected a number: the pool of a GPU has a fixed size"
        );
        assert_eq!(warm_up.load().unwrap(), []);
        assert_eq!(ask("fake_compiled", 0), 0);
        // A call without queries has no kernels, and a driver that fails is an error of the kernel.
        let none = shape(DType::F16, &[2, 8, 0, 64]);
        Attention::new().note(&warm_up, [none, x, x]).unwrap();
        assert_eq!(warm_up.load().unwrap(), []);
        Attention::new().note(&warm_up, [x; 3]).unwrap();
        ask("fake_fail", 2);
        let failure = warm_up.load().unwrap_err();
        assert_eq!(failure.backend_kind(), Some(BackendErrorKind::OutOfMemory), "{failure}");
    }

    failures_keep_their_kind_on_sm_90, FAKE, "", { super::failures_keep_their_kind() }

    failures_keep_their_kind_on_sm_80, FAKE, "sm_80", { super::failures_keep_their_kind() }

    a_gpu_is_planned_for_as_an_older_one_on_sm_90, FAKE, "", {
        let there = There::new();
        let for_target = |target: &str| {
            Cuda::for_target(there.gpu.device().clone(), target.parse().unwrap())
        };
        let turing = for_target("sm_75").unwrap();
        let own = there.gpu.machine();
        assert_eq!(turing.machine().shared_bytes, 64 << 10);
        assert_eq!(turing.machine().multiprocessors, own.multiprocessors);
        let there = There { gpu: turing, ..there };
        for attention in [Attention::new(), Attention::new().scheme(Preset::FULL).causal(true)] {
            there.run(&attention).unwrap();
        }
        let [x, ..] = there.tensors.each_ref().map(CudaTensor::view);
        let call: DeviceCall<'_> = Call::check(&Inputs::new(x, x, x), &Options::default()).unwrap();
        let plan = Backend::plan(&there.gpu, &call, Choice::Automatic, false).unwrap().to_string();
        assert!(plan.contains("rt_s2_b2_l8"), "tiles come through registers: {plan}");
        assert_eq!(
            for_target("sm_120").unwrap_err().to_string(),
            "target: value is sm_120, expected one whose code sm_90a runs"
        );
    }

    the_variable_of_the_target_is_checked, FAKE, "", {
        // SAFETY: this process has no other thread that reads the environment.
        unsafe { std::env::set_var("SAGE_GPU_TARGET", "sm_74") };
        assert_eq!(
            Cuda::new(0).unwrap_err().to_string(),
            "SAGE_GPU_TARGET: value is `sm_74`, expected sm_75 to sm_121, such as sm_75 or sm_89"
        );
        // SAFETY: as above.
        unsafe { std::env::set_var("SAGE_GPU_TARGET", "sm_80") };
        assert_eq!(Cuda::new(0).unwrap().machine().target.to_string(), "sm_80");
    }

    a_missing_gpu_is_told_apart, FAKE, "no_gpu", {
        let x = Tensor::zeros(DType::F16, &[1, 1, 4, 64]).unwrap();
        let on_gpu = Attention::new().device(sageattention::Device::Cuda(0));
        let error = on_gpu.forward(&x, &x, &x).unwrap_err();
        assert_eq!(error.backend_kind(), Some(BackendErrorKind::NoDevice), "{error}");
    }

    warm_calls_allocate_nothing_on_sm_90, FAKE, "", { super::warm_calls_allocate_nothing() }

    warm_calls_allocate_nothing_on_sm_80, FAKE, "sm_80", { super::warm_calls_allocate_nothing() }

    warm_attention_over_a_cache_allocates_nothing, FAKE, "sm_80", {
        let there = There::new();
        let cache = KvCacheOptions::new(8, 64).sequences(2).max_pages(20);
        let mut cache = cache.build_on(there.gpu.clone(), &there.stream).unwrap();
        let [q, k, v] = there.tensors.each_ref().map(CudaTensor::view);
        cache.append(k, v).unwrap();
        let attention = Attention::new().causal(true);
        let run = || {
            let lse = Some(DeviceLse::of(&there.lse));
            cache.attend_into(&[0, 1], q, &attention, there.out.view(), lse).unwrap();
        };
        run();
        assert_eq!(allocations(run), 0);
        cache.truncate(1, 10).unwrap();
        assert_eq!((cache.len(0), cache.len(1), cache.pages_in_use()), (Ok(300), Ok(10), 6));
    }
}

#[test]
fn a_check_of_host_tensors_allocates_nothing() {
    let x = Tensor::new(vec![0f32; 2 * 3 * 40 * 8], &[2, 3, 40, 8]).unwrap();
    let packed = Tensor::new(vec![0f32; 80 * 3 * 8], &[80, 3, 8]).unwrap();
    let cu_seqlens = [0, 20, 20, 80];
    let dense = Inputs::new(x.view(), x.view(), x.view());
    let lists = Lengths::Packed { cu_seqlens_q: &cu_seqlens, cu_seqlens_k: &cu_seqlens };
    let band = Attention::new().causal(true).window(7, 0).options();
    for inputs in [
        dense,
        dense.lengths(Lengths::KvLens(&[40, 11])),
        Inputs::new(packed.view(), packed.view(), packed.view()).lengths(lists),
    ] {
        for options in [Options::default(), band] {
            let check = || {
                let call = Call::check(&inputs, &options).unwrap();
                assert_eq!(call.sequences().map(|sequence| sequence.q_len).sum::<usize>(), 80);
            };
            assert_eq!(allocations(check), 0, "{inputs:?}");
        }
    }
}
