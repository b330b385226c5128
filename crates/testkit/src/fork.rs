//! Work in forked processes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn _exit(code: i32) -> !;
}

const WNOHANG: i32 = 1;
const SIGKILL: i32 = 9;

/// Far longer than any call of a test takes, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `work` in a forked process, and checks that it returns in time, with `true`. It must not wait for locks that
/// another thread may hold now.
#[track_caller]
pub fn in_child(what: &str, work: impl FnOnce() -> bool) {
    // SAFETY: the child leaves by `_exit`, and the caller promises that nothing it runs waits for another thread.
    let pid = unsafe { fork() };
    if pid == 0 {
        let good = catch_unwind(AssertUnwindSafe(work)).unwrap_or(false);
        // SAFETY: ends the process and runs nothing of the parent's.
        unsafe { _exit(if good { 0 } else { 1 }) }
    }
    assert!(pid > 0, "{what}: cannot fork");
    let start = Instant::now();
    let mut status = 0;
    loop {
        // SAFETY: waits for our own child; the pointer is to a local.
        match unsafe { waitpid(pid, &mut status, WNOHANG) } {
            0 if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(2)),
            0 => {
                // SAFETY: our own child, which is still there.
                unsafe { kill(pid, SIGKILL) };
                panic!("{what}: the child hangs");
            }
            _ => break,
        }
    }
    assert_eq!(status, 0, "{what}: the child failed");
}
