//! Views of tensors in this machine's memory.

use std::borrow::Cow;
use std::{ptr, slice};

use half::{bf16, f16};
use sageattention::{DType, Error, Geometry, MAX_RANK, Result, TensorView, TensorViewMut, View, ViewMut};

use crate::tensor::RawTensor;

/// A tensor to read.
///
/// # Safety
/// For `'a`, every element of the tensor, and what lies between them, is memory of this process that nobody writes to.
pub(crate) unsafe fn view<'a>(name: &'static str, tensor: &RawTensor) -> Result<TensorView<'a>> {
    // SAFETY: the caller's promise, three times.
    unsafe {
        Ok(match tensor.dtype(name)? {
            DType::F32 => typed::<f32>(name, tensor)?.into(),
            DType::F16 => typed::<f16>(name, tensor)?.into(),
            DType::BF16 => typed::<bf16>(name, tensor)?.into(),
        })
    }
}

/// A tensor to write to.
///
/// # Safety
/// For `'a`, every element of the tensor, and what lies between them, is memory of this process that nobody else reads
/// or writes.
pub(crate) unsafe fn view_mut<'a>(name: &'static str, tensor: &RawTensor) -> Result<TensorViewMut<'a>> {
    // SAFETY: the caller's promise, three times.
    unsafe {
        Ok(match tensor.dtype(name)? {
            DType::F32 => typed_mut::<f32>(name, tensor)?.into(),
            DType::F16 => typed_mut::<f16>(name, tensor)?.into(),
            DType::BF16 => typed_mut::<bf16>(name, tensor)?.into(),
        })
    }
}

/// A tensor of bytes or booleans to write to.
///
/// # Safety
/// As for [`view_mut`].
pub(crate) unsafe fn bytes_mut<'a>(name: &'static str, tensor: &RawTensor) -> Result<ViewMut<'a, u8>> {
    // SAFETY: the caller's promise.
    unsafe { typed_mut::<u8>(name, tensor) }
}

/// The elements of a tensor of booleans, and where each lies among them. A byte that is neither 0 nor 1 is no `bool`
/// in Rust, and other libraries' tensors may hold some: such a tensor is copied, elements that a stride of 0 repeats
/// once.
///
/// # Safety
/// As for [`view`].
pub(crate) unsafe fn flags<'a>(
    name: &'static str,
    tensor: &RawTensor,
) -> Result<(Cow<'a, [bool]>, Geometry)> {
    // SAFETY: the caller's promise; any byte is a `u8`.
    let bytes = unsafe { typed::<u8>(name, tensor) }?;
    if bytes.data().iter().fold(0, |all, byte| all | byte) <= 1 {
        let data = bytes.data();
        // SAFETY: `bool` has the layout of `u8`, and each of these bytes is 0 or 1.
        let flags = unsafe { slice::from_raw_parts(data.as_ptr().cast::<bool>(), data.len()) };
        return Ok((Cow::Borrowed(flags), *bytes.geometry()));
    }
    let repeats = |(&size, &stride): (&usize, &i64)| if stride == 0 { size.min(1) } else { size };
    let shape: Vec<usize> = tensor.shape.iter().zip(&tensor.strides).map(repeats).collect();
    let compact = Geometry::contiguous(name, &shape)?;
    let strides: Vec<i64> = compact
        .strides()
        .iter()
        .zip(&tensor.strides)
        .map(|(&s, &given)| if given == 0 { 0 } else { s })
        .collect();
    let mut sizes = [1; MAX_RANK];
    sizes[MAX_RANK - shape.len()..].copy_from_slice(&shape);
    let mut flags = Vec::with_capacity(compact.len());
    for a in 0..sizes[0] {
        for b in 0..sizes[1] {
            for c in 0..sizes[2] {
                flags.extend((0..sizes[3]).map(|d| bytes.at([a, b, c, d]) != 0));
            }
        }
    }
    Ok((Cow::Owned(flags), Geometry::strided(name, &tensor.shape, &strides, 0)?))
}

/// A list of 32-bit integers without gaps.
///
/// # Safety
/// As for [`view`].
pub(crate) unsafe fn integers<'a>(name: &'static str, (address, len): (u64, usize)) -> Result<&'a [i32]> {
    let (start, len) = elements::<i32>(name, address, (len > 0).then(|| (0, len as i64 - 1)))?;
    // SAFETY: aligned and not null as `elements` has it, and the caller answers for the memory.
    Ok(unsafe { slice::from_raw_parts(start, len) })
}

/// # Safety
/// As for [`view`].
unsafe fn typed<'a, T: Copy>(name: &'static str, tensor: &RawTensor) -> Result<View<'a, T>> {
    let (start, len, geometry) = memory::<T>(name, tensor)?;
    // SAFETY: aligned and not null as `elements` has it, and the caller answers for the memory.
    View::strided(name, unsafe { slice::from_raw_parts(start, len) }, geometry)
}

/// # Safety
/// As for [`view_mut`].
unsafe fn typed_mut<'a, T: Copy>(name: &'static str, tensor: &RawTensor) -> Result<ViewMut<'a, T>> {
    let (start, len, geometry) = memory::<T>(name, tensor)?;
    // SAFETY: aligned and not null as `elements` has it, and the caller answers for the memory.
    ViewMut::strided(name, unsafe { slice::from_raw_parts_mut(start, len) }, geometry)
}

/// The memory from a tensor's lowest element to its highest, and where the elements lie in it.
fn memory<T>(name: &'static str, tensor: &RawTensor) -> Result<(*mut T, usize, Geometry)> {
    let span = tensor.geometry(name)?.span();
    let (start, len) = elements::<T>(name, tensor.address, span)?;
    let low = span.map_or(0, |(low, _)| low);
    Ok((start, len, Geometry::strided(name, &tensor.shape, &tensor.strides, -low)?))
}

/// Elements `span` from an address on: where the lowest lies, and how many there are up to the highest.
fn elements<T>(name: &'static str, address: u64, span: Option<(i64, i64)>) -> Result<(*mut T, usize)> {
    let Some((low, high)) = span else { return Ok((ptr::NonNull::dangling().as_ptr(), 0)) };
    let bytes = size_of::<T>() as i64;
    let in_memory = || {
        let start = low.checked_mul(bytes).and_then(|low| address.checked_add_signed(low))?;
        let len = high.checked_sub(low)?.checked_add(1)?;
        len.checked_mul(bytes)
            .is_some_and(|bytes| start.checked_add(bytes as u64).is_some())
            .then_some((start, len))
    };
    let wrong = |wanted: &str| Error::value(format!("address of {name}"), format!("{address:#x}"), wanted);
    let (start, len) = in_memory().ok_or_else(|| wrong("all elements within the address space"))?;
    if address == 0 {
        return Err(wrong("the address of an element"));
    }
    if !start.is_multiple_of(align_of::<T>() as u64) {
        return Err(wrong(&format!("a multiple of {}", align_of::<T>())));
    }
    Ok((ptr::with_exposed_provenance_mut(start as usize), len as usize))
}
