//! Kernels: what they are made from, and their launch.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig};
use sage_ptx::{Arg, Param, Target};

use crate::arguments::{self, MAX_PARAM_BYTES, MAX_PARAMS};
use crate::compile::Loaded;
use crate::device::DeviceInfo;
use crate::disk_cache::CacheKey;
use crate::driver::{Driver, DriverVersion, cu};
use crate::error::{Error, Result};
use crate::stream::Stream;

/// Largest block in each dimension, and its most threads, on every GPU.
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
const MAX_THREADS: u64 = 1024;
/// Most blocks of a cluster that every GPU with clusters can place.
const MAX_CLUSTER: u64 = 8;

/// A kernel's text, and what a launch has to know about it.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource<'a> {
    /// Name of the entry in the text, and in messages.
    pub name: &'a str,
    /// PTX.
    pub ptx: &'a str,
    /// What the text was written for.
    pub target: Target,
    /// The entry's parameters.
    pub params: &'a [Param],
    /// Threads of a block, in each dimension.
    pub block: [u32; 3],
    /// Blocks of a cluster, in each dimension: sm_90 and newer.
    pub cluster: Option<[u32; 3]>,
    /// Shared memory of a block beyond what the text declares, in bytes.
    pub dynamic_shared_bytes: u32,
    /// Whether the text needs a compiler that sees the whole program, as
    /// [`Program::needs_whole_compilation`](sage_ptx::Program::needs_whole_compilation) says. The driver keeps such code
    /// in a cache of its own, in place of a [`DiskCache`](crate::DiskCache).
    pub needs_whole_compilation: bool,
    /// Whether the kernel itself waits for the end of the launches before, as
    /// [`Program::waits_for_launches_before`](sage_ptx::Program::waits_for_launches_before) says. It is then launched
    /// while they may still be at work, so a kernel that does not wait would read what they have not written yet.
    pub waits_for_launches_before: bool,
}

impl KernelSource<'_> {
    /// Everything that can be found wrong without the driver.
    pub(crate) fn check(&self, gpu: &DeviceInfo) -> Result<()> {
        let limit = |what: &'static str, found: String, wanted: String| {
            Err(Error::limit(self.name, what, found, wanted))
        };
        if !self.target.runs_on(gpu.target()) {
            let (kernel, found, wanted) = (self.name.to_owned(), gpu.target(), self.target);
            return Err(Error::Target { kernel, found, wanted });
        }
        let product = |of: [u32; 3]| of.into_iter().map(u64::from).product::<u64>();
        let within =
            self.block.into_iter().zip(MAX_BLOCK).all(|(threads, most)| (1..=most).contains(&threads));
        if !within || product(self.block) > MAX_THREADS {
            let wanted = format!("1 to {MAX_BLOCK:?} with a product of at most {MAX_THREADS}");
            return limit("block", format!("{:?}", self.block), wanted);
        }
        if let Some(cluster) = self.cluster {
            if gpu.capability.0 < 9 {
                return limit("cluster", format!("{cluster:?}"), format!("none on {}", gpu.target()));
            }
            if !(1..=MAX_CLUSTER).contains(&product(cluster)) {
                return limit("cluster", format!("{cluster:?}"), format!("a product of 1 to {MAX_CLUSTER}"));
            }
        }
        if self.dynamic_shared_bytes > gpu.shared_bytes_per_block {
            let wanted = format!("at most {} bytes on this GPU", gpu.shared_bytes_per_block);
            return limit("dynamic shared memory", self.dynamic_shared_bytes.to_string(), wanted);
        }
        if self.params.len() > MAX_PARAMS {
            return limit(
                "number of parameters",
                self.params.len().to_string(),
                format!("at most {MAX_PARAMS}"),
            );
        }
        let bytes = self.params.iter().fold(0, |at: usize, param| {
            let align = param.ty.bytes().min(64);
            at.next_multiple_of(align) + param.ty.bytes()
        });
        if bytes > MAX_PARAM_BYTES {
            return limit(
                "size of the parameters",
                bytes.to_string(),
                format!("at most {MAX_PARAM_BYTES} bytes"),
            );
        }
        Ok(())
    }

    /// Whether the kernel may start before the launch before it has ended: it waits for that end by itself, and the
    /// driver can also capture such launches into a graph.
    pub(crate) fn starts_early(&self, driver: DriverVersion) -> bool {
        driver >= DriverVersion { major: 12, minor: 3 } && self.waits_for_launches_before
    }

    /// Identity within a process: all that a [`Kernel`] depends on.
    pub(crate) fn memory_key(&self) -> CacheKey {
        // A field that is added here or there must find its place in a key.
        let KernelSource {
            name,
            ptx,
            target,
            params,
            block,
            cluster,
            dynamic_shared_bytes,
            needs_whole_compilation,
            waits_for_launches_before,
        } = self;
        let shape = format!("{target:?}{block:?}{cluster:?}{dynamic_shared_bytes}");
        let facts = format!("{needs_whole_compilation} {waits_for_launches_before}");
        let params = format!("{params:?}");
        CacheKey::of(&[
            ptx.as_bytes(),
            name.as_bytes(),
            shape.as_bytes(),
            facts.as_bytes(),
            params.as_bytes(),
        ])
    }

    /// Identity on disk: all that the compiled code depends on.
    pub(crate) fn disk_key(&self, driver: DriverVersion, (major, minor): (u16, u16)) -> CacheKey {
        let gpu = format!("driver {driver}, capability {major}.{minor}");
        CacheKey::of(&[self.ptx.as_bytes(), self.name.as_bytes(), gpu.as_bytes()])
    }
}

