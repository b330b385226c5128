//! The GPU's kernels in the emulator as a backend: the one place of the kit that knows how a pass is planned and run.

use sage_core::oracle::{self, Output};
use sage_core::{Accumulator, Call, DType, Geometry, Preset, Problem, Pv, Result, Scheme, Strided};
use sage_emulator::{Emulator, Failure};
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{ForwardPlan, Request, Tensors, nearest_scheme};
use sage_kernels::pass::Launcher;
use sage_kernels::{KEY_TILE, Lengths, Machine, SinkArgs, TensorArg, Tiling};
use sage_ptx::{Arg, BoxedTensor, Program, Target};

use crate::{Computed, Memory, OwnedCall, OwnedMask, Runner, Tolerance, poison};

/// Relative L1 errors against the oracle *of the same scheme*, which sums exactly. What remains is the rounding of the
/// output (2⁻¹¹ relative for f16, 2⁻⁸ for bf16, a quarter of it on average), probabilities rounded relative to a
/// running maximum instead of the final one, and of the accumulators. Each is about twice the worst seen.
const F16: f64 = 1e-3;
const BF16: f64 = 6e-3;
/// P in E4M3 relative to a running maximum: as exact as before, but other values fall on its coarse grid.
const FP8: f64 = 2e-2;
/// The reference lags behind the maximum by up to a factor of 16.
const FP8_OF_WARPGROUPS: f64 = 4e-2;
/// Sums rounded to half precision on their way.
const F16_SUMS: f64 = 6e-3;
/// See `crates/kernels/tests/log_sum_exp.rs`.
const LSE: f64 = 5e-4;

/// What kernels are compared with, which go through the keys a tile at a time: with P in 4 bits nearly every value falls
/// elsewhere on its grid where it is relative to another maximum.
pub(crate) fn of_kernels(call: &Call<'_>, scheme: &Scheme) -> Output {
    match scheme.pv {
        Pv::Fp4 { .. } => oracle::scheme_by_tiles(call, scheme, KEY_TILE),
        _ => oracle::scheme(call, scheme),
    }
}

/// An emulated GPU.
#[derive(Clone, Copy, Debug)]
pub struct Emulated {
    /// What kernels are made for, and how many blocks run at once.
    pub machine: Machine,
    /// Whether the nearest scheme is computed in place of one that has no kernels.
    pub nearest: bool,
    /// The attention kernel's tile shape, or none for the planner's choice.
    pub tiling: Option<Tiling>,
    /// Parts that keys are split into, or none for the planner's choice.
    pub splits: Option<usize>,
    /// Whether grids are folded as those of very many heads are: three numbers along y, and some blocks too many.
    pub folded: bool,
    /// The most queries and keys that the caller says packed sequences have, where lengths are in device memory.
    pub longest: Option<[usize; 2]>,
}

/// Names the target that takes the place of sm_80 in tests, such as sm_75: `sm_80` stands for whatever runs `mma.sync`,
/// so that whole suites can be put through another generation's kernels. Of schemes that it lacks the nearest is
/// computed.
const IN_PLACE_OF_AMPERE: &str = "SAGE_EMULATED_TARGET";

impl Emulated {
    /// A GPU of one multiprocessor.
    ///
    /// # Panics
    /// When the variable `SAGE_EMULATED_TARGET` names no target.
    pub fn on(target: Target) -> Self {
        let named = std::env::var(IN_PLACE_OF_AMPERE).ok().filter(|_| target == Target::SM_80);
        let in_place =
            named.map(|name| name.parse().unwrap_or_else(|error| panic!("{IN_PLACE_OF_AMPERE}: {error}")));
        let machine = Machine { multiprocessors: 1, ..Machine::typical(in_place.unwrap_or(target)) };
        Emulated {
            machine,
            nearest: in_place.is_some(),
            tiling: None,
            splits: None,
            folded: false,
            longest: None,
        }
    }

    /// The same with so many multiprocessors.
    #[must_use]
    pub fn multiprocessors(self, multiprocessors: usize) -> Self {
        Emulated { machine: Machine { multiprocessors, ..self.machine }, ..self }
    }

