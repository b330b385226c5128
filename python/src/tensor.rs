//! Tensors as Python hands them over.

use std::borrow::Cow;
use std::fmt::Display;

use dlpark::ffi::{
    DLDataType, DLDataTypeCode, DLPACK_MAJOR_VERSION, DLPackExchangeAPI, DLPackExchangeAPIHeader, DLTensor,
};
use dlpark::python::{ImportedDlpack, from_dlpack};
use dlpark::tensor::TensorRef;
use pyo3::exceptions::PyBufferError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyTuple};
use sageattention::{DType, Error, Geometry, Result};

/// A tensor in memory that somebody else keeps alive.
///
/// In Python it is a tuple (address, shape, strides in elements, name of the dtype), a DLPack capsule, or a tensor of
/// torch's.
pub(crate) struct RawTensor {
    pub address: u64,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<i64>,
    dtype: Cow<'static, str>,
    /// Keeps a capsule's tensor alive.
    _owner: Option<ImportedDlpack>,
}

impl<'py> FromPyObject<'_, 'py> for RawTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyTuple>() {
            let (address, shape, strides, dtype): (_, _, _, String) = object.extract()?;
            return Ok(RawTensor { address, shape, strides, dtype: dtype.into(), _owner: None });
        }
        if object.is_instance_of::<PyCapsule>() {
            let capsule = from_dlpack(object, None, None)?;
            let tensor = RawTensor::described(capsule.validate().map_err(refused)?)?;
            return Ok(RawTensor { _owner: Some(capsule), ..tensor });
        }
        match description(object)? {
            // SAFETY: torch describes a tensor of its own, which its caller keeps alive.
            Some(tensor) => RawTensor::described(unsafe { TensorRef::from_raw(&tensor) }.map_err(refused)?),
            None => RawTensor::of_attributes(object),
        }
    }
}

/// A tensor of torch's as its table of C functions describes it, in a fraction of the time that attributes take. None
/// where torch has no table that is known here: before 2.10 it has none.
///
/// Nobody asks for the current stream here: for that torch looks for GPUs, even where the tensor is the CPU's.
fn description(tensor: Borrowed<'_, '_, PyAny>) -> PyResult<Option<DLTensor>> {
    let py = tensor.py();
    let Some(capsule) = tensor.get_type().getattr_opt(intern!(py, "__dlpack_c_exchange_api__"))? else {
        return Ok(None);
    };
    let table = capsule.cast::<PyCapsule>()?.pointer_checked(Some(c"dlpack_exchange_api"))?;
    // SAFETY: a capsule of this name holds a table for as long as the process lives, and each begins with this header.
    let header = unsafe { table.cast::<DLPackExchangeAPIHeader>().as_ref() };
    if header.version.major != DLPACK_MAJOR_VERSION {
        return Ok(None);
    }
    // SAFETY: as above, and the version is the one whose fields these are.
    let table = unsafe { table.cast::<DLPackExchangeAPI>().as_ref() };
    let Some(describe) = table.dltensor_from_py_object_no_sync else { return Ok(None) };
    let mut described = DLTensor::default();
    // SAFETY: the object is of the type that has the table.
    match unsafe { describe(tensor.as_ptr().cast(), &mut described) } {
        0 => Ok(Some(described)),
        _ => Err(PyErr::fetch(py)),
    }
}

impl RawTensor {
    fn of_attributes(tensor: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let dtype = tensor.getattr(intern!(py, "dtype"))?.str()?.to_string();
        Ok(RawTensor {
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            shape: tensor.getattr(intern!(py, "shape"))?.extract()?,
            strides: tensor.call_method0(intern!(py, "stride"))?.extract()?,
            dtype: dtype.trim_start_matches("torch.").to_owned().into(),
            _owner: None,
        })
    }

    fn described(tensor: TensorRef<'_>) -> PyResult<Self> {
        Ok(RawTensor {
            address: tensor.data_ptr().expose_provenance() as u64,
            // A `TensorRef` has no negative size.
            shape: tensor.shape().iter().map(|&size| size as usize).collect(),
            strides: tensor.strides_or_compact().map_err(refused)?.into_owned(),
            dtype: name(tensor.dtype()),
            _owner: None,
        })
    }

    /// Whether elements are booleans, one a byte.
    pub(crate) fn is_bool(&self) -> bool {
        self.dtype == "bool"
    }

    /// Whether elements are booleans or unsigned bytes.
    pub(crate) fn is_bytes(&self) -> bool {
        self.is_bool() || self.dtype == "uint8"
    }

    /// The element type, if attention takes it.
    pub(crate) fn dtype(&self, name: &'static str) -> Result<DType> {
        match &*self.dtype {
            "float32" => Ok(DType::F32),
            "float16" => Ok(DType::F16),
            "bfloat16" => Ok(DType::BF16),
            other => Err(Error::DType {
                name: name.into(),
                found: other.to_owned(),
                wanted: if name == "mask" { "bool, f16, bf16 or f32" } else { "f16, bf16 or f32" }.into(),
            }),
        }
    }

    /// The address of a list of int32 without gaps, and how many there are.
    pub(crate) fn list(&self, name: &'static str) -> Result<(u64, usize)> {
        let &[entries] = &*self.shape else { return Err(Error::shape(name, &self.shape, "[batch]")) };
        if self.dtype != "int32" {
            let found = self.dtype.clone().into_owned();
            return Err(Error::DType { name: name.into(), found, wanted: "int32".into() });
        }
        if !self.geometry(name)?.is_contiguous() {
            let found = format!("{:?}", self.strides);
            return Err(Error::Strides { name: name.into(), found, wanted: "1: no gaps".into() });
        }
        Ok((self.address, entries))
    }

    /// Where the elements lie from the address on.
    pub(crate) fn geometry(&self, name: &'static str) -> Result<Geometry> {
        Geometry::strided(name, &self.shape, &self.strides, 0)
    }
}

fn refused(error: impl Display) -> PyErr {
    PyBufferError::new_err(error.to_string())
}

fn name(dtype: DLDataType) -> Cow<'static, str> {
    match (dtype.code, dtype.bits, dtype.lanes) {
        (DLDataTypeCode::FLOAT, 32, 1) => "float32".into(),
        (DLDataTypeCode::FLOAT, 16, 1) => "float16".into(),
        (DLDataTypeCode::BFLOAT, 16, 1) => "bfloat16".into(),
        (DLDataTypeCode::BOOL, 8, 1) => "bool".into(),
        (DLDataTypeCode::FLOAT8_E4M3FN, 8, 1) => "float8_e4m3fn".into(),
        (DLDataTypeCode::FLOAT8_E5M2, 8, 1) => "float8_e5m2".into(),
        (DLDataTypeCode::FLOAT, bits, 1) => format!("float{bits}").into(),
        (DLDataTypeCode::COMPLEX, bits, 1) => format!("complex{bits}").into(),
        (DLDataTypeCode::INT, bits, 1) => format!("int{bits}").into(),
        (DLDataTypeCode::UINT, bits, 1) => format!("uint{bits}").into(),
        (code, bits, lanes) => format!("DLPack type {} of {bits} bits × {lanes}", code.0).into(),
    }
}
