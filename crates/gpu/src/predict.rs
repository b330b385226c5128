//! Predicting which blocks of the score matrix are worth computing, on a GPU.

use std::sync::Arc;

use sage_core::sparse::{BlockMap, PaddedBlocks, PerHead, Predictor, Select};
use sage_core::{BlockMask, Error, Geometry, Result, Strided};
use sage_cuda::{Buffer, Kernel, Stream};
use sage_kernels::pass::Pass;
use sage_kernels::predict::{LengthLists, PredictCall, PredictTensors};

use crate::launches::{self, PassKernels};
use crate::lists::{Lists, kernel_lengths};
use crate::loading::Needed;
use crate::tensor::argument;
use crate::{Cuda, DeviceBytes, DeviceCall, driver};

/// A map of blocks in a GPU's memory, which belongs to the stream that predicted it.
#[derive(Debug)]
pub struct CudaMap {
    flags: Buffer,
    shape: [usize; 4],
    /// That of `shape` without gaps.
    geometry: Geometry,
    block_q: usize,
    block_k: usize,
}

impl CudaMap {
    /// `[batch, num_q_heads, q_blocks, k_blocks]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Queries in a block.
    pub fn block_q(&self) -> usize {
        self.block_q
    }

    /// Keys in a block.
    pub fn block_k(&self) -> usize {
        self.block_k
    }

    /// The map as a call to attention takes it.
    pub fn mask(&self) -> BlockMask<DeviceBytes<'_>> {
        self.blocks()
    }

    /// [`CudaMap::mask`] for any time.
    fn blocks<'m>(&self) -> BlockMask<DeviceBytes<'m>> {
        // SAFETY: the buffer has a byte for each block. Whoever keeps the mask for longer than the map lives launches
        // before the map is dropped, and memory is freed in the stream's order.
        let blocks = unsafe { DeviceBytes::from_raw(self.geometry, self.flags.address()) };
        BlockMask { blocks, block_q: self.block_q, block_k: self.block_k }
    }

    /// Writes the map to memory of the GPU without gaps, a byte for each block, in the order of its stream and without
    /// waiting. `target` may have more blocks of keys than the map, which leaves out those behind the last key that any
    /// query sees: none of them is kept.
    ///
    /// # Errors
    /// When `target` has another shape, and what the driver says.
    pub fn copy_to(&self, target: DeviceBytes<'_>) -> Result<()> {
        let [batch, heads, q_blocks, k_blocks] = self.shape;
        let given = target.geometry();
        let fits = given.is_contiguous()
            && matches!(given.shape(), &[b, h, q, k] if [b, h, q] == [batch, heads, q_blocks] && k >= k_blocks);
        if !fits {
            let found = format!("{:?} with strides {:?}", given.shape(), given.strides());
            let wanted = format!("{:?} without gaps", self.shape);
            return Err(Error::Shape { name: "map".into(), found, wanted });
        }
        let (rows, columns) = (batch * heads * q_blocks, given.shape()[3]);
        // SAFETY: whoever made `target` says that these bytes are the GPU's, and that nobody else uses them meanwhile.
        unsafe { self.flags.copy_rows_to(target.first_byte(), rows, columns) }.map_err(driver)
    }

    /// A copy in the host's memory. Waits for the stream.
    ///
    /// # Errors
    /// What the driver says, or when the stream is being captured.
    pub fn to_host(&self) -> Result<BlockMap> {
        let bytes: Vec<u8> = self.flags.to_vec().map_err(driver)?;
        let flags = bytes.into_iter().map(|byte| byte != 0).collect();
        BlockMap::new(flags, self.shape, self.block_q, self.block_k)
    }

    /// A call over this map, which must outlive the launches of the call.
    pub(crate) fn call<'c>(&self, call: &DeviceCall<'c>) -> DeviceCall<'c> {
        let mut over = *call;
        over.problem = call.problem.blocks([self.block_q, self.block_k]);
        over.block_mask = Some(self.blocks());
        over
    }
}

/// What would do where a GPU lacks an instruction.
const INSTEAD: &str = "predict the map on the host";

/// How a GPU predicts a map, and the compiled kernels for it.
#[derive(Debug)]
pub(crate) struct PredictPlan {
    pub pass: Pass<PredictTensors>,
    kernels: PassKernels,
}

/// What a prediction is planned by.
pub(crate) type PredictKey = (PredictCall, Predictor);

impl PredictPlan {
    pub fn new((call, predictor): &PredictKey) -> Result<Self> {
        Ok(PredictPlan { pass: call.pass(predictor)?, kernels: PassKernels::default() })
    }

    pub fn kernels(&self, cuda: &Cuda) -> Result<&[Kernel]> {
        self.kernels.get(&self.pass, cuda, INSTEAD)
    }

    /// The kernels that are to be compiled for it.
    pub fn needed(&self) -> Vec<Needed> {
        Needed::by(&self.pass, INSTEAD)
    }
}

/// A prediction that is ready to be launched.
pub(crate) struct PreparedPrediction {
    pub plan: Arc<PredictPlan>,
    pub tensors: PredictTensors,
    pub map: CudaMap,
    /// What was copied to the GPU.
    _lists: Lists,
    _numbers: Numbers,
}

impl Cuda {
    /// The plan for a call's prediction, made at its first use.
    pub(crate) fn prediction(
        &self,
        call: &DeviceCall<'_>,
        predictor: &Predictor,
    ) -> Result<Arc<PredictPlan>> {
        let lengths = kernel_lengths(&call.lengths);
        let tensors = tensors(call);
        let aligned = tensors.aligned(call.problem.head_dim);
        let padded_keys = predictor.k_padding.is_some();
        let [q_rows, kv_rows] = [&call.q, &call.k].map(|tensor| tensor.shape()[2]);
        let call =
            PredictCall { lengths, q_rows, kv_rows, aligned, padded_keys, ..PredictCall::new(&call.problem) };
        self.prediction_of((call, planned_by(predictor)))
    }

