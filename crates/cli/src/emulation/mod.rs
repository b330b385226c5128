//! Passes of a GPU, run by the emulator.

mod decode;
mod forward;

use std::time::{Duration, Instant};

use half::{bf16, f16};
use sage_core::Call;
use sage_core::metrics::Accuracy;
use sage_core::oracle::Output;
use sage_emulator::{Buffer, Emulator, EmulatorOptions, Report};
use sage_kernels::forward::ForwardPlan;
use sage_kernels::pass::{Launcher, Pass};
use sage_kernels::{SinkArgs, TensorArg};
use sage_ptx::{Arg, BoxedTensor, Program, Target};
use sageattention::{DType, Geometry, TensorView};

use crate::failure::{Failure, Result};
use crate::gpu_plan::{GpuPlan, Passes};
use crate::made_up::MadeUp;

/// Most bytes of a buffer in the emulator.
const MAX_BYTES: u128 = 4 << 30;

/// What the passes of a call did, and how right they were.
#[derive(Debug)]
pub struct Emulation {
    /// What each launch did, and how long the emulator took.
    pub launches: Vec<(Report, Duration)>,
    /// How far the output is from what it should be.
    pub out: Distances,
    /// How far the log-sum-exp is, where it was asked for.
    pub lse: Option<Distances>,
}

/// How far a result is from what it should be.
#[derive(Clone, Copy, Debug)]
pub struct Distances {
    /// From the definition of what the passes compute: a scheme, or attention over what a KV cache stores.
    pub definition: Accuracy,
    /// From exact attention.
    pub exact: Accuracy,
}

/// Runs a plan for the call that it was made for; `launched` is told after each launch.
///
/// # Errors
/// When a buffer is too large, or the emulator finds a fault.
pub fn run(
    plan: &GpuPlan,
    made_up: &MadeUp<'_>,
    wants_lse: bool,
    launched: &mut dyn FnMut(),
) -> Result<Emulation> {
    let mut gpu = Gpu::new(plan.machine.target, launched);
    match &plan.passes {
        Passes::Forward(forward, _) => forward::run(&mut gpu, forward, made_up, wants_lse),
        Passes::Decode(decode) => decode::run(&mut gpu, decode, made_up, wants_lse),
    }
}

/// What each launch of a plan for a target does with a call's tensors.
///
/// # Errors
/// As [`run`].
pub fn launched(plan: &ForwardPlan, call: &Call<'_>, target: Target) -> Result<Vec<Report>> {
    let nobody = &mut || ();
    let mut gpu = Gpu::new(target, nobody);
    forward::launch_alone(&mut gpu, plan, call)?;
    Ok(gpu.launches.into_iter().map(|(report, _)| report).collect())
}

/// How many launches a plan has.
pub fn launches(plan: &GpuPlan) -> usize {
    match &plan.passes {
        Passes::Forward(forward, _) => forward.pass().kernels().len(),
        Passes::Decode(decode) => {
            let appends = decode.appends().iter().map(|append| append.call.pass().kernels().len());
            appends.sum::<usize>() + decode.attend().kernels().len()
        }
    }
}

/// Refuses a tensor that the emulator cannot have.
///
/// # Errors
/// When it has too many bytes.
pub fn check_buffer(bytes: u128) -> Result<()> {
    if bytes > MAX_BYTES {
        return Err(Failure::Failed(format!(
            "a buffer of {bytes} bytes is not supported: the emulator's have at most {MAX_BYTES}"
        )));
    }
    Ok(())
}

/// An emulated GPU, and what it has done so far.
struct Gpu<'a> {
    emulator: Emulator,
    target: Target,
    launches: Vec<(Report, Duration)>,
    launched: &'a mut dyn FnMut(),
}

impl<'a> Gpu<'a> {
    fn new(target: Target, launched: &'a mut dyn FnMut()) -> Self {
        let options = EmulatorOptions { workers: rayon::current_num_threads(), ..EmulatorOptions::default() };
        let emulator = Emulator::with_options(options);
        Gpu { emulator, target, launches: Vec::new(), launched }
    }

    /// Attention sinks, copied to the GPU; those of no kernel where there are none.
    fn sinks(&mut self, sinks: Option<&[f32]>) -> SinkArgs {
        sinks.map_or(SinkArgs::default(), |sinks| {
            SinkArgs::of_heads(self.emulator.buffer("sinks", sinks).address())
        })
    }

    /// A tensor of four dimensions, copied to the GPU.
    fn upload(&mut self, name: &str, view: &TensorView<'_>) -> TensorArg {
        let buffer = self.upload_data(name, view);
        argument(buffer, view.geometry(), view.dtype())
    }

