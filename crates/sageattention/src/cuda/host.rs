//! Host tensors on a GPU: copied there, computed, copied back.

use half::{bf16, f16};
use sage_core::{Error, Inputs, Mask, Options, Result, Tensor, TensorView, View};
use sage_cuda::{Buffer, Stream};

use super::{Cuda, DeviceBytes, DeviceMask, DeviceTensor, driver};
use crate::attention::{Choice, Output};

impl Cuda {
    /// Attention of host tensors. Waits for the result.
    pub(crate) fn forward_host(
        &self,
        inputs: &Inputs<'_>,
        options: &Options,
        choice: Choice,
        lse_rows: Option<usize>,
    ) -> Result<Output> {
        if inputs.block_mask.is_some() {
            return Err(Error::unsupported("block_mask", "not on a GPU yet"));
        }
        let stream = Stream::new(self.device()).map_err(driver)?;
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|tensor| Copied::new(&stream, &tensor));
        let (q, k, v) = (q?, k?, v?);
        let mask = inputs.mask.as_ref().map(|mask| CopiedMask::new(&stream, mask)).transpose()?;
        let mut out = Tensor::zeros(inputs.q.dtype(), inputs.q.shape())?;
        let on_device = Copied::new(&stream, &out.view())?;
        let lse = lse_rows.map(|rows| Buffer::new(&stream, rows * size_of::<f32>())).transpose().map_err(driver)?;

        let device_inputs = Inputs {
            q: q.tensor,
            k: k.tensor,
            v: v.tensor,
            mask: mask.as_ref().map(|mask| mask.mask),
            block_mask: None,
            lengths: inputs.lengths,
        };
        let address = lse.as_ref().map(Buffer::address);
        self.forward_into(&stream, &device_inputs, options, choice, &on_device.tensor, address)?;

        match out.view_mut() {
            sage_core::TensorViewMut::F32(mut view) => on_device.buffer.copy_to_host(view.data_mut()),
            sage_core::TensorViewMut::F16(mut view) => on_device.buffer.copy_to_host(view.data_mut()),
            sage_core::TensorViewMut::BF16(mut view) => on_device.buffer.copy_to_host(view.data_mut()),
        }
        .map_err(driver)?;
        let lse = lse.map(|lse| lse.to_vec::<f32>()).transpose().map_err(driver)?;
        let shape = sage_core::Call::check(&device_inputs, options)?.lse_shape();
        let lse = lse.map(|lse| Tensor::new(lse, &shape)).transpose()?;
        Ok(Output { out, lse })
    }
}

/// A host tensor's memory on the GPU, gaps included.
struct Copied {
    buffer: Buffer,
    tensor: DeviceTensor,
}

impl Copied {
    fn new(stream: &Stream, tensor: &TensorView<'_>) -> Result<Self> {
        let buffer = match tensor {
            TensorView::F32(view) => Buffer::from_slice(stream, view.data()),
            TensorView::F16(view) => Buffer::from_slice::<f16>(stream, view.data()),
            TensorView::BF16(view) => Buffer::from_slice::<bf16>(stream, view.data()),
        }
        .map_err(driver)?;
        // SAFETY: the view's elements lie in its memory, all of which was copied, and the buffer stays beside the tensor.
        let tensor = unsafe { DeviceTensor::from_raw(tensor.dtype(), *tensor.geometry(), buffer.address()) };
        Ok(Copied { buffer, tensor })
    }
}

/// A host mask on the GPU.
struct CopiedMask {
    _buffer: Buffer,
    mask: DeviceMask,
}

impl CopiedMask {
    fn new(stream: &Stream, mask: &Mask<'_>) -> Result<Self> {
        match mask {
            Mask::Additive(tensor) => {
                let Copied { buffer, tensor } = Copied::new(stream, tensor)?;
                Ok(CopiedMask { _buffer: buffer, mask: DeviceMask::Additive(tensor) })
            }
            Mask::Bool(view) => {
                let bytes: Vec<u8> = View::data(view).iter().map(|&visible| u8::from(visible)).collect();
                let buffer = Buffer::from_slice(stream, &bytes).map_err(driver)?;
                // SAFETY: as for tensors.
                let bytes = unsafe { DeviceBytes::from_raw(*view.geometry(), buffer.address()) };
                Ok(CopiedMask { _buffer: buffer, mask: DeviceMask::Bool(bytes) })
            }
        }
    }
}
