//! Host tensors on a GPU: copied there, computed, copied back.

use sage_core::{Choice, Error, Geometry, Inputs, Mask, Options, Result, Tensor};
use sage_cuda::{Buffer, Stream};

use crate::{Cuda, CudaTensor, DeviceBytes, DeviceLse, DeviceMask, driver};

impl Cuda {
    /// Attention of host tensors, and each row's log-sum-exp where there are `lse_rows`. Waits for the result.
    ///
    /// # Errors
    /// As [`Cuda::forward_into`].
    pub fn forward_host(
        &self,
        inputs: &Inputs<'_>,
        options: &Options,
        choice: Choice,
        lse_rows: Option<usize>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if inputs.block_mask.is_some() {
            return Err(Error::unsupported("block_mask", "not on a GPU yet"));
        }
        let stream = Stream::new(self.device()).map_err(driver)?;
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|tensor| CudaTensor::upload(&stream, &tensor));
        let (q, k, v) = (q?, k?, v?);
        let mask = inputs.mask.as_ref().map(|mask| CopiedMask::new(&stream, mask)).transpose()?;
        let mut out = Tensor::zeros(inputs.q.dtype(), inputs.q.shape())?;
        let on_device = CudaTensor::uninitialized(&stream, out.dtype(), out.shape())?;
        let lse =
            lse_rows.map(|rows| Buffer::new(&stream, rows * size_of::<f32>())).transpose().map_err(driver)?;

        let device_inputs = Inputs {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            mask: mask.as_ref().map(CopiedMask::view),
            block_mask: None,
            lengths: inputs.lengths.beside(),
        };
        let rows = lse.as_ref().map(DeviceLse::of);
        self.forward_into(&stream, &device_inputs, options, choice, &on_device.view(), rows)?;

        match out.view_mut() {
            sage_core::TensorViewMut::F32(mut view) => on_device.buffer().copy_to_host(view.data_mut()),
            sage_core::TensorViewMut::F16(mut view) => on_device.buffer().copy_to_host(view.data_mut()),
            sage_core::TensorViewMut::BF16(mut view) => on_device.buffer().copy_to_host(view.data_mut()),
        }
        .map_err(driver)?;
        let lse = lse.map(|lse| lse.to_vec::<f32>()).transpose().map_err(driver)?;
        let shape = sage_core::Call::check(&device_inputs, options)?.lse_shape();
        let lse = lse.map(|lse| Tensor::new(lse, &shape)).transpose()?;
        Ok((out, lse))
    }
}

/// A host mask on the GPU.
enum CopiedMask {
    Bool(Buffer, Geometry),
    Additive(CudaTensor),
}

impl CopiedMask {
    fn new(stream: &Stream, mask: &Mask<'_>) -> Result<Self> {
        match mask {
            Mask::Additive(tensor) => Ok(CopiedMask::Additive(CudaTensor::upload(stream, tensor)?)),
            Mask::Bool(view) => {
                let bytes: Vec<u8> = view.data().iter().map(|&visible| u8::from(visible)).collect();
                let buffer = Buffer::from_slice(stream, &bytes).map_err(driver)?;
                Ok(CopiedMask::Bool(buffer, *view.geometry()))
            }
        }
    }

    fn view(&self) -> DeviceMask<'_> {
        match self {
            CopiedMask::Additive(tensor) => DeviceMask::Additive(tensor.view()),
            CopiedMask::Bool(buffer, geometry) => {
                // SAFETY: the view's elements lie in its memory, all of which was copied.
                DeviceMask::Bool(unsafe { DeviceBytes::from_raw(*geometry, buffer.address()) })
            }
        }
    }
}
