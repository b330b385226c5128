//! Tensors in a GPU's memory.

use std::marker::PhantomData;

use half::{bf16, f16};
use sage_core::{DType, Error, Geometry, List, Operand, Result, Strided, TensorView};
use sage_cuda::{Buffer, Stream};
use sage_kernels::TensorArg;

use crate::driver;

/// A tensor with memory of its own on a GPU.
#[derive(Debug)]
pub struct CudaTensor {
    buffer: Buffer,
    dtype: DType,
    geometry: Geometry,
}

impl CudaTensor {
    /// A copy of a host tensor, gaps included. Waits for the copy.
    ///
    /// # Errors
    /// When there is not enough memory, or the stream is being captured.
    pub fn upload(stream: &Stream, tensor: &TensorView<'_>) -> Result<Self> {
        let buffer = match tensor {
            TensorView::F32(view) => Buffer::from_slice(stream, view.data()),
            TensorView::F16(view) => Buffer::from_slice::<f16>(stream, view.data()),
            TensorView::BF16(view) => Buffer::from_slice::<bf16>(stream, view.data()),
        };
        let buffer = buffer.map_err(driver)?;
        Ok(CudaTensor { buffer, dtype: tensor.dtype(), geometry: *tensor.geometry() })
    }

    /// A row-major tensor of unknown content.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn uninitialized(stream: &Stream, dtype: DType, shape: &[usize]) -> Result<Self> {
        let geometry = Geometry::contiguous("tensor", shape)?;
        let buffer = Buffer::new(stream, geometry.len() * dtype.bytes()).map_err(driver)?;
        Ok(CudaTensor { buffer, dtype, geometry })
    }

    /// The tensor, borrowed.
    pub fn view(&self) -> DeviceTensor<'_> {
        // SAFETY: the elements of a host view, or of a row-major tensor, lie in its memory, all of which the buffer
        // has.
        unsafe { DeviceTensor::from_raw(self.dtype, self.geometry, self.buffer.address()) }
    }

    /// The memory, gaps included.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The memory, gaps included, to write to.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }
}

/// A tensor as kernels take it.
pub(crate) fn argument(tensor: &DeviceTensor<'_>) -> TensorArg {
    TensorArg { address: tensor.first_element(), strides: tensor.strides() }
}

/// A tensor in a GPU's memory: an address, and where each element lies from there.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensor<'a> {
    dtype: DType,
    geometry: Geometry,
    address: u64,
    memory: PhantomData<&'a Buffer>,
}

impl DeviceTensor<'_> {
    /// The tensor whose element of index 0 of `geometry` lies at `address`.
    ///
    /// # Safety
    /// As long as the tensor or a copy of it is used, every element that `geometry` reaches lies in memory of the GPU
    /// that it is used on; and while work with it runs, nothing else writes there.
    pub unsafe fn from_raw(dtype: DType, geometry: Geometry, address: u64) -> Self {
        DeviceTensor { dtype, geometry, address, memory: PhantomData }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.geometry.shape()
    }

    /// Address of the first element.
    pub(crate) fn first_element(&self) -> u64 {
        let bytes = self.dtype.bytes() as i64;
        self.address.wrapping_add_signed(self.geometry.offset() * bytes)
    }

    /// Strides of batch, heads and rows of a tensor in a call's order, in elements.
    pub(crate) fn strides(&self) -> [i64; 3] {
        let strides = self.geometry.strides();
        [strides[0], strides[1], strides[2]]
    }
}

impl Strided for DeviceTensor<'_> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        DeviceTensor { geometry, ..*self }
    }
}

impl<'a> Operand for DeviceTensor<'a> {
    type Mask = DeviceMask<'a>;
    type Blocks = DeviceBytes<'a>;
    type List = DeviceInts<'a>;

    fn dtype(&self) -> DType {
        self.dtype
    }
}

/// Where the log-sum-exp of each row goes: f32 in a GPU's memory, without gaps.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLse<'a> {
    address: u64,
    rows: usize,
    memory: PhantomData<&'a Buffer>,
}

impl<'a> DeviceLse<'a> {
    /// As many rows as `buffer` holds.
    pub fn of(buffer: &'a Buffer) -> Self {
        let rows = buffer.bytes() / size_of::<f32>();
        DeviceLse { address: buffer.address(), rows, memory: PhantomData }
    }

