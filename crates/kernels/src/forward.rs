//! A whole forward pass: which kernels, in which order, with which arguments and which workspace.
//!
//! A [`Forward`] knows no driver: whoever runs it, on a GPU or in the emulator, loads [`Forward::programs`], zeroes
//! [`Forward::zeroed_bytes`] at the workspace's start (often none), and launches what [`Forward::run`] hands over, in order.

use sage_core::{
    Accumulator, Alignment, DType, Error, Granularity, IntBits, IntQuantizer, Problem, Pv, Qk, Result,
    ScaleRows, Scheme, SmoothK, SmoothQ,
};
use sage_ptx::{Arg, BoxedTensor, Program, Target};

use crate::attention::{
    AttentionArgs, AttentionConfig, Engine, MaskForm, Scores, Tiling, ValueSource, Values, attention,
    boxed_tensors, padded_dim, stage_bytes,
};
pub use crate::choice::int8_scheme;
use crate::choice::{FEW_QUERIES, choose, with_own_values};
use crate::combine::{CombineArgs, CombineConfig};
use crate::preprocess::{
    ColumnStatistics, ConvertVArgs, ConvertVConfig, DeltaSArgs, DeltaSConfig, KeyMean, QuantizeKArgs,
    QuantizeKConfig, QuantizeVArgs, QuantizeVConfig, QueryMeansArgs, QueryMeansConfig, SampleArgs,
    SampleConfig, Source, ValueScales,
};
use crate::sequence::{KEY_TILE, Lengths, total_key_tiles};
use crate::tuning::{Shape, Tuned, tiling};

/// "No limit" of a window: far beyond any key, and far from overflow.
const NO_LIMIT: i32 = 1 << 30;

/// Bytes of K or V by which their statistics run ahead of quantising. At 16 KiB a tile these are more blocks than a GPU
/// holds at once, so that none waits; and a quarter of the L2 cache of the large GPUs, which is cut in halves that may
/// both hold a line, with what is being written beside it.
const LEAD_BYTES: usize = 12 << 20;

/// Bytes of K and V that attention works on at once where pieces of work differ in length: half the L2 cache of an H100, each
/// half of which may hold a copy.
const CACHED_BYTES: usize = 25 << 20;

/// The GPU that a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gpu {
    /// What its code is compiled for.
    pub target: Target,
    /// Its multiprocessors.
    pub multiprocessors: usize,
}

/// What a forward pass is asked for, beside the problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// The scheme, or none for the planner's choice.
    pub scheme: Option<Scheme>,
    /// Largest relative L1 error on N(0, 1) data that the planner's choice may have; none for that of INT8 scores.
    pub accuracy: Option<f32>,
    /// Explicit mask.
    pub mask: MaskForm,
    /// Where lengths come from.
    pub lengths: Lengths,
    /// Query rows of the tensors: of a sequence, or of all when packed.
    pub q_rows: usize,
    /// Key rows of the tensors.
    pub kv_rows: usize,
    /// Whether every row of Q, K, V and the output starts at a multiple of 16 bytes.
    pub aligned: bool,
    /// Whether tensor maps can describe K and V: rows are aligned, and strides positive multiples of 16 bytes.
    pub boxed: bool,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
    /// The attention kernel's tile shape, or none for the tuning table's.
    pub tiling: Option<Tiling>,
}

impl Request {
    /// Whether every query sees as many keys.
    fn pieces_alike(&self, problem: &Problem) -> bool {
        problem.band.is_full() && self.lengths == Lengths::Dense
    }
}

/// A tensor of 16-bit elements in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorArg {
    /// Address of element 0.
    pub address: u64,
    /// Strides of batch, heads and rows, in elements.
    pub strides: [i64; 3],
}

/// What a pass reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tensors {
    /// Queries.
    pub q: TensorArg,
    /// Keys.
    pub k: TensorArg,
    /// Values.
    pub v: TensorArg,
    /// Output.
    pub out: TensorArg,
    /// Log-sum-exp, row-major; 0 where it is not wanted.
    pub lse: u64,
    /// Explicit mask, and its strides of batch, heads, queries and keys in elements.
    pub mask: (u64, [i64; 4]),
    /// Boundaries of packed queries.
    pub cu_seqlens_q: u64,
    /// Boundaries of packed keys, or valid keys of each batch entry.
    pub cu_seqlens_k: u64,
}

/// How a problem is computed on a GPU.
#[derive(Clone, Debug)]
pub struct Forward {
    problem: Problem,
    request: Request,
    scheme: Scheme,
    steps: Vec<Step>,
    shape: Shape,
    splits: usize,
    layout: Layout,
    multiprocessors: u32,
    reasons: Vec<String>,
}

