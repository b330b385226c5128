//! `sageattn info`: what this machine offers.

use std::fs;
use std::path::Path;

use sageattention::cuda::{self, DeviceInfo};
use serde::Serialize;

use crate::console::Console;
use crate::failure::Result;
use crate::table::{DIM, TITLE, styled};

/// What was found; absent where this system does not say.
#[derive(Debug, Serialize)]
struct Info {
    command: &'static str,
    version: &'static str,
    architecture: &'static str,
    cpu: Option<String>,
    /// Instruction-set extensions that matter here, and whether the processor and system have them.
    features: Vec<Feature>,
    /// What the CPU backend says of itself.
    backend: String,
    threads: usize,
    caches: Vec<Cache>,
    memory_bytes: Option<u64>,
    nvidia_driver: Option<String>,
    /// What the driver shows.
    gpus: Vec<Gpu>,
    /// Why it shows none.
    no_gpu: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    /// As `--device` takes it.
    device: String,
    name: String,
    target: String,
    multiprocessors: u32,
    memory_bytes: u64,
    /// CUDA version of the driver.
    driver_version: String,
}

impl Gpu {
    fn new(info: &DeviceInfo) -> Self {
        Gpu {
            device: format!("cuda:{}", info.ordinal),
            name: info.name.clone(),
            target: info.target().to_string(),
            multiprocessors: info.multiprocessors,
            memory_bytes: info.memory_bytes,
            driver_version: info.driver_version.to_string(),
        }
    }
}

#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    found: bool,
}

#[derive(Debug, Serialize)]
struct Cache {
    level: String,
    kind: String,
    size: String,
    /// Processors that share it.
    shared_by: String,
}

/// Looks and prints.
pub fn execute(console: Console) -> Result<()> {
    let (gpus, no_gpu) = match cuda::devices() {
        Ok(found) if found.is_empty() => (Vec::new(), Some("the driver shows none".to_owned())),
        Ok(found) => (found.iter().map(Gpu::new).collect(), None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let info = Info {
        command: "info",
        version: env!("CARGO_PKG_VERSION"),
        architecture: std::env::consts::ARCH,
        cpu: cpu_name(),
        features: features(),
        backend: sageattention::backend_description(),
        threads: rayon::current_num_threads(),
        caches: caches(),
        memory_bytes: memory_bytes(),
        nvidia_driver: first_line("/proc/driver/nvidia/version"),
        gpus,
        no_gpu,
    };
    if console.json { console.print_json(&info) } else { console.print(&text(&info)) }
}

fn text(info: &Info) -> String {
    let mut rows = vec![
        ("sageattn", info.version.to_owned()),
        ("processor", format!("{} ({})", info.cpu.as_deref().unwrap_or("unnamed"), info.architecture)),
    ];
    let named = |found| {
        let names: Vec<&str> = info.features.iter().filter(|f| f.found == found).map(|f| f.name).collect();
        names.join(" ")
    };
    rows.push(("has", named(true)));
    rows.push(("lacks", styled(DIM, named(false))));
    rows.push(("backend", info.backend.clone()));
    rows.push(("threads", info.threads.to_string()));
    for cache in &info.caches {
        let value = format!(
            "L{} {}, {}, processors {}",
            cache.level,
            cache.kind.to_lowercase(),
            cache.size,
            cache.shared_by
        );
        rows.push(("cache", value));
    }
    if let Some(bytes) = info.memory_bytes {
        rows.push(("memory", gibibytes(bytes)));
    }
    if let Some(driver) = &info.nvidia_driver {
        rows.push(("driver", driver.clone()));
    }
    for gpu in &info.gpus {
        let value = format!(
            "{}, {}, {}, {} multiprocessors, {}, driver for CUDA {}",
            gpu.device,
            gpu.name,
            gpu.target,
            gpu.multiprocessors,
            gibibytes(gpu.memory_bytes),
            gpu.driver_version
        );
        rows.push(("gpu", value));
    }
    if let Some(reason) = &info.no_gpu {
        rows.push(("gpu", format!("none: {reason}")));
    }
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| {
            let padding = " ".repeat(12 - name.len());
            let value = value.trim_end().replace('\n', &format!("\n{:14}", ""));
            format!("  {}{padding}{value}\n", styled(TITLE, name))
        })
        .collect()
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<Feature> {
    macro_rules! found {
        ($($name:tt),*) => { vec![$(Feature { name: $name, found: std::is_x86_feature_detected!($name) }),*] };
    }
    found!(
        "sse4.1",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avxvnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "avx512bf16",
        "avx512fp16"
    )
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<Feature> {
    macro_rules! found {
        ($($name:tt),*) => {
            vec![$(Feature { name: $name, found: std::arch::is_aarch64_feature_detected!($name) }),*]
        };
    }
    found!("neon", "fp16", "dotprod", "i8mm", "bf16", "sve")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<Feature> {
    Vec::new()
}

/// The first processor's caches, as Linux describes them.
fn caches() -> Vec<Cache> {
    let base = Path::new("/sys/devices/system/cpu/cpu0/cache");
    let read = |index: usize, what: &str| {
        let text = fs::read_to_string(base.join(format!("index{index}")).join(what)).ok()?;
        Some(text.trim().to_owned())
    };
    (0..8)
        .map_while(|i| {
            Some(Cache {
                level: read(i, "level")?,
                kind: read(i, "type")?,
                size: read(i, "size")?,
                shared_by: read(i, "shared_cpu_list")?,
            })
        })
        .collect()
}

fn memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn first_line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()?.lines().next().map(str::to_owned)
}
