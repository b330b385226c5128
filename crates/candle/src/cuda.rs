//! Attention of tensors in a GPU's memory, on candle's stream.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage};
use half::{bf16, f16};
use sageattention::cuda::{Cuda, DeviceBytes, DeviceInts, DeviceLse, DeviceMask, DeviceTensor, Stream};
use sageattention::{AnyLengths, Attention, BlockMask, DType, Error, Geometry, Lengths as CoreLengths};

use crate::Options;
use crate::error::wrap;
use crate::options::Lengths;
use crate::view::{geometry, out_shape, wrong_dtype};

/// The output, and the log-sum-exp where `lse` asks for it; the work for them is on the stream.
pub(crate) fn forward(
    options: &Options,
    tensors: [(&CudaStorage, &Layout); 3],
    lse: bool,
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    let (q, _) = tensors[0];
    match q.slice {
        CudaStorageSlice::F32(_) => run::<f32>(options, tensors, lse),
        CudaStorageSlice::F16(_) => run::<f16>(options, tensors, lse),
        CudaStorageSlice::BF16(_) => run::<bf16>(options, tensors, lse),
        _ => Err(wrap(wrong_dtype("q", q.dtype(), "f16 or bf16"))),
    }
}

fn run<T: CudaDType + DeviceRepr + sageattention::Element>(
    options: &Options,
    [q, k, v]: [(&CudaStorage, &Layout); 3],
    lse: bool,
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    let (q_shape, out_shape) = (q.1.dims(), out_shape(q.1, v.1));
    let device = q.0.device();
    let candle_stream = device.cuda_stream();
    let gpu = Cuda::shared(candle_stream.context().ordinal() as u32).map_err(wrap)?;
    // SAFETY: candle's streams are of the primary context. `candle_stream` keeps it alive for this call, and all that
    // is allocated on it here is freed in stream order before the call ends.
    let stream =
        unsafe { Stream::from_raw(gpu.device(), candle_stream.cu_stream().expose_provenance() as u64) };

    let (dtype, q) = Memory::tensor("q", q.0, q.1, &candle_stream)?;
    let (k_dtype, k) = Memory::tensor("k", k.0, k.1, &candle_stream)?;
    let (v_dtype, v) = Memory::tensor("v", v.0, v.1, &candle_stream)?;
    let mask = options.mask.as_ref().map(|mask| mask.storage_and_layout());
    let mask = mask.as_ref().map(|(storage, layout)| {
        MaskMemory::new(on_device("mask", storage, device)?, layout, &candle_stream)
    });
    let mask = mask.transpose()?;
    let blocks = options.blocks.as_ref().map(|blocks| (blocks, blocks.flags.storage_and_layout()));
    let blocks = blocks.as_ref().map(|(blocks, (storage, layout))| {
        let storage = on_device("block_mask", storage, device)?;
        Memory::flags("block_mask", storage, layout, &candle_stream).map(|flags| (*blocks, flags))
    });
    let blocks = blocks.transpose()?;
    let sinks = options.sinks.as_ref().map(|sinks| sinks.storage_and_layout());
    let sinks = sinks.as_ref().map(|(storage, layout)| {
        Memory::tensor("sinks", on_device("sinks", storage, device)?, layout, &candle_stream)
    });
    let sinks = sinks.transpose()?;
    let lists = options.lengths.tensors();
    let lists = lists.iter().map(|(name, tensor)| (*name, tensor.storage_and_layout())).collect::<Vec<_>>();
    let lists = lists
        .iter()
        .map(|(name, (storage, layout))| {
            Memory::list(name, on_device(name, storage, device)?, layout, &candle_stream)
        })
        .collect::<Result<Vec<_>>>()?;
    let lengths = lengths(&options.lengths, &lists);

    let out_geometry = Geometry::contiguous("out", &out_shape).map_err(wrap)?;
    // SAFETY: attention writes every element, before anything later on the stream reads one.
    let mut out: CudaSlice<T> = unsafe { device.alloc(out_geometry.len()) }?;
    let lse_rows: usize = options.lse_shape(q_shape).iter().product();
    // SAFETY: as above.
    let mut lse: Option<CudaSlice<f32>> = lse.then(|| unsafe { device.alloc(lse_rows) }).transpose()?;
    {
        let (address, _out_guard) = out.device_ptr_mut(&candle_stream);
        let lse_guard = lse.as_mut().map(|lse| lse.device_ptr_mut(&candle_stream));
        // SAFETY: candle's storages hold every element that their layouts reach; the guards keep them, and let other
        // streams wait for this one.
        let (tensors, mask, sinks, blocks, out, lse) = unsafe {
            let lse = lse_guard.as_ref().map(|(address, _)| DeviceLse::from_raw(*address, lse_rows));
            (
                [q.view(dtype), k.view(k_dtype), v.view(v_dtype)],
                mask.as_ref().map(|mask| mask.view()),
                sinks.as_ref().map(|(dtype, sinks)| sinks.view(*dtype)),
                blocks.as_ref().map(|(blocks, flags)| BlockMask {
                    blocks: DeviceBytes::from_raw(flags.geometry, flags.address),
                    block_q: blocks.block_q,
                    block_k: blocks.block_k,
                }),
                DeviceTensor::from_raw(T::DTYPE, out_geometry, address),
                lse,
            )
        };
        let attention = options.attention().lengths(lengths);
        let attention = mask.into_iter().fold(attention, Attention::mask);
        let attention = sinks.into_iter().fold(attention, Attention::sinks);
        let attention = blocks.into_iter().fold(attention, Attention::block_mask);
        attention.forward_on(&gpu, &stream, tensors, out, lse).map_err(wrap)?;
    }
    let lse = lse.map(|lse| CudaStorage::wrap_cuda_slice(lse, device.clone()));
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lse))
}

