//! What kernels are made from.

use sage_ptx::{Param, Target};

use crate::arguments::{MAX_PARAM_BYTES, MAX_PARAMS};
use crate::device_info::DeviceInfo;
use crate::disk_cache::CacheKey;
use crate::driver::Driver;
use crate::driver_version::DriverVersion;
use crate::error::{Error, Result};

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
    /// [`Program::needs_whole_compilation`](sage_ptx::Program::needs_whole_compilation) says. The driver keeps such
    /// code in a cache of its own ([`driver_cache`](crate::driver_cache())), in place of a
    /// [`DiskCache`](crate::DiskCache).
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

    /// An error where the driver is too old to launch the kernel.
    pub(crate) fn check_driver(&self, driver: &Driver) -> Result<()> {
        if self.cluster.is_some() { driver.require("cuLaunchKernelEx") } else { Ok(()) }
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
        let many = vec![Param { name: "x".into(), ty: ParamType::U32 }; 73];
        assert_eq!(message(source(&many)), "kernel `k`: number of parameters is 73, expected at most 72");
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
