//! How a GPU carries out a problem, and the compiled kernels for it.

use std::fmt;
use std::thread;

use sage_core::{Error, Problem, Result, Scheme};
use sage_cuda::{Device, Kernel, KernelSource};
use sage_kernels::forward::{Forward, Gpu, Request};
use sage_ptx::{Program, Target};

use crate::driver;

/// How a GPU carries out a problem. Prints itself.
#[derive(Debug)]
pub struct CudaPlan {
    pub(super) problem: Problem,
    pub(super) request: Request,
    pub(super) forward: Forward,
    device: String,
    /// In the order of [`Forward::programs`]; empty as long as the plan is only looked at.
    pub(super) kernels: Vec<Kernel>,
}

impl CudaPlan {
    /// The plan, without compiling anything.
    pub(super) fn new(problem: &Problem, request: &Request, device: &Device, gpu: &Gpu) -> Result<Self> {
        let forward = Forward::new(problem, request, gpu)?;
        let info = device.info();
        let device = format!("cuda:{}, {}, {}", info.ordinal, info.name, gpu.target);
        Ok(CudaPlan { problem: *problem, request: *request, forward, device, kernels: Vec::new() })
    }

    /// The plan with its kernels, compiled side by side.
    pub(super) fn compiled(mut self, device: &Device, gpu: &Gpu) -> Result<Self> {
        let programs = self.forward.programs();
        let load = |program: &Program| load(device, gpu.target, program, "choose another scheme");
        let kernels: Vec<Result<Kernel>> = thread::scope(|scope| {
            let threads: Vec<_> = programs.iter().map(|program| scope.spawn(|| load(program))).collect();
            let joined = threads.into_iter().map(|thread| match thread.join() {
                Ok(kernel) => kernel,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        });
        self.kernels = kernels.into_iter().collect::<Result<_>>()?;
        Ok(self)
    }

    /// The scheme that the plan computes.
    pub fn scheme(&self) -> &Scheme {
        self.forward.scheme()
    }

    /// Bytes of scratch memory on the GPU.
    pub fn workspace_bytes(&self) -> usize {
        self.forward.workspace_bytes()
    }
}

/// The kernel of a program; `instead` is what would do where the GPU lacks an instruction.
pub(super) fn load(device: &Device, target: Target, program: &Program, instead: &str) -> Result<Kernel> {
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
    device.load(&source).map_err(driver)
}

impl fmt::Display for CudaPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scheme      {}", self.forward.scheme())?;
        writeln!(f, "device      {}", self.device)?;
        for name in self.forward.kernel_names() {
            writeln!(f, "kernel      {name}")?;
        }
        write!(f, "workspace   {:.1} MiB", self.workspace_bytes() as f64 / (1 << 20) as f64)?;
        for reason in self.forward.reasons() {
            write!(f, "\nbecause     {reason}")?;
        }
        Ok(())
    }
}
