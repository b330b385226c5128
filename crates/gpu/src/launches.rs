//! The compiled kernels of a pass, and their launches on a stream.

use std::sync::OnceLock;

use sage_core::{Error, Result};
use sage_cuda::{Buffer, Device, Kernel, Stream, TensorMap};
use sage_kernels::pass::{Launcher, Pass};
use sage_ptx::{Arg, BoxedTensor};

use crate::{Cuda, driver};

/// The kernels of a pass in the order of its launches, compiled when they are first asked for.
#[derive(Debug, Default)]
pub(super) struct PassKernels(OnceLock<Vec<Kernel>>);

impl PassKernels {
    /// The kernels; `instead` is what would do where the GPU lacks an instruction.
    pub fn get<T>(&self, pass: &Pass<T>, cuda: &Cuda, instead: &'static str) -> Result<&[Kernel]> {
        if let Some(kernels) = self.0.get() {
            return Ok(kernels);
        }
        let kernels = cuda.kernels().of_pass(pass, cuda, instead)?;
        Ok(self.0.get_or_init(|| kernels))
    }
}

/// A launch that is ready: its kernel, grid and arguments.
pub(super) type Launch<'a> = (usize, &'a Kernel, [u32; 3], &'a [Arg]);

/// Runs a pass on a stream, with a workspace from the stream's pool: `launch` puts each launch there.
pub(super) fn run<T>(
    pass: &Pass<T>,
    kernels: &[Kernel],
    tensors: &T,
    stream: &Stream,
    launch: impl FnMut(Launch<'_>) -> Result<()>,
) -> Result<()> {
    let mut workspace = Buffer::new(stream, pass.workspace_bytes()).map_err(driver)?;
    workspace.fill_start(pass.zeroed_bytes(), 0).map_err(driver)?;
    let mut launcher = OnStream { device: stream.device(), kernels, launch };
    pass.run(tensors, workspace.address(), &mut launcher)
}

/// Launches of a pass, which `launch` puts on a stream.
///
/// What makes them sound: the pass gives each kernel the arguments that it was written for, in a grid that stays
/// within the tensors' geometry, which the call was checked against. That there is memory behind a geometry is the
/// promise of whoever made the tensor, mask, list or log-sum-exp ([`crate::DeviceTensor::from_raw`] and its like), or
/// a buffer's own size. The workspace is freed in the stream's order, after the launches.
///
/// One promise is the caller's in words alone, as no type holds it yet: that another stream whose buffers a call uses
/// frees them after the call's stream has passed it ([`Buffer`]).
struct OnStream<'a, F> {
    device: &'a Device,
    kernels: &'a [Kernel],
    launch: F,
}

impl<F: FnMut(Launch<'_>) -> Result<()>> Launcher for OnStream<'_, F> {
    type Error = Error;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg> {
        TensorMap::from(tensor).encode(self.device).map_err(driver)
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<()> {
        (self.launch)((kernel, &self.kernels[kernel], grid, args))
    }
}
