//! A GPU: what it is, and the kernels loaded on it.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUmemPool_attribute, CUuuid};
use sage_ptx::Target;

use crate::compile::{self, Loaded};
use crate::context::{Context, Entered, OutsideCapture};
use crate::disk_cache::{CacheKey, DiskCache};
use crate::driver::{Driver, DriverVersion, cu};
use crate::error::{Error, Result};
use crate::kernel::{Kernel, KernelSource, Origin};

/// What a GPU is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Position among the GPUs that the driver shows.
    pub ordinal: u32,
    /// Marketing name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u16, u16),
    /// Number of streaming multiprocessors.
    pub multiprocessors: u32,
    /// Size of global memory.
    pub memory_bytes: u64,
    /// Size of the L2 cache.
    pub l2_bytes: u64,
    /// Most shared memory of a block that asks for it.
    pub shared_bytes_per_block: u32,
    /// Shared memory of a multiprocessor.
    pub shared_bytes_per_multiprocessor: u32,
    /// 32-bit registers of a multiprocessor.
    pub registers_per_multiprocessor: u32,
    /// Peak clock.
    pub clock_khz: u32,
    /// Identity of the GPU, or of its slice.
    pub uuid: [u8; 16],
    /// CUDA version of the driver.
    pub driver_version: DriverVersion,
}

impl DeviceInfo {
    /// The richest target whose code the GPU runs.
    pub fn target(&self) -> Target {
        Target::of_capability(self.capability.0, self.capability.1)
    }

    pub(crate) fn of(ordinal: u32) -> Result<DeviceInfo> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_CLOCK_RATE as CLOCK, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE as L2,
            CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR as REGISTERS,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED_BLOCK,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR as SHARED,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let device = handle(ordinal)?;
        let mut name = [0; 256];
        // SAFETY: the driver writes at most the 256 bytes, NUL included.
        unsafe { cu!(cuDeviceGetName(name.as_mut_ptr(), 256, device)) }?;
        let name = name.map(|c| c as u8);
        let mut memory = 0;
        // SAFETY: the pointer is to a local.
        unsafe { cu!(cuDeviceTotalMem_v2(&mut memory, device)) }?;
        let mut uuid = CUuuid { bytes: [0; 16] };
        // SAFETY: the pointer is to a local.
        unsafe { cu!(cuDeviceGetUuid_v2(&mut uuid, device)) }?;
        let get = |which| attribute(device, which);
        Ok(DeviceInfo {
            ordinal,
            name: CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned(),
            capability: (get(MAJOR)? as u16, get(MINOR)? as u16),
            multiprocessors: get(MULTIPROCESSORS)?,
            memory_bytes: memory as u64,
            l2_bytes: u64::from(get(L2)?),
            shared_bytes_per_block: get(SHARED_BLOCK)?,
            shared_bytes_per_multiprocessor: get(SHARED)?,
            registers_per_multiprocessor: get(REGISTERS)?,
            clock_khz: get(CLOCK)?,
            uuid: uuid.bytes.map(|c| c as u8),
            driver_version: Driver::get()?.version(),
        })
    }
}

fn handle(ordinal: u32) -> Result<CUdevice> {
    let count = Driver::get()?.device_count();
    let signed = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
    let Some(signed) = signed else { return Err(Error::NoDevice { ordinal, count }) };
    let mut device = 0;
    // SAFETY: the pointer is to a local.
    unsafe { cu!(cuDeviceGet(&mut device, signed)) }?;
    Ok(device)
}

fn attribute(device: CUdevice, which: CUdevice_attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: the pointer is to a local.
    unsafe { cu!(cuDeviceGetAttribute(&mut value, which, device)) }?;
    Ok(value.unsigned_abs())
}

/// Where kernels came from, since the device was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadCounts {
    /// Compiled by the driver.
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
type Slot = Arc<Mutex<Option<Arc<Loaded>>>>;

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
    /// Of several threads that ask for the same kernel at once, one compiles it and the others wait for it. A look-up
    /// hashes the text, so keep the [`Kernel`] rather than asking before every launch.
    pub fn load(&self, source: &KernelSource<'_>) -> Result<Kernel> {
        source.check(&self.0.info)?;
        let slot = {
            let mut kernels = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(kernels.entry(source.memory_key()).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = slot.as_ref() {
            self.0.from_memory.fetch_add(1, Ordering::Relaxed);
            return Ok(Kernel::new(Arc::clone(loaded)));
        }
        let loaded = {
            let _entered = self.enter()?;
            let _outside = OutsideCapture::enter()?;
            compile::load(source, &self.0.info, &self.0.context, self.0.disk.as_ref())?
        };
        let count = match loaded.origin {
            Origin::Compiled => &self.0.compiled,
            Origin::Disk => &self.0.from_disk,
        };
        count.fetch_add(1, Ordering::Relaxed);
        let loaded = Arc::new(loaded);
        *slot = Some(Arc::clone(&loaded));
        Ok(Kernel::new(loaded))
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
