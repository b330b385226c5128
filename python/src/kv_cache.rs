//! The quantised KV cache, of tensors of this machine's memory or of a GPU's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use sageattention::cuda::{Cuda, DeviceBytes, DeviceLse, DeviceMask, DeviceTensor, Stream};
use sageattention::{Error, KvCacheOptions, Layout, Mask, Result, TensorViewMut, ValueFormat, View};

use crate::errors::{exception, guarded};
use crate::forward::{finished, rows_of_lse, wrong_lse};
use crate::host;
use crate::options::Options;
use crate::tensor::RawTensor;

/// A KV cache. It lies where the first tokens do that are appended.
#[pyclass(frozen)]
pub(crate) struct KvCache {
    options: KvCacheOptions,
    sequences: usize,
    memory: Mutex<Memory>,
}

/// Where the cache lies.
enum Memory {
    /// Nowhere yet.
    None,
    Host(Box<sageattention::KvCache>),
    Gpu(Box<OnGpu>),
}

/// A cache in a GPU's memory, whose work is put on one stream.
struct OnGpu {
    cache: sageattention::KvCache<Cuda>,
    /// The GPU's number and the stream's handle, as callers name them.
    place: (u32, u64),
}

/// What a call over a cache has beside its queries.
struct Attended<'a> {
    sequences: &'a [usize],
    q: &'a RawTensor,
    out: &'a RawTensor,
    lse: Option<&'a RawTensor>,
    mask: Option<&'a RawTensor>,
    sinks: Option<&'a RawTensor>,
    options: &'a Options,
}

#[pymethods]
impl KvCache {
    /// `values` is the name of a format; `tensor_layout`, "HND" or "NHD", is that of appended keys and values.
    #[new]
    #[pyo3(signature = (*, num_kv_heads, head_dim, sequences, values, page_size, max_pages, tensor_layout))]
    fn new(
        num_kv_heads: usize,
        head_dim: usize,
        sequences: usize,
        values: &str,
        page_size: usize,
        max_pages: Option<usize>,
        tensor_layout: &str,
    ) -> PyResult<Self> {
        let options = || {
            let format = ValueFormat::ALL.into_iter().find(|format| format.name() == values);
            let names = ValueFormat::ALL.map(ValueFormat::name).join(", ");
            let mut options = KvCacheOptions::new(num_kv_heads, head_dim)
                .sequences(sequences)
                .values(format.ok_or_else(|| Error::value("values", values, names))?)
                .page_size(page_size)
                .layout(if tensor_layout == "NHD" { Layout::Nhd } else { Layout::Hnd });
            if let Some(max_pages) = max_pages {
                options = options.max_pages(max_pages);
            }
            // An empty cache takes no memory, and says what is wrong with an option.
            options.build().map(|_| options)
        };
        let options = guarded(options).map_err(exception)?;
        Ok(KvCache { options, sequences, memory: Mutex::new(Memory::None) })
    }

    /// Appends `k` and `v`, an entry of the batch for each of `sequences`. Tensors and `stream` are as those of `forward`.
    #[pyo3(signature = (sequences, k, v, stream=None, wait=false))]
    fn append(
        &self,
        py: Python<'_>,
        sequences: Vec<usize>,
        k: RawTensor,
        v: RawTensor,
        stream: Option<(u32, u64)>,
        wait: bool,
    ) -> PyResult<()> {
        let append = || match &mut *self.memory_for(stream)? {
            Memory::Gpu(gpu) => {
                // SAFETY: of both tensors the caller says that their memory is as described; its framework keeps it until
                // work on the stream is done.
                let (k, v) = unsafe { (on_gpu("k", &k)?, on_gpu("v", &v)?) };
                gpu.cache.append_to(&sequences, k, v)?;
                settled(stream, wait)
            }
            Memory::Host(cache) => {
                // SAFETY: of both tensors the caller says that their memory is as described; the interpreter keeps its
                // arguments alive during the call.
                let (k, v) = unsafe { (host::view("k", &k)?, host::view("v", &v)?) };
                cache.append_to(&sequences, k, v)
            }
            Memory::None => Ok(()),
        };
        py.detach(|| guarded(append)).map_err(exception)
    }

