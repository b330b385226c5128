//! Our errors among candle's.

use candle_core::Error as CandleError;
use sageattention::{BackendErrorKind, Error};

/// One of our errors as one of candle's.
pub(crate) fn wrap(error: Error) -> CandleError {
    match error {
        // Candle's other wrapping keeps the words alone.
        Error::Backend { .. } => CandleError::Cuda(Box::new(error)).bt(),
        _ => CandleError::wrap(error),
    }
}

/// Why the backend of this crate's functions could not work, such as for want of memory; none where the error is of
/// another kind, or candle's own.
pub fn backend_error_kind(error: &CandleError) -> Option<BackendErrorKind> {
    match error {
        CandleError::Cuda(error) => error.downcast_ref::<Error>()?.backend_kind(),
        CandleError::Context { inner, .. }
        | CandleError::WithPath { inner, .. }
        | CandleError::WithBacktrace { inner, .. } => backend_error_kind(inner),
        CandleError::WrappedContext { wrapped, .. } => backend_error_kind(wrapped.downcast_ref()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Context;

    use super::*;

    #[test]
    fn a_backends_error_keeps_kind_and_words() {
        for kind in [BackendErrorKind::OutOfMemory, BackendErrorKind::Lost, BackendErrorKind::Other] {
            let error = || wrap(Error::Backend { kind, message: "cuMemAllocAsync: out of memory".into() });
            assert_eq!(backend_error_kind(&error()), Some(kind));
            assert!(error().to_string().starts_with("cuMemAllocAsync: out of memory"), "{}", error());
            assert_eq!(backend_error_kind(&error().context("in layer 3")), Some(kind));
            assert_eq!(backend_error_kind(&error().with_path("model.safetensors")), Some(kind));
            let in_result = Err::<(), _>(error()).context("in layer 3").unwrap_err();
            assert_eq!(backend_error_kind(&in_result), Some(kind));
        }
        assert_eq!(backend_error_kind(&wrap(Error::value("q", 1, "2"))), None);
        assert_eq!(backend_error_kind(&CandleError::Msg("words".into())), None);
    }
}
