//! Launches of kernels.

use std::ptr;

use cudarc::driver::sys::{CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig};
use sage_ptx::Arg;

use crate::arguments;
use crate::driver::cu;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::stream::Stream;

impl Kernel {
    /// Puts the kernel on `stream` with `grid` blocks, without waiting for it. A grid without blocks does nothing.
    ///
    /// Checked are the grid, the device, and the arguments' count and types.
    ///
    /// # Errors
    /// Names what does not fit the kernel, or what the driver says. A kernel that left its memory is a fault that the
    /// next synchronisation reports and that no later call on the device survives.
    ///
    /// # Safety
    /// Until the stream has passed the launch, everything that the kernel reads or writes by the addresses and tensor
    /// maps in `args` is memory of the device, of the type that the kernel takes it for, and nothing else writes what
    /// it reads or touches what it writes. Where the stream is captured, this holds for every launch of the graph
    /// instead.
    pub unsafe fn launch(&self, stream: &Stream, grid: [u32; 3], args: &[Arg]) -> Result<()> {
        let kernel = self.loaded();
        arguments::check(&kernel.name, &kernel.params, args)?;
        arguments::check_grid(&kernel.name, grid, kernel.cluster)?;
        if stream.device().context() != kernel.function.context() {
            return Err(Error::limit(&kernel.name, "stream", "of another GPU", "one of the kernel's GPU"));
        }
        if grid.contains(&0) {
            return Ok(());
        }
        let mut pointers = arguments::pointers(args);
        let [x, y, z] = kernel.block;
        let shared = kernel.dynamic_shared_bytes;
        let _entered = kernel.function.context().enter()?;
        let mut attributes = [CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
            pad: [0; 4],
            value: CUlaunchAttributeValue { pad: [0; 64] },
        }; 2];
        let mut count = 0;
        let mut attribute = |id, set: &dyn Fn(&mut CUlaunchAttributeValue)| {
            attributes[count].id = id;
            set(&mut attributes[count].value);
            count += 1;
        };
        if let Some([x, y, z]) = kernel.cluster {
            attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, &|value| {
                (value.clusterDim.x, value.clusterDim.y, value.clusterDim.z) = (x, y, z);
            });
        }
        if kernel.starts_early {
            attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, &|value| {
                value.programmaticStreamSerializationAllowed = 1;
            });
        }
        if count == 0 {
            // SAFETY: function and stream are alive and of the current context; `pointers` lead to as many values of
            // the types that the kernel takes as it has parameters, which the driver copies before it returns. The
            // caller answers for what they point to.
            return unsafe {
                cu!(cuLaunchKernel(
                    kernel.function.raw(),
                    grid[0],
                    grid[1],
                    grid[2],
                    x,
                    y,
                    z,
                    shared,
                    stream.raw(),
                    pointers.as_mut_ptr(),
                    ptr::null_mut(),
                ))
            };
        }
        let config = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: x,
            blockDimY: y,
            blockDimZ: z,
            sharedMemBytes: shared,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: as above; `config` and its attributes are locals, and drivers with either attribute have the symbol.
        unsafe {
            cu!(cuLaunchKernelEx(&config, kernel.function.raw(), pointers.as_mut_ptr(), ptr::null_mut()))
        }
    }
}
