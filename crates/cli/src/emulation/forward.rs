//! A forward pass over tensors.

use sage_core::{Call, Mask, oracle};
use sage_emulator::Buffer;
use sage_kernels::TensorArg;
use sage_kernels::forward::{ForwardPlan, Tensors};
use sageattention::{Geometry, Lengths};

use super::{Emulation, Gpu, argument};
use crate::failure::Result;
use crate::made_up::MadeUp;

/// Runs a plan, and compares what comes out with the oracle of its scheme and with exact attention.
pub(super) fn run(
    gpu: &mut Gpu<'_>,
    plan: &ForwardPlan,
    made_up: &MadeUp<'_>,
    wants_lse: bool,
) -> Result<Emulation> {
    let inputs = made_up.inputs()?;
    let call = Call::check(&inputs, &made_up.attention()?.options())?;
    let dtype = call.problem.dtype;
    let geometry = call.check_output(dtype, &Geometry::contiguous("out", &call.out_shape())?)?;
    let out = gpu.uninitialized("out", dtype.bytes() * geometry.len())?;
    let lse = gpu.lse(call.lse_rows(), wants_lse)?;
    launch(gpu, plan, &call, argument(out, &geometry, dtype), lse)?;
    let found = gpu.read(out, &geometry, dtype);
    Ok(gpu.finish(&found, lse, &oracle::scheme(&call, plan.scheme()), &oracle::exact(&call)))
}

/// Runs the launches of a plan for a call without comparing anything.
pub(super) fn launch_alone(gpu: &mut Gpu<'_>, plan: &ForwardPlan, call: &Call<'_>) -> Result<()> {
    let dtype = call.problem.dtype;
    let geometry = Geometry::contiguous("out", &call.out_dimensions())?;
    let out = gpu.uninitialized("out", dtype.bytes() * geometry.len())?;
    launch(gpu, plan, call, argument(out, &geometry, dtype), None)
}

/// Runs the launches of a plan with a call's tensors.
fn launch(
    gpu: &mut Gpu<'_>,
    plan: &ForwardPlan,
    call: &Call<'_>,
    out: TensorArg,
    lse: Option<Buffer>,
) -> Result<()> {
    let (cu_seqlens_q, cu_seqlens_k) = match call.lengths {
        Lengths::KvLens(kv_lens) => (0, gpu.list("kv_lens", kv_lens)),
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
            (gpu.list("cu_seqlens_q", cu_seqlens_q), gpu.list("cu_seqlens_k", cu_seqlens_k))
        }
        _ => (0, 0),
    };
    let heads = 0..call.problem.num_q_heads;
    let sinks = call.sinks.map(|sinks| heads.map(|head| sinks.at([0, 0, 0, head])).collect::<Vec<f32>>());
    let tensors = Tensors {
        q: gpu.upload("q", &call.q),
        k: gpu.upload("k", &call.k),
        v: gpu.upload("v", &call.v),
        out,
        lse: lse.map_or(0, |lse| lse.address()),
        mask: call.mask.as_ref().map_or(TensorArg::default(), |mask| upload_mask(gpu, mask)),
        cu_seqlens_q,
        cu_seqlens_k,
        sinks: gpu.sinks(sinks.as_deref()),
        ..Tensors::default()
    };
    gpu.run(plan.pass(), &plan.arranged(&tensors))
}

/// A mask that starts with its data, copied to the GPU.
fn upload_mask(gpu: &mut Gpu<'_>, mask: &Mask<'_>) -> TensorArg<4> {
    let buffer = match mask {
        Mask::Bool(view) => {
            let bytes: Vec<u8> = view.data().iter().map(|&seen| u8::from(seen)).collect();
            gpu.emulator.buffer("mask", &bytes)
        }
        Mask::Additive(view) => gpu.upload_data("mask", view),
    };
    let strides = std::array::from_fn(|dimension| mask.geometry().strides()[dimension]);
    TensorArg { address: buffer.address(), strides }
}
