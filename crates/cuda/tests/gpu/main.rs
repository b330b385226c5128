//! The whole way on a real GPU. Without a driver each test says that it is skipped; with one, nothing is.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

/// Writes to stderr past the test harness, which would swallow the words of a test that passes.
macro_rules! say {
    ($($words:tt)*) => {{
        let _ = writeln!(io::stderr(), $($words)*);
    }};
}

/// Ends the test, aloud, where there is no driver, or fails it with `SAGE_REQUIRE_GPU=1`. A driver without a GPU, or a
/// GPU that fails, fails the test.
macro_rules! device {
    () => {
        match Driver::get() {
            Ok(_) => alone(),
            Err(error) => {
                sage_testkit::skip(std::thread::current().name().unwrap_or("a test"), error);
                return;
            }
        }
    };
}

mod compiling;
mod devices;
mod launching;
mod memory;
mod support;
mod tensor_map;
