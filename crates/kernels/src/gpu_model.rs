//! GPUs as they are sold, with the rates that their maker publishes: for plans and predictions where none is at hand.

use sage_ptx::Target;

use crate::machine::Machine;

/// A GPU as it is sold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuModel {
    /// Its name in lower case, with hyphens: `rtx-5090`.
    pub name: &'static str,
    /// What plans ask of it.
    pub machine: Machine,
    /// What it can do in a second.
    pub rates: Rates,
}

/// Rates at the boost clock, of matrices without structured sparsity.
///
/// Sources: NVIDIA's architecture whitepapers (Turing, A100, GA102, Ada, H100, RTX Blackwell), the data sheets of L40S,
/// H200, B200, B300, Jetson and DGX Spark; exponentials from the CUDA C++ Programming Guide's table of arithmetic
/// throughput and, for B300, from its data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Boost clock, GHz.
    pub clock: f32,
    /// Bytes a second to and from memory, 10⁹.
    pub bandwidth: f32,
    /// Products of 16-bit floats summed in f16, 10¹² operations a second.
    pub f16_sums_f16: f32,
    /// The same, summed in f32.
    pub f16_sums_f32: f32,
    /// Products of INT8.
    pub int8: f32,
    /// Products of FP8 summed in f16; 0 where there are none, here and below.
    pub fp8_sums_f16: f32,
    /// The same, summed in f32.
    pub fp8_sums_f32: f32,
    /// Products of FP4.
    pub fp4: f32,
    /// Exponentials of a multiprocessor in a clock.
    pub exponentials: f32,
    /// What `mma.sync` reaches of these rates, where other instructions (`wgmma`, `tcgen05`) reach all: 0.62 on an H100
    /// (Luo et al. 2024, arXiv:2402.13499, table 9). None is published for data-centre Blackwell; what is here would be
    /// Hopper's rate of a multiprocessor.
    pub mma_sync: f32,
}

impl GpuModel {
    /// All of them, by compute capability; of one capability the one that is sold most first.
    pub const ALL: &'static [GpuModel] = &[
        gpu("t4", 75, [40, 64, 4], rates(1.59, 320.0, 65.0, [65.0, 130.0, 0.0, 0.0, 0.0])),
        gpu("rtx-2080-ti", 75, [68, 64, 5], rates(1.545, 616.0, 107.6, [53.8, 215.2, 0.0, 0.0, 0.0])),
        gpu("a100", 80, [108, 163, 40], rates(1.41, 2039.0, 312.0, [312.0, 624.0, 0.0, 0.0, 0.0])),
        gpu("rtx-3090", 86, [82, 99, 6], rates(1.695, 936.0, 142.0, [71.0, 284.0, 0.0, 0.0, 0.0])),
        gpu("jetson-orin", 87, [16, 163, 4], rates(1.3, 204.8, 42.5, [42.5, 85.0, 0.0, 0.0, 0.0])),
        gpu("rtx-4090", 89, [128, 99, 72], rates(2.52, 1008.0, 330.3, [165.2, 660.6, 660.6, 330.3, 0.0])),
        gpu("l40s", 89, [142, 99, 96], rates(2.52, 864.0, 362.0, [362.0, 733.0, 733.0, 733.0, 0.0])),
        gpu("h100", 90, [132, 227, 50], hopper(3350.0)),
        gpu("h200", 90, [132, 227, 50], hopper(4800.0)),
        gpu(
            "b200",
            100,
            [148, 227, 126],
            Rates {
                mma_sync: 0.31,
                ..rates(1.856, 7700.0, 2250.0, [2250.0, 4500.0, 4500.0, 4500.0, 9000.0])
            },
        ),
        gpu(
            "b300",
            103,
            [160, 227, 126],
            Rates {
                mma_sync: 0.31,
                exponentials: 32.0,
                ..rates(1.717, 7700.0, 2250.0, [2250.0, 150.0, 4500.0, 4500.0, 14000.0])
            },
        ),
        gpu(
            "jetson-thor",
            110,
            [20, 227, 32],
            Rates { mma_sync: 0.31, ..rates(1.575, 273.0, 258.0, [258.0, 517.0, 517.0, 517.0, 1035.0]) },
        ),
        gpu(
            "rtx-5090",
            120,
            [170, 99, 96],
            rates(2.407, 1792.0, 419.0, [209.5, 838.0, 838.0, 419.0, 1676.0]),
        ),
        gpu(
            "rtx-pro-6000",
            120,
            [188, 99, 128],
            rates(2.617, 1792.0, 503.8, [503.8, 1007.6, 1007.6, 1007.6, 2015.2]),
        ),
        gpu("dgx-spark", 121, [48, 99, 24], rates(2.54, 273.0, 125.0, [62.5, 250.0, 250.0, 125.0, 500.0])),
    ];

    /// The GPU of that name.
    ///
    /// # Errors
    /// Says the names that there are.
    pub fn named(name: &str) -> Result<Self, String> {
        Self::ALL.iter().find(|model| model.name == name).copied().ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|model| model.name).collect();
            format!("gpu: value is `{name}`, expected one of {}", names.join(", "))
        })
    }

    /// The GPU of a target that is sold most: of its own compute capability, or else of the nearest before it.
    pub(crate) fn typical(target: Target) -> Self {
        let capability = |model: &GpuModel| model.machine.target.sm();
        Self::ALL.iter().fold(Self::ALL[0], |found, model| {
            let nearer = capability(&found) < capability(model) && capability(model) <= target.sm();
            if nearer { *model } else { found }
        })
    }
}

