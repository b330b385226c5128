//! Cases that run with a fake driver, each in a process of its own, and a count of allocations. Other crates' tests use
//! this file too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::env;
use std::process::Command;

#[path = "build.rs"]
mod build;

/// Builds the fake with `cfgs` and runs the ignored test `case` with it.
pub fn run(case: &str, cfgs: &[&str], behaviour: &str) {
    let folder = tempfile::tempdir().unwrap();
    let Some(library) = build::build(folder.path(), cfgs) else { return };
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", case, "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("FAKE_CUDA", behaviour)
        .env("FAKE_LIBRARY", &library)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && out.contains("1 passed"), "{case}\n{out}\n{err}");
}

/// Calls a function of the fake's own, such as `fake_open`.
pub fn ask(symbol: &str, argument: u64) -> u64 {
    // SAFETY: the fake is loaded already, and its functions take a number or ignore it.
    unsafe {
        let library = libloading::Library::new(env::var_os("FAKE_LIBRARY").unwrap()).unwrap();
        library.get::<unsafe extern "C" fn(u64) -> u64>(symbol).unwrap()(argument)
    }
}

/// Tests by name, each with the fake's `cfg`s, its behaviour, and what is done.
macro_rules! cases {
    ($($(#[$cfg:meta])* $name:ident, $cfgs:expr, $behaviour:expr, $body:block)*) => {
        $(#[test] fn $name() { $crate::harness::run(concat!("child::", stringify!($name)), &$cfgs, $behaviour); })*
        mod child {
            use super::*;
            $(#[test] #[ignore = "runs in a process of its own"] fn $name() $body)*
        }
    };
}
pub(crate) use cases;

thread_local! {
    /// Allocations of this thread.
    pub static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
