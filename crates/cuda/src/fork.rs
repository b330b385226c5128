//! Whether this process was forked from one that had started the driver, which no process can use after that.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Whether a parent had started the driver.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Checks that the driver was not started before this process was forked.
///
/// # Errors
/// [`Error::Forked`] in a process that was forked from one in which this crate had started the driver.
pub fn check_not_forked() -> Result<()> {
    if FORKED.load(Ordering::Relaxed) { Err(Error::Forked) } else { Ok(()) }
}

/// Called once, when the driver is started.
#[cfg(unix)]
pub(crate) fn watch() {
    type Handler = Option<unsafe extern "C" fn()>;
    unsafe extern "C" {
        fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> i32;
    }
    unsafe extern "C" fn forked() {
        FORKED.store(true, Ordering::Relaxed);
    }
    // SAFETY: as POSIX declares it; the handler only sets a flag. It fails for want of memory alone: then the
    // driver's own error has to do.
    unsafe { pthread_atfork(None, None, Some(forked)) };
}

#[cfg(not(unix))]
pub(crate) fn watch() {}
