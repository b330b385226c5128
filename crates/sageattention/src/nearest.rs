//! What computes a scheme where a backend lacks its kernels.

use sage_core::{DType, Scheme};

use crate::backend::Device;

/// The scheme of a kernel that `device` has for tensors of type `dtype` and that is at least as accurate as `scheme`;
/// `scheme` itself where there is no reason to leave it.
///
/// The original's functions name the kernels of certain GPUs. Programs call them by name and mean "this fast and this
/// accurate", so a machine without such a kernel computes with the nearest:
///
/// | in `scheme` | on the CPU | on a GPU |
/// | --- | --- | --- |
/// | P·V in FP8 | as it is | as it is; before sm_89 in the tensors' 16 bits |
/// | P·V in INT8 | as it is | P·V in the tensors' 16 bits |
/// | P·V in bf16 | as it is | as it is; before sm_80 in f16 |
/// | no quantisation | as it is | as it is; of bf16 tensors before sm_80 INT8 scores per token |
/// | P·V in f32 or 12 bits | as it is | the plan takes the tensors' 16 bits, and says so |
/// | smoothed V | as it is | of 16 bits: left out, summed in f32 |
/// | scales of 128 keys (Hopper's tiles) | as it is | scales of 64 keys; the plan takes them, and says so |
/// | FP4 scores and P·V | as they are | as they are on sm_120a and sm_121a, elsewhere INT8 scores per thread, P·V as FP8 |
/// | 12-bit P·V of other blocks than 128 keys | of 128 keys | as P·V in f32 |
///
/// A call with a scheme that the device lacks is refused with an error that names this one, except where the plan
/// takes it by itself: there the operands are the same, and only scales are finer or sums wider. The other rules for
/// schemes of one's own stand beside the backends' plans.
///
/// A GPU is looked for: where there is none of that number, rules are those of sm_90.
#[cfg_attr(
    not(feature = "cuda"),
    expect(unused_variables, reason = "the CPU computes every scheme of every type")
)]
pub fn nearest_scheme(scheme: Scheme, dtype: DType, device: Device) -> Scheme {
    match device {
        Device::Cpu => sage_cpu::nearest_scheme(scheme),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => {
            use sage_core::Backend;
            match sage_gpu::Cuda::shared(ordinal) {
                Ok(gpu) => gpu.nearest(scheme, dtype),
                Err(_) => sage_gpu::nearest_on_hopper(scheme, dtype),
            }
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => scheme,
    }
}

#[cfg(test)]
mod tests {
    use sage_core::metrics::Accuracy;
    use sage_core::{Call, Inputs, Options, Preset, Pv, Tensor, oracle};
    use sage_cpu::Cpu;
    use sage_testkit::normal;

    use super::*;

    /// `[1, 1, rows, 64]` of N(0, 1), each channel shifted by twice an N(0, 1) of its own.
    fn random(seed: u64, rows: usize) -> Tensor {
        let numbers = normal(seed, 64 + rows * 64);
        let (shift, elements) = numbers.split_at(64);
        let elements: Vec<f32> =
            elements.iter().zip(shift.iter().cycle()).map(|(x, shift)| x + 2.0 * shift).collect();
        Tensor::new(elements, &[1, 1, rows, 64]).unwrap()
    }

    #[test]
    fn every_preset_plans_on_the_cpu() {
        let (q, k) = (random(1, 130), random(2, 200));
        let call = Call::check(&Inputs::new(q.view(), k.view(), k.view()), &Options::default()).unwrap();
        for preset in Preset::ALL {
            let (scheme, nearest) =
                (preset.scheme(64), nearest_scheme(preset.scheme(64), DType::F16, Device::Cpu));
            let plan = |scheme| Cpu::detect().plan(&call.problem, Some(scheme));
            plan(scheme).unwrap_or_else(|error| panic!("{preset}: {error}"));
            assert_eq!(nearest, scheme, "{preset}: a scheme that has kernels is its own nearest");
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
        for block in [16, 64, 256] {
            let scheme = Scheme { pv: Pv::Fixed12 { block }, ..Preset::INT8.scheme(64) };
            let nearest = nearest_scheme(scheme, DType::F16, Device::Cpu);
            assert_ne!(nearest, scheme);
            let (given, nearest) = (error(&scheme), error(&nearest));
            // Quantising Q·Kᵀ alike leaves the same error there; 2 % is for P·V's errors that happen to cancel some
            // of it.
            assert!(nearest <= given * 1.02, "{scheme}: {nearest} beside {given}");
        }
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn hopper_tiles_get_finer_scales_on_the_gpu_kernels() {
        let scheme =
            nearest_scheme(Preset::SAGE2_INT8_FP8_SM90_PER_THREAD.scheme(128), DType::F16, Device::Cuda(0));
        let sage_core::Qk::Int(quantizer) = scheme.qk else { unreachable!("an integer scheme") };
        assert_eq!((quantizer.tile.warp_q, quantizer.tile.block_k, quantizer.tile.warp_k), (16, 64, 64));
    }

    #[test]
    fn what_a_backend_has_stays() {
        for (preset, device) in [
            (Preset::INT8, Device::Cpu),
            (Preset::FULL, Device::Cpu),
            (Preset::SAGE2_INT8_FP16_PER_THREAD, Device::Cuda(0)),
            (Preset::SAGE1_INT8_FP16, Device::Cuda(0)),
        ] {
            assert_eq!(
                nearest_scheme(preset.scheme(64), DType::F16, device),
                preset.scheme(64),
                "{preset} on {device}"
            );
        }
    }
}
