//! The driver's library, which is looked for when it is needed.

use std::error::Error as _;

use cudarc::driver::sys::{self, CUresult};
use libloading::Library;

use crate::error::{Error, Result};

/// Names of the driver's library, in the order in which the bindings try them, so that both find the same one.
pub(crate) const LIBRARY_NAMES: &[&str] =
    if cfg!(windows) { &["cuda.dll", "nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };

/// What messages call the driver's library.
pub(crate) const CALLED: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda" };

/// Whether the driver's library is there.
pub(crate) fn is_installed() -> bool {
    open(LIBRARY_NAMES).is_ok()
}

/// Whether anybody in this process has started the driver, as far as it says.
pub(crate) fn is_started() -> bool {
    let Ok(library) = open(LIBRARY_NAMES) else { return false };
    if !has(&library, "cuCtxGetCurrent") {
        return false;
    }
    let mut current = std::ptr::null_mut();
    // SAFETY: the symbol is there, and the pointer is to a local. A driver that was not started says so.
    let code = unsafe { sys::cuCtxGetCurrent(&mut current) };
    code != CUresult::CUDA_ERROR_NOT_INITIALIZED
}

/// The first library of one of these names that can be loaded.
pub(crate) fn open(names: &[&str]) -> Result<Library> {
    let mut reason = String::from("not found");
    for name in names {
        // SAFETY: the library's initialisers are NVIDIA's; every CUDA program runs them.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(library),
            Err(error) => {
                // The words of the loader are the source of an error that only says that it failed.
                let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                // Those of Windows leave the name out.
                let named = if cause.contains(name) { String::new() } else { format!("{name}: ") };
                reason = format!("cannot be loaded ({named}{cause})");
            }
        }
    }
    Err(Error::NoDriver { reason })
}

/// Whether a library has a symbol.
pub(crate) fn has(library: &Library, symbol: &str) -> bool {
    // SAFETY: the symbol is looked for, not called.
    unsafe { library.get::<unsafe extern "C" fn()>(symbol) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_with_the_loaders_words() {
        let error = open(&["libcuda_that_nobody_has.so"]).unwrap_err().to_string();
        assert!(error.starts_with("CUDA driver: cannot be loaded ("), "{error}");
        assert!(error.contains("libcuda_that_nobody_has.so"), "{error}");
        assert!(
            error.ends_with(&format!("), expected {CALLED}, which the NVIDIA driver installs")),
            "{error}"
        );
    }

    #[test]
    fn a_library_without_a_symbol_does_not_have_it() {
        let libc = if cfg!(target_os = "linux") { "libc.so.6" } else { return };
        let library = open(&[libc]).unwrap();
        assert!(has(&library, "malloc") && !has(&library, "cuInit"));
    }
}
