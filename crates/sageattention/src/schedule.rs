//! Schemes that change from step to step of a diffusion process.

use sage_core::{Choice, Error, Preset, Result};

/// One scheme for the first and last steps of a diffusion process, a faster one for those between.
///
/// The first steps decide what an image shows and the last ones its details; those between bear more error, which is why
/// SageAttention3's authors advise FP4 for them alone. After the last step a new process begins, so that one schedule
/// serves any number of them.
///
/// ```
/// use sageattention::{Attention, HybridSchedule, Preset, Tensor};
///
/// let x = Tensor::new(vec![0.5f32; 2 * 64 * 64], &[1, 2, 64, 64])?;
/// let mut schedule = HybridSchedule::new(20, 3, 2)?.inner(Preset::INT8);
/// for _step in 0..20 {
///     let out = Attention::new().scheme(schedule.choice()).forward(&x, &x, &x)?;
///     // … what the model and the solver make of it …
///     schedule.step();
/// }
/// # Ok::<(), sageattention::Error>(())
/// ```
///
/// Source: SageAttention3, <https://arxiv.org/abs/2505.11594>, and its repository's advice on timesteps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HybridSchedule {
    steps: usize,
    first: usize,
    last: usize,
    outer: Choice,
    inner: Choice,
    at: usize,
}

impl HybridSchedule {
    /// `first` steps at the start and `last` at the end of a process of `steps` with the outer scheme, which is the
    /// backend's own choice, in 8 and 16 bits; the others with the inner one, which is [`Preset::SAGE3_NVFP4`].
    ///
    /// # Errors
    /// Without steps, or with fewer than `first + last`.
    pub fn new(steps: usize, first: usize, last: usize) -> Result<Self> {
        if steps == 0 {
            return Err(Error::value("steps", steps, "at least 1"));
        }
        if first.checked_add(last).is_none_or(|outside| outside > steps) {
            let found = format!("{first} + {last}");
            return Err(Error::value("first + last", found, format!("at most {steps}, the steps")));
        }
        let (outer, inner) = (Choice::Automatic, Choice::Preset(Preset::SAGE3_NVFP4));
        Ok(HybridSchedule { steps, first, last, outer, inner, at: 0 })
    }

    /// The scheme of the first and last steps.
    #[must_use]
    pub fn outer(self, choice: impl Into<Choice>) -> Self {
        HybridSchedule { outer: choice.into(), ..self }
    }

    /// The scheme of the steps between. Where the backend has no FP4, [`Attention::nearest`](crate::Attention::nearest)
    /// computes the nearest that it has.
    #[must_use]
    pub fn inner(self, choice: impl Into<Choice>) -> Self {
        HybridSchedule { inner: choice.into(), ..self }
    }

    /// The scheme of the step at hand, for [`Attention::scheme`](crate::Attention::scheme).
    pub fn choice(&self) -> Choice {
        self.choice_of(self.at)
    }

    /// The scheme of a step, counted from 0; that of the last one beyond it.
    pub fn choice_of(&self, step: usize) -> Choice {
        if (self.first..self.steps - self.last).contains(&step) { self.inner } else { self.outer }
    }

    /// The step at hand, counted from 0.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Ends a step; the first of a new process follows the last.
    pub fn step(&mut self) {
        self.at = (self.at + 1) % self.steps;
    }

    /// Begins a new process.
    pub fn reset(&mut self) {
        self.at = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_have_their_schemes() {
        let [outer, inner] = [Preset::INT8, Preset::SAGE3_NVFP4].map(Choice::Preset);
        let mut schedule = HybridSchedule::new(5, 2, 1).unwrap().outer(Preset::INT8);
        let process = [outer, outer, inner, inner, outer];
        for choice in process.into_iter().chain(process) {
            assert_eq!(schedule.choice(), choice, "step {}", schedule.at());
            schedule.step();
        }
        schedule.step();
        schedule.reset();
        assert_eq!(schedule.at(), 0);
        assert_eq!([4, 5, 99].map(|step| schedule.choice_of(step)), [outer; 3]);
        let all_inner = HybridSchedule::new(1, 0, 0).unwrap();
        assert_eq!(all_inner.choice(), inner);
    }

    #[test]
    fn wrong_schedules_are_refused() {
        let refused = |steps, first, last| HybridSchedule::new(steps, first, last).unwrap_err().to_string();
        assert_eq!(refused(0, 0, 0), "steps: value is 0, expected at least 1");
        assert_eq!(refused(4, 3, 2), "first + last: value is 3 + 2, expected at most 4, the steps");
        assert!(refused(4, usize::MAX, 2).starts_with("first + last"));
    }
}