    /// All elements that lie behind a view.
    fn upload_data(&mut self, name: &str, view: &TensorView<'_>) -> Buffer {
        match view {
            TensorView::F16(view) => self.emulator.buffer(name, view.data()),
            TensorView::BF16(view) => self.emulator.buffer(name, view.data()),
            TensorView::F32(view) => self.emulator.buffer(name, view.data()),
        }
    }

    /// Memory that nobody has written.
    fn uninitialized(&mut self, name: &str, bytes: usize) -> Result<Buffer> {
        check_buffer(bytes as u128)?;
        // The emulator has no buffer without a byte.
        Ok(self.emulator.uninitialized(name, bytes.max(1)))
    }

    /// A list of integers, copied to the GPU.
    fn list(&mut self, name: &str, values: &[i32]) -> u64 {
        self.emulator.buffer(name, values).address()
    }

    /// Memory for the log-sum-exp of so many rows, where it is wanted.
    fn lse(&mut self, rows: usize, wanted: bool) -> Result<Option<Buffer>> {
        if wanted { self.uninitialized("lse", size_of::<f32>() * rows).map(Some) } else { Ok(None) }
    }

    /// Runs all launches of a pass.
    fn run<T>(&mut self, pass: &Pass<T>, tensors: &T) -> Result<()> {
        let programs = pass.programs(self.target);
        // Nobody but the host zeroes what must be zeros: what is read from elsewhere before it is written is a fault.
        let workspace = self.uninitialized("workspace", pass.workspace_bytes())?;
        self.emulator.write(workspace, &vec![0u8; pass.zeroed_bytes()]);
        let mut stream = EmulatedStream { gpu: self, programs };
        pass.run(tensors, workspace.address(), &mut stream).map_err(|failure| {
            // On one line, as all errors are.
            let text = failure.to_string();
            Failure::Failed(text.split_whitespace().collect::<Vec<_>>().join(" "))
        })
    }

    /// The elements of a tensor in the order of its dimensions.
    fn read(&self, buffer: Buffer, geometry: &Geometry, dtype: DType) -> Vec<f32> {
        let all: Vec<f32> = match dtype {
            DType::F16 => self.emulator.read::<f16>(buffer).into_iter().map(f32::from).collect(),
            DType::BF16 => self.emulator.read::<bf16>(buffer).into_iter().map(f32::from).collect(),
            DType::F32 => self.emulator.read(buffer),
        };
        geometry.places().map(|at| all[geometry.index(at) as usize]).collect()
    }

    /// What was launched, beside how far its results are from what both oracles say.
    fn finish(&mut self, out: &[f32], lse: Option<Buffer>, definition: &Output, exact: &Output) -> Emulation {
        let lse: Option<Vec<f32>> = lse.map(|lse| self.emulator.read(lse));
        Emulation {
            launches: std::mem::take(&mut self.launches),
            out: Distances {
                definition: Accuracy::of(out, &definition.out),
                exact: Accuracy::of(out, &exact.out),
            },
            lse: lse.map(|lse| Distances {
                definition: lse_accuracy(&lse, &definition.lse),
                exact: lse_accuracy(&lse, &exact.lse),
            }),
        }
    }
}

/// Compares log-sum-exps. Rows that rightly are −∞, as they see no key, are left out: a sum with them says nothing.
fn lse_accuracy(found: &[f32], expected: &[f64]) -> Accuracy {
    let rows = found.iter().map(|&lse| f64::from(lse)).zip(expected.iter().copied());
    let counted = rows.filter(|&(found, expected)| found != expected || expected.is_finite());
    let (found, expected): (Vec<f64>, Vec<f64>) = counted.unzip();
    Accuracy::of(&found, &expected)
}

/// Where the elements of a tensor of four dimensions lie.
fn argument(buffer: Buffer, geometry: &Geometry, dtype: DType) -> TensorArg {
    let [batch, heads, rows] = std::array::from_fn(|dimension| geometry.strides()[dimension]);
    // A call leaves out keys that no query sees.
    let address = buffer.address() + geometry.offset() as u64 * dtype.bytes() as u64;
    TensorArg { address, strides: [batch, heads, rows] }
}

/// The emulator as a GPU's stream, which runs one pass.
struct EmulatedStream<'g, 'a> {
    gpu: &'g mut Gpu<'a>,
    programs: Vec<Program>,
}

impl Launcher for EmulatedStream<'_, '_> {
    type Error = sage_emulator::Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg, Self::Error> {
        Ok(self.gpu.emulator.tensor_map(&tensor.into()))
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<(), Self::Error> {
        let start = Instant::now();
        let report = self.gpu.emulator.launch(&self.programs[kernel], grid, args)?;
        self.gpu.launches.push((report, start.elapsed()));
        (self.gpu.launched)();
        Ok(())
    }
}
