//! The entries that compile kernels before calls are made.

use std::path::PathBuf;

use pyo3::prelude::*;
use sageattention::cuda::{self, Cuda, FlagsShape, MaskShape, TensorShape};

use crate::errors::{exception, guarded};
use crate::options::Options;
use crate::predictor::Predictor;
use crate::tensor::RawTensor;

/// Calls that are to come on a GPU, and what they need.
#[pyclass(frozen)]
pub(crate) struct WarmUp(cuda::WarmUp);

#[pymethods]
impl WarmUp {
    /// Of the GPU of that number.
    #[new]
    fn new(py: Python<'_>, ordinal: u32) -> PyResult<Self> {
        let gpu = py.detach(|| guarded(|| Cuda::shared(ordinal))).map_err(exception)?;
        Ok(WarmUp(gpu.warm_up()))
    }

    /// Notes what a call needs. Tensors are as those of `forward`, but for their addresses, which nobody reads;
    /// `packed` is the boundaries of queries and of keys; `kv_lens` is whether calls have lengths of keys, whatever they are.
    #[pyo3(signature = (
        q, k, v, options, lse=false, mask=None, packed=None, predictor=None, sinks=None, kv_lens=false
    ))]
    #[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
    fn note(
        &self,
        py: Python<'_>,
        q: RawTensor,
        k: RawTensor,
        v: RawTensor,
        options: &Options,
        lse: bool,
        mask: Option<RawTensor>,
        packed: Option<(Vec<i32>, Vec<i32>)>,
        predictor: Option<&Predictor>,
        sinks: Option<RawTensor>,
        kv_lens: bool,
    ) -> PyResult<()> {
        // Kernels are the same for all lengths.
        let lens = kv_lens.then(|| vec![0; q.shape.first().copied().unwrap_or(0)]);
        let note = || {
            let shape =
                |name, tensor: &RawTensor| Ok(TensorShape::new(tensor.dtype(name)?, tensor.geometry(name)?));
            let mut attention = options.attention().return_lse(lse);
            if let Some(mask) = &mask {
                attention = attention.mask(match mask.is_bool() {
                    true => MaskShape::Bool(FlagsShape(mask.geometry("mask")?)),
                    false => MaskShape::Additive(shape("mask", mask)?),
                });
            }
            if let Some(sinks) = &sinks {
                attention = attention.sinks(shape("sinks", sinks)?);
            }
            if let Some((q, k)) = &packed {
                attention = attention.packed(q, k);
            }
            if let Some(lens) = &lens {
                attention = attention.kv_lens(lens);
            }
            if let Some(predictor) = predictor {
                attention = attention.sparse(predictor.get().clone());
            }
            attention.note(&self.0, [shape("q", &q)?, shape("k", &k)?, shape("v", &v)?])
        };
        py.detach(|| guarded(note)).map_err(exception)
    }

    /// Compiles and loads what was noted: each kernel's name, where it came from, and milliseconds.
    fn load(&self, py: Python<'_>) -> PyResult<Vec<(String, &'static str, f64)>> {
        let kernels = py.detach(|| guarded(|| self.0.load())).map_err(exception)?;
        let row = |kernel: cuda::LoadedKernel| {
            let (origin, ms) = (kernel.origin_name(), kernel.time.as_secs_f64() * 1e3);
            (kernel.name, origin, ms)
        };
        Ok(kernels.into_iter().map(row).collect())
    }
}

/// The folder to name in `CUDA_CACHE_PATH`, where the driver has none of its own that it can write.
#[pyfunction]
pub(crate) fn driver_cache_folder(py: Python<'_>) -> Option<PathBuf> {
    py.detach(cuda::driver_cache_folder)
}

/// Why the driver remembers none of the kernels that it alone can compile, where it does not.
#[pyfunction]
pub(crate) fn driver_forgets(py: Python<'_>) -> Option<String> {
    py.detach(|| cuda::driver_cache().err())
}