    /// The pass of a call whose tensors lie at these addresses.
    fn plan(&self, call: &OwnedCall, scheme: Option<Scheme>, tensors: &Tensors) -> Result<ForwardPlan> {
        let checked = call.call();
        let aligned = tensors.aligned(&checked.problem);
        let [k, v] = [&checked.k, &checked.v].map(Strided::geometry);
        let request = Request {
            scheme,
            mask: mask_form(call.mask.as_ref()),
            lengths: match (&call.kv_lens, &call.cu_seqlens) {
                (Some(_), _) => Lengths::KvLens,
                (_, Some(_)) => Lengths::Packed,
                _ => Lengths::Dense,
            },
            q_rows: checked.q.shape()[2],
            kv_rows: k.shape()[2],
            aligned,
            values_in_keys: tensors.values_in_keys(&checked.problem),
            has_tensor_map: aligned && tensors.k.has_map(k.shape()) && tensors.v.has_map(v.shape()),
            has_query_map: aligned && tensors.q.has_map(checked.q.shape()),
            lse: call.lse,
            tiling: self.tiling,
            splits: self.splits,
            ..Request::new(&checked.problem)
        }
        .with_masks_of(tensors);
        let mut problem = checked.problem;
        if let Some(longest) = self.longest {
            [problem.q_len, problem.kv_len] = longest;
        }
        let planned = ForwardPlan::new(&problem, &request, &self.machine);
        match (planned, scheme) {
            (Err(_), Some(scheme)) if self.nearest => {
                let nearest = nearest_scheme(scheme, problem.dtype, self.machine.target);
                let request = Request { scheme: Some(nearest), ..request };
                ForwardPlan::new(&problem, &request, &self.machine)
            }
            (planned, _) => planned,
        }
    }
}

impl Runner for Emulated {
    fn name(&self) -> String {
        format!("the emulator of {}", self.machine.target)
    }

    fn supports(&self, call: &OwnedCall, scheme: Option<Scheme>) -> std::result::Result<(), String> {
        if call.q.dtype() == DType::F32 {
            return Err("the kernels take f16 and bf16".into());
        }
        let device = Device::new(call, &call.call());
        self.plan(call, scheme, &device.tensors).map(|_| ()).map_err(|error| error.to_string())
    }

