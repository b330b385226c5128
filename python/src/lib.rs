//! The extension module `sageattention._native`: entries that take raw addresses, shapes and strides.
//!
//! What users call is Python (`python/packages/`), which knows the frameworks: whose allocator makes the output,
//! which stream is current, what a keyword means. Here tensors of this machine's memory and of a GPU's become the
//! views of the crate `sageattention`, the interpreter's lock is released, and errors become exceptions with the same
//! words.

mod channels;
mod errors;
mod forward;
mod host;
mod kv_cache;
mod lengths;
mod map;
mod options;
mod predict;
mod predictor;
mod tensor;
mod warm_up;

/// Functions and types for `python/packages/sageattention`; nothing here is for users.
// Free-threaded builds of Python, for which there is no wheel, switch their lock on where they import what was built for
// them from source: nothing of this was tested without it.
#[pyo3::pymodule(gil_used = true)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::forward::forward;
    #[pymodule_export]
    use crate::kv_cache::KvCache;
    #[pymodule_export]
    use crate::options::Options;
    #[pymodule_export]
    use crate::predict::predict;
    #[pymodule_export]
    use crate::predictor::Predictor;
    #[pymodule_export]
    use crate::warm_up::{WarmUp, driver_cache_folder, driver_forgets};

    /// What computes CPU tensors on this machine, in words.
    #[pyfunction]
    fn backend_description() -> String {
        sageattention::backend_description()
    }

    /// Whether heads of `head_dim` channels of queries and keys, and of `value_dim` of values, are computed: on the CPU, or
    /// on the GPU of this number.
    #[pyfunction]
    #[pyo3(signature = (head_dim, value_dim, gpu=None))]
    fn computes_channels(head_dim: usize, value_dim: usize, gpu: Option<u32>) -> bool {
        crate::channels::are_computed(head_dim, value_dim, gpu)
    }

    /// Names of all schemes, with a line about each.
    #[pyfunction]
    fn schemes() -> Vec<(&'static str, &'static str)> {
        sageattention::Preset::ALL.iter().map(|preset| (preset.name(), preset.summary())).collect()
    }
}
