//! How a GPU carries out a problem, and the compiled kernels for it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use sage_core::{Error, Problem, Result};
use sage_cuda::{Buffer, Device, Kernel, KernelSource, Stream, TensorMap};
use sage_kernels::Kernel as Configuration;
use sage_kernels::forward::{ForwardPlan, Request, Tensors};
use sage_kernels::pass::{Launcher, Pass};
use sage_ptx::{Arg, BoxedTensor};

use crate::predict::PredictPlan;
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

/// How a GPU carries out a problem. Prints itself.
#[derive(Debug)]
pub struct CudaPlan {
    pub(super) forward: ForwardPlan,
    device: String,
    /// In the order of the pass's launches; compiled when the plan is run for the first time.
    kernels: OnceLock<Vec<Kernel>>,
    /// How the block map is predicted, where it is.
    prediction: Option<Arc<PredictPlan>>,
}

impl CudaPlan {
    /// The plan, without compiling anything.
    pub(super) fn new(problem: &Problem, request: &Request, cuda: &Cuda) -> Result<Self> {
        let forward = ForwardPlan::new(problem, request, cuda.machine())?;
        let info = cuda.device().info();
        let device = format!("cuda:{}, {}, {}", info.ordinal, info.name, cuda.machine().target);
        Ok(CudaPlan { forward, device, kernels: OnceLock::new(), prediction: None })
    }

    /// The plan with the prediction of its block map.
    pub(super) fn with_prediction(self, prediction: Arc<PredictPlan>) -> Self {
        CudaPlan { prediction: Some(prediction), ..self }
    }

    /// Bytes of scratch memory, of the prediction or of what follows it.
    pub(super) fn workspace(&self) -> usize {
        let of_prediction = self.prediction.as_ref().map_or(0, |plan| plan.pass.workspace_bytes());
        self.pass().workspace_bytes().max(of_prediction)
    }

    /// The kernels, compiled at the first use.
    pub(super) fn kernels(&self, cuda: &Cuda) -> Result<&[Kernel]> {
        if let Some(kernels) = self.kernels.get() {
            return Ok(kernels);
        }
        let kernels = cuda.kernels().of_pass(self.pass(), cuda, "choose another scheme")?;
        Ok(self.kernels.get_or_init(|| kernels))
    }

    /// The launches.
    pub(super) fn pass(&self) -> &Pass<Tensors> {
        self.forward.pass()
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

impl fmt::Display for CudaPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scheme      {}", self.forward.scheme())?;
        writeln!(f, "device      {}", self.device)?;
        if let Some(prediction) = &self.prediction {
            writeln!(f, "{}", prediction.pass)?;
        }
        write!(f, "{}", self.pass())?;
        for reason in self.forward.reasons() {
            write!(f, "\nbecause     {reason}")?;
        }
        Ok(())
    }
}
