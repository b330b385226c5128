//! Errors as Python exceptions, with the same words.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use sageattention::{BackendErrorKind, Error, Result};

/// The exception of an error's kind.
pub(crate) fn exception(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::DType { .. } => PyTypeError::new_err(message),
        Error::Shape { .. } | Error::Strides { .. } | Error::Memory { .. } | Error::Value { .. } => {
            PyValueError::new_err(message)
        }
        Error::Unsupported { .. } => PyNotImplementedError::new_err(message),
        Error::Backend { kind: BackendErrorKind::OutOfMemory, .. } => PyMemoryError::new_err(message),
        // A backend's own words, and kinds that are yet to come.
        _ => PyRuntimeError::new_err(message),
    }
}

/// Runs `work`; a panic, which would be a defect of ours, becomes an error instead of the interpreter's end.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    // What `work` was writing is the output of a call that fails: nobody reads it.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Error::backend(format!("internal error of sageattention: {}", words(&*panic))))
    })
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}
