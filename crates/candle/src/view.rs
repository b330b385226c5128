//! Candle's tensors as the views that attention takes.

use candle_core::{CpuStorage, DType, Storage, Tensor};
use sageattention::{Error, Geometry, Mask, Result, TensorView, View};

use crate::error::wrap;

/// Where the elements of a tensor lie in its storage.
pub(crate) fn geometry(name: &str, layout: &candle_core::Layout) -> Result<Geometry> {
    let strides: Vec<i64> = layout.stride().iter().map(|&stride| stride as i64).collect();
    Geometry::strided(name, layout.dims(), &strides, layout.start_offset() as i64)
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

/// Memory of an explicit mask, on the CPU.
pub(crate) struct HostMask<'a> {
    storage: &'a CpuStorage,
    geometry: Geometry,
    /// Flags of a u8 mask that are neither 0 nor 1, made so.
    flags: Option<Vec<bool>>,
}

impl<'a> HostMask<'a> {
    /// A mask that lies in a storage.
    pub(crate) fn new(storage: &'a Storage, layout: &candle_core::Layout) -> Result<Self> {
        let geometry = geometry("mask", layout)?;
        let Storage::Cpu(storage) = storage else {
            return Err(Error::value(
                "mask device",
                format!("{:?}", storage.device().location()),
                "cpu, as q",
            ));
        };
        let flags = match storage {
            CpuStorage::U8(bytes) if bytes.iter().any(|&byte| byte > 1) => {
                Some(bytes.iter().map(|&byte| byte != 0).collect())
            }
            _ => None,
        };
        Ok(HostMask { storage, geometry, flags })
    }

    /// The mask as attention takes it.
    pub(crate) fn mask(&self) -> Result<Mask<'_>> {
        let geometry = self.geometry;
        Ok(match (self.storage, &self.flags) {
            (_, Some(flags)) => Mask::Bool(View::strided("mask", flags, geometry)?),
            (CpuStorage::U8(bytes), None) => {
                // All are 0 or 1, as `new` has seen.
                let flags = bytemuck::checked::cast_slice::<u8, bool>(bytes);
                Mask::Bool(View::strided("mask", flags, geometry)?)
            }
            (CpuStorage::F32(data), None) => Mask::Additive(View::strided("mask", data, geometry)?.into()),
            (CpuStorage::F16(data), None) => Mask::Additive(View::strided("mask", data, geometry)?.into()),
            (CpuStorage::BF16(data), None) => Mask::Additive(View::strided("mask", data, geometry)?.into()),
            (other, None) => return Err(wrong_dtype("mask", dtype(other), "u8, f32, f16 or bf16")),
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
