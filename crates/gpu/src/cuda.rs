//! A GPU, and the plans and kernels made for it.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use sage_core::{Error, Problem, Recent, Result};
use sage_cuda::{Device, Stream};
use sage_kernels::Machine;
use sage_kernels::forward::{ForwardPlan, Request};
use sage_ptx::Target;

use crate::kept_numbers::KeptNumbers;
use crate::loading::Kernels;
use crate::plan::CudaPlan;
use crate::predict::{PredictKey, PredictPlan};
use crate::{TuningTable, driver};

/// Plans kept for each GPU: a model's layers and lengths are far fewer.
const MAX_PLANS: usize = 128;

/// Names a target that plans are made for in place of the GPU's own: an older one, whose kernels run on newer GPUs as
/// well, so that they can be tested and timed there.
const TARGET_VARIABLE: &str = "SAGE_GPU_TARGET";

/// A GPU, with the plans and kernels made for it so far. Clones are the same; any thread may use them.
#[derive(Clone, Debug)]
pub struct Cuda(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: Device,
    machine: Machine,
    /// Compiled for plans and KV caches.
    kernels: Kernels,
    plans: Mutex<Recent<(Problem, Request), Arc<CudaPlan>>>,
    predictions: Mutex<Recent<PredictKey, Arc<PredictPlan>>>,
    /// Of predictors.
    numbers: KeptNumbers,
    /// In place of the kernels' own table.
    tuning: TuningTable,
}

impl Cuda {
    /// The GPU of that number, with plans of its own: for the target that the variable `SAGE_GPU_TARGET` names, where it
    /// is set, as [`Cuda::for_target`].
    ///
    /// # Errors
    /// When there is no driver, or no such GPU, or the variable names no target whose code it runs.
    pub fn new(ordinal: u32) -> Result<Self> {
        let device = Device::new(ordinal).map_err(driver)?;
        match env::var(TARGET_VARIABLE) {
            Err(env::VarError::NotPresent) => Ok(Cuda::of_device(device)),
            Ok(text) => match text.parse() {
                Ok(target) => Cuda::for_target(device, target),
                Err(_) => Err(not_a_target(text)),
            },
            Err(env::VarError::NotUnicode(text)) => Err(not_a_target(text.to_string_lossy())),
        }
    }

    /// The GPU of that number, opened once in the life of the process: plans and kernels are shared by all who ask
    /// here.
    ///
    /// # Errors
    /// When there is no driver, or no such GPU.
    pub fn shared(ordinal: u32) -> Result<Self> {
        static GPUS: Mutex<BTreeMap<u32, Cuda>> = Mutex::new(BTreeMap::new());
        // A forked process must not wait for a lock that one of its parent's threads held.
        sage_cuda::check_not_forked().map_err(driver)?;
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let gpu = Cuda::new(ordinal)?;
        gpus.insert(ordinal, gpu.clone());
        Ok(gpu)
    }

    /// A device that is open already.
    pub fn of_device(device: Device) -> Self {
        let (machine, tuning) = (machine_of(&device), TuningTable::of(&device));
        Cuda::planned_for(device, machine, tuning)
    }

    /// A device that is open already, as if it were of an older target: with that one's kernels, in no more shared
    /// memory than its GPUs have, and without tile shapes that were measured for the device's own.
    ///
    /// # Errors
    /// When the device does not run the target's code.
    pub fn for_target(device: Device, target: Target) -> Result<Self> {
        let own = machine_of(&device);
        if !target.runs_on(own.target) {
            return Err(Error::value("target", target, format!("one whose code {} runs", own.target)));
        }
        let shared_bytes = own.shared_bytes.min(Machine::typical(target).shared_bytes);
        let tuning = TuningTable::new(&device);
        Ok(Cuda::planned_for(device, Machine { target, shared_bytes, ..own }, tuning))
    }

    fn planned_for(device: Device, machine: Machine, tuning: TuningTable) -> Self {
        Cuda(Arc::new(Inner {
            device,
            machine,
            kernels: Kernels::default(),
            plans: Mutex::new(Recent::new(MAX_PLANS)),
            predictions: Mutex::new(Recent::new(MAX_PLANS)),
            numbers: KeptNumbers::default(),
            tuning,
        }))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// A new stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(&self) -> Result<Stream> {
        Stream::new(self.device()).map_err(driver)
    }

    /// What kernels are planned for.
    pub fn machine(&self) -> &Machine {
        &self.0.machine
    }

    /// That kernels compute such a problem, by a scheme of the planner's choice, wherever its tensors lie.
    ///
    /// # Errors
    /// Says what no kernel here does.
    pub fn check_problem(&self, problem: &Problem) -> Result<()> {
        ForwardPlan::new(problem, &Request::new(problem), self.machine()).map(drop)
    }

    /// The kernels that were compiled so far.
    pub(crate) fn kernels(&self) -> &Kernels {
        &self.0.kernels
    }

    /// Lists of numbers in the GPU's memory.
    pub(crate) fn numbers(&self) -> &KeptNumbers {
        &self.0.numbers
    }

    /// The plan for a problem, made at its first use.
    pub(crate) fn plan_of(&self, problem: &Problem, request: &Request) -> Result<Arc<CudaPlan>> {
        recent(&self.0.plans, (*problem, *request), |(problem, request)| self.new_plan(problem, request))
    }

    /// The plan for a prediction, made at its first use.
    pub(crate) fn prediction_of(&self, key: PredictKey) -> Result<Arc<PredictPlan>> {
        recent(&self.0.predictions, key, PredictPlan::new)
    }

    /// A plan, with a tile shape that was measured on this GPU where there is one and none is asked for.
    pub(crate) fn new_plan(&self, problem: &Problem, request: &Request) -> Result<CudaPlan> {
        let plan = CudaPlan::new(problem, request, self)?;
        match (request.tiling, self.0.tuning.tiling(plan.forward.key())) {
            (None, Some(tiling)) => {
                let tuned = Request { tiling: Some(tiling), ..*request };
                CudaPlan::new(problem, &tuned, self)
            }
            _ => Ok(plan),
        }
    }
}

/// What plans ask of a device.
fn machine_of(device: &Device) -> Machine {
    let info = device.info();
    Machine {
        target: info.target(),
        multiprocessors: info.multiprocessors as usize,
        shared_bytes: info.shared_bytes_per_block as usize,
        l2_bytes: info.l2_bytes as usize,
    }
}

fn not_a_target(text: impl Display) -> Error {
    Error::value(TARGET_VARIABLE, format!("`{text}`"), "sm_75 to sm_121, such as sm_75 or sm_89")
}

/// The plan of a key, made by `make` where it was not used of late.
fn recent<K: PartialEq, P>(
    plans: &Mutex<Recent<K, Arc<P>>>,
    key: K,
    make: impl FnOnce(&K) -> Result<P>,
) -> Result<Arc<P>> {
    let locked = || plans.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(plan) = locked().get(&key) {
        return Ok(plan);
    }
    let plan = Arc::new(make(&key)?);
    let mut plans = locked();
    // Another thread may have made it meanwhile, and compiled its kernels.
    if let Some(plan) = plans.get(&key) {
        return Ok(plan);
    }
    plans.put(key, plan.clone());
    Ok(plan)
}
