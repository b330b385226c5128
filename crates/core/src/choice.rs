//! Which scheme a caller wants.

use crate::{Preset, Scheme};

/// Which scheme computes attention.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Choice {
    /// The fastest that is accurate on the backend at hand.
    #[default]
    Automatic,
    /// The fastest whose relative L1 error, Σ|O − O′| / Σ|O| against exact attention of N(0, 1) data, is at most
    /// this. The measured errors are 0.002 of bf16 tensors in full precision, 0.014 of INT8 scores, and 0.04 with FP8
    /// P·V besides.
    Within(f32),
    /// A scheme with a name: our own, or what a function of the original SageAttention stands for.
    Preset(Preset),
    /// This one.
    Scheme(Scheme),
}

impl Choice {
    /// The scheme that was chosen for heads of `head_dim` channels, or `None` where the backend chooses.
    pub fn scheme(&self, head_dim: usize) -> Option<Scheme> {
        match self {
            Choice::Automatic | Choice::Within(_) => None,
            Choice::Preset(preset) => Some(preset.scheme(head_dim)),
            Choice::Scheme(scheme) => Some(*scheme),
        }
    }

    /// The largest error allowed, where one was named.
    pub fn accuracy(&self) -> Option<f32> {
        match self {
            Choice::Within(error) => Some(*error),
            _ => None,
        }
    }
}

impl From<Scheme> for Choice {
    fn from(scheme: Scheme) -> Self {
        Choice::Scheme(scheme)
    }
}

impl From<Preset> for Choice {
    fn from(preset: Preset) -> Self {
        Choice::Preset(preset)
    }
}
