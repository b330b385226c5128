//! Loading the kernels of calls before they are made.

use std::sync::{Arc, Mutex, PoisonError};

use sage_core::sparse::Predictor;
use sage_core::{
    Backend, BlockMask, BlockTables, CacheBackend, CacheSize, Call, Choice, DType, Geometry, NewTokens,
    Operand, Result, Scheme, SparseBackend, Strided,
};

use crate::backend::computes_nothing;
use crate::cache_shape::{CacheShape, INSTEAD, check_options, runs, sixteen_bits};
use crate::loading::{LoadedKernel, Needed};
use crate::predict::PredictPlan;
use crate::shape::{flags_stand_in, stand_in};
use crate::{Cuda, CudaPlan, DeviceCall, TensorShape};

/// A GPU as a backend of tensors without memory: a call is planned as [`Cuda`] plans it, and its kernels are noted,
/// which [`WarmUp::load`] then compiles and loads, those of all calls side by side. Clones note in one place.
///
/// Plans and kernels are the GPU's from there on, and the disk cache has what can be kept there, so that neither this
/// process nor the next ones compile anything for such calls. What a plan goes by is a call's shapes, strides and
/// options, and which addresses are multiples of 16: those of shapes are. For slices that begin elsewhere, give a
/// geometry with an offset.
#[derive(Clone, Debug)]
pub struct WarmUp {
    cuda: Cuda,
    noted: Arc<Mutex<Noted>>,
}

/// What calls need.
#[derive(Debug, Default)]
struct Noted {
    kernels: Vec<Needed>,
    plans: Vec<Arc<CudaPlan>>,
    predictions: Vec<Arc<PredictPlan>>,
}

impl Cuda {
    /// A backend on which calls are planned and not computed, to load their kernels before they are made.
    pub fn warm_up(&self) -> WarmUp {
        WarmUp { cuda: self.clone(), noted: Arc::default() }
    }
}

impl WarmUp {
    /// The GPU.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// Compiles and loads the kernels of the calls that were made since the last time: each once, in the order in which
    /// calls named them.
    ///
    /// # Errors
    /// What the driver says of the first kernel that it cannot compile. The others are loaded all the same.
    pub fn load(&self) -> Result<Vec<LoadedKernel>> {
        sage_cuda::check_not_forked().map_err(crate::driver)?;
        let Noted { kernels, plans, predictions } = std::mem::take(&mut *self.lock());
        let loaded = self.cuda.kernels().load(&kernels, &self.cuda)?;
        plans.iter().try_for_each(|plan| plan.kernels(&self.cuda).map(drop))?;
        predictions.iter().try_for_each(|plan| plan.kernels(&self.cuda).map(drop))?;
        Ok(loaded)
    }

    /// Notes what a call needs that computes something.
    fn note(&self, call: &DeviceCall<'_>, choice: Choice, lse: bool) -> Result<()> {
        let plan = Backend::plan(&self.cuda, call, choice, lse)?;
        if computes_nothing(call) {
            return Ok(());
        }
        let mut noted = self.lock();
        noted.kernels.extend(plan.needed());
        noted.plans.push(plan);
        Ok(())
    }

    fn note_prediction(&self, call: &DeviceCall<'_>, predictor: &Predictor) -> Result<()> {
        let plan = self.cuda.prediction(call, predictor)?;
        let mut noted = self.lock();
        noted.kernels.extend(plan.needed());
        noted.predictions.push(plan);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for WarmUp {
    type Tensor<'a> = TensorShape;
    type Output<'a> = ();
    type Lse<'a> = ();
    type Queue = ();
    type Plan = CudaPlan;

    fn name(&self) -> String {
        self.cuda.name()
    }

    fn nearest(&self, scheme: Scheme, dtype: DType) -> Scheme {
        self.cuda.nearest(scheme, dtype)
    }

    fn plan<'c>(&self, call: &Call<'c, TensorShape>, choice: Choice, lse: bool) -> Result<Arc<CudaPlan>> {
        self.cuda.plan(&stand_in(call), choice, lse)
    }

    fn run<'c>(
        &self,
        (): &(),
        call: &Call<'c, TensorShape>,
        choice: Choice,
        (): (),
        lse: Option<()>,
    ) -> Result<()> {
        self.note(&stand_in(call), choice, lse.is_some())
    }
}

impl SparseBackend for WarmUp {
    type Map = ();

    fn plan_sparse<'c>(
        &self,
        call: &Call<'c, TensorShape>,
        predictor: &Predictor,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<CudaPlan>> {
        self.cuda.plan_sparse(&stand_in(call), predictor, choice, lse)
    }

    fn predict<'c>(&self, (): &(), call: &Call<'c, TensorShape>, predictor: &Predictor) -> Result<()> {
        self.note_prediction(&stand_in(call), predictor)
    }

    fn run_sparse<'c>(
        &self,
        (): &(),
        call: &Call<'c, TensorShape>,
        predictor: &Predictor,
        choice: Choice,
        (): (),
        lse: Option<()>,
    ) -> Result<()> {
        let mut call = stand_in(call);
        self.note_prediction(&call, predictor)?;
        let (block_q, block_k) = (predictor.block_q, predictor.block_k);
        let geometry = Geometry::contiguous("block_map", &predictor.shape(&call.problem))?;
        call.problem = call.problem.blocks([block_q, block_k]);
        call.block_mask = Some(BlockMask { blocks: flags_stand_in(&geometry), block_q, block_k });
        self.note(&call, choice, lse.is_some())
    }
}

/// Of a cache that nothing is stored in, the passes are noted: of tokens appended as many as there are, of attention
/// over as many as were.
impl CacheBackend for WarmUp {
    type Cache = CacheShape;

    const SHARES_PAGES: bool = false;

    fn cache(&self, (): &(), size: &CacheSize) -> Result<CacheShape> {
        CacheShape::new(size, self.cuda.machine().target)
    }

    fn cache_bytes(&self, _: &CacheShape) -> usize {
        0
    }

    fn append(
        &self,
        cache: &mut CacheShape,
        _: &BlockTables,
        tokens: &NewTokens<'_, TensorShape>,
    ) -> Result<()> {
        let dtype = sixteen_bits("k", tokens.k.dtype())?;
        let count = tokens.k.geometry().shape()[2];
        for run in runs(tokens.sequences).filter(|_| count > 0) {
            self.lock().kernels.extend(Needed::by(&cache.append(dtype, run.count, count).pass(), INSTEAD));
        }
        Ok(())
    }

    fn attend<'c>(
        &self,
        cache: &CacheShape,
        _: &BlockTables,
        sequences: &[usize],
        call: &Call<'c, TensorShape>,
        (): (),
        lse: Option<()>,
    ) -> Result<()> {
        check_options(call)?;
        let planned = cache.attend(&call.problem, lse.is_some())?;
        for run in runs(sequences) {
            let mut planned = planned;
            planned.sequences = run.count;
            self.lock().kernels.extend(Needed::by(&planned.pass(self.cuda.machine())?, INSTEAD));
        }
        Ok(())
    }

    fn shorten(&self, _: &mut CacheShape, _: &BlockTables) -> Result<()> {
        Ok(())
    }
}
