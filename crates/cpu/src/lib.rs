//! SageAttention on CPUs: SIMD micro-kernels chosen at run time, threads, f32, f16 and bf16 in and out.
//!
//! - [`Cpu::plan`] chooses scheme, kernels and tiles for a problem; the plan prints itself and says why;
//! - [`Cpu::forward`] computes attention, with online softmax and memory that grows with the sequence only.
//!
//! ```
//! use sage_core::{Call, Inputs, Options, Tensor};
//! use sage_cpu::Cpu;
//!
//! let x = Tensor::new(vec![0.5f32; 2 * 64 * 32], &[1, 2, 64, 32])?;
//! let call = Call::check(&Inputs::new(x.view(), x.view(), x.view()), &Options::default())?;
//! let cpu = Cpu::detect();
//! let plan = cpu.plan(&call.problem, None)?;
//! let mut out = x.clone();
//! cpu.forward(&plan, &call, out.view_mut(), None)?;
//! # Ok::<(), sage_core::Error>(())
//! ```
//!
//! # Numbers that are not finite
//! A score that is NaN, or +∞, makes its row of the output NaN, as in PyTorch. Under integer Q·Kᵀ a NaN or ±∞ in Q or
//! K does so for every row that reads its group's scale, and under smooth-K one in K for the whole head: never a
//! number that is silently wrong. A value that is not finite reaches every row whose tile of 128 keys holds it, even
//! where a mask hides it from the row.
//!
//! What no query sees reaches nothing, whatever K and V hold there: keys beyond `kv_lens` or `cu_seqlens`, and keys
//! that the band, the mask and the block mask hide from every query of all heads that share them.
//!
//! # Numbers of any size
//! Every form but those below takes numbers from the whole range of single precision, subnormal ones too, as long as
//! the scaled scores are within it. The original's quantisers add 1e-7 to scales or take no maximum below it: what is
//! much smaller is zero to them ([`sage_core::ZeroGroup`]). NVFP4's scales hold magnitudes from 0.006 to 2688, and half
//! precision those up to 65504, as [`sage_core::oracle`] says of these formats. Where AMX multiplies bfloat16, numbers of Q
//! and K below 1.2e-38 are zero to it, and those of V beside much larger ones of 128 keys.
//!
//! # Schemes
//! All that [`Scheme`] can say runs in kernels of its own, but 12-bit P·V of other blocks than 128 keys. Integers and FP4
//! are multiplied as integers. P and V of 8 and 16 bits are rounded to these and multiplied in single precision, which is
//! no faster than full precision: it shows what a GPU would compute. P of 16 and fewer bits is relative to the largest
//! score so far, as it is there.
//!
//! With AMX, P and V in bfloat16 are multiplied as such, and so are Q and K where the tensors are bfloat16 and neither
//! smoothed nor rotated. It is what the plan chooses there: of bfloat16 tensors nothing is quantised, of others Q and K are.
//!
//! # Determinism
//! The same call on the same machine gives the same bits: no sum's order depends on the number of threads.
//!
//! # Threads
//! Work is divided between the threads of the rayon pool that the caller is in, or of rayon's global one. A forked
//! process, which has none of its parent's threads, starts as many of its own.

mod backend;
mod cache;
mod forward;
mod isa;
mod kernels;
mod machine;
mod mask_rows;
mod nearest;
mod plan;
mod rows;
mod seen;
mod sparse;
mod split;
#[cfg(test)]
mod testing;
mod threads;
mod tile;
mod tiled;
mod visibility;

use std::sync::{Arc, Mutex};

use aligned_vec::AVec;
use sage_core::{
    Call, Error, Geometry, Problem, Recent, Result, Scheme, TensorView, TensorViewMut, View, ViewMut,
};

use crate::forward::Attention;
use crate::kernels::{Kernels, Load};
use crate::plan::Strategy;
use crate::rows::OutputRows;
use crate::seen::SeenHeads;

pub use crate::cache::CachePages;
pub use crate::isa::InstructionSet;
pub use crate::machine::{Caches, Machine};
pub use crate::nearest::nearest_scheme;
pub use crate::plan::CpuPlan;

/// Plans kept: a model's layers and lengths are far fewer.
const MAX_PLANS: usize = 32;

/// What a plan depends on beside the processor: the problem, the scheme asked for, and the threads at hand.
type PlanKey = (Problem, Option<Scheme>, usize);

/// Attention on this machine's processor.
#[derive(Clone, Debug)]
pub struct Cpu {
    machine: Machine,
    instruction_set: InstructionSet,
    plans: Arc<Mutex<Recent<PlanKey, Arc<CpuPlan>>>>,
    /// Memory for packed keys and values that calls have finished with.
    spare: Arc<Mutex<Vec<AVec<u32>>>>,
}

impl Cpu {
    /// Looks at the processor, and chooses the fastest instruction set that it has.
    pub fn detect() -> Self {
        let machine = Machine::detect();
        let instruction_set = machine.instruction_sets[0];
        tracing::debug!(?machine, %instruction_set, "detected");
        Cpu { machine, instruction_set, plans: no_plans(), spare: Arc::default() }
    }

    /// The same processor, restricted to one instruction set.
    ///
    /// # Errors
    /// When the processor lacks it.
    pub fn with_instruction_set(self, instruction_set: InstructionSet) -> Result<Self> {
        if !self.machine.instruction_sets.contains(&instruction_set) {
            let names: Vec<_> = self.machine.instruction_sets.iter().map(|set| set.name()).collect();
            return Err(Error::value("instruction_set", instruction_set, names.join(", ")));
        }
        Ok(Cpu { instruction_set, plans: no_plans(), ..self })
    }