    /// The `rows` values from `address` on, which is a multiple of 4.
    ///
    /// # Safety
    /// As for [`DeviceTensor::from_raw`], of f32.
    pub unsafe fn from_raw(address: u64, rows: usize) -> Self {
        DeviceLse { address, rows, memory: PhantomData }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// An error unless there is a place for each of `rows` rows.
    pub(crate) fn check(&self, rows: usize) -> Result<()> {
        if self.rows >= rows {
            return Ok(());
        }
        Err(Error::Memory { name: "lse".into(), found: self.rows, wanted: rows.to_string() })
    }
}

/// 32-bit integers in a GPU's memory, without gaps: lengths, or boundaries of packed sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInts<'a> {
    address: u64,
    entries: usize,
    memory: PhantomData<&'a Buffer>,
}

impl<'a> DeviceInts<'a> {
    /// As many as `buffer` holds.
    pub fn of(buffer: &'a Buffer) -> Self {
        let entries = buffer.bytes() / size_of::<i32>();
        DeviceInts { address: buffer.address(), entries, memory: PhantomData }
    }

    /// The `entries` integers from `address` on, which is a multiple of 4.
    ///
    /// # Safety
    /// As for [`DeviceTensor::from_raw`], of i32.
    pub unsafe fn from_raw(address: u64, entries: usize) -> Self {
        DeviceInts { address, entries, memory: PhantomData }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl List for DeviceInts<'_> {
    fn entries(&self) -> usize {
        self.entries
    }
}

/// An explicit mask in a GPU's memory, broadcastable to `[batch, num_q_heads, q_len, kv_len]`.
#[derive(Clone, Copy, Debug)]
pub enum DeviceMask<'a> {
    /// A byte for each score: not 0 where the key is visible.
    Bool(DeviceBytes<'a>),
    /// Added to the scaled scores before softmax; −∞ hides a key. Any element type.
    Additive(DeviceTensor<'a>),
}

/// Bytes in a GPU's memory, laid out as a tensor.
#[derive(Clone, Copy, Debug)]
pub struct DeviceBytes<'a> {
    geometry: Geometry,
    address: u64,
    memory: PhantomData<&'a Buffer>,
}

impl DeviceBytes<'_> {
    /// The bytes whose element of index 0 of `geometry` lies at `address`.
    ///
    /// # Safety
    /// As for [`DeviceTensor::from_raw`].
    pub unsafe fn from_raw(geometry: Geometry, address: u64) -> Self {
        DeviceBytes { geometry, address, memory: PhantomData }
    }

    /// Address of the first byte.
    pub(crate) fn first_byte(&self) -> u64 {
        self.address.wrapping_add_signed(self.geometry.offset())
    }

    /// As kernels take them: strides are of batch, heads, queries and keys, or blocks of these.
    pub(crate) fn argument(&self) -> TensorArg<4> {
        mask_argument(&self.geometry, self.first_byte())
    }
}

fn mask_argument(geometry: &Geometry, address: u64) -> TensorArg<4> {
    let strides = geometry.strides();
    TensorArg { address, strides: [strides[0], strides[1], strides[2], strides[3]] }
}

impl Strided for DeviceBytes<'_> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        DeviceBytes { geometry, ..*self }
    }
}

impl DeviceMask<'_> {
    /// As kernels take it: strides are of batch, heads, queries and keys.
    pub(crate) fn argument(&self) -> TensorArg<4> {
        match self {
            DeviceMask::Bool(bytes) => bytes.argument(),
            DeviceMask::Additive(tensor) => mask_argument(tensor.geometry(), tensor.first_element()),
        }
    }
}

impl Strided for DeviceMask<'_> {
    fn geometry(&self) -> &Geometry {
        match self {
            DeviceMask::Bool(bytes) => bytes.geometry(),
            DeviceMask::Additive(tensor) => tensor.geometry(),
        }
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        match self {
            DeviceMask::Bool(bytes) => DeviceMask::Bool(bytes.with_geometry(geometry)),
            DeviceMask::Additive(tensor) => DeviceMask::Additive(tensor.with_geometry(geometry)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_of_no_keys_is_an_argument_too() {
        let geometry = Geometry::strided("mask", &[1, 2, 3, 0], &[6, 3, 1, 1], 5).unwrap();
        // SAFETY: nothing uses it on a GPU.
        let mask = DeviceMask::Bool(unsafe { DeviceBytes::from_raw(geometry, 0x1000) });
        assert_eq!(mask.argument(), TensorArg { address: 0x1005, strides: [6, 3, 1, 1] });
    }

    #[test]
    fn a_log_sum_exp_needs_a_place_for_each_row() {
        // SAFETY: nothing uses it on a GPU.
        let lse = unsafe { DeviceLse::from_raw(0x1000, 6) };
        assert_eq!((lse.check(6), lse.check(0)), (Ok(()), Ok(())));
        assert_eq!(
            lse.check(7).map_err(|error| error.to_string()),
            Err("lse: memory holds 6 elements, expected 7".into())
        );
    }
}
