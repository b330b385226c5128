//! The primary context of a GPU, current only while a call needs it.

use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUstreamCaptureMode};

use crate::driver::{cu, report};
use crate::error::Result;

/// A share in the primary context, the one that the CUDA runtime, PyTorch and candle use too.
#[derive(Debug)]
pub(crate) struct Context {
    raw: CUcontext,
    device: CUdevice,
}

// SAFETY: the driver lets any thread use a context's handle.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of `device`.
    ///
    /// # Safety
    /// `device` is a handle that the driver gave.
    pub(crate) unsafe fn retain(device: CUdevice) -> Result<Context> {
        let mut raw = ptr::null_mut();
        // SAFETY: the caller answers for the device, and the pointer is to a local.
        unsafe { cu!(cuDevicePrimaryCtxRetain(&mut raw, device)) }?;
        Ok(Context { raw, device })
    }

    /// Makes the context current until the guard is dropped; then the caller's is current again.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        let mut current = ptr::null_mut();
        // SAFETY: the pointer is to a local.
        unsafe { cu!(cuCtxGetCurrent(&mut current)) }?;
        let pushed = current != self.raw;
        if pushed {
            // SAFETY: the context lives as long as `self`, which the guard borrows.
            unsafe { cu!(cuCtxPushCurrent_v2(self.raw)) }?;
        }
        Ok(Entered { pushed, context: PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `retain`, released once here.
        report(unsafe { cu!(cuDevicePrimaryCtxRelease_v2(self.device)) });
    }
}

/// The context is current on this thread while this lives; the raw pointer keeps it on this thread.
pub(crate) struct Entered<'a> {
    pushed: bool,
    context: PhantomData<(&'a Context, *mut ())>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this thread.
            report(unsafe { cu!(cuCtxPopCurrent_v2(&mut popped)) });
        }
    }
}

/// While this lives, calls that a stream capture forbids to its thread by default, such as loading a module, are
/// allowed: they do not touch the stream that is captured.
pub(crate) struct OutsideCapture {
    before: CUstreamCaptureMode,
    thread: PhantomData<*mut ()>,
}

impl OutsideCapture {
    pub(crate) fn enter() -> Result<OutsideCapture> {
        let mut before = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is to a local, which receives the thread's former mode.
        unsafe { cu!(cuThreadExchangeStreamCaptureMode(&mut before)) }?;
        Ok(OutsideCapture { before, thread: PhantomData })
    }
}

impl Drop for OutsideCapture {
    fn drop(&mut self) {
        // SAFETY: gives the thread back the mode that it had.
        report(unsafe { cu!(cuThreadExchangeStreamCaptureMode(&mut self.before)) });
    }
}

/// Whether two contexts are the same one.
impl PartialEq for Context {
    fn eq(&self, other: &Context) -> bool {
        ptr::eq::<sys::CUctx_st>(self.raw, other.raw)
    }
}