/// Who runs the launches of a pass: a GPU's stream, or the emulator.
pub trait Launcher {
    /// What can go wrong.
    type Error;

    /// The tensor map of a tensor, as an argument.
    ///
    /// # Errors
    /// Where there can be none.
    fn tensor_map(&mut self, tensor: &BoxedTensor) -> std::result::Result<Arg, Self::Error>;

    /// Launches kernel `kernel` of [`Forward::programs`].
    ///
    /// # Errors
    /// Where the launch fails.
    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg])
    -> std::result::Result<(), Self::Error>;
}

/// A launch, before its arguments are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    QueryMeans(QueryMeansConfig),
    SampleK(SampleConfig),
    QuantizeK(QuantizeKConfig),
    DeltaS(DeltaSConfig),
    SampleV(SampleConfig),
    QuantizeV(QuantizeVConfig),
    ConvertV(ConvertVConfig),
    Attention(AttentionConfig),
    Combine(CombineConfig),
}

/// Offsets in the workspace.
#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    pieces_taken: Option<u64>,
    k_arrivals: u64,
    v_arrivals: u64,
    v_marked: u64,
    /// End of the counters, which the first launch that samples K, or who runs the pass, sets to zero.
    counters: u64,
    k: u64,
    k_scale: u64,
    k_mean: u64,
    k_partials: u64,
    v: u64,
    v_scale: u64,
    v_mean: u64,
    v_factor: u64,
    v_partials: u64,
    q_mean: u64,
    delta_s: u64,
    partial: u64,
    partial_lse: u64,
    bytes: u64,
}

impl Forward {
    /// The pass for a problem.
    ///
    /// # Errors
    /// When no kernel computes the scheme, or not with such options or on such a GPU.
    pub fn new(problem: &Problem, request: &Request, gpu: &Gpu) -> Result<Self> {
        if problem.dtype == DType::F32 {
            return Err(Error::DType {
                name: "q".into(),
                found: "f32".into(),
                wanted: "f16 or bf16 on a GPU".into(),
            });
        }
        if problem.block_masked {
            return Err(Error::unsupported("block_mask", "not on a GPU yet"));
        }
        let mut reasons = Vec::new();
        let scheme = match request.scheme {
            Some(scheme) => scheme,
            None => {
                let (scheme, reason) = choose(problem, request, gpu)?;
                reasons.push(reason);
                scheme
            }
        };
        let scheme = with_own_values(scheme, problem.dtype, &mut reasons);
        let pass = Pass { problem, request, gpu, scheme: &scheme };
        let (steps, shape, splits) = pass.steps(&mut reasons)?;
        let layout = pass.layout(&steps, splits);
        Ok(Forward {
            problem: *problem,
            request: *request,
            scheme,
            steps,
            shape,
            splits,
            layout,
            multiprocessors: gpu.multiprocessors as u32,
            reasons,
        })
    }

    /// The scheme that is computed.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// The launches, in order.
    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The kernels, in the order of their launches.
    pub fn programs(&self) -> Vec<Program> {
        self.steps.iter().map(Step::program).collect()
    }

    /// Names of the kernels, in the order of their launches.
    pub fn kernel_names(&self) -> Vec<String> {
        self.steps.iter().map(Step::name).collect()
    }

    /// Bytes of workspace, to be aligned to 256.
    pub fn workspace_bytes(&self) -> usize {
        self.layout.bytes as usize
    }

    /// Bytes at the workspace's start that must be zeros before the first launch.
    pub fn zeroed_bytes(&self) -> usize {
        let by_a_launch = self.steps.iter().any(|step| matches!(step, Step::SampleK(_)));
        if by_a_launch { 0 } else { self.layout.counters as usize }
    }

    /// What the attention kernel's tile shape is chosen for.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Parts that keys are split into.
    pub fn splits(&self) -> usize {
        self.splits
    }

    /// Why the pass is what it is, a sentence for each choice.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// Hands every launch over, in order. Allocates nothing.
    ///
    /// # Errors
    /// The first of `launcher`.
    pub fn run<L: Launcher>(
        &self,
        tensors: &Tensors,
        workspace: u64,
        launcher: &mut L,
    ) -> std::result::Result<(), L::Error> {
        let arguments = Arguments {
            problem: &self.problem,
            request: &self.request,
            splits: self.splits,
            multiprocessors: self.multiprocessors,
            q_block: query_block(&self.steps),
            q_blocks: query_blocks(&self.problem, &self.steps),
            layout: &self.layout,
            tensors,
            workspace,
            v_max: match self.scheme.pv {
                Pv::Fp8 { v_max, .. } => v_max,
                _ => 0.0,
            },
        };
        for (index, step) in self.steps.iter().enumerate() {
            arguments.launch(step, index, launcher)?;
        }
        Ok(())
    }
}

