//! SageAttention on NVIDIA GPUs, from sm_80 on. Needs the driver and nothing else: `sage_kernels` builds kernels, which
//! the driver compiles.
//!
//! [`Cuda::forward_into`] takes tensors that lie in the GPU's memory, the caller's stream, and does not wait for the GPU.
//! [`Cuda::forward_host`] copies host tensors there and the result back.

mod host;
mod kv_cache;
mod plan;
mod recent;
mod tensor;
mod tuning;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sage_core::{Call, Choice, Error, Inputs, Lengths, Operand, Options, Problem, Result, Scheme, Strided};
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{Request, Tensors};
pub use sage_kernels::{Engine, Tiling, WarpTiling, WarpgroupTiling};
use sage_kernels::{Machine, TensorArg};
use sage_ptx::Target;

pub use kv_cache::{KvCache, PoolSize};
pub use plan::CudaPlan;
use plan::{Kernels, Launch};
use recent::Recent;
pub use sage_cuda::{Buffer, Device, DeviceInfo, Event, ExecutableGraph, Graph, Stream, devices};
pub use tensor::{CudaTensor, DeviceBytes, DeviceInts, DeviceLse, DeviceMask, DeviceTensor};
pub use tuning::{Trial, TunedShape, TuningTable};

/// Plans kept for each GPU: a model's layers and lengths are far fewer.
const MAX_PLANS: usize = 128;

/// A GPU, with the plans and kernels made for it so far. Shared freely between threads.
#[derive(Debug)]
pub struct Cuda {
    device: Device,
    machine: Machine,
    /// Compiled for plans and KV caches.
    kernels: Kernels,
    plans: Mutex<Recent<(Problem, Request), Arc<CudaPlan>>>,
    /// In place of the kernels' own table.
    tuning: TuningTable,
}

/// Queries, keys and values in a GPU's memory.
pub type DeviceInputs<'a> = Inputs<'a, DeviceTensor<'a>>;

impl Cuda {
    /// The GPU of that number.
    ///
    /// # Errors
    /// When there is no driver, or no such GPU.
    pub fn new(ordinal: u32) -> Result<Self> {
        Ok(Cuda::of_device(Device::new(ordinal).map_err(driver)?))
    }

    /// The GPU of that number, opened once in the life of the process: plans and kernels are shared by all who ask here.
    ///
    /// # Errors
    /// When there is no driver, or no such GPU.
    pub fn shared(ordinal: u32) -> Result<Arc<Self>> {
        static GPUS: Mutex<BTreeMap<u32, Arc<Cuda>>> = Mutex::new(BTreeMap::new());
        // A forked process must not wait for a lock that one of its parent's threads held.
        sage_cuda::check_not_forked().map_err(driver)?;
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Cuda::new(ordinal)?);
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
        Cuda {
            device,
            machine,
            kernels: Kernels::default(),
            plans: Mutex::new(Recent::new(MAX_PLANS)),
            tuning,
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A new stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(&self) -> Result<Stream> {
        Stream::new(&self.device).map_err(driver)
    }

    /// The GPU's time for the work that `run` puts on `stream`; waits for it.
    ///
    /// # Errors
    /// What `run` or the driver says.
    pub fn time(&self, stream: &Stream, run: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let [start, end] = [self.event()?, self.event()?];
        stream.record(&start).map_err(driver)?;
        run()?;
        stream.record(&end).map_err(driver)?;
        between(&start, &end)
    }

    fn event(&self) -> Result<Event> {
        Event::new(&self.device, true).map_err(driver)
    }

    /// Computes attention on `stream`: `out` in q's layout, shape and element type; `lse` row-major in the shape of
    /// [`Call::lse_shape`]. Returns when the work is on the stream. A first call of a shape compiles its kernels; later
    /// ones allocate nothing on the host, take their workspace from the stream's pool, and can be captured in a graph.
    /// Lengths in host memory are copied to the GPU, which waits for the stream; in its memory they are read there. Buffers
    /// of another stream must outlive the work: see [`Buffer`].
    ///
    /// # Errors
    /// Names the first tensor or option that is wrong, or what no kernel computes, or what the driver says.
    pub fn forward_into(
        &self,
        stream: &Stream,
        inputs: &DeviceInputs<'_>,
        options: &Options,
        choice: Choice,
        out: &DeviceTensor<'_>,
        lse: Option<DeviceLse<'_>>,
    ) -> Result<()> {
        let Some(prepared) = self.prepare(stream, inputs, options, choice, (out, lse), None)? else {
            return Ok(());
        };
        let plan = &prepared.plan;
        plan::run(plan.pass(), &plan.kernels, &prepared.tensors, stream, |(_, kernel, grid, args)| {
            // SAFETY: see `plan::OnStream`.
            unsafe { kernel.launch(stream, grid, args) }.map_err(driver)
        })
    }

    /// Median times of a call's kernels, in the order of the call, its runs one after the other: for
    /// benchmarks.
    ///
    /// # Errors
    /// As [`Cuda::forward_into`].
    pub fn time_kernels(
        &self,
        stream: &Stream,
        inputs: &DeviceInputs<'_>,
        options: &Options,
        choice: Choice,
        out: &DeviceTensor<'_>,
        runs: usize,
    ) -> Result<Vec<(String, Duration)>> {
        match self.prepare(stream, inputs, options, choice, (out, None), None)? {
            Some(prepared) => self.time_prepared(stream, &prepared, runs),
            None => Ok(Vec::new()),
        }
    }

    fn time_prepared(
        &self,
        stream: &Stream,
        prepared: &Prepared,
        runs: usize,
    ) -> Result<Vec<(String, Duration)>> {
        let kernels = &prepared.plan.kernels;
        // All runs are queued before the first is waited for: a launch must not wait for the host between its events.
        let mut marks = Vec::new();
        for _ in 0..runs.max(1) {
            let timed = |(index, kernel, grid, args): Launch<'_>| {
                let [start, end] = [self.event()?, self.event()?];
                stream.record(&start).map_err(driver)?;
                // SAFETY: see `plan::OnStream`.
                unsafe { kernel.launch(stream, grid, args) }.map_err(driver)?;
                stream.record(&end).map_err(driver)?;
                marks.push((index, start, end));
                Ok(())
            };
            plan::run(prepared.plan.pass(), kernels, &prepared.tensors, stream, timed)?;
        }
        let mut times = vec![Vec::new(); kernels.len()];
        for (index, start, end) in marks {
            times[index].push(between(&start, &end)?);
        }
        let median = |mut times: Vec<Duration>| {
            times.sort();
            times[times.len() / 2]
        };
        Ok(kernels
            .iter()
            .zip(times)
            .map(|(kernel, times)| (kernel.name().to_owned(), median(times)))
            .collect())
    }

