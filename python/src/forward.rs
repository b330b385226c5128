//! The entry: a call on the CPU or a GPU.

use pyo3::prelude::*;
use sageattention::cuda::{Cuda, DeviceBytes, DeviceLse, DeviceMask, DeviceTensor, Stream};
use sageattention::{BlockMask, DType, Error, Mask, Result, TensorViewMut, View};

use crate::errors::{exception, guarded};
use crate::host;
use crate::lengths::{GivenLengths, Packed};
use crate::map;
use crate::options::Options;
use crate::predictor::Predictor;
use crate::tensor::RawTensor;

/// The blocks of the score matrix to compute, and how many queries and keys a block has.
#[derive(FromPyObject)]
pub(crate) struct Blocks(RawTensor, usize, usize);

/// A call's tensors, and what predicts its blocks.
struct Tensors<'p> {
    q: RawTensor,
    k: RawTensor,
    v: RawTensor,
    out: RawTensor,
    lse: Option<RawTensor>,
    mask: Option<RawTensor>,
    sinks: Option<RawTensor>,
    block_mask: Option<Blocks>,
    lengths: GivenLengths,
    predictor: Option<&'p Predictor>,
    map: Option<RawTensor>,
}

/// Computes attention of `q`, `k` and `v` into `out`, and each row's log-sum-exp into `lse`.
///
/// What a tensor may be, [`RawTensor`] says. All lie in the memory of one device: this machine's, or where `stream` is
/// given (the GPU's number, the stream's handle) that GPU's.
/// Where a `predictor` is given, only the blocks that it finds worth it are computed, and `map` is told which they are:
/// `[batch, heads, q_blocks, k_blocks]` bytes without gaps, not 0 where a block was computed.
/// `sinks` are attention sinks, float32 `[heads]`.
/// With `wait`, a GPU is done when the call returns.
/// `packed` is (address of cu_seqlens_q, of cu_seqlens_k, sequences, longest q, longest k), and `kv_lens`, in its place,
/// how many keys each entry of the batch has: int32 `[batch]`.
///
/// The caller answers for addresses, shapes and strides, and for `out` and `lse` being nobody else's, nor `map`.
#[pyfunction]
#[pyo3(signature = (
    q, k, v, out, options, lse=None, mask=None, block_mask=None, packed=None, stream=None, wait=false, predictor=None,
    map=None, sinks=None, kv_lens=None
))]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(crate) fn forward(
    py: Python<'_>,
    q: RawTensor,
    k: RawTensor,
    v: RawTensor,
    out: RawTensor,
    options: &Options,
    lse: Option<RawTensor>,
    mask: Option<RawTensor>,
    block_mask: Option<Blocks>,
    packed: Option<Packed>,
    stream: Option<(u32, u64)>,
    wait: bool,
    predictor: Option<&Predictor>,
    map: Option<RawTensor>,
    sinks: Option<RawTensor>,
    kv_lens: Option<RawTensor>,
) -> PyResult<()> {
    let lengths = GivenLengths::new(packed, kv_lens).map_err(exception)?;
    let tensors = Tensors { q, k, v, out, lse, mask, sinks, block_mask, lengths, predictor, map };
    let run = || match stream {
        _ if tensors.map.is_some() && predictor.is_none() => {
            Err(Error::unsupported("a map without a predictor", "give both"))
        }
        None => on_cpu(&tensors, options),
        Some((ordinal, stream)) => on_gpu(&tensors, options, ordinal, stream, wait),
    };
    py.detach(|| guarded(run)).map_err(exception)
}

impl Tensors<'_> {
    /// That memory for a map is that of the predicted one.
    fn check_map(&self, options: &Options) -> Result<()> {
        match (&self.map, self.predictor) {
            (Some(map), Some(predictor)) => {
                map::check(map, [&self.q, &self.k], options.is_nhd(), predictor.get())
            }
            _ => Ok(()),
        }
    }
}