/// What the choice of kernels depends on.
struct Pass<'a> {
    problem: &'a Problem,
    request: &'a Request,
    gpu: &'a Gpu,
    scheme: &'a Scheme,
}

impl Pass<'_> {
    fn source(&self) -> Source {
        Source {
            dtype: self.problem.dtype,
            head_dim: self.problem.head_dim,
            aligned: self.request.aligned,
            lengths: self.request.lengths,
        }
    }

    fn steps(&self, reasons: &mut Vec<String>) -> Result<(Vec<Step>, Shape, usize)> {
        let (problem, request, scheme) = (self.problem, self.request, self.scheme);
        if scheme.rotate {
            return Err(Error::unsupported("scheme with rotation", "no GPU kernel rotates Q and K yet"));
        }
        let scores = match scheme.qk {
            Qk::Full => Scores::Full,
            Qk::Int(quantizer) => Scores::Int(checked(quantizer)?),
            Qk::Nvfp4 => {
                return Err(Error::unsupported("scheme with NVFP4 scores", "no GPU kernel computes it yet"));
            }
        };
        let quantised = matches!(scores, Scores::Int(_));
        let (values, convert) = self.values()?;
        let source = self.source();
        let mut steps = Vec::new();

        let smooth_q = match scheme.smooth.q {
            SmoothQ::Off => None,
            SmoothQ::Block(rows) if rows.is_multiple_of(64) => Some(rows),
            SmoothQ::Block(rows) => {
                return Err(Error::value("smooth.q block", rows, "a multiple of 64 on a GPU"));
            }
            SmoothQ::Sequence => Some(problem.q_len.next_multiple_of(64).max(64)),
        };
        if let Some(block) = smooth_q {
            let lengths = if request.lengths == Lengths::Packed { Lengths::Packed } else { Lengths::Dense };
            steps.push(Step::QueryMeans(QueryMeansConfig { source: Source { lengths, ..source }, block }));
        }
        if quantised {
            if let Scores::Int(quantizer) = scores {
                let IntQuantizer { bits, granularity, rounding, zero_group, .. } = quantizer;
                let mean = match scheme.smooth.k {
                    SmoothK::Off => KeyMean::Zero,
                    SmoothK::Mean => KeyMean::Collected,
                    SmoothK::Sampled(rows) => {
                        let statistics = ColumnStatistics::Mean;
                        steps.push(Step::SampleK(SampleConfig { source, rows, statistics }));
                        KeyMean::Given
                    }
                };
                steps.push(Step::QuantizeK(QuantizeKConfig {
                    source,
                    bits,
                    granularity,
                    rounding,
                    zero_group,
                    mean,
                }));
            }
        } else if scheme.smooth.k.is_on() || smooth_q.is_some() {
            return Err(Error::unsupported("smoothing of full-precision scores", "it changes nothing there"));
        }
        if smooth_q.is_some() {
            steps.push(Step::DeltaS(DeltaSConfig { source, smooth_k: scheme.smooth.k.is_on() }));
        }
        if let Values::Fp8(_) = values {
            let smooth = scheme.smooth.v;
            let quantise = |scales| Step::QuantizeV(QuantizeVConfig { source, smooth, scales });
            match scheme.pv {
                Pv::Fp8 { rows: ScaleRows::Sampled(rows), .. } => {
                    if smooth {
                        let wanted = "V's mean is of all rows, and so are its scales then";
                        return Err(Error::unsupported("smooth V with sampled scales", wanted));
                    }
                    let statistics = ColumnStatistics::Scale;
                    steps.push(Step::SampleV(SampleConfig { source, rows, statistics }));
                    steps.push(quantise(ValueScales::Given));
                    steps.push(quantise(ValueScales::CollectedWhereMarked));
                }
                _ => steps.push(quantise(ValueScales::Collected)),
            }
        } else if scheme.smooth.v {
            return Err(Error::unsupported(
                "smooth V with 16-bit P·V",
                "on a GPU V is smoothed for FP8 only",
            ));
        }
        if let Some(to) = convert {
            steps.push(Step::ConvertV(ConvertVConfig { source, to }));
        }

        let shape = Shape {
            integer: quantised,
            fp8: matches!(values, Values::Fp8(_)),
            two_level: matches!(
                values,
                Values::F16(Accumulator::F16ThenF32)
                    | Values::Fp8(Accumulator::F16ThenF32 | Accumulator::F32ThenF32)
            ),
            padded_dim: padded_dim(problem.head_dim),
            plain: request.mask != MaskForm::None
                || problem.logit_softcap.is_some()
                || smooth_q.is_some()
                || matches!(scores, Scores::Int(q) if q.granularity == Granularity::PerToken),
            unaligned: !request.aligned,
            max_rows_per_warp: max_rows_per_warp(&scores),
            warpgroups: self.suits_warpgroups(&scores, &values),
            per_block: matches!(scores, Scores::Int(q) if q.granularity == Granularity::PerBlock),
            few_rows: problem.q_len <= 128,
        };
        let tuned = match request.tiling {
            Some(tiling) => Tuned { tiling, reason: "as asked for, or as `sageattn tune` measured" },
            None => tiling(self.gpu.target, &shape),
        };
        let mut attention = AttentionConfig {
            dtype: problem.dtype,
            head_dim: problem.head_dim,
            scores,
            values,
            value_source: match (values, convert) {
                (Values::Fp8(_), _) | (_, Some(_)) => ValueSource::Workspace,
                _ => ValueSource::Given,
            },
            mask: request.mask,
            softcap: problem.logit_softcap.is_some(),
            lse: request.lse,
            smooth_k: scheme.smooth.k.is_on(),
            smooth_q,
            smooth_v: scheme.smooth.v,
            lengths: request.lengths,
            aligned: request.aligned,
            split: false,
            tiling: tuned.tiling,
        };
        reasons.push(format!(
            "{} warps of {} query rows, tiles of {} keys: {}",
            attention.tiling.warps, attention.tiling.rows_per_warp, attention.tiling.tile_keys, tuned.reason
        ));
        let splits = self.splits(&attention);
        if splits > 1 {
            reasons.push(format!("keys in {splits} parts: the query blocks alone would leave the GPU idle"));
            attention.split = true;
            attention.lse = true;
        }
        steps.push(Step::Attention(attention));
        if splits > 1 {
            let (dtype, head_dim) = (problem.dtype, problem.head_dim);
            steps.push(Step::Combine(CombineConfig { dtype, head_dim, lse: request.lse }));
        }
        Ok((steps, shape, splits))
    }

    /// Whether there is a kernel of warpgroups for such operands, and work for it: it takes 128 query rows and more at once.
    fn suits_warpgroups(&self, scores: &Scores, values: &Values) -> bool {
        let scores = match scores {
            Scores::Full => true,
            Scores::Int(quantizer) => quantizer.bits == IntBits::Eight,
        };
        let values = match values {
            Values::F16(Accumulator::F32) | Values::BF16 | Values::Fp8(Accumulator::F32) => true,
            // A tile's own sums beside all tiles' would take 256 registers of wider heads: 2.4 KB of spills in the loop.
            Values::Fp8(Accumulator::F32ThenF32) => self.problem.head_dim <= 128,
            _ => false,
        };
        let hopper = self.gpu.target == Target::SM_90A;
        hopper && scores && values && self.request.boxed && self.problem.q_len > FEW_QUERIES
    }

    /// P·V's form, and what V must be converted to first.
    fn values(&self) -> Result<(Values, Option<DType>)> {
        let dtype = self.problem.dtype;
        match self.scheme.pv {
            Pv::F16(Accumulator::F32ThenF32) => {
                Err(Error::unsupported("FP16 P·V summed in f32+f32", "use f32: its sums are exact already"))
            }
            Pv::F16(accumulator) => {
                Ok((Values::F16(accumulator), (dtype == DType::BF16).then_some(DType::F16)))
            }
            Pv::BF16(Accumulator::F32) => Ok((Values::BF16, (dtype == DType::F16).then_some(DType::BF16))),
            Pv::BF16(accumulator) => {
                Err(Error::value("pv accumulator", accumulator.name(), "f32 for BF16 P·V"))
            }
            Pv::Fp8 { .. } if self.gpu.target.sm() < 89 => Err(Error::unsupported(
                format!("FP8 P·V on {}", self.gpu.target),
                "FP8 needs sm_89 or later; use FP16 P·V",
            )),
            Pv::Fp8 { accumulator: Accumulator::F16, .. } => {
                Err(Error::unsupported("FP8 P·V summed in f16", "use f16+f32"))
            }
            Pv::Fp8 { accumulator, .. } => Ok((Values::Fp8(accumulator), None)),
            Pv::F32 | Pv::Int8 | Pv::Fixed12 { .. } | Pv::Nvfp4 => {
                Err(Error::unsupported(format!("scheme `{}`", self.scheme), "no GPU kernel computes its P·V"))
            }
        }
    }

    /// Parts of the keys that give every multiprocessor a block, where the queries alone do not.
    fn splits(&self, attention: &AttentionConfig) -> usize {
        let problem = self.problem;
        let [x, y, z] = attention.pieces(problem.batch, problem.num_q_heads, problem.q_len, 1);
        let blocks = x as usize * y as usize * z as usize;
        let wanted = 2 * self.gpu.multiprocessors;
        let tiles = problem.kv_len.div_ceil(attention.tiling.tile_keys);
        // Fewer than four tiles a part cost more to merge than they save.
        if blocks == 0 || blocks * 2 > wanted { 1 } else { (wanted / blocks).min(tiles / 4).max(1) }
    }

    fn layout(&self, steps: &[Step], splits: usize) -> Layout {
        let (problem, request) = (self.problem, self.request);
        let padded = padded_dim(problem.head_dim);
        let tiles = total_key_tiles(request.lengths, problem.batch, request.kv_rows);
        let heads = problem.num_kv_heads;
        let statistics = 4 * problem.batch * heads * padded;
        let mut end = 0u64;
        let mut take = |bytes: usize| {
            let offset = end;
            end += (bytes as u64).next_multiple_of(256);
            offset
        };
        let partials = |parts: usize| 4 * padded * parts * heads * tiles;
        let mut layout = Layout::default();
        for step in steps {
            match step {
                Step::QuantizeK(QuantizeKConfig { mean: KeyMean::Collected, .. }) => {
                    layout.k_arrivals = take(4 * problem.batch * heads);
                }
                Step::QuantizeV(QuantizeVConfig { scales: ValueScales::Given, .. }) => {
                    layout.v_marked = take(4 * problem.batch * heads);
                }
                Step::QuantizeV(_) => {
                    layout.v_arrivals = take(4 * problem.batch * heads);
                }
                Step::Attention(config)
                    if config.tiling.engine == Engine::Warpgroups && !self.request.pieces_alike(problem) =>
                {
                    layout.pieces_taken = Some(take(4));
                }
                _ => {}
            }
        }
        layout.counters = take(0);
        for step in steps {
            match step {
                Step::QueryMeans(_) => {
                    let blocks = query_blocks(problem, steps);
                    layout.q_mean = take(4 * problem.batch * problem.num_q_heads * blocks * padded);
                }
                Step::QuantizeK(config) => {
                    layout.k = take(heads * tiles * config.tile_bytes());
                    layout.k_scale = take(4 * heads * tiles * config.groups());
                    if config.mean != KeyMean::Zero {
                        layout.k_mean = take(statistics);
                    }
                    if config.mean == KeyMean::Collected {
                        layout.k_partials = take(partials(ColumnStatistics::Mean.partials()));
                    }
                }
                Step::DeltaS(_) => {
                    let blocks = query_blocks(problem, steps);
                    let keys = problem.kv_len.next_multiple_of(KEY_TILE).max(KEY_TILE);
                    layout.delta_s = take(4 * problem.batch * problem.num_q_heads * blocks * keys);
                }
                Step::QuantizeV(config) => {
                    if config.scales != ValueScales::CollectedWhereMarked {
                        layout.v = take(heads * tiles * config.tile_bytes());
                        layout.v_scale = take(statistics);
                        layout.v_mean = take(statistics);
                        layout.v_factor = take(statistics);
                    }
                    if config.scales != ValueScales::Given {
                        layout.v_partials = take(partials(config.statistics().partials()));
                    }
                }
                Step::ConvertV(_) => layout.v = take(2 * heads * tiles * KEY_TILE * padded),
                Step::Combine(_) => {
                    let rows = splits * self.total_rows();
                    layout.partial = take(4 * rows * problem.head_dim);
                    layout.partial_lse = take(4 * rows);
                }
                Step::SampleK(_) | Step::SampleV(_) | Step::Attention(_) => {}
            }
        }
        layout.bytes = take(0);
        layout
    }

    fn total_rows(&self) -> usize {
        total_rows(self.problem, self.request)
    }
}

