//! A stream's work, recorded and launched as a whole.

use std::ptr;

use cudarc::driver::sys::{CUgraph, CUgraphExec, CUstreamCaptureMode};

use crate::device::Device;
use crate::driver::{cu, report};
use crate::error::{Error, Result};
use crate::stream::Stream;

/// `CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`: memory that a replay allocated and did not free is freed by the
/// next replay, which would be refused otherwise. The bindings name it differently from version to version.
const AUTO_FREE_ON_LAUNCH: u64 = 1;

impl Stream {
    /// Records later work into a graph instead of running it, until [`end_capture`](Stream::end_capture) on the same
    /// thread. The legacy default stream cannot be captured.
    pub fn begin_capture(&self) -> Result<()> {
        let _entered = self.device().enter()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and its context current.
        unsafe { cu!(cuStreamBeginCapture_v2(self.raw(), mode)) }
    }

    /// Ends the capture and gives what was recorded.
    pub fn end_capture(&self) -> Result<Graph> {
        let entered = self.device().enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the stream is alive, and the pointer is to a local.
        let ended = unsafe { cu!(cuStreamEndCapture(self.raw(), &mut raw)) };
        drop(entered);
        self.free_the_unfreed();
        ended?;
        if raw.is_null() {
            return Err(Error::value("captured graph", "invalid", "a capture without forbidden calls"));
        }
        Ok(Graph { raw, device: self.device().clone() })
    }
}

/// What [`Stream::end_capture`] recorded. The memory that the recorded work uses must outlive every replay.
#[derive(Debug)]
pub struct Graph {
    raw: CUgraph,
    device: Device,
}

// SAFETY: the handle may move between threads, and no method changes the graph.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Prepares the graph for launches.
    pub fn instantiate(&self) -> Result<ExecutableGraph> {
        let _entered = self.device.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the graph is alive, and the pointer is to a local.
        unsafe { cu!(cuGraphInstantiateWithFlags(&mut raw, self.raw, AUTO_FREE_ON_LAUNCH)) }?;
        Ok(ExecutableGraph { raw, device: self.device.clone() })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        report(self.device.enter().and_then(|_entered| {
            // SAFETY: handed over by `end_capture`, destroyed once.
            unsafe { cu!(cuGraphDestroy(self.raw)) }
        }));
    }
}

/// A graph that can be launched, again and again.
#[derive(Debug)]
pub struct ExecutableGraph {
    raw: CUgraphExec,
    device: Device,
}

// SAFETY: the driver lets any thread use the handle.
unsafe impl Send for ExecutableGraph {}
// SAFETY: `cuGraphLaunch` orders launches of the same graph; nothing else takes a shared reference.
unsafe impl Sync for ExecutableGraph {}

impl ExecutableGraph {
    /// Puts the recorded work on `stream`, without waiting for it.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// Until the stream has passed the work, what was promised of each recorded launch holds; see
    /// [`Kernel::launch`](crate::Kernel::launch).
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        let _entered = self.device.enter()?;
        // SAFETY: graph and stream are alive; the driver refuses a stream of another context. The caller answers for
        // the memory that the work uses.
        unsafe { cu!(cuGraphLaunch(self.raw, stream.raw())) }
    }
}

impl Drop for ExecutableGraph {
    fn drop(&mut self) {
        report(self.device.enter().and_then(|_entered| {
            // SAFETY: instantiated once, destroyed once; the driver lets a running replay finish first.
            unsafe { cu!(cuGraphExecDestroy(self.raw)) }
        }));
    }
}
