//! Planning and running a checked call on a GPU.

use std::sync::Arc;

use sage_core::{
    Backend, BackendPlan, BlockTables, CacheBackend, CacheSize, Choice, DType, NewTokens, Operand, Result,
    Scheme, Strided,
};
use sage_cuda::Stream;
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{Alternative, Request, Tensors};
use sage_kernels::{SinkArgs, TensorArg};
use sage_ptx::Target;

use crate::launches;
use crate::lists::{Lists, kernel_lengths};
use crate::plan::CudaPlan;
use crate::predict::PredictPlan;
use crate::tensor::argument;
use crate::{CachePool, Cuda, DeviceCall, DeviceLse, DeviceMask, DeviceTensor, Tiling, driver};

/// Computes on the caller's stream, and returns when the work is there. A first call of a shape compiles its kernels;
/// later ones allocate nothing on the host, take their workspace from the stream's pool, and can be captured in a
/// graph. Lengths in host memory are copied to the GPU, which waits for the stream; in its memory they are read
/// there. Buffers of another stream must outlive the work: see [`sage_cuda::Buffer`].
impl Backend for Cuda {
    type Tensor<'a> = DeviceTensor<'a>;
    type Output<'a> = DeviceTensor<'a>;
    type Lse<'a> = DeviceLse<'a>;
    type Queue = Stream;
    type Plan = CudaPlan;

    fn name(&self) -> String {
        format!("cuda:{}", self.device().info().ordinal)
    }

    fn nearest(&self, scheme: Scheme, dtype: DType) -> Scheme {
        sage_kernels::forward::nearest_scheme(scheme, dtype, self.machine().target)
    }

    fn plan<'c>(&self, call: &DeviceCall<'c>, choice: Choice, lse: bool) -> Result<Arc<CudaPlan>> {
        let request = request(call, choice, &addresses(call, output_without_gaps(call)), lse);
        self.plan_of(&call.problem, &request)
    }

    fn run<'c>(
        &self,
        stream: &Stream,
        call: &DeviceCall<'c>,
        choice: Choice,
        out: DeviceTensor<'_>,
        lse: Option<DeviceLse<'_>>,
    ) -> Result<()> {
        match self.prepare(stream, call, choice, (out, lse), Forced::default())? {
            Some(prepared) => self.launch(stream, &prepared),
            None => Ok(()),
        }
    }
}

impl CacheBackend for Cuda {
    type Cache = CachePool;

    const SHARES_PAGES: bool = false;

    fn cache(&self, stream: &Stream, size: &CacheSize) -> Result<CachePool> {
        CachePool::new(stream, size, self.machine().target)
    }

    fn cache_bytes(&self, cache: &CachePool) -> usize {
        cache.bytes()
    }

    fn append(
        &self,
        cache: &mut CachePool,
        tables: &BlockTables,
        tokens: &NewTokens<'_, DeviceTensor<'_>>,
    ) -> Result<()> {
        cache.append(self, tables, tokens)
    }

    fn attend<'c>(
        &self,
        cache: &CachePool,
        _: &BlockTables,
        sequences: &[usize],
        call: &DeviceCall<'c>,
        out: DeviceTensor<'_>,
        lse: Option<DeviceLse<'_>>,
    ) -> Result<()> {
        cache.attend(self, sequences, call, out, lse)
    }

    fn shorten(&self, cache: &mut CachePool, tables: &BlockTables) -> Result<()> {
        cache.copy_lens(tables)
    }
}

/// What a caller forces in place of the planner's choice.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Forced {
    pub tiling: Option<Tiling>,
    pub splits: Option<usize>,
}

/// A call that is ready to be launched.
pub(crate) struct Prepared {
    pub plan: Arc<CudaPlan>,
    pub tensors: Tensors,
    /// Lengths that were copied to the GPU.
    _lists: Lists,
}

