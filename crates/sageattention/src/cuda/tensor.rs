//! Tensors in a GPU's memory.

use sage_core::{DType, Geometry, Operand, Strided};

/// A tensor in a GPU's memory: an address, and where each element lies from there.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensor {
    dtype: DType,
    geometry: Geometry,
    address: u64,
}

impl DeviceTensor {
    /// The tensor whose element of index 0 of `geometry` lies at `address`.
    ///
    /// # Safety
    /// As long as the tensor or a copy of it is used, every element that `geometry` reaches lies in memory of the GPU
    /// that it is used on; and while work with it runs, nothing else writes there.
    pub unsafe fn from_raw(dtype: DType, geometry: Geometry, address: u64) -> Self {
        DeviceTensor { dtype, geometry, address }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.geometry.shape()
    }

    /// Address of the first element.
    pub(super) fn first_element(&self) -> u64 {
        let bytes = self.dtype.bytes() as i64;
        self.address.wrapping_add_signed(self.geometry.index([0; sage_core::MAX_RANK]) * bytes)
    }

    /// Strides of batch, heads and rows of a tensor in a call's order, in elements.
    pub(super) fn strides(&self) -> [i64; 3] {
        let strides = self.geometry.strides();
        [strides[0], strides[1], strides[2]]
    }
}

impl Strided for DeviceTensor {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        DeviceTensor { geometry, ..*self }
    }
}

impl Operand for DeviceTensor {
    const ON_DEVICE: bool = true;

    fn dtype(&self) -> DType {
        self.dtype
    }
}

/// An explicit mask in a GPU's memory, broadcastable to `[batch, num_q_heads, q_len, kv_len]`.
#[derive(Clone, Copy, Debug)]
pub enum DeviceMask {
    /// A byte for each score: not 0 where the key is visible.
    Bool(DeviceBytes),
    /// Added to the scaled scores before softmax; −∞ hides a key. Any element type.
    Additive(DeviceTensor),
}

/// Bytes in a GPU's memory, laid out as a tensor.
#[derive(Clone, Copy, Debug)]
pub struct DeviceBytes {
    geometry: Geometry,
    address: u64,
}

impl DeviceBytes {
    /// The bytes whose element of index 0 of `geometry` lies at `address`.
    ///
    /// # Safety
    /// As for [`DeviceTensor::from_raw`].
    pub unsafe fn from_raw(geometry: Geometry, address: u64) -> Self {
        DeviceBytes { geometry, address }
    }
}

impl DeviceMask {
    /// Address of the first element, and strides of batch, heads, queries and keys in elements.
    pub(super) fn parts(&self) -> (u64, [i64; 4]) {
        let geometry = self.geometry();
        let strides = geometry.strides();
        let first = match self {
            DeviceMask::Bool(bytes) => {
                bytes.address.wrapping_add_signed(geometry.index([0; sage_core::MAX_RANK]))
            }
            DeviceMask::Additive(tensor) => tensor.first_element(),
        };
        (first, [strides[0], strides[1], strides[2], strides[3]])
    }
}

impl Strided for DeviceMask {
    fn geometry(&self) -> &Geometry {
        match self {
            DeviceMask::Bool(bytes) => &bytes.geometry,
            DeviceMask::Additive(tensor) => tensor.geometry(),
        }
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        match self {
            DeviceMask::Bool(bytes) => DeviceMask::Bool(DeviceBytes { geometry, ..*bytes }),
            DeviceMask::Additive(tensor) => DeviceMask::Additive(tensor.with_geometry(geometry)),
        }
    }
}
