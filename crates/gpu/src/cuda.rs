//! A GPU, and the plans and kernels made for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use sage_core::{Problem, Recent, Result};
use sage_cuda::{Device, Stream};
use sage_kernels::Machine;
use sage_kernels::forward::Request;

use crate::kept_numbers::KeptNumbers;
use crate::launches::Kernels;
use crate::plan::CudaPlan;
use crate::predict::{PredictKey, PredictPlan};
use crate::{TuningTable, driver};

/// Plans kept for each GPU: a model's layers and lengths are far fewer.
const MAX_PLANS: usize = 128;

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
    /// The GPU of that number, with plans of its own.
    ///
    /// # Errors
    /// When there is no driver, or no such GPU.
    pub fn new(ordinal: u32) -> Result<Self> {
        Ok(Cuda::of_device(Device::new(ordinal).map_err(driver)?))
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
        let info = device.info();
        let machine = Machine {
            target: info.target(),
            multiprocessors: info.multiprocessors as usize,
            shared_bytes: info.shared_bytes_per_block as usize,
            l2_bytes: info.l2_bytes as usize,
        };
        let tuning = TuningTable::of(&device);
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