    /// A checked call's plan and addresses; none where there is nothing to compute.
    fn prepare(
        &self,
        stream: &Stream,
        inputs: &DeviceInputs<'_>,
        options: &Options,
        choice: Choice,
        (out, lse): (&DeviceTensor<'_>, Option<DeviceLse<'_>>),
        tiling: Option<Tiling>,
    ) -> Result<Option<Prepared>> {
        sage_cuda::check_not_forked().map_err(driver)?;
        let call = Call::check(inputs, options)?;
        let out_geometry = call.check_output(out.dtype(), out.geometry())?;
        let out = out.with_geometry(out_geometry);
        if let Some(lse) = lse {
            lse.check(call.lse_shape().iter().product())?;
        }
        if call.problem.q_len == 0 || call.problem.batch == 0 || call.problem.num_q_heads == 0 {
            return Ok(None);
        }
        let lists = Lists::new(stream, &call.lengths)?;
        let tensors = Tensors {
            q: argument(&call.q),
            k: argument(&call.k),
            v: argument(&call.v),
            out: argument(&out),
            lse: lse.map_or(0, |lse| lse.address()),
            mask: call.mask.map_or((0, [0; 4]), |mask| mask.parts()),
            cu_seqlens_q: lists.q,
            cu_seqlens_k: lists.k,
        };
        let mut request = request(&call, choice, lse.is_some());
        request.tiling = tiling;
        request.aligned = tensors.aligned(call.problem.head_dim);
        request.has_tensor_map =
            request.aligned && tensors.k.has_map(call.k.shape()) && tensors.v.has_map(call.v.shape());
        let plan = self.plan(&call.problem, &request)?;
        Ok(Some(Prepared { plan, tensors, _lists: lists }))
    }

    /// The plan for a problem, with its kernels.
    fn plan(&self, problem: &Problem, request: &Request) -> Result<Arc<CudaPlan>> {
        let key = (*problem, *request);
        let plans = || self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans().get(&key) {
            return Ok(plan);
        }
        let mut plan = self.uncompiled(problem, request)?;
        plan.kernels =
            self.kernels.of_pass(plan.pass(), &self.device, &self.machine, "choose another scheme")?;
        let plan = Arc::new(plan);
        plans().put(key, plan.clone());
        Ok(plan)
    }

    /// The plan, with a tile shape that was measured on this GPU where there is one and none is asked for.
    fn uncompiled(&self, problem: &Problem, request: &Request) -> Result<CudaPlan> {
        let plan = CudaPlan::new(problem, request, &self.device, &self.machine)?;
        match (request.tiling, self.tuning.tiling(plan.forward.key())) {
            (None, Some(tiling)) => {
                let tuned = Request { tiling: Some(tiling), ..*request };
                CudaPlan::new(problem, &tuned, &self.device, &self.machine)
            }
            _ => Ok(plan),
        }
    }