    /// A call's prediction, with memory for the map.
    pub(crate) fn prepare_prediction(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        predictor: &Predictor,
    ) -> Result<PreparedPrediction> {
        sage_cuda::check_not_forked().map_err(driver)?;
        let plan = self.prediction(call, predictor)?;
        let shape = predictor.shape(&call.problem);
        let geometry = Geometry::contiguous("block_map", &shape)?;
        let flags = Buffer::new(stream, geometry.len()).map_err(driver)?;
        let (block_q, block_k) = (predictor.block_q, predictor.block_k);
        let map = CudaMap { flags, shape, geometry, block_q, block_k };
        let lists = Lists::new(stream, &call.lengths)?;
        let numbers = Numbers::new(self, stream, predictor)?;
        let lengths = LengthLists { queries: lists.q, keys: lists.k };
        let tensors = PredictTensors { lengths, map: map.flags.address(), ..numbers.tensors(tensors(call)) };
        Ok(PreparedPrediction { plan, tensors, map, _lists: lists, _numbers: numbers })
    }

    /// Predicts the map of a call on a stream.
    pub(crate) fn predict_map(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        predictor: &Predictor,
    ) -> Result<CudaMap> {
        let prepared = self.prepare_prediction(stream, call, predictor)?;
        let kernels = prepared.plan.kernels(self)?;
        launches::run(&prepared.plan.pass, kernels, &prepared.tensors, stream, |(_, kernel, grid, args)| {
            // SAFETY: see `launches::OnStream`; the map has a byte for each block, and the numbers one for each that the
            // predictor was checked to have.
            unsafe { kernel.launch(stream, grid, args) }.map_err(driver)
        })?;
        Ok(prepared.map)
    }
}

/// Where a call's queries and keys lie.
fn tensors(call: &DeviceCall<'_>) -> PredictTensors {
    PredictTensors { q: argument(&call.q), k: argument(&call.k), ..PredictTensors::default() }
}

/// The predictor without what its plan does not depend on: padding and numbers that heads have of their own, which
/// kernels read from memory.
fn planned_by(predictor: &Predictor) -> Predictor {
    let planned = |number: &PerHead| match number {
        PerHead::All(number) => PerHead::All(*number),
        PerHead::Each(_) => PerHead::Each(Vec::new()),
    };
    let select = match &predictor.select {
        Select::TopK(share) => Select::TopK(planned(share)),
        Select::Cdf(share) => Select::Cdf(planned(share)),
        Select::Sigmas(tau) => Select::Sigmas(planned(tau)),
        Select::TopKTopP { k, p } => Select::TopKTopP { k: planned(k), p: planned(p) },
        other => other.clone(),
    };
    let mut plan = Predictor::new(select)
        .blocks(predictor.block_q, predictor.block_k)
        .smooth_k(predictor.smooth_k)
        .sink_k(predictor.sink_k.clone())
        .sink_q(predictor.sink_q.clone())
        .original_tails(predictor.original_tails);
    plan.similarity = predictor.similarity.as_ref().map(planned);
    plan
}

/// Numbers of a predictor that kernels read from memory.
struct Numbers {
    top_share: Option<Arc<Buffer>>,
    amount: Option<Arc<Buffer>>,
    similarity: Option<Arc<Buffer>>,
    q_sizes: Option<Arc<Buffer>>,
    k_sizes: Option<Arc<Buffer>>,
}

impl Numbers {
    fn new(gpu: &Cuda, stream: &Stream, predictor: &Predictor) -> Result<Self> {
        let list = |bits: &[u32]| gpu.numbers().get(gpu, stream, bits).map(Some);
        let each = |number: Option<&PerHead>| match number {
            Some(PerHead::Each(numbers)) => list(bytemuck::cast_slice(numbers)),
            Some(PerHead::All(_)) | None => Ok(None),
        };
        let sizes = |padding: Option<&PaddedBlocks>| {
            let Some(padding) = padding else { return Ok(None) };
            // A size that does not fit is that of a longer block than there are tokens, all of which it has.
            let size =
                |&size: &usize| u32::try_from(size).map_or(i32::MAX as u32, |size| size.min(i32::MAX as u32));
            list(&padding.sizes().iter().map(size).collect::<Vec<u32>>())
        };
        let [top_share, amount] = shares(&predictor.select);
        Ok(Numbers {
            top_share: each(top_share)?,
            amount: each(amount)?,
            similarity: each(predictor.similarity.as_ref())?,
            q_sizes: sizes(predictor.q_padding.as_ref())?,
            k_sizes: sizes(predictor.k_padding.as_ref())?,
        })
    }

    /// Their addresses beside those of `tensors`.
    fn tensors(&self, tensors: PredictTensors) -> PredictTensors {
        let address = |list: &Option<Arc<Buffer>>| list.as_ref().map_or(0, |list| list.address());
        PredictTensors {
            top_share: address(&self.top_share),
            amount: address(&self.amount),
            similarity: address(&self.similarity),
            q_sizes: address(&self.q_sizes),
            k_sizes: address(&self.k_sizes),
            ..tensors
        }
    }
}

/// The hyper-parameters of a selection: the share of blocks, and what else it goes by.
fn shares(select: &Select) -> [Option<&PerHead>; 2] {
    match select {
        Select::TopK(share) => [Some(share), None],
        Select::Cdf(amount) | Select::Sigmas(amount) => [None, Some(amount)],
        Select::TopKTopP { k, p } => [Some(k), Some(p)],
        _ => [None, None],
    }
}