    /// What the processor has.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The instruction set whose kernels run.
    pub fn instruction_set(&self) -> InstructionSet {
        self.instruction_set
    }

    /// Chooses kernels and tiles, and the scheme where it is `None`, or finds what was chosen before.
    ///
    /// # Errors
    /// When no kernel here computes the scheme.
    pub fn plan(&self, problem: &Problem, scheme: Option<Scheme>) -> Result<Arc<CpuPlan>> {
        let threads = threads::count();
        let key = (*problem, scheme, threads);
        // Nothing waits for the lock: in a forked process it may be held for ever.
        if let Some(plan) = self.plans.try_lock().ok().and_then(|mut plans| plans.get(&key)) {
            return Ok(plan);
        }
        let set = self.instruction_set;
        let plan = Arc::new(CpuPlan::new(problem, scheme, &self.machine, threads, set, kernels(set))?);
        if let Ok(mut plans) = self.plans.try_lock() {
            plans.put(key, plan.clone());
        }
        Ok(plan)
    }

    /// Computes attention into `out`, which has [`Call::out_shape`] and Q's element type; and the natural log-sum-exp of
    /// each row into `lse`, row-major of [`Call::lse_shape`].
    ///
    /// # Errors
    /// When `out` or `lse` do not fit the call, or the plan is of another problem.
    pub fn forward(
        &self,
        plan: &CpuPlan,
        call: &Call<'_>,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        if plan.problem != call.problem {
            return Err(Error::unsupported("a plan of another problem", "plan the problem of this call"));
        }
        let geometry = call.check_output(out.dtype(), out.geometry())?;
        call.check_lse(lse.as_deref())?;
        threads::run(|| self.run_typed(plan, call, (out, geometry), lse))?
    }

    fn run_typed(
        &self,
        plan: &CpuPlan,
        call: &Call<'_>,
        (out, geometry): (TensorViewMut<'_>, Geometry),
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        match (call.q, call.k, call.v, out) {
            (TensorView::F32(q), TensorView::F32(k), TensorView::F32(v), TensorViewMut::F32(out)) => {
                self.run(plan, call, [q, k, v], (out, geometry), lse)
            }
            (TensorView::F16(q), TensorView::F16(k), TensorView::F16(v), TensorViewMut::F16(out)) => {
                self.run(plan, call, [q, k, v], (out, geometry), lse)
            }
            (TensorView::BF16(q), TensorView::BF16(k), TensorView::BF16(v), TensorViewMut::BF16(out)) => {
                self.run(plan, call, [q, k, v], (out, geometry), lse)
            }
            // `Call::check` and `check_output` refuse mixed element types.
            _ => Err(Error::unsupported("q, k, v and out of different dtypes", "use one dtype for all")),
        }
    }

    fn run<E: Load>(
        &self,
        plan: &CpuPlan,
        call: &Call<'_>,
        [q, k, v]: [View<'_, E>; 3],
        (mut out, geometry): (ViewMut<'_, E>, Geometry),
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let mut lse = lse.map(|lse| lse_view(call, lse)).transpose()?;
        if call.q.geometry().is_empty() {
            return Ok(());
        }
        let attention = Attention {
            kernels: kernels(plan.instruction_set),
            call,
            seen: SeenHeads::of(call),
            q,
            k,
            v,
            out: OutputRows::new(&mut out, geometry),
            lse: lse.as_mut().map(|(view, geometry)| OutputRows::new(view, *geometry)),
        };
        match plan.strategy {
            Strategy::Tiled { block_q, layout } => {
                let mut packed = self.take_spare();
                attention.tiled(&layout, block_q, &plan.scheme.smooth, &mut packed);
                self.return_spare(packed);
            }
            Strategy::Split => attention.split(),
        }
        Ok(())
    }

    // Nothing waits for the lock: in a forked process it may be held for ever.
    fn take_spare(&self) -> AVec<u32> {
        let spare = self.spare.try_lock().ok().and_then(|mut spare| spare.pop());
        spare.unwrap_or_else(|| AVec::new(64))
    }

    fn return_spare(&self, packed: AVec<u32>) {
        // Larger ones are rare, and better given back.
        if packed.len() * 4 <= plan::PACKED_BYTES_MAX
            && let Ok(mut spare) = self.spare.try_lock()
        {
            spare.push(packed);
        }
    }
}

fn no_plans() -> Arc<Mutex<Recent<PlanKey, Arc<CpuPlan>>>> {
    Arc::new(Mutex::new(Recent::new(MAX_PLANS)))
}

/// The caller's memory for log-sum-exps, in the order of a call's rows.
fn lse_view<'l>(call: &Call<'_>, lse: &'l mut [f32]) -> Result<(ViewMut<'l, f32>, Geometry)> {
    let shape = [&call.q.shape()[..3], &[1]].concat();
    let geometry = Geometry::contiguous("lse", &shape)?;
    Ok((ViewMut::strided("lse", lse, geometry)?, geometry))
}

/// The kernels of an instruction set that was detected.
fn kernels(instruction_set: InstructionSet) -> &'static Kernels {
    match instruction_set {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => &kernels::AVX2,
        #[cfg(target_arch = "x86_64")]
        InstructionSet::AvxVnni => &kernels::AVX_VNNI,
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512Vnni => &kernels::AVX512,
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        InstructionSet::Amx => &kernels::AMX,
        #[cfg(target_arch = "aarch64")]
        InstructionSet::NeonDotprod => &kernels::NEON,
        _ => &kernels::PORTABLE,
    }
}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