impl Cuda {
    /// The plan of a call over a map of such blocks that `prediction` makes.
    pub(crate) fn plan_over(
        &self,
        call: &DeviceCall<'_>,
        blocks: [usize; 2],
        prediction: Arc<PredictPlan>,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<CudaPlan>> {
        let mut tensors = addresses(call, output_without_gaps(call));
        // Of a predicted map every head of every sequence has blocks of its own.
        tensors.blocks.strides = [1; 4];
        let problem = call.problem.blocks(blocks);
        let request = request(call, choice, &tensors, lse);
        Ok(Arc::new(self.new_plan(&problem, &request)?.with_prediction(prediction)))
    }

    /// Ways to compute a call, of which the planner takes one.
    ///
    /// # Errors
    /// When no kernel computes it.
    pub fn alternatives(&self, call: &DeviceCall<'_>, choice: Choice) -> Result<Vec<Alternative>> {
        let request = request(call, choice, &addresses(call, output_without_gaps(call)), false);
        Alternative::all(&call.problem, &request, self.machine())
    }

    /// Computes a call in one of its [`Cuda::alternatives`], as [`Backend::run`] does in the planner's.
    ///
    /// # Errors
    /// As [`Backend::run`].
    pub fn run_alternative(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        alternative: &Alternative,
        out: DeviceTensor<'_>,
    ) -> Result<()> {
        let forced = Forced { tiling: Some(alternative.tiling), splits: Some(alternative.splits) };
        match self.prepare(stream, call, alternative.scheme.into(), (out, None), forced)? {
            Some(prepared) => self.launch(stream, &prepared),
            None => Ok(()),
        }
    }

    fn launch(&self, stream: &Stream, prepared: &Prepared) -> Result<()> {
        let kernels = prepared.plan.kernels(self)?;
        launches::run(prepared.plan.pass(), kernels, &prepared.tensors, stream, |(_, kernel, grid, args)| {
            // SAFETY: see `launches::OnStream`.
            unsafe { kernel.launch(stream, grid, args) }.map_err(driver)
        })
    }

    /// A call's plan and addresses; none where there is nothing to compute.
    pub(crate) fn prepare(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        choice: Choice,
        (out, lse): (DeviceTensor<'_>, Option<DeviceLse<'_>>),
        Forced { tiling, splits }: Forced,
    ) -> Result<Option<Prepared>> {
        sage_cuda::check_not_forked().map_err(driver)?;
        let geometry = call.check_output(out.dtype(), out.geometry())?;
        let out = out.with_geometry(geometry);
        if let Some(lse) = lse {
            lse.check(call.lse_rows())?;
        }
        if computes_nothing(call) {
            return Ok(None);
        }
        let mut tensors = addresses(call, argument(&out));
        let request = Request { tiling, splits, ..request(call, choice, &tensors, lse.is_some()) };
        let plan = self.plan_of(&call.problem, &request)?;
        let lists = Lists::new(stream, &call.lengths)?;
        (tensors.cu_seqlens_q, tensors.cu_seqlens_k) = (lists.q, lists.k);
        tensors.lse = lse.map_or(0, |lse| lse.address());
        let tensors = plan.forward.arranged(&tensors);
        Ok(Some(Prepared { plan, tensors, _lists: lists }))
    }
}

impl BackendPlan for CudaPlan {
    fn scheme(&self) -> &Scheme {
        self.forward.scheme()
    }

    fn workspace_bytes(&self) -> usize {
        self.workspace()
    }
}

/// [`Backend::nearest`] where there is no GPU to ask: by the rules of sm_90.
pub fn nearest_on_hopper(scheme: Scheme, dtype: DType) -> Scheme {
    sage_kernels::forward::nearest_scheme(scheme, dtype, Target::SM_90A)
}

/// Whether a call has no query.
pub(crate) fn computes_nothing(call: &DeviceCall<'_>) -> bool {
    call.problem.q_len == 0 || call.problem.batch == 0 || call.problem.num_q_heads == 0
}

/// An output of which every row is as far from the next as it is long.
fn output_without_gaps(call: &DeviceCall<'_>) -> TensorArg {
    TensorArg { address: 0, strides: [call.problem.value_dim as i64; 3] }
}

/// Where a call's tensors and its output lie.
fn addresses(call: &DeviceCall<'_>, out: TensorArg) -> Tensors {
    Tensors {
        q: argument(&call.q),
        k: argument(&call.k),
        v: argument(&call.v),
        out,
        mask: call.mask.map_or(TensorArg::default(), |mask| mask.argument()),
        blocks: call.block_mask.map_or(TensorArg::default(), |mask| mask.blocks.argument()),
        sinks: sinks(call),
        ..Tensors::default()
    }
}

/// Where a call's attention sinks lie.
pub(crate) fn sinks(call: &DeviceCall<'_>) -> SinkArgs {
    call.sinks.map_or(SinkArgs::default(), |sinks| SinkArgs::of_heads(sinks.first_element()))
}

/// What kernels of a call are planned by, beside its problem.
fn request(call: &DeviceCall<'_>, choice: Choice, tensors: &Tensors, lse: bool) -> Request {
    let aligned = tensors.aligned(&call.problem);
    Request {
        scheme: choice.scheme(call.problem.head_dim),
        accuracy: choice.accuracy(),
        mask: match call.mask {
            None => MaskForm::None,
            Some(DeviceMask::Bool(_)) => MaskForm::Bool,
            Some(DeviceMask::Additive(tensor)) => MaskForm::Bias(tensor.dtype()),
        },
        lengths: kernel_lengths(&call.lengths),
        q_rows: call.q.shape()[2],
        kv_rows: call.k.shape()[2],
        aligned,
        values_in_keys: tensors.values_in_keys(&call.problem),
        has_tensor_map: aligned && tensors.k.has_map(call.k.shape()) && tensors.v.has_map(call.v.shape()),
        has_query_map: aligned && tensors.q.has_map(call.q.shape()),
        lse,
        ..Request::new(&call.problem)
    }
    .with_masks_of(tensors)
}