/// The lengths of a call, which the kernels read where they lie.
fn lengths<'a>(lengths: &Lengths, lists: &'a [Memory<'_>]) -> AnyLengths<'a> {
    match (lengths, lists) {
        (Lengths::KvLens(_), [kv_lens]) => CoreLengths::DeviceKvLens(kv_lens.integers()),
        (&Lengths::Packed { max_q_len, max_kv_len, .. }, [cu_q, cu_k]) => CoreLengths::DevicePacked {
            cu_seqlens_q: cu_q.integers(),
            cu_seqlens_k: cu_k.integers(),
            max_q_len,
            max_kv_len,
        },
        _ => CoreLengths::Dense,
    }
}

/// A storage, if it is of the GPU that Q is on.
fn on_device<'a>(name: &'static str, storage: &'a Storage, device: &CudaDevice) -> Result<&'a CudaStorage> {
    match storage {
        Storage::Cuda(storage) if storage.device().id() == device.id() => Ok(storage),
        other => {
            let found = format!("{:?}", other.device().location());
            Err(wrap(Error::value(format!("{name} device"), found, "the GPU that q is on")))
        }
    }
}

/// Elements in a GPU's memory, and the guard by which cudarc orders the streams that use it.
struct Memory<'a> {
    geometry: Geometry,
    address: u64,
    _guard: SyncOnDrop<'a>,
}

impl<'a> Memory<'a> {
    fn tensor(
        name: &'static str,
        storage: &'a CudaStorage,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> Result<(DType, Self)> {
        let geometry = geometry(name, layout).map_err(wrap)?;
        let (dtype, (address, _guard)) = match &storage.slice {
            CudaStorageSlice::F32(slice) => (DType::F32, slice.device_ptr(stream)),
            CudaStorageSlice::F16(slice) => (DType::F16, slice.device_ptr(stream)),
            CudaStorageSlice::BF16(slice) => (DType::BF16, slice.device_ptr(stream)),
            _ => return Err(wrap(wrong_dtype(name, storage.dtype(), "f32, f16 or bf16"))),
        };
        Ok((dtype, Memory { geometry, address, _guard }))
    }

    /// Flags, a byte each.
    fn flags(
        name: &'static str,
        storage: &'a CudaStorage,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> Result<Self> {
        let CudaStorageSlice::U8(slice) = &storage.slice else {
            return Err(wrap(wrong_dtype(name, storage.dtype(), "u8")));
        };
        let geometry = geometry(name, layout).map_err(wrap)?;
        let (address, _guard) = slice.device_ptr(stream);
        Ok(Memory { geometry, address, _guard })
    }

    /// Lengths: one dimension of 32-bit integers without gaps.
    fn list(
        name: &'static str,
        storage: &'a CudaStorage,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> Result<Self> {
        let geometry = geometry(name, layout).map_err(wrap)?;
        if geometry.rank() != 1 || !geometry.is_contiguous() {
            let found = format!("{geometry:?}");
            return Err(wrap(Error::value(format!("{name} layout"), found, "one dimension without gaps")));
        }
        // Lengths are below 2³¹, where both types have the same bits.
        let (address, _guard) = match &storage.slice {
            CudaStorageSlice::U32(slice) => slice.device_ptr(stream),
            CudaStorageSlice::I32(slice) => slice.device_ptr(stream),
            _ => return Err(wrap(wrong_dtype(name, storage.dtype(), "u32 or i32"))),
        };
        Ok(Memory { geometry, address, _guard })
    }

    /// What [`Memory::list`] made.
    fn integers(&self) -> DeviceInts<'_> {
        let first = self.address.wrapping_add_signed(self.geometry.offset() * size_of::<i32>() as i64);
        // SAFETY: the storage holds every entry that its layout reaches, 32-bit integers without gaps as `list` has
        // seen; the guard keeps it, and lets other streams wait for this one.
        unsafe { DeviceInts::from_raw(first, self.geometry.len()) }
    }

    /// # Safety
    /// As [`DeviceTensor::from_raw`]; `dtype` is that of the storage.
    unsafe fn view(&self, dtype: DType) -> DeviceTensor<'_> {
        // SAFETY: the caller's.
        unsafe { DeviceTensor::from_raw(dtype, self.geometry, self.address) }
    }
}

/// An explicit mask in a GPU's memory.
enum MaskMemory<'a> {
    Bool(Memory<'a>),
    Additive(DType, Memory<'a>),
}

impl<'a> MaskMemory<'a> {
    fn new(storage: &'a CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<Self> {
        if matches!(storage.slice, CudaStorageSlice::U8(_)) {
            return Memory::flags("mask", storage, layout, stream).map(MaskMemory::Bool);
        }
        let (dtype, memory) = Memory::tensor("mask", storage, layout, stream)?;
        Ok(MaskMemory::Additive(dtype, memory))
    }

    /// # Safety
    /// As [`DeviceTensor::from_raw`].
    unsafe fn view(&self) -> DeviceMask<'_> {
        // SAFETY: the caller's, in both.
        unsafe {
            match self {
                MaskMemory::Bool(flags) => {
                    DeviceMask::Bool(DeviceBytes::from_raw(flags.geometry, flags.address))
                }
                MaskMemory::Additive(dtype, numbers) => DeviceMask::Additive(numbers.view(*dtype)),
            }
        }
    }
}