/// Where a kernel's code came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The driver compiled it.
    Compiled,
    /// An earlier process compiled it.
    Disk,
}

/// What the driver says of a compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelAttributes {
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread in bytes: spilled registers and the stack.
    pub local_bytes: u32,
    /// Shared memory that the text declares.
    pub static_shared_bytes: u32,
    /// Blocks that a multiprocessor can hold at once, in the shape that the source asks for.
    pub max_blocks_per_multiprocessor: u32,
}

/// A kernel loaded on a [`Device`](crate::Device). Clones are the same kernel.
#[derive(Clone)]
pub struct Kernel(Arc<Loaded>);

impl Kernel {
    pub(crate) fn new(loaded: Arc<Loaded>) -> Kernel {
        Kernel(loaded)
    }

    /// Name of the entry.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What a launch passes.
    pub fn params(&self) -> &[Param] {
        &self.0.params
    }

    /// Threads of a block, in each dimension.
    pub fn block(&self) -> [u32; 3] {
        self.0.block
    }

    /// What the driver says of the compiled code.
    pub fn attributes(&self) -> KernelAttributes {
        self.0.attributes
    }

    /// Where the code came from.
    pub fn origin(&self) -> Origin {
        self.0.origin
    }

    /// Puts the kernel on `stream` with `grid` blocks, without waiting for it. A grid without blocks does nothing.
    ///
    /// Checked are the grid, the device, and the arguments' count and types.
    ///
    /// # Errors
    /// Names what does not fit the kernel, or what the driver says. A kernel that left its memory is a fault that the next
    /// synchronisation reports and that no later call on the device survives.
    ///
    /// # Safety
    /// Until the stream has passed the launch, everything that the kernel reads or writes by the addresses and tensor maps
    /// in `args` is memory of the device, of the type that the kernel takes it for, and nothing else writes what it reads
    /// or touches what it writes. Where the stream is captured, this holds for every launch of the graph instead.
    pub unsafe fn launch(&self, stream: &Stream, grid: [u32; 3], args: &[Arg]) -> Result<()> {
        let kernel = &*self.0;
        arguments::check(&kernel.name, &kernel.params, args)?;
        arguments::check_grid(&kernel.name, grid, kernel.cluster)?;
        if *stream.device().context() != *kernel.context {
            return Err(Error::limit(&kernel.name, "stream", "of another GPU", "one of the kernel's GPU"));
        }
        if grid.contains(&0) {
            return Ok(());
        }
        let mut pointers = arguments::pointers(args);
        let [x, y, z] = kernel.block;
        let shared = kernel.dynamic_shared_bytes;
        let _entered = kernel.context.enter()?;
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
                    kernel.function(),
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
        unsafe { cu!(cuLaunchKernelEx(&config, kernel.function(), pointers.as_mut_ptr(), ptr::null_mut())) }
    }