/// Query rows that share a mean; 0 where none is subtracted.
fn query_block(steps: &[Step]) -> usize {
    let block = steps.iter().find_map(|step| match step {
        Step::QueryMeans(config) => Some(config.block),
        _ => None,
    });
    block.unwrap_or(0)
}

/// Such blocks of the longest sequence.
fn query_blocks(problem: &Problem, steps: &[Step]) -> usize {
    match query_block(steps) {
        0 => 0,
        block => problem.q_len.div_ceil(block).max(1),
    }
}

/// By how many heads statistics run ahead: as many as [`LEAD_BYTES`] hold.
fn lead(problem: &Problem) -> usize {
    let of_head = (2 * problem.kv_len * problem.head_dim).max(1);
    let all = problem.batch * problem.num_kv_heads;
    (LEAD_BYTES / of_head).min(all).max(1)
}

/// Query rows of all heads: rows of the log-sum-exp.
fn total_rows(problem: &Problem, request: &Request) -> usize {
    let batches = if request.lengths == Lengths::Packed { 1 } else { problem.batch };
    batches * problem.num_q_heads * request.q_rows
}

/// The quantiser, if the kernels' tiles are the ones that its groups refer to.
fn checked(quantizer: IntQuantizer) -> Result<IntQuantizer> {
    let tile = quantizer.tile;
    let wrong =
        |name: &'static str, found: usize, wanted: &'static str| Err(Error::value(name, found, wanted));
    match quantizer.granularity {
        Granularity::PerTensor => {
            return Err(Error::unsupported("scales per tensor", "on a GPU scales are per block or finer"));
        }
        Granularity::PerToken => {}
        Granularity::PerBlock if tile.block_q != 128 => {
            return wrong("tile.block_q", tile.block_q, "128 on a GPU");
        }
        Granularity::PerWarp | Granularity::PerThread if !matches!(tile.warp_q, 16 | 32) => {
            return wrong("tile.warp_q", tile.warp_q, "16 or 32 on a GPU");
        }
        Granularity::PerBlock | Granularity::PerWarp if tile.block_k != KEY_TILE => {
            return wrong("tile.block_k", tile.block_k, "64 on a GPU");
        }
        Granularity::PerThread if tile.warp_k != KEY_TILE => {
            return wrong("tile.warp_k", tile.warp_k, "64 on a GPU");
        }
        _ => {}
    }
    Ok(quantizer)
}

