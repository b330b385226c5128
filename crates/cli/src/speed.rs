//! The speed of schemes on one shape.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use sage_core::Problem;
use sageattention::cuda::{Cuda, CudaTensor, Stream};
use sageattention::{Attention, DType, Device, Preset, Result, Tensor};
use serde::Serialize;

use crate::inputs;
use crate::memory::peak_increase;
use crate::options::{SchemeName, with_sinks};
use crate::shape::Shape;
use crate::timing::{Times, interleaved};

/// One scheme on one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The name on the command line.
    pub scheme: &'static str,
    /// What was computed.
    pub computes: String,
    pub dtype: &'static str,
    #[serde(flatten)]
    pub shape: Shape,
    pub causal: bool,
    #[serde(flatten)]
    pub times: Times,
    /// 2·B·H·Lq·Lk·(D + Dv) operations, halved for causal, in the median time.
    pub gflops: f64,
    /// Full precision's median time over this one's, both from the same run: above 1 is faster.
    pub ratio_to_full_precision: f64,
    /// Rise of the resident memory of a process in its first call, where that was measured.
    pub peak_memory_bytes: Option<u64>,
    /// For one query: bytes of K and V over the median time.
    pub bandwidth_gbs: Option<f64>,
    /// The same over the measured bandwidth of the machine's memory.
    pub bandwidth_fraction: Option<f64>,
}

