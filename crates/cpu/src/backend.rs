//! The processor as a backend: calls in this process's memory, computed when they return.

use std::sync::Arc;

use sage_core::{
    Backend, BackendPlan, BlockTables, CacheBackend, CacheSize, Call, Choice, DType, Error, NewTokens,
    Preset, Problem, Result, Scheme, TensorView, TensorViewMut,
};

use crate::{CachePages, Cpu, CpuPlan, kernels, nearest_scheme};

/// Most sequences of a cache.
const MAX_SEQUENCES: usize = 1 << 24;

/// Relative L1 error of the processor's own choice, INT8 per token: the worst measured on N(0, 1) is 0.0098.
const OWN_ERROR: f32 = 0.01;

/// The same of tensors in bfloat16 where the processor multiplies them as they are: 0.0023.
const BF16_ERROR: f32 = 0.004;

impl Backend for Cpu {
    type Tensor<'a> = TensorView<'a>;
    type Output<'a> = TensorViewMut<'a>;
    type Lse<'a> = &'a mut [f32];
    type Queue = ();
    type Plan = CpuPlan;

    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn nearest(&self, scheme: Scheme, _: DType) -> Scheme {
        nearest_scheme(scheme)
    }

    fn plan<'c>(&self, call: &Call<'c>, choice: Choice, _: bool) -> Result<Arc<CpuPlan>> {
        Cpu::plan(self, &call.problem, self.chosen(choice, &call.problem)?)
    }

    fn run<'c>(
        &self,
        (): &(),
        call: &Call<'c>,
        choice: Choice,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let plan = Backend::plan(self, call, choice, lse.is_some())?;
        self.forward(&plan, call, out, lse)
    }
}

impl CacheBackend for Cpu {
    type Cache = CachePages;

    const SHARES_PAGES: bool = true;

    fn cache(&self, (): &(), size: &CacheSize) -> Result<CachePages> {
        if size.sequences > MAX_SEQUENCES {
            return Err(Error::value("sequences", size.sequences, format!("at most {MAX_SEQUENCES}")));
        }
        CachePages::new(size.layout)
    }

    fn cache_bytes(&self, cache: &CachePages) -> usize {
        cache.bytes()
    }

    fn append(
        &self,
        cache: &mut CachePages,
        tables: &BlockTables,
        tokens: &NewTokens<'_, TensorView<'_>>,
    ) -> Result<()> {
        cache.prepare(tables.pages(), tokens.copies)?;
        self.append_cached(cache, tables, tokens.sequences, tokens.k, tokens.v)
    }

    fn attend<'c>(
        &self,
        cache: &CachePages,
        tables: &BlockTables,
        sequences: &[usize],
        call: &Call<'c>,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        self.forward_cached(cache, tables, sequences, call, out, lse)
    }

    fn shorten(&self, _: &mut CachePages, _: &BlockTables) -> Result<()> {
        Ok(())
    }
}

impl BackendPlan for CpuPlan {
    fn scheme(&self) -> &Scheme {
        CpuPlan::scheme(self)
    }

    fn workspace_bytes(&self) -> usize {
        CpuPlan::workspace_bytes(self)
    }
}

impl Cpu {
    /// The scheme of a choice; none where the plan chooses.
    pub(crate) fn chosen(&self, choice: Choice, problem: &Problem) -> Result<Option<Scheme>> {
        let as_they_are = problem.dtype == DType::BF16 && kernels(self.instruction_set()).bf16.is_some();
        let own_error = if as_they_are { BF16_ERROR } else { OWN_ERROR };
        match choice.accuracy() {
            Some(error) if error.is_nan() || error <= 0.0 => {
                Err(Error::value("accuracy", error, "a relative error above 0"))
            }
            Some(error) if error < own_error => Ok(Some(Preset::FULL.scheme(problem.head_dim))),
            _ => Ok(choice.scheme(problem.head_dim)),
        }
    }
}

#[cfg(test)]
mod tests {
    use sage_core::{Call, Inputs, Options, Tensor};

    use super::*;

    #[test]
    fn a_plan_is_made_once() {
        let x = Tensor::new(vec![0.5f32; 2 * 200 * 16], &[1, 2, 200, 16]).unwrap();
        let inputs = Inputs::new(x.view(), x.view(), x.view());
        let call = Call::check(&inputs, &Options::default()).unwrap();
        let cpu = Cpu::detect();
        let plan = |choice| Backend::plan(&cpu, &call, choice, false).unwrap();
        let own = plan(Choice::Automatic);
        assert!(
            Arc::ptr_eq(&own, &plan(Choice::Automatic)),
            "the plan that was printed is the one that runs"
        );
        assert!(Arc::ptr_eq(&own, &cpu.clone().plan(&call.problem, None).unwrap()), "clones share plans");
        let full = plan(Choice::Preset(Preset::FULL));
        assert!(!Arc::ptr_eq(&own, &full));
        let other = cpu.clone().with_instruction_set(crate::InstructionSet::Portable).unwrap();
        assert!(!Arc::ptr_eq(&own, &other.plan(&call.problem, None).unwrap()));
    }
}
