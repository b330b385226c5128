//! What can be wrong with a call. Every message names the tensor or option, the value found and the value wanted.

use std::borrow::Cow;

/// Result of anything that checks its arguments.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a backend cannot work, as far as a caller would act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendErrorKind {
    /// There is not enough memory: a smaller call, or one after other memory was freed, may do.
    OutOfMemory,
    /// There is no such device, or no driver that can use it.
    NoDevice,
    /// The device failed, or work on it did: this process cannot use it any more, a new one can.
    Lost,
    /// A kernel cannot be compiled, or the device cannot run it: other calls may do.
    Kernel,
    /// The process was forked from one that had used the device, so it can not: one that is started anew can.
    Forked,
    /// Anything else: the message says what.
    Other,
}

/// A call that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong number of dimensions, or one of them has the wrong size.
    #[error("{name}: shape is {found}, expected {wanted}")]
    Shape {
        /// Tensor.
        name: Cow<'static, str>,
        /// Its shape.
        found: String,
        /// The shape that would do.
        wanted: String,
    },
    /// A tensor has the wrong element type.
    #[error("{name}: dtype is {found}, expected {wanted}")]
    DType {
        /// Tensor.
        name: Cow<'static, str>,
        /// Its element type.
        found: String,
        /// The element type that would do.
        wanted: String,
    },
    /// A tensor's strides cannot be used.
    #[error("{name}: strides are {found}, expected {wanted}")]
    Strides {
        /// Tensor.
        name: Cow<'static, str>,
        /// Its strides, in elements.
        found: String,
        /// What they must satisfy.
        wanted: String,
    },
    /// A tensor's memory is smaller than its shape, strides and offset say.
    #[error("{name}: memory holds {found} elements, expected {wanted}")]
    Memory {
        /// Tensor.
        name: Cow<'static, str>,
        /// Elements there are.
        found: usize,
        /// Elements there must be.
        wanted: String,
    },
    /// An option or a list entry is outside its range.
    #[error("{name}: value is {found}, expected {wanted}")]
    Value {
        /// Option or list entry.
        name: Cow<'static, str>,
        /// Its value.
        found: String,
        /// The values that would do.
        wanted: String,
    },
    /// A backend cannot work: there is no such device, or its driver refuses.
    #[error("{message}")]
    Backend {
        /// What a caller can tell apart.
        kind: BackendErrorKind,
        /// The backend's own words.
        message: String,
    },
    /// Each argument is fine, but they do not go together, or no backend here can do it.
    #[error("{what} is not supported: {instead}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Why not, and what would do.
        instead: String,
    },
}

impl Error {
    /// A tensor `name` of the shape `found` where `wanted` was needed.
    pub fn shape(name: impl Into<Cow<'static, str>>, found: &[usize], wanted: impl Into<String>) -> Self {
        Error::Shape { name: name.into(), found: format!("{found:?}"), wanted: wanted.into() }
    }

    /// An option or list entry `name` whose value is `found` where `wanted` was needed.
    pub fn value(
        name: impl Into<Cow<'static, str>>,
        found: impl ToString,
        wanted: impl Into<String>,
    ) -> Self {
        Error::Value { name: name.into(), found: found.to_string(), wanted: wanted.into() }
    }

    /// A backend's `message`, where no other kind fits it than [`BackendErrorKind::Other`].
    pub fn backend(message: impl Into<String>) -> Self {
        Error::Backend { kind: BackendErrorKind::Other, message: message.into() }
    }

    /// Why the backend cannot work; none where the call itself is wrong.
    pub fn backend_kind(&self) -> Option<BackendErrorKind> {
        match self {
            Error::Backend { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// A combination `what` that nothing here can do, and what to do `instead`.
    pub fn unsupported(what: impl Into<String>, instead: impl Into<String>) -> Self {
        Error::Unsupported { what: what.into(), instead: instead.into() }
    }
}