    fn run(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Computed {
        let checked = call.call();
        let mut device = Device::new(call, &checked);
        let plan = self
            .plan(call, scheme, &device.tensors)
            .unwrap_or_else(|error| panic!("{error}: {}, {call:?}", self.name()));
        let pass = plan.pass();
        // Zeroed and other parts of the workspace are separate here, so that reads of what nothing wrote are found.
        let workspace = device.emulator.uninitialized("workspace", pass.workspace_bytes().max(1));
        device.emulator.write(workspace, &vec![0u8; pass.zeroed_bytes()]);
        let programs = pass.programs(self.machine.target);
        let kernels = pass.kernel_names();
        let mut launcher =
            Launches { emulator: &mut device.emulator, programs: &programs, folded: self.folded };
        pass.run(&plan.arranged(&device.tensors), workspace.address(), &mut launcher)
            .unwrap_or_else(|failure| panic!("{}, {kernels:?}, {call:?}\n{failure}", self.name()));
        let out = match device.out {
            Some(buffer) => device.unwritten.with_half_bits(&device.emulator.read::<u16>(buffer)),
            None => device.unwritten,
        };
        // Rows beyond the longest that the caller spoke of have no block.
        let whole = self.longest.is_some() || !poison::is_left(&out);
        assert!(whole, "an element of the output was not written: {kernels:?}, {call:?}");
        Computed {
            scheme: *plan.scheme(),
            shape: checked.out_dimensions(),
            out: poison::elements(&checked, &out),
            lse: device.lse.map_or_else(Vec::new, |buffer| device.emulator.read(buffer)),
            kernels,
        }
    }

    fn expected(&self, call: &Call<'_>, scheme: &Scheme) -> Output {
        of_kernels(call, scheme)
    }

    fn tolerance(&self, dtype: DType, scheme: &Scheme) -> Tolerance {
        let of_values = match scheme.pv {
            Pv::Fp8 { .. } if self.machine.target == Target::SM_90A => FP8_OF_WARPGROUPS,
            Pv::Fp8 { .. } => FP8,
            Pv::F16(Accumulator::F16 | Accumulator::F16ThenF32) => F16_SUMS,
            Pv::BF16(_) => BF16,
            _ => F16,
        };
        let of_output = if dtype == DType::BF16 { BF16 } else { F16 };
        Tolerance { relative_l1: of_values.max(of_output), element: None, rounding: 0.0, lse: LSE }
    }
}

/// A call's tensors in an emulated device's memory.
struct Device {
    emulator: Emulator,
    tensors: Tensors,
    unwritten: Memory,
    out: Option<sage_emulator::Buffer>,
    lse: Option<sage_emulator::Buffer>,
}

impl Device {
    fn new(call: &OwnedCall, checked: &Call<'_>) -> Self {
        let mut emulator = Emulator::new();
        let unwritten = poison::output(call.q.dtype(), call.out);
        let mut tensor = |name: &str, memory: &Memory, geometry: &Geometry| {
            let buffer = (!memory.is_empty()).then(|| emulator.buffer(name, memory.half_bits()));
            // What is empty has no memory.
            let address = buffer
                .filter(|_| !geometry.is_empty())
                .map_or(0, |buffer| buffer.address().wrapping_add_signed(2 * geometry.index([0; 4])));
            (buffer, TensorArg { address, strides: std::array::from_fn(|i| geometry.strides()[i]) })
        };
        let (_, q) = tensor("q", &call.q, checked.q.geometry());
        let (_, k) = tensor("k", &call.k, checked.k.geometry());
        // What is the same in memory may be the same memory.
        let geometry = checked.v.geometry();
        let v = if !geometry.is_empty() && call.v.half_bits() == call.k.half_bits() {
            let first = checked.k.geometry().index([0; 4]);
            let from_first = 2 * (geometry.index([0; 4]) - first);
            let strides = std::array::from_fn(|i| geometry.strides()[i]);
            TensorArg { address: k.address.wrapping_add_signed(from_first), strides }
        } else {
            tensor("v", &call.v, checked.v.geometry()).1
        };
        let geometry = checked.check_output(call.q.dtype(), &call.out).unwrap();
        let (out_buffer, out) = tensor("out", &unwritten, &geometry);
        let mask_address = call.mask.as_ref().map_or(0, |mask| upload_mask(&mut emulator, mask));
        let mask_strides =
            checked.mask.map_or([0; 4], |mask| std::array::from_fn(|i| mask.geometry().strides()[i]));
        let flags = |flags: &[bool]| flags.iter().map(|&flag| u8::from(flag)).collect::<Vec<u8>>();
        let blocks = call
            .blocks
            .as_ref()
            .map_or(0, |blocks| emulator.buffer("blocks", &flags(&blocks.visible)).address());
        let blocks_strides = checked
            .block_mask
            .map_or([0; 4], |mask| std::array::from_fn(|i| mask.blocks.geometry().strides()[i]));
        let mut list = |name: &str, values: Option<&Vec<i32>>| {
            values.map_or(0, |values| emulator.buffer(name, values).address())
        };
        let packed = call.cu_seqlens.as_ref();
        let cu_seqlens_q = list("cu_seqlens_q", packed.map(|(q, _)| q));
        let cu_seqlens_k = list("cu_seqlens_k", packed.map(|(_, k)| k).or(call.kv_lens.as_ref()));
        let sinks = call.sinks.as_ref().map_or(SinkArgs::default(), |sinks| {
            SinkArgs::of_heads(emulator.buffer("sinks", sinks).address())
        });
        let rows: usize = checked.lse_shape().iter().product();
        let lse = call.lse.then(|| emulator.uninitialized("lse", 4 * rows));
        let tensors = Tensors {
            q,
            k,
            v,
            out,
            lse: lse.map_or(0, |lse| lse.address()),
            mask: TensorArg { address: mask_address, strides: mask_strides },
            blocks: TensorArg { address: blocks, strides: blocks_strides },
            cu_seqlens_q,
            cu_seqlens_k,
            sinks,
        };
        Device { emulator, tensors, unwritten, out: out_buffer, lse }
    }
}

/// The address of a mask's first element.
fn upload_mask(emulator: &mut Emulator, mask: &OwnedMask) -> u64 {
    match mask {
        OwnedMask::Bool(visible, _) => {
            let bytes: Vec<u8> = visible.iter().map(|&x| u8::from(x)).collect();
            emulator.buffer("mask", &bytes).address()
        }
        OwnedMask::Additive(biases) if biases.dtype() == DType::F32 => {
            emulator.buffer("mask", &biases.to_f32_memory()).address()
        }
        OwnedMask::Additive(biases) => emulator.buffer("mask", biases.half_bits()).address(),
    }
}

fn mask_form(mask: Option<&OwnedMask>) -> MaskForm {
    match mask {
        None => MaskForm::None,
        Some(OwnedMask::Bool(..)) => MaskForm::Bool,
        Some(OwnedMask::Additive(biases)) => MaskForm::Bias(biases.dtype()),
    }
}

/// Runs a pass's launches.
pub(crate) struct Launches<'a> {
    pub emulator: &'a mut Emulator,
    pub programs: &'a [Program],
    pub folded: bool,
}

impl Launcher for Launches<'_> {
    type Error = Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> std::result::Result<Arg, Failure> {
        // As the driver refuses.
        assert!(tensor.address != 0 && !tensor.shape.contains(&0), "{tensor:?}");
        Ok(self.emulator.tensor_map(&tensor.into()))
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> std::result::Result<(), Failure> {
        let [x, y, z] = grid;
        let grid = if self.folded && y > 3 { [x, 3, (y * z).div_ceil(3) + 1] } else { grid };
        self.emulator.launch(&self.programs[kernel], grid, args).map(|_| ())
    }
}

/// The presets that a GPU computes, for heads of 64 channels.
pub fn presets(machine: &Machine) -> Vec<Preset> {
    let problem = Problem::dense(DType::F16, [1, 1, 1], [100, 100], 64);
    let computed = |preset: &&Preset| {
        let request = Request { scheme: Some(preset.scheme(64)), ..Request::new(&problem) };
        ForwardPlan::new(&problem, &request, machine).is_ok()
    };
    Preset::ALL.iter().filter(computed).copied().collect()
}