/// Most query rows of a warp: the groups of smaller warps would be mixed in one lane.
fn max_rows_per_warp(scores: &Scores) -> usize {
    match scores {
        Scores::Int(IntQuantizer {
            granularity: Granularity::PerWarp | Granularity::PerThread,
            tile,
            ..
        }) => tile.warp_q,
        _ => 32,
    }
}

impl Step {
    pub(crate) fn program(&self) -> Program {
        match self {
            Step::QueryMeans(config) => config.program(),
            Step::SampleK(config) | Step::SampleV(config) => config.program(),
            Step::QuantizeK(config) => config.program(),
            Step::DeltaS(config) => config.program(),
            Step::QuantizeV(config) => config.program(),
            Step::ConvertV(config) => config.program(),
            Step::Attention(config) => attention(config),
            Step::Combine(config) => config.program(),
        }
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Step::QueryMeans(config) => config.name(),
            Step::SampleK(config) | Step::SampleV(config) => config.name(),
            Step::QuantizeK(config) => config.name(),
            Step::DeltaS(config) => config.name(),
            Step::QuantizeV(config) => config.name(),
            Step::ConvertV(config) => config.name(),
            Step::Attention(config) => config.name(),
            Step::Combine(config) => config.name(),
        }
    }
}

/// What arguments are made of.
struct Arguments<'a> {
    problem: &'a Problem,
    request: &'a Request,
    splits: usize,
    multiprocessors: u32,
    /// Query rows that share a mean, and how many such blocks the longest sequence has.
    q_block: usize,
    q_blocks: usize,
    layout: &'a Layout,
    tensors: &'a Tensors,
    workspace: u64,
    v_max: f32,
}

