//! Which schemes each architecture prefers where the caller leaves it open: a table with its reasons.

use std::ops::RangeInclusive;

use sage_core::{DType, Preset, Problem, Qk, Scheme, SmoothK, Smoothing};
use sage_ptx::Target;

use super::choice::int8_scheme;
use super::fallback::nearest_scheme;
use crate::machine::Machine;
use crate::preprocess::MOST_CHANNELS;

/// Relative L1 errors on N(0, 1) at 4096 keys, head_dim 128. The first three are a little above what was measured on an
/// H100 (docs/performance/hopper.md#accuracy-on-the-gpu), the others a little above the oracle's
/// (docs/performance/gpus.md).
pub(super) const FULL_ERROR: f32 = 0.0025;
pub(super) const INT8_ERROR: f32 = 0.0135;
pub(super) const FP8_ERROR: f32 = 0.039;
pub(super) const FP4_SCORES_ERROR: f32 = 0.16;
pub(super) const FP4_ERROR: f32 = 0.2;

/// A scheme that an architecture prefers.
#[derive(Clone, Copy, Debug)]
pub struct Preference {
    own: Own,
    /// Its relative L1 error on N(0, 1).
    pub error: f32,
    /// Why it is preferred to those before it, or why there is none after it.
    pub reason: &'static str,
}

/// A scheme, up to the inputs' element type.
#[derive(Clone, Copy, Debug)]
enum Own {
    /// 16-bit scores and P·V.
    Full,
    /// INT8 scores, 16-bit P·V.
    Int8,
    Preset(Preset),
}

impl Preference {
    /// The scheme for tensors of type `dtype` with heads of `head_dim` channels.
    pub fn scheme(&self, dtype: DType, head_dim: usize) -> Scheme {
        let int8 = int8_scheme(dtype);
        match self.own {
            Own::Full => {
                Scheme { qk: Qk::Full, smooth: Smoothing { k: SmoothK::Off, ..int8.smooth }, ..int8 }
            }
            Own::Int8 => int8,
            Own::Preset(preset) => preset.scheme(head_dim),
        }
    }

    /// The scheme for a problem, or none where a GPU has no kernels for it.
    pub fn on(&self, machine: &Machine, problem: &Problem) -> Option<Scheme> {
        let scheme = self.scheme(machine.product_dtype(problem.dtype), problem.head_dim);
        // Larger heads are multiplied as given, or with INT8 scores and values as given.
        let as_given = matches!(self.own, Own::Full)
            || matches!(self.own, Own::Int8) && problem.head_dim <= MOST_CHANNELS;
        if problem.head_dim.max(problem.value_dim) > MOST_CHANNELS && !as_given {
            return None;
        }
        (nearest_scheme(scheme, problem.dtype, machine.target) == scheme).then_some(scheme)
    }
}

/// The schemes that an architecture prefers.
#[derive(Clone, Copy, Debug)]
pub struct Preferences {
    /// Without quantisation.
    pub full: Preference,
    /// The others, the most accurate first and the fastest last.
    pub quantised: &'static [Preference],
}

impl Preferences {
    /// Those of a target's architecture.
    pub fn of(target: Target) -> Self {
        let found = TABLE.iter().find(|(capabilities, _)| capabilities.contains(&target.sm()));
        found.map_or(Preferences { full: FULL, quantised: &[] }, |(_, preferences)| *preferences)
    }

    /// All of them, full precision first.
    pub fn all(&self) -> impl Iterator<Item = &Preference> {
        std::iter::once(&self.full).chain(self.quantised)
    }
}

const FULL: Preference = Preference {
    own: Own::Full,
    error: FULL_ERROR,
    reason: "for an accuracy that integers do not have, and where keys are few",
};

const fn int8(reason: &'static str) -> Preference {
    Preference { own: Own::Int8, error: INT8_ERROR, reason }
}

const fn preset(preset: Preset, error: f32, reason: &'static str) -> Preference {
    Preference { own: Own::Preset(preset), error, reason }
}

const INT8_FP8: Preference =
    preset(Preset::INT8_FP8, FP8_ERROR, "FP8 has twice the rate of 16 bits, and sums in f32 for free");

/// Full precision, and other schemes.
const fn with(quantised: &'static [Preference]) -> Preferences {
    Preferences { full: FULL, quantised }
}

/// Rows by compute capability times ten. Reasons name rates of [`crate::Rates`].
const TABLE: &[(RangeInclusive<u16>, Preferences)] = &[
    (75..=79, with(&[int8("INT8 has twice the rate of f16; tensor cores take no FP8 and no bf16")])),
    (80..=80, with(&[int8("INT8 has twice the rate of 16 bits, f32 sums are free, and there is no FP8")])),
    (
        81..=88,
        with(&[int8(
            "INT8 has four times the rate of 16 bits with f32 sums, and there is no FP8; f16 sums would double \
                 P·V's rate, but overflow where V is large: by name, `sage2-int8-fp16-f16f32-per-thread`",
        )]),
    ),
    (
        89..=89,
        with(&[
            int8(
                "INT8 has four times the rate of 16 bits with f32 sums on GeForce, and twice on other Ada GPUs",
            ),
            preset(
                Preset::SAGE2PP_INT8_FP8_PER_THREAD,
                FP8_ERROR,
                "FP8 summed in f16 has four times the rate of 16 bits with f32 sums on GeForce, twice that of FP8 with \
                 f32 sums (SageAttention2++)",
            ),
        ]),
    ),
    (90..=99, with(&[int8("V needs no pass of its own, and sums are exact"), INT8_FP8])),
    (
        100..=102,
        with(&[
            int8("INT8 has twice the rate of 16 bits by mma.sync as well, with which kernels here multiply"),
            INT8_FP8,
        ]),
    ),
    (
        103..=109,
        Preferences {
            full: Preference {
                reason: "INT8 has a fifteenth of 16 bits' rate on B300 (0.15 of 2.25 PFLOPS)",
                ..FULL
            },
            quantised: &[],
        },
    ),
    (110..=119, with(&[int8("INT8 has twice the rate of 16 bits"), INT8_FP8])),
    (
        120..=129,
        with(&[
            int8("INT8 has four times the rate of 16 bits with f32 sums on GeForce"),
            preset(
                Preset::SAGE2PP_INT8_FP8_PER_THREAD,
                FP8_ERROR,
                "FP8 summed in f16 has four times the rate of 16 bits with f32 sums on GeForce",
            ),
            preset(
                Preset::NVFP4_FP8,
                FP4_SCORES_ERROR,
                "FP4 has twice INT8's rate, and FP8 P·V keeps what FP4 probabilities would lose",
            ),
            preset(Preset::SAGE3_NVFP4, FP4_ERROR, "FP4 has twice the rate of FP8 for P·V as well"),
        ]),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_has_preferences_in_the_order_of_their_errors() {
        for target in Target::ALL.into_iter().chain([75, 103, 110, 121].map(sm_target)) {
            let preferences = Preferences::of(target);
            assert!(preferences.all().is_sorted_by(|a, b| a.error < b.error), "{target}");
            assert_eq!(preferences.full.scheme(DType::BF16, 128).qk, Qk::Full, "{target}");
        }
        let covered = TABLE.iter().flat_map(|(capabilities, _)| capabilities.clone());
        assert!(covered.eq(75..=129), "no capability is left out, and none twice");
    }

    fn sm_target(sm: u16) -> Target {
        Target::of_capability(sm / 10, sm % 10)
    }
}
