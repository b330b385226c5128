//! Points in a stream's work, to wait for and to measure between.

use std::ptr;

use cudarc::driver::sys::{CUevent, CUevent_flags};

use crate::device::Device;
use crate::driver::{Driver, cu, report};
use crate::error::Result;

/// A point in a stream's work. [`Stream::record`](crate::Stream::record) sets it.
#[derive(Debug)]
pub struct Event {
    raw: CUevent,
    device: Device,
}

// SAFETY: the driver lets any thread use an event's handle.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has not happened. One that need not measure `timing` costs the GPU less.
    pub fn new(device: &Device, timing: bool) -> Result<Event> {
        let flags =
            if timing { CUevent_flags::CU_EVENT_DEFAULT } else { CUevent_flags::CU_EVENT_DISABLE_TIMING };
        let _entered = device.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the context is current, and the pointer is to a local.
        unsafe { cu!(cuEventCreate(&mut raw, flags as u32)) }?;
        Ok(Event { raw, device: device.clone() })
    }

    /// Waits until the event has happened. An event that was never recorded has.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.device.enter()?;
        // SAFETY: the event is alive.
        unsafe { cu!(cuEventSynchronize(self.raw)) }
    }

    /// Waits until `end` has happened and gives the milliseconds from `self` to it. Both must measure timing and have
    /// been recorded.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        end.synchronize()?;
        let _entered = self.device.enter()?;
        // SAFETY: both events are alive.
        unsafe { Driver::get()?.elapsed_ms(self.raw, end.raw) }
    }

    pub(crate) fn raw(&self) -> CUevent {
        self.raw
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        report(self.device.enter().and_then(|_entered| {
            // SAFETY: created by `new`, destroyed once.
            unsafe { cu!(cuEventDestroy_v2(self.raw)) }
        }));
    }
}
