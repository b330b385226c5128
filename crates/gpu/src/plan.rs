//! How a GPU carries out a problem.

use std::fmt;
use std::sync::Arc;

use sage_core::{Problem, Result};
use sage_cuda::Kernel;
use sage_kernels::forward::{ForwardPlan, Request, Tensors};
use sage_kernels::pass::Pass;

use crate::Cuda;
use crate::launches::PassKernels;
use crate::loading::Needed;
use crate::predict::PredictPlan;

/// What would do where a GPU lacks an instruction.
const INSTEAD: &str = "choose another scheme";

/// How a GPU carries out a problem. Prints itself.
#[derive(Debug)]
pub struct CudaPlan {
    pub(super) forward: ForwardPlan,
    device: String,
    kernels: PassKernels,
    /// How the block map is predicted, where it is.
    prediction: Option<Arc<PredictPlan>>,
}

impl CudaPlan {
    /// The plan, without compiling anything.
    pub(super) fn new(problem: &Problem, request: &Request, cuda: &Cuda) -> Result<Self> {
        let forward = ForwardPlan::new(problem, request, cuda.machine())?;
        let info = cuda.device().info();
        let device = format!("cuda:{}, {}, {}", info.ordinal, info.name, cuda.machine().target);
        Ok(CudaPlan { forward, device, kernels: PassKernels::default(), prediction: None })
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
        self.kernels.get(self.pass(), cuda, INSTEAD)
    }

    /// The kernels that are to be compiled for it.
    pub(super) fn needed(&self) -> Vec<Needed> {
        Needed::by(self.pass(), INSTEAD)
    }

    /// The launches.
    pub(super) fn pass(&self) -> &Pass<Tensors> {
        self.forward.pass()
    }
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
