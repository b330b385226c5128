//! A whole forward pass: which kernels, in which order, with which arguments and which workspace.
//!
//! A [`Forward`] knows no driver: whoever runs it, on a GPU or in the emulator, loads [`Forward::programs`], zeroes
//! [`Forward::zeroed_bytes`] at the workspace's start (often none), and launches what [`Forward::run`] hands over, in order.

mod arguments;
mod layout;
mod nearest;
mod pass;

use sage_core::{DType, Error, MAX_HEADS, Problem, Pv, Result, Scheme};
use sage_ptx::{Arg, BoxedTensor, Program, Target};

use crate::attention::{AttentionConfig, MaskForm, Tiling, attention};
use crate::choice::choose;
pub use crate::choice::int8_scheme;
use crate::combine::CombineConfig;
use crate::preprocess::{
    ConvertVConfig, DeltaSConfig, QuantizeKConfig, QuantizeVConfig, QueryMeansConfig, RankKeysConfig,
    SampleConfig, SeenKeysConfig,
};
use crate::sequence::Lengths;
use crate::tuning::Shape;
use arguments::Arguments;
use layout::{Layout, query_block, query_blocks};
pub use nearest::nearest_scheme;
use nearest::{computed, naming_nearest};
use pass::Pass;

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

impl TensorArg {
    /// Whether a tensor map can describe this tensor of `[batch, heads, rows, …]`, whose rows are aligned: it knows
    /// neither repeated nor backward dimensions, nor strides of a terabyte.
    pub fn has_map(&self, shape: &[usize]) -> bool {
        let valid = |(&size, &stride): (&usize, &i64)| size == 1 || (1..1 << 39).contains(&stride);
        shape.iter().zip(&self.strides).all(valid)
    }
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

impl Tensors {
    /// Whether every row of Q, K, V and the output starts at a multiple of 16 bytes and is whole such chunks.
    pub fn aligned(&self, head_dim: usize) -> bool {
        let aligned = |tensor: &TensorArg| {
            tensor.address.is_multiple_of(16) && tensor.strides.iter().all(|stride| stride % 8 == 0)
        };
        head_dim.is_multiple_of(8) && [self.q, self.k, self.v, self.out].iter().all(aligned)
    }
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
    SeenKeys(SeenKeysConfig),
    RankKeys(RankKeysConfig),
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

impl Forward {
    /// The pass for a problem.
    ///
    /// # Errors
    /// When no kernel computes the scheme, or not with such options or on such a GPU; names the nearest scheme that has
    /// kernels.
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
        check_sizes(problem, request)?;
        let mut reasons = Vec::new();
        let scheme = match request.scheme {
            Some(scheme) => scheme,
            None => {
                let (scheme, reason) = choose(problem, request, gpu)?;
                reasons.push(reason);
                scheme
            }
        };
        scheme.check()?;
        let given = scheme;
        let scheme = computed(given, problem.dtype, &mut reasons);
        let steps = |scheme: &Scheme, reasons: &mut Vec<String>| {
            Pass { problem, request, gpu, scheme }.steps(reasons)
        };
        let (mut steps, shape, splits) = steps(&scheme, &mut reasons).map_err(|error| {
            let mut unused = Vec::new();
            let nearest = computed(nearest_scheme(given, gpu.target), problem.dtype, &mut unused);
            match steps(&nearest, &mut unused) {
                Ok(_) => naming_nearest(error, &nearest, problem.head_dim),
                Err(_) => error,
            }
        })?;
        if problem.batch * problem.num_q_heads == 0 || problem.q_len == 0 {
            steps.clear();
            reasons.push("nothing to launch: there is no query".into());
        }
        let layout = Layout::new(problem, request, &steps, splits);
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

/// Most rows of a tensor: sums with the "no limit" of a window and the rows of a tile fit 32 bits.
const MAX_ROWS: usize = (1 << 30) - 1024;

/// Sizes that tensors with strides of 0, or very many packed sequences, can have, but not the kernels' numbers.
fn check_sizes(problem: &Problem, request: &Request) -> Result<()> {
    for (name, rows) in [("q", request.q_rows), ("k", request.kv_rows)] {
        if rows > MAX_ROWS {
            return Err(Error::value(
                format!("rows of {name}"),
                rows,
                format!("at most {MAX_ROWS} on a GPU"),
            ));
        }
    }
    if problem.batch.saturating_mul(problem.num_q_heads) > MAX_HEADS {
        let found = format!("boundaries of {} sequences of {} heads", problem.batch, problem.num_q_heads);
        let wanted = format!("at most {MAX_HEADS} heads, all sequences together");
        return Err(Error::value("cu_seqlens_q", found, wanted));
    }
    Ok(())
}

/// Query rows of all heads: rows of the log-sum-exp.
fn total_rows(problem: &Problem, request: &Request) -> usize {
    let batches = if request.lengths == Lengths::Packed { 1 } else { problem.batch };
    batches * problem.num_q_heads * request.q_rows
}

impl Step {
    pub(crate) fn program(&self) -> Program {
        match self {
            Step::SeenKeys(config) => config.program(),
            Step::RankKeys(config) => config.program(),
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
            Step::SeenKeys(config) => config.name(),
            Step::RankKeys(config) => config.name(),
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