fn on_cpu(tensors: &Tensors<'_>, options: &Options) -> Result<()> {
    // SAFETY: of all tensors the caller of `forward` says that their memory is as described; the interpreter keeps its
    // arguments alive during the call. Other threads that write to them meanwhile would race with any library.
    let (q, k, v) =
        unsafe { (host::view("q", &tensors.q)?, host::view("k", &tensors.k)?, host::view("v", &tensors.v)?) };
    // SAFETY: as above, and nobody else knows of the output yet.
    let out = unsafe { host::view_mut("out", &tensors.out) }?;

    let mut attention = options.attention();
    // SAFETY: as above.
    let flags = |name, tensor| unsafe { host::flags(name, tensor) };
    let visible = match &tensors.mask {
        Some(mask) if mask.is_bool() => Some(flags("mask", mask)?),
        _ => None,
    };
    if let Some((visible, geometry)) = &visible {
        attention = attention.mask(Mask::Bool(View::strided("mask", visible, *geometry)?));
    } else if let Some(mask) = &tensors.mask {
        // SAFETY: as above.
        attention = attention.mask(Mask::Additive(unsafe { host::view("mask", mask) }?));
    }
    if let Some(sinks) = &tensors.sinks {
        // SAFETY: as above.
        attention = attention.sinks(unsafe { host::view("sinks", sinks) }?);
    }
    let blocks =
        tensors.block_mask.as_ref().map(|Blocks(tensor, ..)| flags("block_mask", tensor)).transpose()?;
    if let (Some((blocks, geometry)), Some(Blocks(_, block_q, block_k))) = (&blocks, &tensors.block_mask) {
        let blocks = View::strided("block_mask", blocks, *geometry)?;
        attention = attention.block_mask(BlockMask { blocks, block_q: *block_q, block_k: *block_k });
    }
    // SAFETY: as above.
    attention = attention.lengths(unsafe { tensors.lengths.on_cpu() }?);
    let mut lse = match &tensors.lse {
        // SAFETY: as for the output.
        Some(lse) => match unsafe { host::view_mut("lse", lse) }? {
            TensorViewMut::F32(view) if view.geometry().is_contiguous() => Some(view),
            _ => return Err(wrong_lse(lse)),
        },
        None => None,
    };
    if let Some(predictor) = tensors.predictor {
        attention = attention.sparse(predictor.get().clone());
    }
    tensors.check_map(options)?;
    let predicted = attention.forward_into(q, k, v, out, lse.as_mut().map(|lse| lse.data_mut()))?;
    if let (Some(predicted), Some(map)) = (predicted, &tensors.map) {
        // SAFETY: as for the output.
        unsafe { map::write(&predicted, map) }?;
    }
    Ok(())
}

fn on_gpu(tensors: &Tensors<'_>, options: &Options, ordinal: u32, stream: u64, wait: bool) -> Result<()> {
    let gpu = Cuda::shared(ordinal)?;
    // SAFETY: the caller hands over a stream of this GPU, which outlives the call.
    let stream = unsafe { Stream::from_raw(gpu.device(), stream) };
    let tensor = |name, tensor: &RawTensor| -> Result<DeviceTensor<'_>> {
        // SAFETY: the caller of `forward` says that the memory is as described; its framework keeps it until work on
        // the stream is done.
        Ok(unsafe { DeviceTensor::from_raw(tensor.dtype(name)?, tensor.geometry(name)?, tensor.address) })
    };
    let mask = match &tensors.mask {
        Some(mask) if mask.is_bool() => {
            // SAFETY: as above.
            let bytes = unsafe { DeviceBytes::from_raw(mask.geometry("mask")?, mask.address) };
            Some(DeviceMask::Bool(bytes))
        }
        Some(mask) => Some(DeviceMask::Additive(tensor("mask", mask)?)),
        None => None,
    };
    let mut attention = options.attention();
    if let Some(mask) = mask {
        attention = attention.mask(mask);
    }
    if let Some(sinks) = &tensors.sinks {
        attention = attention.sinks(tensor("sinks", sinks)?);
    }
    if let Some(Blocks(flags, block_q, block_k)) = &tensors.block_mask {
        // SAFETY: as above.
        let blocks = unsafe { DeviceBytes::from_raw(flags.geometry("block_mask")?, flags.address) };
        attention = attention.block_mask(BlockMask { blocks, block_q: *block_q, block_k: *block_k });
    }
    // SAFETY: as above.
    attention = attention.lengths(unsafe { tensors.lengths.on_gpu() }?);
    let lse = match &tensors.lse {
        Some(lse) => {
            let rows = rows_of_lse(lse)?;
            // SAFETY: as above.
            Some(unsafe { DeviceLse::from_raw(lse.address, rows) })
        }
        None => None,
    };
    let qkv = [tensor("q", &tensors.q)?, tensor("k", &tensors.k)?, tensor("v", &tensors.v)?];
    if let Some(predictor) = tensors.predictor {
        attention = attention.sparse(predictor.get().clone());
    }
    tensors.check_map(options)?;
    let predicted = attention.forward_on(&gpu, &stream, qkv, tensor("out", &tensors.out)?, lse)?;
    if let (Some(predicted), Some(map)) = (predicted, &tensors.map) {
        // SAFETY: as above, and nobody else knows of the map yet.
        let bytes = unsafe { DeviceBytes::from_raw(map.geometry("map")?, map.address) };
        predicted.copy_to(bytes)?;
    }
    if wait { finished(&stream) } else { Ok(()) }
}

/// Waits for a stream.
pub(crate) fn finished(stream: &Stream) -> Result<()> {
    stream.synchronize().map_err(|error| Error::Backend { kind: error.kind(), message: error.to_string() })
}

/// The rows of a log-sum-exp.
pub(crate) fn rows_of_lse(lse: &RawTensor) -> Result<usize> {
    let fits = lse.dtype("lse")? == DType::F32 && lse.geometry("lse")?.is_contiguous();
    if fits { Ok(lse.shape.iter().product()) } else { Err(wrong_lse(lse)) }
}

pub(crate) fn wrong_lse(lse: &RawTensor) -> Error {
    Error::Shape {
        name: "lse".into(),
        found: format!("{:?} with strides {:?}", lse.shape, lse.strides),
        wanted: "f32 without gaps: [batch, num_q_heads, q_len], or [num_q_heads, total] when packed".into(),
    }
}
