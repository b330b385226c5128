//! What computes a scheme of the original where a backend lacks its kernels.

use sage_core::{Accumulator, Granularity, IntBits, Pv, Qk, Scheme, SmoothQ};

use crate::backend::Device;

/// Keys of a tile of the GPU kernels, whose scales are never of more keys.
const GPU_KEY_TILE: usize = 64;
/// Keys that share a scale in the CPU's 12-bit P·V.
const CPU_KEY_TILE: usize = 128;

/// The scheme of a kernel that `device` has and that is at least as accurate as `scheme`; `scheme` itself where there is
/// no reason to leave it.
///
/// The original's functions name the kernels of certain GPUs. Programs call them by name and mean "this fast and this
/// accurate", so a machine without such a kernel computes with the nearest:
///
/// | in `scheme` | on the CPU | on a GPU |
/// | --- | --- | --- |
/// | P·V in FP8 or INT8 | 12-bit P·V with exact sums | as it is |
/// | P·V in 16 bits | P·V in f32 | as it is |
/// | smoothed V | left out: it serves narrow sums alone | of 16 bits: left out, summed in f32 |
/// | smoothed Q with INT4 scores | INT8 scores | as it is |
/// | scales of 128 keys (Hopper's tiles) | as it is | scales of 64 keys |
///
/// FP4 scores are left as they are: a backend that lacks them says so.
pub fn nearest_scheme(scheme: Scheme, device: Device) -> Scheme {
    match device {
        Device::Cpu => on_cpu(scheme),
        Device::Cuda(_) => on_gpu(scheme),
    }
}

fn on_cpu(mut scheme: Scheme) -> Scheme {
    if matches!(scheme.qk, Qk::Nvfp4) {
        return scheme;
    }
    if scheme.smooth.q != SmoothQ::Off {
        scheme.smooth.q = SmoothQ::Off;
        if let Qk::Int(quantizer) = &mut scheme.qk {
            quantizer.bits = IntBits::Eight;
        }
    }
    scheme.smooth.v = false;
    scheme.pv = match scheme.pv {
        Pv::F16(_) | Pv::BF16(_) => Pv::F32,
        Pv::Fp8 { .. } | Pv::Int8 => Pv::Fixed12 { block: CPU_KEY_TILE },
        as_it_is @ (Pv::F32 | Pv::Fixed12 { .. } | Pv::Nvfp4) => as_it_is,
    };
    scheme
}

fn on_gpu(mut scheme: Scheme) -> Scheme {
    if let Qk::Int(quantizer) = &mut scheme.qk
        && quantizer.granularity != Granularity::PerTensor
    {
        let tile = &mut quantizer.tile;
        tile.block_k = tile.block_k.min(GPU_KEY_TILE);
        tile.warp_k = tile.warp_k.min(GPU_KEY_TILE);
    }
    if scheme.smooth.v && matches!(scheme.pv, Pv::F16(_)) {
        scheme.smooth.v = false;
        scheme.pv = Pv::F16(Accumulator::F32);
    }
    scheme
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};
    use sage_core::metrics::Accuracy;
    use sage_core::{Call, Inputs, Options, Preset, Tensor, oracle};
    use sage_cpu::Cpu;

    use super::*;

    /// `[1, 1, rows, 64]` of N(0, 1), each channel shifted by twice an N(0, 1) of its own.
    fn random(seed: u64, rows: usize) -> Tensor {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
        let shift: Vec<f32> = (0..64).map(|_| 2.0 * normal()).collect();
        let elements: Vec<f32> = (0..rows * 64).map(|i| normal() + shift[i % 64]).collect();
        Tensor::new(elements, &[1, 1, rows, 64]).unwrap()
    }

    /// The presets that the original's functions for integer scores stand for.
    fn presets() -> impl Iterator<Item = Preset> {
        Preset::ALL
            .iter()
            .copied()
            .filter(|preset| preset.original().is_some() && matches!(preset.scheme(64).qk, Qk::Int(_)))
    }

    #[test]
    fn the_cpu_has_kernels_for_the_nearest_of_every_integer_scheme() {
        let (q, k) = (random(1, 130), random(2, 200));
        let call = Call::check(&Inputs::new(q.view(), k.view(), k.view()), &Options::default()).unwrap();
        for preset in presets() {
            let scheme = nearest_scheme(preset.scheme(64), Device::Cpu);
            Cpu::detect()
                .plan(&call.problem, Some(scheme))
                .unwrap_or_else(|error| panic!("{preset}: {error}"));
        }
    }

    #[test]
    fn the_nearest_scheme_of_the_cpu_is_at_least_as_accurate() {
        let (q, k, v) = (random(3, 140), random(4, 260), random(5, 260));
        let call = Call::check(&Inputs::new(q.view(), k.view(), v.view()), &Options::default()).unwrap();
        let exact = oracle::exact(&call);
        let error = |scheme: &Scheme| {
            let out: Vec<f32> = oracle::scheme(&call, scheme).out.iter().map(|&x| x as f32).collect();
            Accuracy::of(&out, &exact.out).relative_l1
        };
        for preset in presets() {
            let scheme = preset.scheme(64);
            let (given, nearest) = (error(&scheme), error(&nearest_scheme(scheme, Device::Cpu)));
            // Quantising Q·Kᵀ alike leaves the same error there; 2 % is for P·V's errors that happen to cancel some of it.
            assert!(nearest <= given * 1.02, "{preset}: {nearest} beside {given}");
        }
    }

    #[test]
    fn hopper_tiles_get_finer_scales_on_the_gpu_kernels() {
        let scheme = nearest_scheme(Preset::SAGE2_INT8_FP8_SM90_PER_THREAD.scheme(128), Device::Cuda(0));
        let Qk::Int(quantizer) = scheme.qk else { unreachable!("an integer scheme") };
        assert_eq!((quantizer.tile.warp_q, quantizer.tile.block_k, quantizer.tile.warp_k), (16, 64, 64));
        assert_eq!(scheme.pv, Preset::SAGE2_INT8_FP8_SM90_PER_THREAD.scheme(128).pv);
    }

    #[test]
    fn what_a_backend_has_stays() {
        for (preset, device) in [
            (Preset::INT8, Device::Cpu),
            (Preset::FULL, Device::Cpu),
            (Preset::SAGE2_INT8_FP8_PER_THREAD, Device::Cuda(0)),
            (Preset::SAGE1_INT8_FP16, Device::Cuda(0)),
        ] {
            assert_eq!(nearest_scheme(preset.scheme(64), device), preset.scheme(64), "{preset} on {device}");
        }
    }
}
