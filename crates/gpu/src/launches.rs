//! The compiled kernels of a pass, and their launches on a stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use sage_core::{Error, Result};
use sage_cuda::{Buffer, Device, Kernel, KernelSource, Stream, TensorMap};
use sage_kernels::Kernel as Configuration;
use sage_kernels::pass::{Launcher, Pass};
use sage_ptx::{Arg, BoxedTensor};

use crate::{Cuda, driver};

/// The kernels that were compiled for a GPU so far, by their names.
#[derive(Debug, Default)]
pub(super) struct Kernels(Mutex<HashMap<String, Kernel>>);

impl Kernels {
    /// Compiled kernels for every launch of a pass: those that are new side by side. `instead` is what would do where
    /// the GPU lacks an instruction.
    pub fn of_pass<T>(&self, pass: &Pass<T>, cuda: &Cuda, instead: &str) -> Result<Vec<Kernel>> {
        let kernels: Vec<Result<Kernel>> = thread::scope(|scope| {
            let found = |configuration: &Arc<dyn Configuration>| {
                let (name, configuration) = (configuration.name(), configuration.clone());
                if let Some(kernel) = self.known(&name) {
                    return Ok(Ok(kernel));
                }
                // Another thread may do the same meanwhile; a kernel is compiled once all the same.
                Err(scope.spawn(move || {
                    let kernel = load(cuda, &*configuration, instead)?;
                    self.lock().insert(name, kernel.clone());
                    Ok(kernel)
                }))
            };
            let begun: Vec<_> = pass.kernels().map(found).collect();
            let joined = begun.into_iter().map(|kernel| match kernel.map_err(|thread| thread.join()) {
                Ok(known) | Err(Ok(known)) => known,
                Err(Err(panic)) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        });
        kernels.into_iter().collect()
    }

    fn known(&self, name: &str) -> Option<Kernel> {
        self.lock().get(name).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Kernel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernels of a pass in the order of its launches, compiled when they are first asked for.
#[derive(Debug, Default)]
pub(super) struct PassKernels(OnceLock<Vec<Kernel>>);

impl PassKernels {
    /// The kernels; `instead` is what would do where the GPU lacks an instruction.
    pub fn get<T>(&self, pass: &Pass<T>, cuda: &Cuda, instead: &str) -> Result<&[Kernel]> {
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

/// The kernel of a configuration.
fn load(cuda: &Cuda, configuration: &dyn Configuration, instead: &str) -> Result<Kernel> {
    let (program, target) = (configuration.program(), cuda.machine().target);
    let ptx = program.ptx(target).map_err(|missing| Error::unsupported(missing.to_string(), instead))?;
    let source = KernelSource {
        name: &program.name,
        ptx: &ptx,
        target,
        params: &program.params,
        block: program.block,
        cluster: None,
        dynamic_shared_bytes: program.dynamic_shared_bytes(),
        needs_whole_compilation: program.needs_whole_compilation(),
        waits_for_launches_before: program.waits_for_launches_before(target),
    };
    cuda.device().load(&source).map_err(driver)
}