    /// Attention of `q`, an entry of its batch for each of `sequences`, into `out`; arguments are as those of `forward`.
    #[pyo3(signature = (sequences, q, out, options, lse=None, mask=None, sinks=None, stream=None, wait=false))]
    #[expect(clippy::too_many_arguments, reason = "arguments of a Python method")]
    fn attend(
        &self,
        py: Python<'_>,
        sequences: Vec<usize>,
        q: RawTensor,
        out: RawTensor,
        options: &Options,
        lse: Option<RawTensor>,
        mask: Option<RawTensor>,
        sinks: Option<RawTensor>,
        stream: Option<(u32, u64)>,
        wait: bool,
    ) -> PyResult<()> {
        let attended = Attended {
            sequences: &sequences,
            q: &q,
            out: &out,
            lse: lse.as_ref(),
            mask: mask.as_ref(),
            sinks: sinks.as_ref(),
            options,
        };
        let attend = || match &*self.memory_for(stream)? {
            Memory::Gpu(gpu) => {
                attended.on_gpu(&gpu.cache)?;
                settled(stream, wait)
            }
            Memory::Host(cache) => attended.on_cpu(cache),
            Memory::None => Ok(()),
        };
        py.detach(|| guarded(attend)).map_err(exception)
    }

    /// Forgets all but the first `len` tokens of a sequence.
    fn truncate(&self, py: Python<'_>, sequence: usize, len: usize) -> PyResult<()> {
        let truncate = || match &mut *self.memory() {
            Memory::Host(cache) => cache.truncate(sequence, len),
            Memory::Gpu(gpu) => gpu.cache.truncate(sequence, len),
            Memory::None => self.options.build()?.truncate(sequence, len),
        };
        py.detach(|| guarded(truncate)).map_err(exception)
    }

    /// Forgets every token; the memory is kept.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        let clear = || match &mut *self.memory() {
            Memory::Host(cache) => cache.clear(),
            Memory::Gpu(gpu) => gpu.cache.clear(),
            Memory::None => Ok(()),
        };
        py.detach(|| guarded(clear)).map_err(exception)
    }

    /// Lets the empty sequence `to` begin with all tokens of `from`.
    fn fork(&self, py: Python<'_>, from: usize, to: usize) -> PyResult<()> {
        let fork = || match &mut *self.memory() {
            Memory::Host(cache) => cache.fork(from, to),
            Memory::Gpu(gpu) => gpu.cache.fork(from, to),
            Memory::None => self.options.build()?.fork(from, to),
        };
        py.detach(|| guarded(fork)).map_err(exception)
    }

    /// Tokens of every sequence.
    fn lengths(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        let lengths = || {
            let memory = self.memory();
            let len = |sequence| match &*memory {
                Memory::Host(cache) => cache.len(sequence),
                Memory::Gpu(gpu) => gpu.cache.len(sequence),
                Memory::None => Ok(0),
            };
            (0..self.sequences).map(len).collect::<Result<_>>()
        };
        py.detach(|| guarded(lengths)).map_err(exception)
    }

    /// Bytes of all pages that were ever needed at once; on a GPU those of the pool.
    fn bytes(&self, py: Python<'_>) -> usize {
        py.detach(|| match &*self.memory() {
            Memory::Host(cache) => cache.bytes(),
            Memory::Gpu(gpu) => gpu.cache.bytes(),
            Memory::None => 0,
        })
    }
}

impl KvCache {
    /// A call that has panicked may have left tokens half written; what the tables count is whole.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cache where a caller's tensors lie, which the first of them decide.
    fn memory_for(&self, stream: Option<(u32, u64)>) -> Result<MutexGuard<'_, Memory>> {
        let mut memory = self.memory();
        if let Memory::None = *memory {
            *memory = match stream {
                None => Memory::Host(Box::new(self.options.build()?)),
                Some(place) => Memory::Gpu(Box::new(OnGpu::new(&self.options, place)?)),
            };
        }
        let place = match &*memory {
            Memory::Gpu(gpu) => Some(gpu.place),
            Memory::Host(_) | Memory::None => None,
        };
        if place.map(|(gpu, _)| gpu) != stream.map(|(gpu, _)| gpu) {
            let name =
                |place: Option<(u32, u64)>| place.map_or("cpu".to_owned(), |(gpu, _)| format!("cuda:{gpu}"));
            return Err(Error::value("device", name(stream), format!("{}, where the cache is", name(place))));
        }
        if place != stream {
            let wanted = "the one on which the cache was first appended to: its work is put there, in order";
            return Err(Error::value("stream", "another of the GPU's", wanted));
        }
        Ok(memory)
    }
}

