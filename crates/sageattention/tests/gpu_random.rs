//! Random calls on a real GPU, against the oracle: shapes, strides, layouts, lengths, masks and options that nobody
//! thought of. `SAGE_RANDOM_CALLS` says how many. Without a driver the test prints that it is skipped.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
mod random_calls;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::gpu;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use random_calls::{Computed, Memory, RandomCall, RandomLengths, RandomMask, check, count, presets};
use sage_core::{Call, DType};
use sage_kernels::Machine;
use sage_kernels::forward::{ForwardPlan, Request};
use sageattention::cuda::{
    Buffer, Cuda, CudaTensor, DeviceBytes, DeviceInputs, DeviceLse, DeviceMask, Stream,
};
use sageattention::{Choice, Error, Inputs, Lengths, Scheme, TensorView};

/// Most rows of a sequence.
const MOST_ROWS: usize = 300;

/// Computes a call on a stream of its own, or says what no kernel computes.
fn run(call: &RandomCall, cuda: &Cuda) -> Result<Computed, Error> {
    let stream = cuda.stream().unwrap();
    let upload = |memory: &Memory| CudaTensor::upload(&stream, &memory.view()).unwrap();
    let [q, k, v, out] = [&call.q, &call.k, &call.v, &call.out].map(upload);
    let mask = call.mask.as_ref().map(|mask| OnGpu::new(&stream, mask));
    let lengths = match &call.lengths {
        RandomLengths::Dense => Lengths::Dense,
        RandomLengths::KvLens(lens) => Lengths::KvLens(lens),
        RandomLengths::Packed(q, k) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
    };
    let inputs: DeviceInputs<'_> =
        Inputs { mask: mask.as_ref().map(OnGpu::view), lengths, ..Inputs::new(q.view(), k.view(), v.view()) };
    let rows: usize = Call::check(&inputs, &call.options)?.lse_shape().iter().product();
    let lse = call.lse.then(|| Buffer::new(&stream, 4 * rows).unwrap());
    let choice = call.preset.map_or(Choice::Automatic, Choice::Preset);
    let rows = lse.as_ref().map(DeviceLse::of);
    cuda.forward_into(&stream, &inputs, &call.options, choice, &out.view(), rows)?;
    Ok(Computed {
        scheme: scheme(call, cuda),
        out: match call.out.dtype {
            DType::BF16 => out.buffer().to_vec::<bf16>().unwrap().reinterpret_cast().to_vec(),
            _ => out.buffer().to_vec::<f16>().unwrap().reinterpret_cast().to_vec(),
        },
        lse: lse.map(|lse| lse.to_vec().unwrap()),
    })
}

/// A mask on the GPU.
enum OnGpu {
    Bool(Buffer, sageattention::Geometry),
    Additive(CudaTensor),
}

impl OnGpu {
    fn new(stream: &Stream, mask: &RandomMask) -> Self {
        match mask {
            RandomMask::Bool(visible, geometry) => {
                let bytes: Vec<u8> = visible.iter().map(|&x| u8::from(x)).collect();
                OnGpu::Bool(Buffer::from_slice(stream, &bytes).unwrap(), *geometry)
            }
            RandomMask::F32(bias, geometry) => {
                let view = sageattention::View::strided("mask", bias, *geometry).unwrap();
                OnGpu::Additive(CudaTensor::upload(stream, &TensorView::F32(view)).unwrap())
            }
            RandomMask::Halves(memory) => {
                OnGpu::Additive(CudaTensor::upload(stream, &memory.view()).unwrap())
            }
        }
    }

    fn view(&self) -> DeviceMask<'_> {
        match self {
            OnGpu::Additive(tensor) => DeviceMask::Additive(tensor.view()),
            OnGpu::Bool(buffer, geometry) => {
                // SAFETY: the buffer has all bytes of the mask.
                DeviceMask::Bool(unsafe { DeviceBytes::from_raw(*geometry, buffer.address()) })
            }
        }
    }
}

fn target(cuda: &Cuda) -> Machine {
    let info = cuda.device().info();
    Machine { multiprocessors: info.multiprocessors as usize, ..Machine::typical(info.target()) }
}

/// The scheme that the GPU computes: it does not depend on how the tensors lie in memory.
fn scheme(call: &RandomCall, cuda: &Cuda) -> Scheme {
    let inputs = call.inputs();
    let problem = Call::check(&inputs, &call.options).unwrap().problem;
    let request = Request {
        scheme: call.preset.map(|preset| preset.scheme(problem.head_dim)),
        has_tensor_map: false,
        ..Request::new(&problem)
    };
    *ForwardPlan::new(&problem, &request, &target(cuda)).unwrap().scheme()
}

/// The oracle takes longer than the GPU, so calls are computed by as many threads as there are cores.
#[test]
fn random_calls_agree_with_the_oracle() {
    let Some(cuda) = gpu("random_calls_agree_with_the_oracle") else { return };
    let presets = presets(&target(&cuda));
    let count = count(300);
    let (next, computed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worst = Mutex::new([0f64; 2]);
    let failures = Mutex::new(Vec::new());
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            let call = RandomCall::new(number, MOST_ROWS, &presets);
            // All failures of a run are told, each with its call.
            let found =
                catch_unwind(AssertUnwindSafe(|| run(&call, &cuda).map(|result| check(&call, &result))));
            match found {
                Ok(Ok(found)) => {
                    let mut worst = worst.lock().unwrap();
                    *worst = [worst[0].max(found.of_scheme), worst[1].max(found.of_exact)];
                    computed.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Err(refused @ Error::Unsupported { .. })) => {
                    eprintln!("{call:?}: not computed: {refused}")
                }
                Ok(Err(error)) => failures.lock().unwrap().push(format!("{call:?}: {error}")),
                Err(panic) => {
                    let words = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
                    failures.lock().unwrap().push(words.to_owned());
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let (failures, worst) = (failures.into_inner().unwrap(), worst.into_inner().unwrap());
    let computed = computed.into_inner();
    assert!(failures.is_empty(), "{} of {count} calls failed:\n{}", failures.len(), failures.join("\n"));
    eprintln!(
        "{computed} of {count} calls computed; worst errors {:.2} of what the scheme and {:.2} of what exact attention allows",
        worst[0], worst[1]
    );
    assert!(computed * 10 >= count * 9, "{computed} of {count}");
}
