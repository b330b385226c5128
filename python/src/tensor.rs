//! Tensors as Python hands them over.

use std::borrow::Cow;

use dlpark::ffi::{DLDataType, DLDataTypeCode};
use dlpark::python::{ImportedDlpack, from_dlpack};
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use sageattention::{DType, Error, Geometry, Result};

/// A tensor argument: where its elements lie, or a DLPack capsule that says so.
#[derive(FromPyObject)]
pub(crate) enum TensorArg<'py> {
    Raw(u64, Vec<usize>, Vec<i64>, String),
    Capsule(Bound<'py, PyAny>),
}

/// A tensor in memory that somebody else keeps alive.
pub(crate) struct RawTensor {
    pub address: u64,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<i64>,
    dtype: Cow<'static, str>,
    /// Keeps a capsule's tensor alive.
    _owner: Option<ImportedDlpack>,
}

impl TensorArg<'_> {
    pub(crate) fn open(self) -> PyResult<RawTensor> {
        match self {
            TensorArg::Raw(address, shape, strides, dtype) => {
                Ok(RawTensor { address, shape, strides, dtype: dtype.into(), _owner: None })
            }
            TensorArg::Capsule(capsule) => RawTensor::of_capsule(&capsule),
        }
    }
}

impl RawTensor {
    fn of_capsule(capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        let refused = |error: &dyn std::fmt::Display| PyBufferError::new_err(error.to_string());
        let imported = from_dlpack(capsule.as_borrowed(), None, None)?;
        let tensor = imported.validate().map_err(|error| refused(&error))?;
        let strides = tensor.strides_or_compact().map_err(|error| refused(&error))?.into_owned();
        // Validated: no size is negative.
        let shape = tensor.shape().iter().map(|&size| size as usize).collect();
        let address = tensor.data_ptr().expose_provenance() as u64;
        let dtype = name(tensor.dtype());
        Ok(RawTensor { address, shape, strides, dtype, _owner: Some(imported) })
    }

    /// Whether elements are booleans, one a byte.
    pub(crate) fn is_bool(&self) -> bool {
        self.dtype == "bool"
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

    /// Where the elements lie from the address on.
    pub(crate) fn geometry(&self, name: &'static str) -> Result<Geometry> {
        Geometry::strided(name, &self.shape, &self.strides, 0)
    }
}

fn name(dtype: DLDataType) -> Cow<'static, str> {
    match (dtype.code, dtype.bits, dtype.lanes) {
        (DLDataTypeCode::FLOAT, 32, 1) => "float32".into(),
        (DLDataTypeCode::FLOAT, 16, 1) => "float16".into(),
        (DLDataTypeCode::BFLOAT, 16, 1) => "bfloat16".into(),
        (DLDataTypeCode::BOOL, 8, 1) => "bool".into(),
        (DLDataTypeCode::FLOAT, bits, 1) => format!("float{bits}").into(),
        (DLDataTypeCode::INT, bits, 1) => format!("int{bits}").into(),
        (DLDataTypeCode::UINT, bits, 1) => format!("uint{bits}").into(),
        (code, bits, lanes) => format!("DLPack type {} of {bits} bits × {lanes}", code.0).into(),
    }
}