const fn gpu(
    name: &'static str,
    sm: u16,
    [multiprocessors, shared_kib, l2_mib]: [usize; 3],
    rates: Rates,
) -> GpuModel {
    let machine = Machine {
        target: Target::of_capability(sm / 10, sm % 10),
        multiprocessors,
        shared_bytes: shared_kib << 10,
        l2_bytes: l2_mib << 20,
    };
    GpuModel { name, machine, rates }
}

/// Rates of a GPU whose tensor cores have one set of instructions.
const fn rates(
    clock: f32,
    bandwidth: f32,
    f16_sums_f16: f32,
    [f16_sums_f32, int8, fp8_sums_f16, fp8_sums_f32, fp4]: [f32; 5],
) -> Rates {
    Rates {
        clock,
        bandwidth,
        f16_sums_f16,
        f16_sums_f32,
        int8,
        fp8_sums_f16,
        fp8_sums_f32,
        fp4,
        exponentials: 16.0,
        mma_sync: 1.0,
    }
}

const fn hopper(bandwidth: f32) -> Rates {
    Rates { mma_sync: 0.62, ..rates(1.83, bandwidth, 989.0, [989.0, 1979.0, 1979.0, 1979.0, 0.0]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (at, model) in GpuModel::ALL.iter().enumerate() {
            assert_eq!(GpuModel::named(model.name), Ok(*model));
            assert!(GpuModel::ALL[..at].iter().all(|other| other.name != model.name), "{} twice", model.name);
        }
        let message = GpuModel::named("rtx-9090").unwrap_err();
        assert!(message.starts_with("gpu: value is `rtx-9090`, expected one of t4, "), "{message}");
    }

    #[test]
    fn the_typical_gpu_is_the_first_of_its_capability() {
        let typical = |target| GpuModel::typical(target).name;
        assert_eq!(typical(Target::SM_75), "t4");
        assert_eq!([typical(Target::SM_80), typical(Target::SM_89)], ["a100", "rtx-4090"]);
        assert_eq!([typical(Target::SM_90), typical(Target::SM_90A)], ["h100", "h100"]);
        assert_eq!([typical(Target::SM_120), typical(Target::SM_121A)], ["rtx-5090", "dgx-spark"]);
    }

    /// A multiprocessor's products in a clock are powers of two, up to what makers round.
    #[test]
    fn rates_are_those_of_whole_tensor_cores() {
        for GpuModel { name, machine, rates } in GpuModel::ALL {
            let of_a_clock = |rate: f32| {
                f64::from(rate) * 1e12 / (f64::from(rates.clock) * 1e9) / machine.multiprocessors as f64
            };
            for rate in [rates.f16_sums_f16, rates.f16_sums_f32, rates.fp8_sums_f16, rates.fp8_sums_f32] {
                let power = of_a_clock(rate).log2();
                assert!(
                    rate == 0.0 || (power - power.round()).abs() < 0.12,
                    "{name}: {} a clock",
                    power.exp2()
                );
            }
        }
    }
}
