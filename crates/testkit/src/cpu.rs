//! The processor as a backend.

use sage_core::{Accumulator, Call, DType, Fp4Format, Geometry, PLevels, Preset, Pv, Qk, Scheme};
use sage_cpu::{Cpu, InstructionSet};

use crate::{Computed, OwnedCall, Runner, Tolerance, poison};

/// Full precision beside exact attention: single precision throughout. Measured worst over the tests of full precision:
/// relative L1 1.7e-6, element 2.4e-6, log-sum-exp 4.2e-6, all under a soft cap of 50, whose `tanh` is a difference
/// from 1 (without a cap 7.0e-7, 1.6e-6, 1.8e-6).
pub const CPU_FULL: Tolerance =
    Tolerance { relative_l1: 5e-6, element: Some(1e-5), rounding: 0.0, lse: 1e-5 };

/// A kernel and the oracle of its scheme share quantised values, but for ties that fall to the other side: the
/// kernel multiplies by an inverse where the oracle divides, sums K's mean in another order, and takes 12-bit P from
/// an `exp2` that is off by 2⁻²². A tie in Q or K moves one score by 1/127 of a group's largest product, which shows
/// in that row alone; one in P moves a probability by 1/4095 of the tile's largest.
///
/// Measured worst over the tests of quantised schemes: relative L1 1.8e-4 (a single channel; 3e-5 with 40), element
/// 4.1e-3, log-sum-exp 3.7e-3.
pub const CPU_QUANTISED: Tolerance =
    Tolerance { relative_l1: 5e-4, element: Some(8e-3), rounding: 0.0, lse: 8e-3 };

/// Without smoothing, quotients of numbers of 8 bits are exact ties, and many of them at once. Measured worst:
/// relative L1 4.0e-3, element 9.0e-3, log-sum-exp 1.5e-2, all with bf16 and one channel.
pub const CPU_TIES: Tolerance =
    Tolerance { relative_l1: 5e-3, element: Some(2e-2), rounding: 0.0, lse: 3e-2 };

/// Probabilities of 16 and fewer bits are relative to the largest score so far, and the oracle's to that of all keys: of
/// more than one tile of 128 keys they are as good, but other ones, and so as far from the oracle's as the format is
/// coarse. (Where the first tile has the largest score they are the same; `tests/probabilities.rs` of the processor's
/// crate holds them to [`CPU_QUANTISED`] there.)
///
/// Twice the measured worst over the tests of presets: relative L1 and element.
fn rounded_p(pv: &Pv) -> Option<[f64; 2]> {
    match pv {
        Pv::F32 | Pv::Fixed12 { .. } => None,
        Pv::F16(_) => Some([4e-4, 2e-3]),
        Pv::BF16(_) => Some([3e-3, 1.6e-2]),
        Pv::Int8 => Some([3e-2, 0.11]),
        Pv::Fp8 { .. } => Some([4e-2, 9e-2]),
        Pv::Fp4 { format: Fp4Format::Nv, .. } => Some([8e-2, 0.15]),
        Pv::Fp4 { format: Fp4Format::Mx, .. } => Some([0.2, 0.4]),
    }
}

/// A processor restricted to each instruction set that this machine has.
pub fn every_cpu() -> Vec<Cpu> {
    let with = |set| Cpu::detect().with_instruction_set(set).unwrap();
    InstructionSet::detected().into_iter().map(with).collect()
}

/// Every way through the keys and every form of the two products that is near exact attention.
pub fn cpu_schemes(head_dim: usize) -> Vec<Scheme> {
    let (full, int8) = (Preset::FULL.scheme(head_dim), Preset::INT8.scheme(head_dim));
    vec![
        full,
        Scheme { pv: int8.pv, ..full },
        int8,
        Preset::INT8_F32.scheme(head_dim),
        Preset::INT8_PER_TOKEN.scheme(head_dim),
        Scheme { rotate: true, smooth: full.smooth, ..int8 },
    ]
}

/// Forms of P, and of Q and K, in fewer bits, which are further from exact attention and do not have the whole range of
/// single precision.
pub fn cpu_narrow_schemes(head_dim: usize) -> Vec<Scheme> {
    let (full, int8) = (Preset::FULL.scheme(head_dim), Preset::INT8.scheme(head_dim));
    let mxfp4 = Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One };
    vec![
        Preset::ATTN_QAT_NVFP4.scheme(head_dim),
        Scheme { pv: mxfp4, rotate: true, ..int8 },
        Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(head_dim),
        Scheme { pv: Pv::F16(Accumulator::F32), ..full },
        Scheme { pv: Pv::BF16(Accumulator::F32), ..full },
    ]
}

/// Runs a call, with the log-sum-exp, into an output that lies as `out` says in the caller's dimensions.
///
/// # Panics
/// When the processor does not compute the call, or leaves something unwritten or writes beside the output.
pub fn run_on_cpu(cpu: &Cpu, call: &Call<'_>, out: Geometry, scheme: Option<Scheme>) -> Computed {
    let problem = &call.problem;
    let plan = cpu.plan(problem, scheme).unwrap_or_else(|error| panic!("{error}: {problem:?}"));
    let mut out = poison::output(problem.dtype, out);
    let mut lse = vec![f32::from_bits(poison::F32); call.lse_shape().iter().product()];
    cpu.forward(&plan, call, out.view_mut(), Some(&mut lse)).unwrap();
    assert!(!poison::is_left(&out), "an element of the output was not written: {problem:?}");
    let written = lse.iter().all(|x| x.to_bits() != poison::F32);
    assert!(written, "a log-sum-exp was not written: {problem:?}");
    Computed {
        scheme: *plan.scheme(),
        shape: call.out_dimensions(),
        out: poison::elements(call, &out),
        lse,
        kernels: Vec::new(),
    }
}

impl Runner for Cpu {
    fn name(&self) -> String {
        format!("the processor with {}", self.instruction_set())
    }

    fn supports(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Result<(), String> {
        self.plan(&call.call().problem, scheme).map(|_| ()).map_err(|error| error.to_string())
    }

    fn run(&self, call: &OwnedCall, scheme: Option<Scheme>) -> Computed {
        let computed = run_on_cpu(self, &call.call(), call.out, scheme);
        if call.lse { computed } else { Computed { lse: Vec::new(), ..computed } }
    }

    fn tolerance(&self, dtype: DType, scheme: &Scheme) -> Tolerance {
        let many_ties = dtype == DType::BF16 && !scheme.smooth.k.is_on() && scheme.qk != Qk::Full;
        let within = if *scheme == Preset::FULL.scheme(64) {
            CPU_FULL
        } else if many_ties {
            CPU_TIES
        } else {
            CPU_QUANTISED
        };
        let within = match rounded_p(&scheme.pv) {
            None => within,
            Some([relative_l1, element]) => Tolerance {
                relative_l1: relative_l1 + within.relative_l1,
                element: within.element.map(|within| within.max(element)),
                ..within
            },
        };
        within.rounded(dtype)
    }
}
