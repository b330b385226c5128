//! The threads that work is divided between, also in a process that was forked from one with threads.
//!
//! Threads do not survive a fork, but what rayon remembers of them does: work given to its global pool, or to any other
//! of the parent's, would wait for ever. So a forked process gets a pool of its own when it first computes. No sum's
//! order depends on the threads, so its results are those of the parent, bit for bit.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};
use sage_core::{Error, Result};

/// Forks that lie between the process that loaded this library and this process.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// Threads of the pool that computed last, or 0: what a forked process asks for.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// The pool of a forked process. No lock guards it: one that another thread held at the fork would stay locked.
static POOL: AtomicPtr<OwnPool> = AtomicPtr::new(ptr::null_mut());

/// A pool, and the number of forks of the process that it belongs to.
struct OwnPool {
    forks: usize,
    pool: ThreadPool,
}

/// Runs `work`, which divides itself by rayon's means, where there are threads: in the pool that the caller is in, in
/// rayon's global one, or in a forked process in its own.
///
/// # Errors
/// When a forked process cannot start threads.
pub(crate) fn run<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R> {
    watch();
    match FORKS.load(Ordering::Relaxed) {
        0 => {
            THREADS.store(rayon::current_num_threads(), Ordering::Relaxed);
            Ok(work())
        }
        forks => Ok(own_pool(forks)?.install(work)),
    }
}

/// How many threads [`run`] divides work between.
pub(crate) fn count() -> usize {
    watch();
    match (FORKS.load(Ordering::Relaxed), THREADS.load(Ordering::Relaxed)) {
        (0, _) => rayon::current_num_threads(),
        (_, 0) => std::thread::available_parallelism().map_or(1, usize::from),
        (_, threads) => threads,
    }
}

fn own_pool(forks: usize) -> Result<&'static ThreadPool> {
    let known = POOL.load(Ordering::Acquire);
    // SAFETY: what is stored here was leaked, so it lives for ever.
    if let Some(own) = unsafe { known.as_ref() }
        && own.forks == forks
    {
        return Ok(&own.pool);
    }
    // 0 lets rayon choose, as it does for its global pool.
    let pool =
        ThreadPoolBuilder::new().num_threads(THREADS.load(Ordering::Relaxed)).build().map_err(|error| {
            Error::backend(format!("threads of a forked process: cannot be started ({error})"))
        })?;
    let new = Box::into_raw(Box::new(OwnPool { forks, pool }));
    match POOL.compare_exchange(known, new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: leaked from now on, as is what it replaces: a pool whose threads are those of another process.
        Ok(_) => Ok(unsafe { &(*new).pool }),
        Err(_) => {
            // SAFETY: nobody else has seen the new one.
            drop(unsafe { Box::from_raw(new) });
            own_pool(forks)
        }
    }
}

/// Counts the forks of this process from now on.
fn watch() {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if !WATCHED.swap(true, Ordering::Relaxed) {
        register();
    }
}

#[cfg(unix)]
fn register() {
    type Handler = Option<unsafe extern "C" fn()>;
    unsafe extern "C" {
        fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> i32;
    }
    unsafe extern "C" fn forked() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: as POSIX declares it; the handler only counts. It fails for want of memory alone, and then a fork goes
    // unnoticed, as it would without it.
    unsafe { pthread_atfork(None, None, Some(forked)) };
}

#[cfg(not(unix))]
fn register() {}

/// Watches from the moment on at which this library is loaded, where the linker has a list of functions for it: another
/// user of rayon in the same program may start its global pool, and fork, before anything is computed here.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
#[used]
#[unsafe(link_section = ".init_array")]
static WATCH_FROM_THE_START: extern "C" fn() = {
    extern "C" fn start() {
        watch();
    }
    start
};
