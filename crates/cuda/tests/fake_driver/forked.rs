//! A process that is forked from a test's.

/// Runs `child` in a forked process, which has this thread alone, and demands that it returns true there. It must not
/// wait for another thread.
pub fn in_a_fork(child: impl FnOnce() -> bool) {
    unsafe extern "C" {
        fn fork() -> i32;
        fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
        fn _exit(code: i32) -> !;
    }
    // SAFETY: the child runs nothing that waits for another thread, and leaves by `_exit`.
    let pid = unsafe { fork() };
    if pid == 0 {
        let good = child();
        // SAFETY: ends the process and runs nothing of the parent's.
        unsafe { _exit(if good { 0 } else { 1 }) }
    }
    let mut status = -1;
    // SAFETY: waits for our own child; the pointer is to a local.
    assert_eq!(unsafe { waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the forked process found something else");
}