impl OnGpu {
    fn new(options: &KvCacheOptions, place: (u32, u64)) -> Result<Self> {
        let (ordinal, stream) = place;
        let gpu = Cuda::shared(ordinal)?;
        // SAFETY: a framework's streams live as long as the process.
        let stream = unsafe { Stream::from_raw(gpu.device(), stream) };
        Ok(OnGpu { cache: options.build_on(gpu, &stream)?, place })
    }
}

impl Attended<'_> {
    fn on_cpu(&self, cache: &sageattention::KvCache) -> Result<()> {
        let mut attention = self.options.attention();
        // SAFETY: of all tensors the caller of `attend` says that their memory is as described; the interpreter keeps its
        // arguments alive during the call. Other threads that write to them meanwhile would race with any library.
        let q = unsafe { host::view("q", self.q) }?;
        // SAFETY: as above, and nobody else knows of the output yet.
        let out = unsafe { host::view_mut("out", self.out) }?;
        // SAFETY: as above.
        let flags = self.mask.filter(|mask| mask.is_bool()).map(|mask| unsafe { host::flags("mask", mask) });
        let flags = flags.transpose()?;
        if let Some((visible, geometry)) = &flags {
            attention = attention.mask(Mask::Bool(View::strided("mask", visible, *geometry)?));
        } else if let Some(mask) = self.mask {
            // SAFETY: as above.
            attention = attention.mask(Mask::Additive(unsafe { host::view("mask", mask) }?));
        }
        if let Some(sinks) = self.sinks {
            // SAFETY: as above.
            attention = attention.sinks(unsafe { host::view("sinks", sinks) }?);
        }
        let mut lse = match self.lse {
            // SAFETY: as for the output.
            Some(lse) => match unsafe { host::view_mut("lse", lse) }? {
                TensorViewMut::F32(view) if view.geometry().is_contiguous() => Some(view),
                _ => return Err(wrong_lse(lse)),
            },
            None => None,
        };
        cache.attend_into(self.sequences, q, &attention, out, lse.as_mut().map(|lse| lse.data_mut()))
    }

    fn on_gpu(&self, cache: &sageattention::KvCache<Cuda>) -> Result<()> {
        let mut attention = self.options.attention();
        // SAFETY: the caller of `attend` says that the memory of tensors is as described; its framework keeps it until
        // work on the stream is done.
        let tensor = |name, tensor: &RawTensor| unsafe { on_gpu(name, tensor) };
        if let Some(mask) = self.mask.filter(|mask| mask.is_bool()) {
            // SAFETY: as above.
            let bytes = unsafe { DeviceBytes::from_raw(mask.geometry("mask")?, mask.address) };
            attention = attention.mask(DeviceMask::Bool(bytes));
        } else if let Some(mask) = self.mask {
            attention = attention.mask(DeviceMask::Additive(tensor("mask", mask)?));
        }
        if let Some(sinks) = self.sinks {
            attention = attention.sinks(tensor("sinks", sinks)?);
        }
        let lse = match self.lse {
            Some(lse) => {
                let rows = rows_of_lse(lse)?;
                // SAFETY: as above.
                Some(unsafe { DeviceLse::from_raw(lse.address, rows) })
            }
            None => None,
        };
        cache.attend_into(self.sequences, tensor("q", self.q)?, &attention, tensor("out", self.out)?, lse)
    }
}

/// A tensor in a GPU's memory.
///
/// # Safety
/// As [`DeviceTensor::from_raw`].
unsafe fn on_gpu<'a>(name: &'static str, tensor: &RawTensor) -> Result<DeviceTensor<'a>> {
    // SAFETY: the caller's promise.
    Ok(unsafe { DeviceTensor::from_raw(tensor.dtype(name)?, tensor.geometry(name)?, tensor.address) })
}

/// Waits for the work on a GPU's stream, where the caller's library does not know of it.
fn settled(stream: Option<(u32, u64)>, wait: bool) -> Result<()> {
    let Some((ordinal, stream)) = stream.filter(|_| wait) else { return Ok(()) };
    let gpu = Cuda::shared(ordinal)?;
    // SAFETY: as in `OnGpu::new`.
    finished(&unsafe { Stream::from_raw(gpu.device(), stream) })
}
