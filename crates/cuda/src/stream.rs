//! Queues of work on a GPU, our own or a caller's.

use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdeviceptr, CUstream, CUstream_flags, CUstreamCaptureStatus};

use crate::device::Device;
use crate::driver::{cu, report};
use crate::error::Result;
use crate::event::Event;

/// A queue of work on a [`Device`]. Clones are the same queue; work put on it runs in order.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    raw: CUstream,
    owned: bool,
    device: Device,
    /// Memory that was to be freed during a capture which did not allocate it; see [`Stream::free`].
    unfreed: Mutex<Vec<CUdeviceptr>>,
}

// SAFETY: the driver lets any thread use a stream's handle.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Inner {}

impl Stream {
    /// A new stream that does not wait for the legacy default stream.
    pub fn new(device: &Device) -> Result<Stream> {
        let _entered = device.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the context is current, and the pointer is to a local.
        unsafe { cu!(cuStreamCreate(&mut raw, CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }?;
        Ok(Stream(Arc::new(Inner { raw, owned: true, device: device.clone(), unfreed: Mutex::default() })))
    }

    /// A caller's stream, by the number that other libraries give for it (`torch.cuda.current_stream().cuda_stream`).
    /// 0 and 1 are the legacy default stream, 2 is the default stream of whatever thread makes the call.
    ///
    /// # Safety
    /// `handle` is one of these three numbers, or a stream in the primary context of `device`. It stays alive until
    /// the last clone of the result, and the last [`Buffer`](crate::Buffer) allocated on it, is dropped.
    pub unsafe fn from_raw(device: &Device, handle: u64) -> Stream {
        let raw = ptr::with_exposed_provenance_mut(handle as usize);
        Stream(Arc::new(Inner { raw, owned: false, device: device.clone(), unfreed: Mutex::default() }))
    }

    /// The number by which other libraries know the stream.
    pub fn handle(&self) -> u64 {
        self.0.raw.expose_provenance() as u64
    }

    /// The device that does the work.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Waits until all work on the stream is done. This is where a kernel's own faults come to light.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.0.device.enter()?;
        // SAFETY: the stream is alive and its context current.
        unsafe { cu!(cuStreamSynchronize(self.0.raw)) }
    }

    /// Lets `event` happen when the work so far is done.
    pub fn record(&self, event: &Event) -> Result<()> {
        let _entered = self.0.device.enter()?;
        // SAFETY: stream and event are alive; the driver refuses an event of another context.
        unsafe { cu!(cuEventRecord(event.raw(), self.0.raw)) }
    }

    /// Lets later work wait for `event`, which may be of another stream or device.
    pub fn wait_event(&self, event: &Event) -> Result<()> {
        let _entered = self.0.device.enter()?;
        // SAFETY: stream and event are alive.
        unsafe { cu!(cuStreamWaitEvent(self.0.raw, event.raw(), 0)) }
    }

    /// Whether work put on the stream is being recorded into a graph instead of run.
    pub fn is_capturing(&self) -> Result<bool> {
        self.0.is_capturing()
    }

    pub(crate) fn raw(&self) -> CUstream {
        self.0.raw
    }

    /// Frees memory of the device's pool once the work so far is done.
    ///
    /// During a capture only memory that the capture itself allocated can be freed: other memory waits for the end of
    /// the capture, because freeing it at every replay would make no sense and the driver ends the capture for it.
    ///
    /// # Safety
    /// `address` is a live allocation of `cuMemAllocAsync` and nobody uses it later than the work so far.
    pub(crate) unsafe fn free(&self, address: CUdeviceptr, of_a_capture: bool) {
        if !of_a_capture && self.is_capturing().unwrap_or(false) {
            self.0.unfreed.lock().unwrap_or_else(PoisonError::into_inner).push(address);
            return;
        }
        report(self.0.device.enter().and_then(|_entered| {
            // SAFETY: the caller answers for the address; the stream is alive and its context current.
            unsafe { cu!(cuMemFreeAsync(address, self.0.raw)) }
        }));
    }

    /// Frees what had to wait, unless the stream is being captured still.
    pub(crate) fn free_the_unfreed(&self) {
        let mut unfreed = self.0.unfreed.lock().unwrap_or_else(PoisonError::into_inner);
        if unfreed.is_empty() || self.is_capturing().unwrap_or(true) {
            return;
        }
        self.0.free_all(&mut unfreed);
    }
}

impl Inner {
    fn is_capturing(&self) -> Result<bool> {
        let _entered = self.device.enter()?;
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is alive, and the pointer is to a local.
        unsafe { cu!(cuStreamIsCapturing(self.raw, &mut status)) }?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    fn free_all(&self, unfreed: &mut Vec<CUdeviceptr>) {
        for address in unfreed.drain(..) {
            report(self.device.enter().and_then(|_entered| {
                // SAFETY: `Stream::free` was handed the allocation, and nobody has freed it since.
                unsafe { cu!(cuMemFreeAsync(address, self.raw)) }
            }));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut unfreed = std::mem::take(self.unfreed.get_mut().unwrap_or_else(PoisonError::into_inner));
        if !unfreed.is_empty() && self.is_capturing().unwrap_or(true) {
            // Freeing them now would end the capture of a caller, who would rather lose the memory.
            let (count, handle) = (unfreed.len(), self.raw.addr());
            tracing::warn!(
                "stream {handle:#x}: dropped during a capture, {count} older buffers are never freed"
            );
        } else {
            self.free_all(&mut unfreed);
        }
        if self.owned {
            report(self.device.enter().and_then(|_entered| {
                // SAFETY: created by `new`, destroyed once; the driver lets running work finish first.
                unsafe { cu!(cuStreamDestroy_v2(self.raw)) }
            }));
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (handle, ordinal) = (self.handle(), self.0.device.info().ordinal);
        f.debug_struct("Stream").field("handle", &handle).field("device", &ordinal).finish_non_exhaustive()
    }
}