impl Arguments<'_> {
    fn launch<L: Launcher>(
        &self,
        step: &Step,
        index: usize,
        launcher: &mut L,
    ) -> std::result::Result<(), L::Error> {
        let mut launch = |grid, args: &[Arg]| launcher.launch(index, grid, args);
        let (problem, request, t) = (self.problem, self.request, self.tensors);
        let (batch, heads, kv_len) = (problem.batch, problem.num_kv_heads, problem.kv_len);
        let at = |offset: u64| self.workspace + offset;
        let layout = self.layout;
        let key_tiles = total_key_tiles(request.lengths, batch, request.kv_rows) as i32;
        let rows = request.kv_rows as i32;
        let lead = lead(problem);
        match step {
            Step::QueryMeans(config) => {
                let [stride_batch, stride_head, stride_row] = t.q.strides;
                let args = QueryMeansArgs {
                    x: t.q.address,
                    mean: at(layout.q_mean),
                    cu_seqlens: t.cu_seqlens_q,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows: request.q_rows as i32,
                };
                launch(config.grid(problem.q_len, problem.num_q_heads, batch), &args.args())
            }
            Step::SampleK(config) | Step::SampleV(config) => {
                let of_keys = matches!(step, Step::SampleK(_));
                let tensor = if of_keys { &t.k } else { &t.v };
                let [stride_batch, stride_head, stride_row] = tensor.strides;
                let args = SampleArgs {
                    x: tensor.address,
                    mean: at(layout.k_mean),
                    scale: at(layout.v_scale),
                    factor: at(layout.v_factor),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    v_max: self.v_max,
                    counters: self.workspace,
                    counter_count: if of_keys { (layout.counters / 4) as i32 } else { 0 },
                };
                launch(config.grid(heads, batch), &args.args())
            }
            Step::QuantizeK(config) => {
                let [stride_batch, stride_head, stride_row] = t.k.strides;
                let args = QuantizeKArgs {
                    x: t.k.address,
                    out: at(layout.k),
                    scale: at(layout.k_scale),
                    mean: at(layout.k_mean),
                    partials: at(layout.k_partials),
                    arrivals: at(layout.k_arrivals),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    key_tiles,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                    lead: lead as i32,
                };
                launch(config.grid(kv_len, heads, batch, lead), &args.args())
            }
            Step::DeltaS(config) => {
                let [stride_batch, stride_head, stride_row] = t.k.strides;
                let args = DeltaSArgs {
                    x: t.k.address,
                    k_mean: at(layout.k_mean),
                    q_mean: at(layout.q_mean),
                    delta_s: at(layout.delta_s),
                    cu_seqlens: t.cu_seqlens_k,
                    cu_seqlens_q: t.cu_seqlens_q,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    q_rows: request.q_rows as i32,
                    group_size: problem.group_size() as i32,
                    q_blocks: self.q_blocks as i32,
                    block_rows: self.q_block as i32,
                };
                launch(config.grid(kv_len, heads, batch), &args.args())
            }
            Step::QuantizeV(config) => {
                let [stride_batch, stride_head, stride_row] = t.v.strides;
                let args = QuantizeVArgs {
                    x: t.v.address,
                    out: at(layout.v),
                    mean: at(layout.v_mean),
                    scale: at(layout.v_scale),
                    factor: at(layout.v_factor),
                    partials: at(layout.v_partials),
                    arrivals: at(layout.v_arrivals),
                    marked: at(layout.v_marked),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    key_tiles,
                    v_max: self.v_max,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                    lead: lead as i32,
                };
                launch(config.grid(kv_len, heads, batch, lead), &args.args())
            }
            Step::ConvertV(config) => {
                let [stride_batch, stride_head, stride_row] = t.v.strides;
                let args = ConvertVArgs {
                    x: t.v.address,
                    out: at(layout.v),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    key_tiles,
                };
                launch(config.grid(kv_len, heads, batch), &args.args())
            }
            Step::Attention(config) => {
                let args = self.attention(config, key_tiles);
                let pieces = self.pieces(config);
                if config.tiling.engine == Engine::Warps {
                    return launch(pieces, &args.args());
                }
                let [k_map, v_map] = self.boxed_tensors(config, &args, key_tiles);
                let maps = [launcher.tensor_map(&k_map)?, launcher.tensor_map(&v_map)?];
                let mut all = [maps[0]; AttentionArgs::COUNT + 2];
                all[..AttentionArgs::COUNT].copy_from_slice(&args.args());
                all[AttentionArgs::COUNT..].copy_from_slice(&maps);
                let blocks = pieces.iter().product::<u32>().min(self.multiprocessors);
                launcher.launch(index, [blocks, 1, 1], &all)
            }
            Step::Combine(config) => {
                let [out_stride_batch, out_stride_head, out_stride_row] = t.out.strides;
                let total_rows = total_rows(problem, request);
                let args = CombineArgs {
                    partial: at(layout.partial),
                    partial_lse: at(layout.partial_lse),
                    out: t.out.address,
                    lse: t.lse,
                    out_stride_batch,
                    out_stride_head,
                    out_stride_row,
                    total_rows: total_rows as i32,
                    q_rows: request.q_rows as i32,
                    q_heads: problem.num_q_heads as i32,
                    splits: self.splits as i32,
                };
                launch(config.grid(total_rows), &args.args())
            }
        }
    }

    /// Tiles of queries, heads and sequences of the attention kernel.
    fn pieces(&self, config: &AttentionConfig) -> [u32; 3] {
        let problem = self.problem;
        config.pieces(problem.batch, problem.num_q_heads, problem.q_len, self.splits)
    }

    /// Heads whose pieces of work are handed out together. Where pieces differ in length there must be many to even out, but
    /// their keys and values must stay in cache.
    fn heads_together(&self, config: &AttentionConfig, all_heads: u32) -> i32 {
        let problem = self.problem;
        if self.request.pieces_alike(problem) {
            return 1;
        }
        let bytes = stage_bytes(config) / config.tiling.tile_keys * problem.kv_len;
        let most = (CACHED_BYTES * problem.group_size() / bytes.max(1)).clamp(1, all_heads as usize);
        let divisor = (1..=most).rev().find(|&heads| (all_heads as usize).is_multiple_of(heads));
        divisor.unwrap_or(1) as i32
    }

    /// K and V for the kernels whose tiles are copied in bulk.
    fn boxed_tensors(
        &self,
        config: &AttentionConfig,
        args: &AttentionArgs,
        key_tiles: i32,
    ) -> [BoxedTensor; 2] {
        let (problem, t) = (self.problem, self.tensors);
        let batches = if self.request.lengths == Lengths::Packed { 1 } else { problem.batch };
        let shape =
            [problem.head_dim, self.request.kv_rows, problem.num_kv_heads, batches].map(|size| size as u64);
        let tiles = problem.num_kv_heads * key_tiles as usize;
        boxed_tensors(config, [(shape, t.k.strides), (shape, t.v.strides)], [args.k, args.v], tiles)
    }

    fn attention(&self, config: &AttentionConfig, key_tiles: i32) -> AttentionArgs {
        let (problem, request, t, layout) = (self.problem, self.request, self.tensors, self.layout);
        let at = |offset: u64| self.workspace + offset;
        let limit = |side: Option<usize>| side.map_or(NO_LIMIT, |n| n.min(NO_LIMIT as usize) as i32);
        let quantised = matches!(config.scores, Scores::Int(_));
        let workspace_v = config.value_source == ValueSource::Workspace;
        let [q_tiles, heads, sequences] = self.pieces(config);
        AttentionArgs {
            q: t.q.address,
            k: if quantised { at(layout.k) } else { t.k.address },
            v: if workspace_v { at(layout.v) } else { t.v.address },
            out: t.out.address,
            lse: if config.split { at(layout.partial_lse) } else { t.lse },
            partial: at(layout.partial),
            k_scale: at(layout.k_scale),
            k_mean: at(layout.k_mean),
            v_scale: at(layout.v_scale),
            v_mean: at(layout.v_mean),
            q_mean: at(layout.q_mean),
            delta_s: at(layout.delta_s),
            mask: t.mask.0,
            cu_seqlens_q: t.cu_seqlens_q,
            cu_seqlens_k: t.cu_seqlens_k,
            q_stride_batch: t.q.strides[0],
            q_stride_head: t.q.strides[1],
            q_stride_row: t.q.strides[2],
            k_stride_batch: t.k.strides[0],
            k_stride_head: t.k.strides[1],
            k_stride_row: t.k.strides[2],
            v_stride_batch: t.v.strides[0],
            v_stride_head: t.v.strides[1],
            v_stride_row: t.v.strides[2],
            out_stride_batch: t.out.strides[0],
            out_stride_head: t.out.strides[1],
            out_stride_row: t.out.strides[2],
            mask_stride_batch: t.mask.1[0],
            mask_stride_head: t.mask.1[1],
            mask_stride_row: t.mask.1[2],
            mask_stride_key: t.mask.1[3],
            q_rows: request.q_rows as i32,
            kv_rows: request.kv_rows as i32,
            group_size: problem.group_size() as i32,
            kv_heads: problem.num_kv_heads as i32,
            key_tiles,
            q_blocks: self.q_blocks as i32,
            max_tiles: problem.kv_len.div_ceil(KEY_TILE).max(1) as i32,
            window_left: limit(problem.band.left),
            window_right: limit(problem.band.right),
            bottom_right: i32::from(problem.band.alignment == Alignment::BottomRight),
            splits: self.splits as i32,
            taken: layout.pieces_taken.map_or(0, at),
            q_tiles: q_tiles as i32,
            all_heads: (heads * sequences) as i32,
            heads_together: self.heads_together(config, heads * sequences),
            total_rows: total_rows(problem, request) as i64,
            sm_scale: problem.sm_scale,
            softcap: problem.logit_softcap.unwrap_or(0.0),
        }
    }
}
