//! A real GPU as a backend: the one place of the kit that knows how tensors get there.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use sage_core::oracle::Output;
use sage_core::{
    Backend, BlockMask, Call, Choice, DType, Geometry, Inputs, Options, Problem, Scheme, SparseBackend,
    Strided,
};
use sage_gpu::{Buffer, Cuda, CudaTensor, DeviceBytes, DeviceInputs, DeviceLse, DeviceMask, Stream, devices};
use sage_kernels::forward::{ForwardPlan, Request};

use crate::emulator::of_kernels;
use crate::{Computed, Emulated, Memory, OwnedCall, OwnedMask, Prediction, Runner, Tolerance, poison, skip};

/// The first GPU, or none with the reason printed: a failure with `SAGE_REQUIRE_GPU=1`.
pub fn first(test: &str) -> Option<Cuda> {
    match devices() {
        Ok(found) if !found.is_empty() => return Some(Cuda::new(0).unwrap()),
        Ok(_) => skip(test, "the driver finds no GPU"),
        Err(reason) => skip(test, reason),
    }
    None
}

/// The bytes of a map that a GPU predicts.
pub fn predicted(cuda: &Cuda, case: &Prediction) -> Vec<u8> {
    let stream = cuda.stream().unwrap();
    let [q, k] = case.tensors().map(|tensor| CudaTensor::upload(&stream, &tensor.view()).unwrap());
    let inputs: DeviceInputs<'_> = Inputs::new(q.view(), k.view(), k.view()).lengths(case.lengths().beside());
    let call = Call::check_sparse(&inputs, &Options::default().band(case.band), &case.predictor).unwrap();
    let map = SparseBackend::predict(cuda, &stream, &call, &case.predictor)
        .unwrap_or_else(|error| panic!("{error}: {case:?}"));
    map.to_host().unwrap().flags().iter().map(|&kept| u8::from(kept)).collect()
}

/// The scheme that a GPU computes for a problem, or why it does not: it does not depend on how tensors lie in memory.
fn computed_scheme(cuda: &Cuda, problem: &Problem, scheme: Option<Scheme>) -> sage_core::Result<Scheme> {
    let request = Request { scheme, has_tensor_map: false, ..Request::new(problem) };
    Ok(*ForwardPlan::new(problem, &request, cuda.machine())?.scheme())
}

impl Runner for Cuda {
    fn name(&self) -> String {
        format!("a GPU of {}", self.machine().target)
    }

    fn supports(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Result<(), String> {
        computed_scheme(self, &call.call().problem, scheme).map(|_| ()).map_err(|error| error.to_string())
    }

    fn run(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Computed {
        let checked = call.call();
        let stream = self.stream().unwrap();
        let upload = |memory: &Memory| CudaTensor::upload(&stream, &memory.view()).unwrap();
        let unwritten = poison::output(call.q.dtype(), call.out);
        let [q, k, v, out] = [&call.q, &call.k, &call.v, &unwritten].map(upload);
        let mask = call.mask.as_ref().map(|mask| MaskThere::new(&stream, mask));
        let given = call.inputs().block_mask;
        let blocks = given.map(|mask| (mask, FlagsThere::new(&stream, mask.blocks.data())));
        let block_mask = blocks.as_ref().map(|(mask, there)| BlockMask {
            blocks: there.view(*mask.blocks.geometry()),
            block_q: mask.block_q,
            block_k: mask.block_k,
        });
        let sinks = call.inputs().sinks.map(|sinks| CudaTensor::upload(&stream, &sinks).unwrap());
        // What is the same in memory may be the same memory.
        let same = call.v.bits() == call.k.bits();
        let v = if same { k.view().with_geometry(*call.v.geometry()) } else { v.view() };
        let inputs: DeviceInputs<'_> = Inputs::new(q.view(), k.view(), v)
            .mask(mask.as_ref().map(MaskThere::view))
            .block_mask(block_mask)
            .lengths(call.lengths())
            .sinks(sinks.as_ref().map(CudaTensor::view));
        let lse = call.lse.then(|| Buffer::new(&stream, 4 * checked.lse_rows()).unwrap());
        let choice = scheme.map_or(Choice::Automatic, Choice::Scheme);
        let to = lse.as_ref().map(DeviceLse::of);
        let there = Call::check(&inputs, &call.options).unwrap();
        Backend::run(self, &stream, &there, choice, out.view(), to)
            .unwrap_or_else(|error| panic!("{error}: {call:?}"));
        let bits = match call.q.dtype() {
            DType::BF16 => out.buffer().to_vec::<bf16>().unwrap().reinterpret_cast().to_vec(),
            _ => out.buffer().to_vec::<f16>().unwrap().reinterpret_cast().to_vec(),
        };
        let out = unwritten.with_half_bits(&bits);
        assert!(!poison::is_left(&out), "an element of the output was not written: {call:?}");
        Computed {
            scheme: computed_scheme(self, &checked.problem, scheme).unwrap(),
            shape: checked.out_dimensions(),
            out: poison::elements(&checked, &out),
            lse: lse.map_or_else(Vec::new, |lse| lse.to_vec().unwrap()),
            kernels: Vec::new(),
        }
    }

    fn expected(&self, call: &Call<'_>, scheme: &Scheme) -> Output {
        of_kernels(call, scheme)
    }

    /// Twice that of the emulated kernels: a GPU's own exponential and accumulators are a little coarser.
    fn tolerance(&self, dtype: DType, scheme: &Scheme) -> Tolerance {
        Emulated::on(self.machine().target).tolerance(dtype, scheme).times(2.0)
    }
}

/// Flags on the GPU, a byte each.
struct FlagsThere(Buffer);

impl FlagsThere {
    fn new(stream: &Stream, flags: &[bool]) -> Self {
        let bytes: Vec<u8> = flags.iter().map(|&flag| u8::from(flag)).collect();
        FlagsThere(Buffer::from_slice(stream, &bytes).unwrap())
    }

    fn view(&self, geometry: Geometry) -> DeviceBytes<'_> {
        // SAFETY: the buffer has all bytes that the geometry reaches.
        unsafe { DeviceBytes::from_raw(geometry, self.0.address()) }
    }
}

/// A mask on the GPU.
enum MaskThere {
    Bool(FlagsThere, Geometry),
    Additive(CudaTensor),
}

impl MaskThere {
    fn new(stream: &Stream, mask: &OwnedMask) -> Self {
        match mask {
            OwnedMask::Bool(visible, geometry) => {
                MaskThere::Bool(FlagsThere::new(stream, visible), *geometry)
            }
            OwnedMask::Additive(biases) => {
                MaskThere::Additive(CudaTensor::upload(stream, &biases.view()).unwrap())
            }
        }
    }

    fn view(&self) -> DeviceMask<'_> {
        match self {
            MaskThere::Additive(tensor) => DeviceMask::Additive(tensor.view()),
            MaskThere::Bool(flags, geometry) => DeviceMask::Bool(flags.view(*geometry)),
        }
    }
}