    /// An error where the driver is too old to launch `source`.
    pub(crate) fn check_driver(driver: &Driver, source: &KernelSource<'_>) -> Result<()> {
        if source.cluster.is_some() { driver.require("cuLaunchKernelEx") } else { Ok(()) }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Kernel");
        shown.field("name", &self.name()).field("attributes", &self.attributes()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use sage_ptx::ParamType;

    use super::*;

    fn h100() -> DeviceInfo {
        DeviceInfo {
            ordinal: 0,
            name: "H100".into(),
            capability: (9, 0),
            multiprocessors: 132,
            memory_bytes: 80 << 30,
            l2_bytes: 50 << 20,
            shared_bytes_per_block: 232_448,
            shared_bytes_per_multiprocessor: 233_472,
            registers_per_multiprocessor: 65_536,
            clock_khz: 1_980_000,
            uuid: [0; 16],
            driver_version: DriverVersion { major: 13, minor: 0 },
        }
    }

    fn source(params: &[Param]) -> KernelSource<'_> {
        KernelSource {
            name: "k",
            ptx: "",
            target: Target::SM_90A,
            params,
            block: [128, 1, 1],
            cluster: None,
            dynamic_shared_bytes: 0,
            needs_whole_compilation: false,
            waits_for_launches_before: false,
        }
    }

    #[test]
    fn only_kernels_that_wait_start_early_and_only_on_drivers_that_can_capture_them() {
        let waits = KernelSource { waits_for_launches_before: true, ..source(&[]) };
        let driver = |major, minor| DriverVersion { major, minor };
        assert!(waits.starts_early(driver(12, 3)) && waits.starts_early(driver(13, 0)));
        assert!(!waits.starts_early(driver(12, 2)));
        // The text has no say.
        let silent = KernelSource { ptx: "griddepcontrol.wait;", ..source(&[]) };
        assert!(!silent.starts_early(driver(13, 0)));
    }

    #[test]
    fn a_source_that_the_gpu_cannot_run_is_named() {
        let good = source(&[]);
        good.check(&h100()).unwrap();
        KernelSource { cluster: Some([2, 1, 1]), ..good }.check(&h100()).unwrap();
        let message = |source: KernelSource<'_>| source.check(&h100()).unwrap_err().to_string();
        assert_eq!(
            message(KernelSource { target: Target::SM_100A, ..good }),
            "kernel `k`: GPU is sm_90a, expected sm_100a alone"
        );
        for block in [[0, 1, 1], [2048, 1, 1], [1, 1, 65], [32, 32, 2]] {
            assert_eq!(
                message(KernelSource { block, ..good }),
                format!(
                    "kernel `k`: block is {block:?}, expected 1 to [1024, 1024, 64] with a product of at most 1024"
                )
            );
        }
        assert_eq!(
            message(KernelSource { cluster: Some([4, 4, 1]), ..good }),
            "kernel `k`: cluster is [4, 4, 1], expected a product of 1 to 8"
        );
        assert_eq!(
            message(KernelSource { dynamic_shared_bytes: 232_449, ..good }),
            "kernel `k`: dynamic shared memory is 232449, expected at most 232448 bytes on this GPU"
        );
        let many = vec![Param { name: "x".into(), ty: ParamType::U32 }; 65];
        assert_eq!(message(source(&many)), "kernel `k`: number of parameters is 65, expected at most 64");
        let large = vec![Param { name: "x".into(), ty: ParamType::TensorMap }; 33];
        assert_eq!(
            message(source(&large)),
            "kernel `k`: size of the parameters is 4224, expected at most 4096 bytes"
        );

        let a100 = DeviceInfo { capability: (8, 0), ..h100() };
        let clustered = KernelSource { target: Target::SM_80, cluster: Some([2, 1, 1]), ..good };
        assert_eq!(
            clustered.check(&a100).unwrap_err().to_string(),
            "kernel `k`: cluster is [2, 1, 1], expected none on sm_80"
        );
    }

    #[test]
    fn keys_differ_in_everything_that_matters() {
        let params = [Param { name: "x".into(), ty: ParamType::U32 }];
        let good = source(&[]);
        let in_memory = [
            good,
            KernelSource { name: "l", ..good },
            KernelSource { ptx: "p", ..good },
            KernelSource { name: "kp", ..good },
            KernelSource { block: [64, 1, 1], ..good },
            KernelSource { cluster: Some([1, 1, 1]), ..good },
            KernelSource { dynamic_shared_bytes: 1, ..good },
            KernelSource { target: Target::SM_90, ..good },
            KernelSource { needs_whole_compilation: true, ..good },
            KernelSource { waits_for_launches_before: true, ..good },
            source(&params),
        ]
        .map(|source| source.memory_key());
        let driver = DriverVersion { major: 13, minor: 0 };
        let on_disk = [
            good.disk_key(driver, (9, 0)),
            good.disk_key(driver, (8, 9)),
            good.disk_key(DriverVersion { major: 12, minor: 8 }, (9, 0)),
            KernelSource { ptx: "p", ..good }.disk_key(driver, (9, 0)),
            KernelSource { name: "l", ..good }.disk_key(driver, (9, 0)),
        ];
        for keys in [&in_memory[..], &on_disk[..]] {
            for (i, key) in keys.iter().enumerate() {
                assert!(!keys[..i].contains(key), "{i}");
            }
        }
        let wider = KernelSource { block: [256, 1, 1], ..good };
        assert_eq!(
            good.disk_key(driver, (9, 0)),
            wider.disk_key(driver, (9, 0)),
            "launch shape is not compiled in"
        );
    }
}
