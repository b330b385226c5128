//! A GPU in use, and the kernels loaded on it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUmemPool_attribute};

use crate::compile;
use crate::context::{Context, Entered, OutsideCapture};
use crate::device_info::{DeviceInfo, attribute, handle};
use crate::disk_cache::{CacheKey, DiskCache};
use crate::driver::cu;
use crate::error::Result;
use crate::kernel::{Kernel, Origin};
use crate::source::KernelSource;

/// Where kernels came from, since the device was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadCounts {
    /// Compiled by the driver, or found in its own cache.
    pub compiled: u64,
    /// Read from the disk cache.
    pub from_disk: u64,
    /// Loaded before by this process.
    pub from_memory: u64,
}

/// A GPU in use. Clones are the same device; any thread may use them.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

/// A kernel, or room for one. Who loads it holds the lock, and others that want it wait.
type Slot = Arc<Mutex<Option<Kernel>>>;

struct Inner {
    info: DeviceInfo,
    context: Arc<Context>,
    has_pools: bool,
    disk: Option<DiskCache>,
    kernels: Mutex<HashMap<CacheKey, Slot>>,
    compiled: AtomicU64,
    from_disk: AtomicU64,
    from_memory: AtomicU64,
}

impl Device {
    /// Opens the GPU at position `ordinal`, with the disk cache where [`DiskCache::from_env`] finds it.
    ///
    /// While any clone lives, opening the same GPU again gives the same device with its loaded kernels.
    pub fn new(ordinal: u32) -> Result<Device> {
        // First, so that a forked process does not wait for a lock that another thread held.
        crate::check_not_forked()?;
        static OPEN: Mutex<Vec<(u32, Weak<Inner>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = open.iter().filter(|(of, _)| *of == ordinal).find_map(|(_, device)| device.upgrade());
        if let Some(inner) = known {
            return Ok(Device(inner));
        }
        handle(ordinal)?;
        let device = Device::with_cache(ordinal, DiskCache::from_env().cloned())?;
        open.retain(|(_, device)| device.strong_count() > 0);
        open.push((ordinal, Arc::downgrade(&device.0)));
        Ok(device)
    }

    /// Opens the GPU at position `ordinal` by itself, with kernels of its own and the disk cache given, or none.
    pub fn with_cache(ordinal: u32, disk: Option<DiskCache>) -> Result<Device> {
        let device = handle(ordinal)?;
        let info = DeviceInfo::of(ordinal)?;
        // SAFETY: the driver gave the handle.
        let context = unsafe { Context::retain(device) }?;
        let has_pools =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0;
        if has_pools {
            keep_freed_memory(device)?;
        }
        Ok(Device(Arc::new(Inner {
            info,
            context: Arc::new(context),
            has_pools,
            disk,
            kernels: Mutex::default(),
            compiled: AtomicU64::new(0),
            from_disk: AtomicU64::new(0),
            from_memory: AtomicU64::new(0),
        })))
    }

    /// What the GPU is and has.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// The disk cache in use.
    pub fn disk_cache(&self) -> Option<&DiskCache> {
        self.0.disk.as_ref()
    }

    /// Waits until the GPU has done everything that was put on any stream of its primary context. Not while one of them
    /// is captured: the driver would end the capture.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the context is current.
        unsafe { cu!(cuCtxSynchronize()) }
    }

    /// Compiles or finds a kernel and loads it.
    ///
    /// Where several threads ask for the same kernel at once, one compiles it and the others wait for it. A look-up
    /// hashes the text, so keep the [`Kernel`] rather than asking before every launch.
    pub fn load(&self, source: &KernelSource<'_>) -> Result<Kernel> {
        source.check(&self.0.info)?;
        let slot = {
            let mut kernels = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(kernels.entry(source.memory_key()).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = slot.as_ref() {
            self.0.from_memory.fetch_add(1, Ordering::Relaxed);
            return Ok(kernel.clone());
        }
        let kernel = {
            let _entered = self.enter()?;
            let _outside = OutsideCapture::enter()?;
            compile::load(source, &self.0.info, &self.0.context, self.0.disk.as_ref())?
        };
        let count = match kernel.origin() {
            Origin::Compiled | Origin::Driver => &self.0.compiled,
            Origin::Disk => &self.0.from_disk,
        };
        count.fetch_add(1, Ordering::Relaxed);
        *slot = Some(kernel.clone());
        Ok(kernel)
    }

    /// Where the kernels loaded so far came from.
    pub fn load_counts(&self) -> LoadCounts {
        LoadCounts {
            compiled: self.0.compiled.load(Ordering::Relaxed),
            from_disk: self.0.from_disk.load(Ordering::Relaxed),
            from_memory: self.0.from_memory.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn context(&self) -> &Context {
        &self.0.context
    }

    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        self.0.context.enter()
    }

    pub(crate) fn has_pools(&self) -> bool {
        self.0.has_pools
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("info", &self.0.info).finish_non_exhaustive()
    }
}

/// Has the default pool keep what is freed. It would return it to the system at every synchronisation, and a warm call
/// would pay for the mapping again.
fn keep_freed_memory(device: CUdevice) -> Result<()> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: the pointer is to a local.
    unsafe { cu!(cuDeviceGetDefaultMemPool(&mut pool, device)) }?;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut bytes = u64::MAX;
    // SAFETY: this attribute is a u64, and the pointer is to one.
    unsafe { cu!(cuMemPoolSetAttribute(pool, threshold, (&raw mut bytes).cast())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Device>();
        shared::<Kernel>();
        shared::<crate::Stream>();
        shared::<crate::Buffer>();
        shared::<crate::Event>();
        shared::<crate::Graph>();
        shared::<crate::ExecutableGraph>();
    }
}