/// The schemes that are measured unless others are asked for: all that the backend computes for the problem, and its
/// own choice last, where that has no name.
pub fn runnable(attention: &Attention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Vec<SchemeName> {
    let runs = |preset: &&Preset| attention.clone().scheme(**preset).plan(q, k, v).is_ok();
    let mut seen = Vec::new();
    let mut names = Vec::new();
    for &preset in Preset::ALL.iter().filter(runs) {
        // Names that stand for the same computation are measured once.
        let scheme = preset.scheme(q.shape().last().copied().unwrap_or(0));
        if !seen.contains(&scheme) {
            seen.push(scheme);
            names.push(preset.into());
        }
    }
    match attention.plan(q, k, v) {
        Ok(plan) if !seen.contains(plan.scheme()) => names.push(SchemeName::automatic()),
        _ => {}
    }
    names
}

/// Tensors of a shape, and attention on them.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub attention: Attention<'a>,
    /// What computes.
    pub device: Device,
    /// Attention sinks, which `attention` has as well: on a GPU they are copied there once.
    pub sinks: Option<&'a [f32]>,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl<'a> Subject<'a> {
    /// Normally distributed tensors, and `attention` with these sinks where there are some.
    pub fn random(
        shape: &Shape,
        dtype: DType,
        attention: Attention<'a>,
        sinks: Option<&'a [f32]>,
    ) -> Result<Self> {
        let tensor =
            |heads, rows, channels, seed| inputs::normal(dtype, &[shape.batch, heads, rows, channels], seed);
        Ok(Subject {
            attention: with_sinks(attention, sinks),
            device: Device::Cpu,
            sinks,
            q: tensor(shape.heads, shape.q_len, shape.head_dim, 1)?,
            k: tensor(shape.kv_heads, shape.kv_len, shape.head_dim, 2)?,
            v: tensor(shape.kv_heads, shape.kv_len, shape.value_dim, 3)?,
        })
    }

    /// Sizes of the tensors, keys that no query sees included.
    fn shape(&self) -> Shape {
        let (q, k, v) = (self.q.shape(), self.k.shape(), self.v.shape());
        Shape {
            batch: q[0],
            heads: q[1],
            kv_heads: k[1],
            q_len: q[2],
            kv_len: k[2],
            head_dim: q[3],
            value_dim: v[3],
        }
    }

    /// Shape of the output.
    fn out_shape(&self) -> [usize; 4] {
        let Shape { batch, heads, q_len, value_dim, .. } = self.shape();
        [batch, heads, q_len, value_dim]
    }

    /// How far a scheme's call raises the resident memory of this process, which must not have made one before: later
    /// ones reuse what the first one took.
    pub fn peak_memory(&self, scheme: SchemeName) -> Result<Option<u64>> {
        let mut out = Tensor::zeros(self.q.dtype(), &self.out_shape())?;
        // The call would be the first to touch pages of zeros.
        let mut written = out.view_mut();
        let geometry = *written.geometry();
        geometry.places().for_each(|at| written.set(at, 1.0));
        let attention = self.attention.clone().scheme(scheme.choice());
        let (result, peak) =
            peak_increase(|| attention.forward_into(&self.q, &self.k, &self.v, out.view_mut(), None));
        result.map(|_| peak)
    }

    /// Times calls in turn, each after one that warms it up.
    pub fn time(&self, calls: &[Attention<'_>], reps: usize, progress: &ProgressBar) -> Result<Vec<Times>> {
        match self.device {
            Device::Cpu => {
                let mut out = Tensor::zeros(self.q.dtype(), &self.out_shape())?;
                let call = |i: usize| {
                    let start = Instant::now();
                    calls[i].forward_into(&self.q, &self.k, &self.v, out.view_mut(), None)?;
                    Ok(start.elapsed())
                };
                self.times(calls.len(), reps, call, progress)
            }
            Device::Cuda(ordinal) => {
                let gpu = OnGpu::new(ordinal, self)?;
                self.times(calls.len(), reps, |i| gpu.time(&calls[i]), progress)
            }
        }
    }

    /// Times of candidates in turn, each after a call that warms it up.
    fn times(
        &self,
        candidates: usize,
        reps: usize,
        mut call: impl FnMut(usize) -> Result<Duration>,
        progress: &ProgressBar,
    ) -> Result<Vec<Times>> {
        (0..candidates).try_for_each(|i| call(i).map(drop))?;
        interleaved(candidates, reps, call, || progress.inc(1))
    }

    /// Measures schemes in turn, full precision always among them. The first call of each, which warms it up, is not
    /// timed.
    pub fn measure(
        &self,
        schemes: &[SchemeName],
        reps: usize,
        bandwidth_gbs: Option<f64>,
        progress: &ProgressBar,
    ) -> Result<Vec<Row>> {
        let full = SchemeName::from(Preset::FULL);
        let mut timed = schemes.to_vec();
        if !timed.contains(&full) {
            timed.push(full);
        }
        let calls: Vec<Attention<'_>> =
            timed.iter().map(|name| self.attention.clone().scheme(name.choice())).collect();
        let times = self.time(&calls, reps, progress)?;
        let full_ms = timed.iter().position(|&name| name == full).map_or(f64::NAN, |i| times[i].median_ms);
        (0..schemes.len())
            .map(|i| {
                let plan = calls[i].plan(&self.q, &self.k, &self.v)?;
                let p = plan.problem();
                let seconds = times[i].median_ms / 1e3;
                // Keys that a window hides are not read.
                let channels = p.head_dim + p.value_dim;
                let read = p.batch * p.num_kv_heads * p.kv_len * channels * p.dtype.bytes();
                let achieved = (p.q_len == 1).then(|| read as f64 / seconds / 1e9);
                Ok(Row {
                    scheme: timed[i].name(),
                    computes: plan.scheme().to_string(),
                    dtype: p.dtype.name(),
                    shape: self.shape(),
                    causal: p.band.right == Some(0),
                    times: times[i],
                    gflops: operations(p) / seconds / 1e9,
                    ratio_to_full_precision: full_ms / times[i].median_ms,
                    peak_memory_bytes: None,
                    bandwidth_gbs: achieved,
                    bandwidth_fraction: achieved.zip(bandwidth_gbs).map(|(achieved, limit)| achieved / limit),
                })
            })
            .collect()
    }
}

/// A subject's tensors in a GPU's memory.
struct OnGpu {
    gpu: Cuda,
    stream: Stream,
    inputs: [CudaTensor; 3],
    sinks: Option<CudaTensor>,
    out: CudaTensor,
}

impl OnGpu {
    fn new(ordinal: u32, subject: &Subject<'_>) -> Result<Self> {
        let gpu = Cuda::new(ordinal)?;
        let stream = gpu.stream()?;
        let upload = |tensor: &Tensor| CudaTensor::upload(&stream, &tensor.view());
        let inputs = [upload(&subject.q)?, upload(&subject.k)?, upload(&subject.v)?];
        let sinks = subject.sinks.map(|sinks| CudaTensor::upload(&stream, &inputs::sinks(sinks)?));
        let out = CudaTensor::uninitialized(&stream, subject.q.dtype(), &subject.out_shape())?;
        Ok(OnGpu { gpu, stream, inputs, sinks: sinks.transpose()?, out })
    }

    /// The GPU's time for one call.
    fn time(&self, attention: &Attention<'_>) -> Result<Duration> {
        let tensors = || self.inputs.each_ref().map(CudaTensor::view);
        let attention = match &self.sinks {
            Some(sinks) => attention.clone().sinks(sinks.view()),
            None => attention.clone(),
        };
        self.gpu.time(&self.stream, || {
            attention.forward_on(&self.gpu, &self.stream, tensors(), self.out.view(), None).map(drop)
        })
    }
}

/// 2·B·H·Lq·Lk·(D + Dv), halved for causal; where the lengths differ, or there is a window, the pairs that are seen are
/// counted.
pub fn operations(p: &Problem) -> f64 {
    let is_causal = p.band.left.is_none() && p.band.right == Some(0);
    let pairs = if is_causal && p.q_len == p.kv_len {
        (p.q_len * p.kv_len) as f64 / 2.0
    } else {
        (0..p.q_len).map(|i| p.band.keys(i, p.q_len, p.kv_len).len() as f64).sum()
    };
    2.0 * (p.batch * p.num_q_heads * (p.head_dim + p.value_dim)) as f64 * pairs
}
