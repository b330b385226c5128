//! A small call, emulated with the kernels of a large one.

use sage_core::{Call, Inputs, Options, Problem, Scheme};
use sage_emulator::Report;
use sage_kernels::forward::{ForwardPlan, Request};
use sage_kernels::{GpuModel, Machine, Tiling};

use crate::emulation;
use crate::failure::Result;
use crate::inputs;

/// One head of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    pub q_len: usize,
    pub kv_len: usize,
}

impl Slice {
    /// What the launches of a scheme's pass do for normally distributed tensors of a problem's type and channels.
    ///
    /// # Errors
    /// When no kernel computes it, or the emulator finds a fault.
    pub fn launches(
        &self,
        model: &GpuModel,
        problem: &Problem,
        scheme: &Scheme,
        tiling: Tiling,
    ) -> Result<Vec<Report>> {
        let tensor = |rows, seed| inputs::normal(problem.dtype, &[1, 1, rows, problem.head_dim], seed);
        let (q, k, v) = (tensor(self.q_len, 1)?, tensor(self.kv_len, 2)?, tensor(self.kv_len, 3)?);
        let tensors = Inputs::new(q.view(), k.view(), v.view());
        let call = Call::check(&tensors, &Options::default().logit_softcap(problem.logit_softcap))?;
        let request = Request { scheme: Some(*scheme), tiling: Some(tiling), ..Request::new(&call.problem) };
        // Keys are not split where one multiprocessor has all the work.
        let machine = Machine { multiprocessors: 1, ..model.machine };
        let plan = ForwardPlan::new(&call.problem, &request, &machine)?;
        emulation::launched(&plan, &call, machine.target)
    }
}
