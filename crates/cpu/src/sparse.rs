//! Attention over blocks that are predicted.

use std::sync::Arc;

use rayon::prelude::*;
use sage_core::sparse::{BlockMap, Predictor};
use sage_core::{Call, Choice, Result, SparseBackend, TensorViewMut};

use crate::{Cpu, CpuPlan, threads};

impl SparseBackend for Cpu {
    type Map = BlockMap;

    fn plan_sparse<'c>(
        &self,
        call: &Call<'c>,
        predictor: &Predictor,
        choice: Choice,
        _: bool,
    ) -> Result<Arc<CpuPlan>> {
        let problem = call.problem.blocks([predictor.block_q, predictor.block_k]);
        Cpu::plan(self, &problem, self.chosen(choice, &problem)?)
    }

    fn predict<'c>(&self, (): &(), call: &Call<'c>, predictor: &Predictor) -> Result<BlockMap> {
        let mut flags = predictor.cleared_flags(&call.problem)?;
        let groups: Vec<_> = predictor.groups(call, &mut flags).collect();
        threads::run(|| {
            groups.into_par_iter().for_each(|(group, flags)| predictor.predict_group(call, group, flags));
        })?;
        predictor.map_of_flags(&call.problem, flags)
    }

    fn run_sparse<'c>(
        &self,
        (): &(),
        call: &Call<'c>,
        predictor: &Predictor,
        choice: Choice,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<BlockMap> {
        call.check_output(out.dtype(), out.geometry())?;
        call.check_lse(lse.as_deref())?;
        let plan = self.plan_sparse(call, predictor, choice, lse.is_some())?;
        let map = self.predict(&(), call, predictor)?;
        self.forward(&plan, &call.over(&map)?, out, lse)?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use sage_core::sparse::Select;
    use sage_core::{Alignment, Backend, Band, DType, Inputs, Lengths, Options, Tensor};

    use super::*;

    /// Queries and keys of which some are near each other.
    fn local(shape: &[usize], seed: u64) -> Tensor {
        let noise = sage_testkit::normal(seed, shape.iter().product());
        let tokens = shape[2] * shape[3];
        let wave = |at: usize| (at % tokens / shape[3]) as f32 * 0.1 / (1 + at % shape[3]) as f32;
        let elements: Vec<f32> = noise.iter().enumerate().map(|(at, x)| wave(at).sin() + 0.2 * x).collect();
        Tensor::new(elements, shape).unwrap().to_dtype(DType::F16)
    }

    fn inputs([q, k, v]: &[Tensor; 3]) -> Inputs<'_> {
        Inputs::new(q.view(), k.view(), v.view())
    }

    #[test]
    fn threads_predict_the_map_of_one_thread_and_attention_is_over_it() {
        let tensors = [local(&[2, 4, 300, 32], 1), local(&[2, 2, 333, 32], 2), local(&[2, 2, 333, 32], 3)];
        let [q, k, _] = &tensors;
        let cpu = Cpu::detect();
        let predictor = Predictor::sparge_attn(Select::Cdf(0.9.into()), 0.1).blocks(32, 64);
        for lengths in [Lengths::Dense, Lengths::KvLens(&[333, 100])] {
            for band in [Band::FULL, Band::causal(Alignment::TopLeft)] {
                let options = Options::default().band(band);
                let call =
                    Call::check_sparse(&inputs(&tensors).lengths(lengths), &options, &predictor).unwrap();
                let (mut out, mut lse) = (q.clone(), vec![0.0; call.lse_rows()]);
                let choice = Choice::Automatic;
                let map =
                    cpu.run_sparse(&(), &call, &predictor, choice, out.view_mut(), Some(&mut lse)).unwrap();
                assert_eq!(map, predictor.map(&call).unwrap());
                assert!(map.kept() < map.flags().len(), "a full map tells nothing");

                // Of dense tensors the call has lost the blocks of keys that nothing sees; this map has them.
                let whole = predictor.predict(q.view(), k.view(), &options).unwrap();
                let mask = if lengths == Lengths::Dense { whole.mask() } else { map.mask() };
                let given =
                    Call::check(&inputs(&tensors).lengths(lengths).block_mask(mask), &options).unwrap();
                let (mut expected, mut expected_lse) = (q.clone(), vec![0.0; lse.len()]);
                Backend::run(&cpu, &(), &given, choice, expected.view_mut(), Some(&mut expected_lse))
                    .unwrap();
                assert_eq!((out, lse), (expected, expected_lse));
            }
        }
    }
}