    /// What would be done, without compiling anything.
    ///
    /// # Errors
    /// When no kernel computes the scheme, or not with such options.
    pub fn explain(&self, problem: &Problem, choice: Choice) -> Result<CudaPlan> {
        let request = Request {
            scheme: choice.scheme(problem.head_dim),
            accuracy: choice.accuracy(),
            ..Request::new(problem)
        };
        self.uncompiled(problem, &request)
    }
}

/// The scheme that GPU `ordinal` has kernels for and that is at least as accurate as `scheme`. Where there is none of that
/// number, rules are those of sm_90.
pub fn nearest_scheme(scheme: Scheme, ordinal: u32) -> Scheme {
    let target = Cuda::shared(ordinal).map_or(Target::SM_90A, |cuda| cuda.machine.target);
    sage_kernels::forward::nearest_scheme(scheme, target)
}

/// A call that is ready to be launched.
struct Prepared {
    plan: Arc<CudaPlan>,
    tensors: Tensors,
    /// Lengths that were copied to the GPU.
    _lists: Lists,
}

/// The GPU's time from one event to another; waits for the latter.
fn between(start: &Event, end: &Event) -> Result<Duration> {
    end.synchronize().map_err(driver)?;
    let ms = start.elapsed_ms(end).map_err(driver)?;
    Ok(Duration::from_secs_f64(f64::from(ms) / 1e3))
}

/// The driver's words and kind as an error of a call.
pub(crate) fn driver(error: sage_cuda::Error) -> Error {
    Error::Backend { kind: error.kind(), message: error.to_string() }
}

fn argument(tensor: &DeviceTensor<'_>) -> TensorArg {
    TensorArg { address: tensor.first_element(), strides: tensor.strides() }
}

/// What is asked for, before the tensors are looked at.
fn request(call: &Call<'_, DeviceTensor<'_>>, choice: Choice, lse: bool) -> Request {
    Request {
        scheme: choice.scheme(call.problem.head_dim),
        accuracy: choice.accuracy(),
        mask: match call.mask {
            None => MaskForm::None,
            Some(DeviceMask::Bool(_)) => MaskForm::Bool,
            Some(DeviceMask::Additive(tensor)) => MaskForm::Bias(tensor.dtype()),
        },
        lengths: match call.lengths {
            Lengths::Dense => sage_kernels::Lengths::Dense,
            Lengths::KvLens(_) | Lengths::DeviceKvLens(_) => sage_kernels::Lengths::KvLens,
            Lengths::Packed { .. } | Lengths::DevicePacked { .. } => sage_kernels::Lengths::Packed,
        },
        q_rows: call.q.shape()[2],
        kv_rows: call.k.shape()[2],
        aligned: false,
        has_tensor_map: false,
        lse,
        tiling: None,
    }
}

/// Addresses of the lengths on the GPU, and what was copied there.
struct Lists {
    q: u64,
    k: u64,
    _copies: [Option<Buffer>; 2],
}

impl Lists {
    fn new(stream: &Stream, lengths: &Lengths<'_, DeviceInts<'_>>) -> Result<Self> {
        let copy = |values: &[i32]| Buffer::from_slice(stream, values).map_err(driver);
        let address = |copy: &Option<Buffer>| copy.as_ref().map_or(0, Buffer::address);
        let copies = match *lengths {
            Lengths::KvLens(kv_lens) => [None, Some(copy(kv_lens)?)],
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
                [Some(copy(cu_seqlens_q)?), Some(copy(cu_seqlens_k)?)]
            }
            Lengths::Dense => [None, None],
            Lengths::DeviceKvLens(k) => return Ok(Lists { q: 0, k: k.address(), _copies: [None, None] }),
            Lengths::DevicePacked { cu_seqlens_q: q, cu_seqlens_k: k, .. } => {
                return Ok(Lists { q: q.address(), k: k.address(), _copies: [None, None] });
            }
        };
        Ok(Lists { q: address(&copies[0]), k: address(&copies[1]), _copies: copies })
    }
}

#[cfg(test)]
mod tests {
    use sage_core::BackendErrorKind;

    use super::*;

    #[test]
    fn an_error_of_the_driver_keeps_kind_and_words() {
        let of_code = |code: &str| sage_cuda::Error::Driver {
            call: "cuMemAllocAsync",
            code: code.into(),
            description: "words".into(),
        };
        for (error, kind) in [
            (of_code("CUDA_ERROR_OUT_OF_MEMORY"), BackendErrorKind::OutOfMemory),
            (of_code("CUDA_ERROR_ILLEGAL_ADDRESS"), BackendErrorKind::Lost),
            (of_code("CUDA_ERROR_UNKNOWN"), BackendErrorKind::Other),
            (sage_cuda::Error::NoDevice { ordinal: 3, count: 1 }, BackendErrorKind::NoDevice),
            (sage_cuda::Error::Forked, BackendErrorKind::Forked),
        ] {
            let (found, words) = (driver(error.clone()), error.to_string());
            assert_eq!((found.backend_kind(), found.to_string()), (Some(kind), words));
        }
    }
}
