//! Candle's tensors as the views that attention takes.

use candle_core::{CpuStorage, DType, Storage, Tensor};
use sageattention::{Error, Geometry, Mask, Result, TensorView, View};

use crate::error::wrap;

/// Where the elements of a tensor lie in its storage.
pub(crate) fn geometry(name: &str, layout: &candle_core::Layout) -> Result<Geometry> {
    let strides: Vec<i64> = layout.stride().iter().map(|&stride| stride as i64).collect();
    Geometry::strided(name, layout.dims(), &strides, layout.start_offset() as i64)
}

/// The shape of the output of queries and values: Q's, but V's channels, as far as those are good ones.
pub(crate) fn out_shape(q: &candle_core::Layout, v: &candle_core::Layout) -> Vec<usize> {
    let rows = q.dims().split_last().map_or(&[][..], |(_, rows)| rows);
    rows.iter().chain(v.dims().last()).copied().collect()
}

/// That a tensor's element type is none of those.
pub(crate) fn wrong_dtype(name: &'static str, found: DType, wanted: &str) -> Error {
    Error::DType { name: name.into(), found: found.as_str().into(), wanted: wanted.into() }
}

/// A query, key or value tensor.
pub(crate) fn tensor<'a>(
    name: &'static str,
    storage: &'a CpuStorage,
    layout: &candle_core::Layout,
) -> Result<TensorView<'a>> {
    let geometry = geometry(name, layout)?;
    match storage {
        CpuStorage::F32(data) => Ok(View::strided(name, data, geometry)?.into()),
        CpuStorage::F16(data) => Ok(View::strided(name, data, geometry)?.into()),
        CpuStorage::BF16(data) => Ok(View::strided(name, data, geometry)?.into()),
        other => Err(wrong_dtype(name, dtype(other), "f32, f16 or bf16")),
    }
}

/// The element type of a storage.
fn dtype(storage: &CpuStorage) -> DType {
    candle_core::backend::BackendStorage::dtype(storage)
}

/// A tensor's storage, if it is this process's memory.
fn on_cpu<'a>(name: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        other => {
            let found = format!("{:?}", other.device().location());
            Err(Error::value(format!("{name} device"), found, "cpu, as q"))
        }
    }
}

/// Flags on the CPU, from u8.
pub(crate) struct HostFlags<'a> {
    name: &'static str,
    bytes: &'a [u8],
    geometry: Geometry,
    /// Bytes that are neither 0 nor 1, made so.
    flags: Option<Vec<bool>>,
}

impl<'a> HostFlags<'a> {
    /// Flags that lie in a storage.
    pub(crate) fn new(
        name: &'static str,
        storage: &'a Storage,
        layout: &candle_core::Layout,
    ) -> Result<Self> {
        match on_cpu(name, storage)? {
            CpuStorage::U8(bytes) => Ok(Self::of_bytes(name, bytes, geometry(name, layout)?)),
            other => Err(wrong_dtype(name, dtype(other), "u8")),
        }
    }

    fn of_bytes(name: &'static str, bytes: &'a [u8], geometry: Geometry) -> Self {
        let odd = bytes.iter().any(|&byte| byte > 1);
        let flags = odd.then(|| bytes.iter().map(|&byte| byte != 0).collect());
        HostFlags { name, bytes, geometry, flags }
    }

    /// The flags as attention takes them.
    pub(crate) fn view(&self) -> Result<View<'_, bool>> {
        let flags = match &self.flags {
            Some(flags) => flags,
            // All are 0 or 1, as `of_bytes` has seen.
            None => bytemuck::checked::cast_slice::<u8, bool>(self.bytes),
        };
        View::strided(self.name, flags, self.geometry)
    }
}

/// An explicit mask on the CPU.
pub(crate) enum HostMask<'a> {
    Bool(HostFlags<'a>),
    Additive(TensorView<'a>),
}

impl<'a> HostMask<'a> {
    /// A mask that lies in a storage.
    pub(crate) fn new(storage: &'a Storage, layout: &candle_core::Layout) -> Result<Self> {
        let storage = on_cpu("mask", storage)?;
        let geometry = geometry("mask", layout)?;
        match storage {
            CpuStorage::U8(bytes) => Ok(HostMask::Bool(HostFlags::of_bytes("mask", bytes, geometry))),
            CpuStorage::F32(_) | CpuStorage::F16(_) | CpuStorage::BF16(_) => {
                tensor("mask", storage, layout).map(HostMask::Additive)
            }
            other => Err(wrong_dtype("mask", dtype(other), "u8, f32, f16 or bf16")),
        }
    }

    /// The mask as attention takes it.
    pub(crate) fn mask(&self) -> Result<Mask<'_>> {
        Ok(match self {
            HostMask::Bool(flags) => Mask::Bool(flags.view()?),
            HostMask::Additive(biases) => Mask::Additive(*biases),
        })
    }
}

/// A list of lengths in this process's memory.
pub(crate) fn lengths(name: &'static str, tensor: &Tensor) -> candle_core::Result<Vec<i32>> {
    if !tensor.dtype().is_int() || tensor.rank() != 1 {
        let found = format!("{:?} of {}", tensor.dims(), tensor.dtype().as_str());
        return Err(wrap(Error::value(name, found, "one dimension of integers")));
    }
    let values = tensor.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let fits = |value: i64| {
        i32::try_from(value).map_err(|_| wrap(Error::value(name, value, format!("0 to {}", i32::MAX))))
    };
    values.into_iter().map(fits).collect()
}
