//! What the processor has: instruction sets and caches.

use crate::isa::InstructionSet;

/// Sizes of one core's caches, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caches {
    /// First-level data cache.
    pub l1: usize,
    /// Second-level cache.
    pub l2: usize,
    /// Last-level cache, shared by several cores; 0 where there is none.
    pub l3: usize,
    /// Whether the sizes were read from the processor, or are a guess.
    pub detected: bool,
}

impl Caches {
    /// What nearly every processor of the last ten years has at least.
    const GUESS: Caches = Caches { l1: 32 << 10, l2: 256 << 10, l3: 0, detected: false };

    /// Reads the sizes from the processor (x86-64) or from the operating system (Linux).
    pub fn detect() -> Self {
        let mut caches = Caches { l1: 0, l2: 0, l3: 0, detected: true };
        for (level, size) in levels() {
            match level {
                1 => caches.l1 = size,
                2 => caches.l2 = size,
                3 => caches.l3 = size,
                _ => {}
            }
        }
        if caches.l1 == 0 || caches.l2 == 0 { Caches::GUESS } else { caches }
    }
}

/// Level and size of each data or unified cache.
#[cfg(target_arch = "x86_64")]
fn levels() -> Vec<(u8, usize)> {
    use raw_cpuid::{CacheType, CpuId};
    let parameters = CpuId::new().get_cache_parameters();
    parameters
        .into_iter()
        .flatten()
        .filter(|cache| matches!(cache.cache_type(), CacheType::Data | CacheType::Unified))
        .map(|cache| {
            let line = cache.coherency_line_size() * cache.physical_line_partitions();
            (cache.level(), line * cache.associativity() * cache.sets())
        })
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn levels() -> Vec<(u8, usize)> {
    let entry = |index: usize| {
        let read = |name: &str| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
            std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
        };
        if read("type")? == "Instruction" {
            return None;
        }
        let size = read("size")?;
        Some((read("level")?.parse().ok()?, size.strip_suffix('K')?.parse::<usize>().ok()? << 10))
    };
    (0..8).filter_map(entry).collect()
}

/// This machine's processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Instruction sets with kernels of their own, fastest first.
    pub instruction_sets: Vec<InstructionSet>,
    /// Caches of a core.
    pub caches: Caches,
}

impl Machine {
    /// Looks at the processor.
    pub fn detect() -> Self {
        Machine { instruction_sets: InstructionSet::detected(), caches: Caches::detect() }
    }
}
