//! The entry that predicts blocks, without attention over them.

use pyo3::prelude::*;
use sageattention::Result;
use sageattention::cuda::{Cuda, DeviceBytes, DeviceTensor, Stream};

use crate::errors::{exception, guarded};
use crate::forward::finished;
use crate::lengths::GivenLengths;
use crate::options::Options;
use crate::predictor::Predictor;
use crate::tensor::RawTensor;
use crate::{host, map};

/// Writes the blocks that `predictor` keeps of `q` and `k` into `map`, `[batch, heads, q_blocks, k_blocks]` bytes
/// without gaps: not 0 where attention would compute a block. Tensors, `stream`, `wait` and `kv_lens` are as those of
/// `forward`.
///
/// The caller answers for addresses, shapes and strides, and for `map` being nobody else's.
#[pyfunction]
#[pyo3(signature = (q, k, map, options, predictor, stream=None, wait=false, kv_lens=None))]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(crate) fn predict(
    py: Python<'_>,
    q: RawTensor,
    k: RawTensor,
    map: RawTensor,
    options: &Options,
    predictor: &Predictor,
    stream: Option<(u32, u64)>,
    wait: bool,
    kv_lens: Option<RawTensor>,
) -> PyResult<()> {
    let run = || {
        map::check(&map, [&q, &k], options.is_nhd(), predictor.get())?;
        let lengths = GivenLengths::new(None, kv_lens)?;
        match stream {
            None => on_cpu([&q, &k], &lengths, &map, options, predictor),
            Some(stream) => on_gpu([&q, &k], &lengths, &map, options, predictor, stream, wait),
        }
    };
    py.detach(|| guarded(run)).map_err(exception)
}

fn on_cpu(
    [q, k]: [&RawTensor; 2],
    lengths: &GivenLengths,
    map: &RawTensor,
    options: &Options,
    predictor: &Predictor,
) -> Result<()> {
    // SAFETY: the caller of `predict` says that their memory is as described; the interpreter keeps its arguments
    // alive during the call.
    let (q, k) = unsafe { (host::view("q", q)?, host::view("k", k)?) };
    // SAFETY: as above.
    let attention = options.attention().lengths(unsafe { lengths.on_cpu() }?);
    let predicted = attention.sparse(predictor.get().clone()).predict(q, k)?;
    // SAFETY: as above, and nobody else knows of the map yet.
    unsafe { map::write(&predicted, map) }
}

fn on_gpu(
    [q, k]: [&RawTensor; 2],
    lengths: &GivenLengths,
    map: &RawTensor,
    options: &Options,
    predictor: &Predictor,
    (ordinal, stream): (u32, u64),
    wait: bool,
) -> Result<()> {
    let gpu = Cuda::shared(ordinal)?;
    // SAFETY: the caller hands over a stream of this GPU, which outlives the call.
    let stream = unsafe { Stream::from_raw(gpu.device(), stream) };
    let tensor = |name, tensor: &RawTensor| -> Result<DeviceTensor<'_>> {
        // SAFETY: the caller of `predict` says that the memory is as described; its framework keeps it until work on
        // the stream is done.
        Ok(unsafe { DeviceTensor::from_raw(tensor.dtype(name)?, tensor.geometry(name)?, tensor.address) })
    };
    // SAFETY: as above.
    let attention = options.attention().lengths(unsafe { lengths.on_gpu() }?);
    let attention = attention.sparse(predictor.get().clone());
    let predicted = attention.predict_on(&gpu, &stream, [tensor("q", q)?, tensor("k", k)?])?;
    // SAFETY: as above, and nobody else knows of the map yet.
    predicted.copy_to(unsafe { DeviceBytes::from_raw(map.geometry("map")?, map.address) })?;
    if wait { finished(&stream) } else { Ok(()) }
}
