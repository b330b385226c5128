//! What a GPU is and has.

use std::ffi::CStr;

use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUuuid};
use sage_ptx::Target;

use crate::driver::{Driver, cu};
use crate::driver_version::DriverVersion;
use crate::error::{Error, Result};

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

/// The driver's handle of the GPU at position `ordinal`.
pub(crate) fn handle(ordinal: u32) -> Result<CUdevice> {
    let count = Driver::get()?.device_count();
    let signed = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
    let Some(signed) = signed else { return Err(Error::NoDevice { ordinal, count }) };
    let mut device = 0;
    // SAFETY: the pointer is to a local.
    unsafe { cu!(cuDeviceGet(&mut device, signed)) }?;
    Ok(device)
}

/// An attribute that is a number.
pub(crate) fn attribute(device: CUdevice, which: CUdevice_attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: the pointer is to a local.
    unsafe { cu!(cuDeviceGetAttribute(&mut value, which, device)) }?;
    Ok(value.unsigned_abs())
}

/// All GPUs, in the driver's order; empty where the driver finds none.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    (0..Driver::get()?.device_count()).map(DeviceInfo::of).collect()
}
