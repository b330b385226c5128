//! Without a driver, or without the GPU asked for, every call says so and none panics.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use std::io::{self, Write as _};

use sage_core::BackendErrorKind;
use sage_cuda::{Device, Driver, Error, devices};

/// Writes to stderr past the test harness, which would swallow the words of a test that passes.
macro_rules! say {
    ($($words:tt)*) => {{
        let _ = writeln!(io::stderr(), $($words)*);
    }};
}

#[test]
fn without_a_driver_every_entrance_says_so() {
    let Err(error) = Driver::get() else {
        // Here there is one, so the next test is the one that counts.
        say!("skipped: there is a CUDA driver");
        return;
    };
    assert!(matches!(error, Error::NoDriver { .. }), "{error:?}");
    assert_eq!(error.kind(), BackendErrorKind::NoDevice);
    let message = error.to_string();
    assert!(message.starts_with("CUDA driver: cannot be loaded ("), "{message}");
    // On Windows the loader's words name no file.
    assert!(message.contains("libcuda") || cfg!(windows), "{message}");
    let library = if cfg!(windows) { "nvcuda.dll" } else { "libcuda" };
    let end = format!("), expected {library}, which the NVIDIA driver installs");
    assert!(message.ends_with(&end), "{message}");

    // The outcome is remembered: every entrance gives the same.
    assert_eq!(devices().unwrap_err(), error);
    assert_eq!(Device::new(0).unwrap_err(), error);
    assert_eq!(Device::new(u32::MAX).unwrap_err(), error);
    assert_eq!(Device::with_cache(0, None).unwrap_err(), error);
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    let driver = match Driver::get() {
        Ok(driver) => driver,
        Err(error) => {
            say!("skipped: no CUDA driver ({error})");
            return;
        }
    };
    let count = driver.device_count();
    assert_eq!(devices().unwrap().len(), count as usize);
    for ordinal in [count, count + 1, i32::MAX as u32, u32::MAX] {
        assert_eq!(Device::new(ordinal).unwrap_err(), Error::NoDevice { ordinal, count });
        assert_eq!(Device::with_cache(ordinal, None).unwrap_err(), Error::NoDevice { ordinal, count });
    }
}
