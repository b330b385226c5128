//! Host tensors on a GPU: copied there, computed, copied back.

use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit};
use sage_core::{
    Backend, Call, Choice, DType, Element, Geometry, Mask, Result, Scheme, TensorView, TensorViewMut, View,
    ViewMut,
};
use sage_cuda::{Buffer, Stream};

use crate::{
    Cuda, CudaPlan, CudaTensor, DeviceBytes, DeviceCall, DeviceLse, DeviceMask, DeviceTensor, driver, shape,
};

/// A GPU as a backend of host tensors: they are copied to it, and the result is waited for and copied back. It keeps no
/// KV cache, to which tokens are appended from the GPU's own memory.
#[derive(Clone, Debug)]
pub struct HostTensors(pub Cuda);

impl Backend for HostTensors {
    type Tensor<'a> = TensorView<'a>;
    type Output<'a> = TensorViewMut<'a>;
    type Lse<'a> = &'a mut [f32];
    type Queue = ();
    type Plan = CudaPlan;

    fn name(&self) -> String {
        self.0.name()
    }

    fn nearest(&self, scheme: Scheme, dtype: DType) -> Scheme {
        self.0.nearest(scheme, dtype)
    }

    fn plan<'c>(&self, call: &Call<'c>, choice: Choice, lse: bool) -> Result<Arc<CudaPlan>> {
        self.0.plan(&as_if_copied(call), choice, lse)
    }

    fn run<'c>(
        &self,
        (): &(),
        call: &Call<'c>,
        choice: Choice,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        call.check_output(out.dtype(), out.geometry())?;
        call.check_lse(lse.as_deref())?;
        // Nothing is copied for a call that no kernel computes.
        self.plan(call, choice, lse.is_some())?;
        on_copies(&self.0, call, out, lse, |stream, there, out, lse| {
            self.0.run(stream, there, choice, out, lse)
        })
    }
}

/// Copies a call's tensors to a GPU, has `run` compute the call there, and copies the output back.
pub(crate) fn on_copies<R>(
    cuda: &Cuda,
    call: &Call<'_>,
    out: TensorViewMut<'_>,
    lse: Option<&mut [f32]>,
    run: impl FnOnce(&Stream, &DeviceCall<'_>, DeviceTensor<'_>, Option<DeviceLse<'_>>) -> Result<R>,
) -> Result<R> {
    let stream = cuda.stream()?;
    let [q, k, v] = [call.q, call.k, call.v].map(|tensor| CudaTensor::upload(&stream, &tensor));
    let (q, k, v) = (q?, k?, v?);
    let mask = call.mask.as_ref().map(|mask| CopiedMask::new(&stream, mask)).transpose()?;
    let mask = mask.as_ref().map(CopiedMask::view);
    let blocks = call.block_mask.as_ref().map(|mask| CopiedFlags::new(&stream, &mask.blocks)).transpose()?;
    let blocks = blocks.as_ref().map(CopiedFlags::view);
    let sinks = call.sinks.map(|sinks| CudaTensor::upload(&stream, &sinks)).transpose()?;
    let out_there = CudaTensor::uninitialized(&stream, out.dtype(), out.geometry().shape())?;
    let lse_there =
        lse.as_ref().map(|lse| Buffer::new(&stream, size_of_val(&**lse))).transpose().map_err(driver)?;
    let there =
        call.moved([q.view(), k.view(), v.view()], mask, blocks, sinks.as_ref().map(CudaTensor::view));
    let result = run(&stream, &there, out_there.view(), lse_there.as_ref().map(DeviceLse::of))?;

    match out {
        TensorViewMut::F32(out) => download(out_there.buffer(), out),
        TensorViewMut::F16(out) => download(out_there.buffer(), out),
        TensorViewMut::BF16(out) => download(out_there.buffer(), out),
    }?;
    if let (Some(lse), Some(there)) = (lse, lse_there) {
        there.copy_to_host(lse).map_err(driver)?;
    }
    Ok(result)
}

/// The call with stand-ins for what would be copied: for planning alone.
pub(crate) fn as_if_copied<'a>(call: &Call<'a>) -> DeviceCall<'a> {
    shape::stand_in(&shape::without_memory(call))
}

/// A row-major tensor on the GPU into host memory of the same shape. Waits for it.
fn download<T: Element + NoUninit + AnyBitPattern>(from: &Buffer, mut to: ViewMut<'_, T>) -> Result<()> {
    let geometry = *to.geometry();
    if geometry.is_empty() {
        return Ok(());
    }
    if geometry.is_contiguous() {
        let first = geometry.offset() as usize;
        return from.copy_to_host(&mut to.data_mut()[first..first + geometry.len()]).map_err(driver);
    }
    let elements: Vec<T> = from.to_vec().map_err(driver)?;
    geometry.places().zip(elements).for_each(|(at, x)| to.set(at, x));
    Ok(())
}

/// Flags of a host mask on the GPU, a byte each.
struct CopiedFlags(Buffer, Geometry);

impl CopiedFlags {
    fn new(stream: &Stream, flags: &View<'_, bool>) -> Result<Self> {
        let bytes: Vec<u8> = flags.data().iter().map(|&flag| u8::from(flag)).collect();
        Ok(CopiedFlags(Buffer::from_slice(stream, &bytes).map_err(driver)?, *flags.geometry()))
    }

    fn view(&self) -> DeviceBytes<'_> {
        // SAFETY: the view's elements lie in its memory, all of which was copied.
        unsafe { DeviceBytes::from_raw(self.1, self.0.address()) }
    }
}

/// A host mask on the GPU.
enum CopiedMask {
    Bool(CopiedFlags),
    Additive(CudaTensor),
}

impl CopiedMask {
    fn new(stream: &Stream, mask: &Mask<'_>) -> Result<Self> {
        match mask {
            Mask::Additive(tensor) => Ok(CopiedMask::Additive(CudaTensor::upload(stream, tensor)?)),
            Mask::Bool(flags) => Ok(CopiedMask::Bool(CopiedFlags::new(stream, flags)?)),
        }
    }

    fn view(&self) -> DeviceMask<'_> {
        match self {
            CopiedMask::Additive(tensor) => DeviceMask::Additive(tensor.view()),
            CopiedMask::Bool(flags) => DeviceMask::Bool(flags.view()),
        }
    }
}
