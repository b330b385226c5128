//! What a launch costs on each of a GPU's pipes, in seconds of the whole GPU.

use std::fmt;

use sage_emulator::Report;
use sage_kernels::{GpuModel, Rates};

/// A part of a multiprocessor that does one thing at a time, or the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipe {
    /// Tensor cores.
    Tensor,
    /// The unit for exponentials, reciprocals and logarithms.
    Exponentials,
    /// Schedulers: four instructions of warps in a clock.
    Issue,
    /// Shared memory: 128 bytes in a clock.
    Shared,
    /// Memory.
    Memory,
}

impl fmt::Display for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pipe::Tensor => "tensor cores",
            Pipe::Exponentials => "exponentials",
            Pipe::Issue => "instructions",
            Pipe::Shared => "shared memory",
            Pipe::Memory => "memory",
        })
    }
}

/// Seconds that each pipe of a GPU is busy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    pub tensor: f64,
    pub exponentials: f64,
    pub issue: f64,
    pub shared: f64,
    pub memory: f64,
}

/// The part of softmax's time, exponentials or all instructions, and of shared memory's that products do not hide. With
/// these, full precision, INT8 scores and INT8 with FP8 values are within 8% of what was measured: by `wgmma` on an H200
/// and by `mma.sync` on an H100, with 64 and 128 channels, 4,096 to 17,776 keys, causal or not
/// (docs/performance/gpus.md#predicted-times).
const EXPOSED_SOFTMAX: f64 = 0.85;
const EXPOSED_SHARED: f64 = 0.2;

/// Lanes of a warp.
const LANES: f64 = 32.0;

/// Instructions of warps that a multiprocessor's schedulers issue in a clock.
const ISSUED: f64 = 4.0;

/// Kinds of instructions that a register allocator removes, or that stand for none.
const FREE: [&str; 2] = ["mov", "wgmma fence/commit/wait"];

impl Work {
    /// That of a launch that was emulated.
    pub fn of(report: &Report, model: &GpuModel) -> Self {
        let rates = &model.rates;
        let clocks = f64::from(rates.clock) * 1e9 * model.machine.multiprocessors as f64;
        let count = |names: &[&str]| names.iter().map(|name| report.count(name)).sum::<u64>() as f64;
        let instructions = report.total() as f64 - count(&FREE);
        let wavefronts: u64 = report.shared.iter().map(|place| place.wavefronts).sum();
        let (sectors, _) = report.sectors();
        Work {
            tensor: report
                .instructions
                .iter()
                .map(|(kind, &count)| products(kind, rates) * count as f64)
                .sum(),
            exponentials: count(&["ex2", "lg2", "rcp", "tanh"]) * LANES
                / (clocks * f64::from(rates.exponentials)),
            issue: instructions / (clocks * ISSUED),
            shared: wavefronts as f64 / clocks,
            memory: (32 * sectors + report.bulk_bytes) as f64 / (f64::from(rates.bandwidth) * 1e9),
        }
    }

    /// Both.
    pub fn plus(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    /// So many times as much.
    pub fn times(self, factor: f64) -> Self {
        self.with(self, |a, _| a * factor)
    }

    /// The same, without what is below zero, as differences of launches that search for work may be.
    pub fn at_least_nothing(self) -> Self {
        self.with(self, |a, _| a.max(0.0))
    }

    fn with(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Work {
            tensor: f(self.tensor, other.tensor),
            exponentials: f(self.exponentials, other.exponentials),
            issue: f(self.issue, other.issue),
            shared: f(self.shared, other.shared),
            memory: f(self.memory, other.memory),
        }
    }

    fn pipes(&self) -> [(Pipe, f64); 5] {
        [
            (Pipe::Tensor, self.tensor),
            (Pipe::Exponentials, self.exponentials),
            (Pipe::Issue, self.issue),
            (Pipe::Shared, self.shared),
            (Pipe::Memory, self.memory),
        ]
    }

    /// The pipe that is busy longest.
    pub fn bound(&self) -> Pipe {
        let pipes = self.pipes();
        pipes.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(Pipe::Memory, |&(pipe, _)| pipe)
    }

    /// Seconds of the launch: of its memory, or of its products and what they do not hide of the other pipes.
    pub fn seconds(&self) -> f64 {
        let softmax = self.exponentials.max(self.issue);
        self.memory.max(self.tensor + EXPOSED_SOFTMAX * softmax + EXPOSED_SHARED * self.shared)
    }

    /// The part of the launch's time that each pipe is busy.
    pub fn busy(&self) -> Vec<(Pipe, f64)> {
        let seconds = self.seconds().max(f64::MIN_POSITIVE);
        self.pipes().iter().map(|&(pipe, busy)| (pipe, busy / seconds)).collect()
    }
}

/// Seconds that all tensor cores of a GPU take for an instruction of a warp; 0 where it is none of theirs.
fn products(kind: &str, rates: &Rates) -> f64 {
    let Some((instruction, [m, n, k], sums, element)) = parse(kind) else { return 0.0 };
    let rate = f64::from(match (element, sums) {
        ("f16" | "bf16", "f16") => rates.f16_sums_f16,
        ("f16" | "bf16", _) => rates.f16_sums_f32,
        ("e4m3" | "e5m2", "f16") => rates.fp8_sums_f16,
        ("e4m3" | "e5m2", _) => rates.fp8_sums_f32,
        ("e2m1", _) => rates.fp4,
        // INT4 has twice INT8's rate where tensor cores have it at all, and kernels pack it as INT8 elsewhere.
        ("s4", _) => 2.0 * rates.int8,
        _ => rates.int8,
    });
    // The four warps of a warpgroup execute one instruction together.
    let (warps, reached) = if instruction == "wgmma" { (4.0, 1.0) } else { (1.0, f64::from(rates.mma_sync)) };
    2.0 * (m * n * k) as f64 / warps / (rate * 1e12 * reached)
}

/// Instruction, sizes, and types of sums and elements of a kind such as `mma.m16n8k32.s32.s8`.
fn parse(kind: &str) -> Option<(&str, [u64; 3], &str, &str)> {
    let mut parts = kind.split('.');
    let (instruction, sizes) = (parts.next()?, parts.next()?);
    let (m, rest) = sizes.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    let sizes = [m.parse().ok()?, n.parse().ok()?, k.parse().ok()?];
    Some((instruction, sizes, parts.next()?, parts.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_take_their_operations_at_their_rate() {
        let ada = GpuModel::named("rtx-4090").unwrap().rates;
        let seconds = |kind| products(kind, &ada) * 1e12;
        assert!((seconds("mma.m16n8k32.s32.s8") - 8192.0 / 660.6).abs() < 1e-3);
        assert!((seconds("mma.m16n8k16.f32.bf16") - 4096.0 / 165.2).abs() < 1e-3);
        assert!((seconds("mma.m16n8k32.f16.e4m3") - 8192.0 / 660.6).abs() < 1e-3);
        assert_eq!(seconds("ld.shared.128"), 0.0);
        let hopper = GpuModel::named("h200").unwrap().rates;
        let of_group = 4.0 * products("wgmma.m64n128k16.f32.f16", &hopper) * 1e12;
        assert!((of_group - 2.0 * 64.0 * 128.0 * 16.0 / 989.0).abs() < 1e-3);
    }
}
