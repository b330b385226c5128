//! Schemes against exact attention, head by head.

use indicatif::ProgressBar;
use rayon::prelude::*;
use sage_core::metrics::Accuracy;
use sage_core::oracle;
use sage_core::sparse::Predictor;
use sageattention::{Attention, Device, Preset, Result, Scheme};
use sageattn_files::qkv_file::Qkv;
use serde::Serialize;

use crate::heads::{Head, Heads};

/// What computed a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ComputedBy {
    /// The scheme's definition, in double precision but for what is quantised.
    #[serde(rename = "oracle")]
    Oracle,
    /// The kernels of the CPU backend.
    #[serde(rename = "cpu kernel")]
    CpuKernel,
    /// The kernels of a GPU.
    #[serde(rename = "gpu kernel")]
    GpuKernel,
}

impl ComputedBy {
    /// The name in tables, the same as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            ComputedBy::Oracle => "oracle",
            ComputedBy::CpuKernel => "cpu kernel",
            ComputedBy::GpuKernel => "gpu kernel",
        }
    }
}

/// How far one scheme's result is from exact attention.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// What computed it.
    pub computed_by: ComputedBy,
    /// All heads together.
    pub overall: Accuracy,
    /// Each query head alone.
    pub per_head: Vec<(Head, Accuracy)>,
}

/// Exact attention of one set of tensors, to compare schemes with.
#[derive(Clone, Debug)]
pub struct Reference<'a> {
    qkv: &'a Qkv,
    heads: Heads<'a>,
    attention: Attention<'a>,
    device: Device,
    /// What predicts the blocks that schemes compute; all without one.
    predictor: Option<Predictor>,
    exact: Vec<Vec<f64>>,
}

impl<'a> Reference<'a> {
    /// Computes exact attention, all heads at once; they are added to the progress. The kernels that are compared
    /// with it are those of `device`. With a predictor, which `attention` has too, schemes compute its blocks alone;
    /// `sinks` are its attention sinks.
    pub fn new(
        qkv: &'a Qkv,
        attention: Attention<'a>,
        device: Device,
        predictor: Option<&Predictor>,
        sinks: Option<&'a [f32]>,
        progress: &ProgressBar,
    ) -> Result<Self> {
        let heads = Heads::new(qkv, attention.options(), sinks)?;
        progress.inc_length(heads.list().len() as u64);
        let exact = per_head(&heads, progress, |head| heads.exact(head))?;
        Ok(Reference {
            qkv,
            heads,
            attention: attention.device(device),
            device,
            predictor: predictor.cloned(),
            exact,
        })
    }

    /// The tensors, head by head.
    pub fn heads(&self) -> &Heads<'a> {
        &self.heads
    }

    /// Compares a scheme's definition.
    pub fn oracle(&self, scheme: &Scheme, progress: &ProgressBar) -> Result<Comparison> {
        scheme.check()?;
        let of_head = |head| match &self.predictor {
            Some(predictor) => {
                self.heads.over_blocks(head, predictor, |call| oracle::scheme(call, scheme).out)
            }
            None => self.heads.scheme(head, scheme),
        };
        let found = per_head(&self.heads, progress, of_head)?;
        Ok(self.comparison(ComputedBy::Oracle, &found))
    }

    /// Compares the kernels of the device, or `None` where it has none for the preset.
    pub fn kernel(&self, preset: Preset) -> Result<Option<Comparison>> {
        let attention = self.attention.clone().scheme(preset);
        let Qkv { q, k, v, .. } = self.qkv;
        if attention.plan(q, k, v).is_err() {
            return Ok(None);
        }
        let out = attention.forward(q, k, v)?.out;
        let found = self
            .heads
            .list()
            .iter()
            .map(|&head| self.heads.output(&out, head))
            .collect::<Result<Vec<_>>>()?;
        let computed_by = match self.device {
            Device::Cpu => ComputedBy::CpuKernel,
            Device::Cuda(_) => ComputedBy::GpuKernel,
        };
        Ok(Some(self.comparison(computed_by, &found)))
    }

    fn comparison<T: Copy + Into<f64>>(&self, computed_by: ComputedBy, found: &[Vec<T>]) -> Comparison {
        let per_head = self
            .heads
            .list()
            .iter()
            .zip(found.iter().zip(&self.exact))
            .map(|(&head, (found, exact))| (head, Accuracy::of(found, exact)))
            .collect();
        Comparison { computed_by, overall: Accuracy::of(&found.concat(), &self.exact.concat()), per_head }
    }
}

/// One result for each head, in their order, computed on all threads.
pub fn per_head<T: Send>(
    heads: &Heads<'_>,
    progress: &ProgressBar,
    compute: impl Fn(Head) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    heads
        .list()
        .par_iter()
        .map(|&head| {
            let result = compute(head);
            progress.inc(1);
            result
        })
        .collect()
}
