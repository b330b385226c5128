//! A forward pass of a GPU, run by the emulator.

use std::time::{Duration, Instant};

use half::f16;
use sage_core::metrics::Accuracy;
use sage_core::{Call, oracle};
use sage_emulator::{Emulator, EmulatorOptions, Report};
use sage_kernels::forward::{ForwardPlan, Request, Tensors};
use sage_kernels::pass::Launcher;
use sage_kernels::{Machine, TensorArg};
use sage_ptx::{Arg, BoxedTensor, Program};
use sageattention::{DType, Scheme, TensorView};

use crate::failure::{Failure, Result};

/// Most bytes of a buffer in the emulator.
const MAX_BYTES: u64 = 4 << 30;

/// A pass that was run.
#[derive(Debug)]
pub struct Emulation {
    /// How it was planned.
    pub forward: ForwardPlan,
    /// What each launch did, and how long the emulator took.
    pub launches: Vec<(Report, Duration)>,
    /// Against the definition of its scheme.
    pub of_scheme: Accuracy,
    /// Against exact attention.
    pub of_exact: Accuracy,
}

/// Plans a dense call without an explicit mask, in f16 or bf16.
pub fn plan(call: &Call<'_>, scheme: Option<Scheme>, gpu: &Machine) -> Result<ForwardPlan> {
    let problem = &call.problem;
    let request = Request { scheme, ..Request::new(problem) };
    let forward = ForwardPlan::new(problem, &request, gpu)?;
    check_buffer(forward.pass().workspace_bytes() as u64)?;
    // The emulator runs instructions of every target.
    for program in forward.pass().programs() {
        program.ptx(gpu.target).map_err(|error| Failure::Failed(error.to_string()))?;
    }
    Ok(forward)
}

/// Refuses buffers that the emulator cannot have.
pub fn check_buffer(bytes: u64) -> Result<()> {
    if bytes > MAX_BYTES {
        return Err(Failure::Failed(format!(
            "a buffer of {bytes} bytes is not supported: the emulator's have at most {MAX_BYTES}"
        )));
    }
    Ok(())
}

/// The emulator as a GPU's stream.
struct Emulated<'a, F> {
    emulator: &'a mut Emulator,
    programs: &'a [Program],
    launches: Vec<(Report, Duration)>,
    launched: F,
}

impl<F: FnMut()> Launcher for Emulated<'_, F> {
    type Error = sage_emulator::Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> std::result::Result<Arg, Self::Error> {
        Ok(self.emulator.tensor_map(&tensor.into()))
    }

    fn launch(
        &mut self,
        kernel: usize,
        grid: [u32; 3],
        args: &[Arg],
    ) -> std::result::Result<(), Self::Error> {
        let start = Instant::now();
        let report = self.emulator.launch(&self.programs[kernel], grid, args)?;
        self.launches.push((report, start.elapsed()));
        (self.launched)();
        Ok(())
    }
}

/// Runs a plan for the call; `launched` is told after each launch.
pub fn run(call: &Call<'_>, forward: ForwardPlan, mut launched: impl FnMut()) -> Result<Emulation> {
    let mut emulator = Emulator::with_options(EmulatorOptions {
        workers: rayon::current_num_threads(),
        ..EmulatorOptions::default()
    });
    let mut tensor = |name: &str, view: &TensorView<'_>| {
        let buffer = match view {
            TensorView::F16(view) => emulator.buffer(name, view.data()),
            TensorView::BF16(view) => emulator.buffer(name, view.data()),
            TensorView::F32(view) => emulator.buffer(name, view.data()),
        };
        let geometry = view.geometry();
        let [batch, heads, rows] = std::array::from_fn(|i| geometry.strides()[i]);
        // A call leaves out keys that no query sees.
        let address = buffer.address() + geometry.offset() as u64 * view.dtype().bytes() as u64;
        TensorArg { address, strides: [batch, heads, rows] }
    };
    let (q, k, v) = (tensor("q", &call.q), tensor("k", &call.k), tensor("v", &call.v));
    // The output lies as the queries do.
    let out = emulator.uninitialized("out", size_of::<f16>() * call.q.geometry().len());
    // Nobody but the host zeroes what must be zeros: what is read from elsewhere before it is written is a fault.
    let workspace = emulator.uninitialized("workspace", forward.pass().workspace_bytes().max(1));
    emulator.write(workspace, &vec![0u8; forward.pass().zeroed_bytes()]);
    let tensors = Tensors { q, k, v, out: TensorArg { address: out.address(), ..q }, ..Tensors::default() };

    let programs = forward.pass().programs();
    let mut launcher = Emulated {
        emulator: &mut emulator,
        programs: &programs,
        launches: Vec::new(),
        launched: &mut launched,
    };
    forward.pass().run(&tensors, workspace.address(), &mut launcher).map_err(|failure| {
        // On one line, as all errors are.
        let text = failure.to_string();
        Failure::Failed(text.split_whitespace().collect::<Vec<_>>().join(" "))
    })?;

    let launches = launcher.launches;
    let found: Vec<f32> = match call.problem.dtype {
        DType::BF16 => emulator.read::<half::bf16>(out).into_iter().map(f32::from).collect(),
        _ => emulator.read::<f16>(out).into_iter().map(f32::from).collect(),
    };
    let of_scheme = Accuracy::of(&found, &oracle::scheme(call, forward.scheme()).out);
    let of_exact = Accuracy::of(&found, &oracle::exact(call).out);
    Ok(Emulation { forward, launches, of_scheme, of_exact })
}
