//! The GPU's time for work on a stream.

use std::time::Duration;

use sage_core::sparse::Predictor;
use sage_core::{Choice, Result};
use sage_cuda::{Event, Kernel, Stream};
use sage_kernels::pass::Pass;

use crate::backend::{Forced, Prepared};
use crate::launches::{self, Launch};
use crate::{Cuda, DeviceCall, DeviceTensor, driver};

impl Cuda {
    /// The GPU's time for the work that `run` puts on `stream`; waits for it.
    ///
    /// # Errors
    /// What `run` or the driver says.
    pub fn time(&self, stream: &Stream, run: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let [start, end] = [self.event()?, self.event()?];
        stream.record(&start).map_err(driver)?;
        run()?;
        stream.record(&end).map_err(driver)?;
        between(&start, &end)
    }

    /// Median times of a call's kernels, in the order of the call, its runs one after the other: for
    /// benchmarks.
    ///
    /// # Errors
    /// As [`sage_core::Backend::run`].
    pub fn time_kernels(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        choice: Choice,
        out: DeviceTensor<'_>,
        runs: usize,
    ) -> Result<Vec<(String, Duration)>> {
        match self.prepare(stream, call, choice, (out, None), Forced::default())? {
            Some(prepared) => self.time_prepared(stream, &prepared, runs),
            None => Ok(Vec::new()),
        }
    }

    /// Median times of the kernels that predict a call's block map, as [`Cuda::time_kernels`].
    ///
    /// # Errors
    /// As [`sage_core::SparseBackend::predict`].
    pub fn time_prediction(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        predictor: &Predictor,
        runs: usize,
    ) -> Result<Vec<(String, Duration)>> {
        let prepared = self.prepare_prediction(stream, call, predictor)?;
        let kernels = prepared.plan.kernels(self)?;
        self.time_pass(stream, &prepared.plan.pass, kernels, &prepared.tensors, runs)
    }

    pub(crate) fn time_prepared(
        &self,
        stream: &Stream,
        prepared: &Prepared,
        runs: usize,
    ) -> Result<Vec<(String, Duration)>> {
        let kernels = prepared.plan.kernels(self)?;
        self.time_pass(stream, prepared.plan.pass(), kernels, &prepared.tensors, runs)
    }

    fn time_pass<T>(
        &self,
        stream: &Stream,
        pass: &Pass<T>,
        kernels: &[Kernel],
        tensors: &T,
        runs: usize,
    ) -> Result<Vec<(String, Duration)>> {
        // All runs are queued before the first is waited for: a launch must not wait for the host between its events.
        let mut marks = Vec::new();
        for _ in 0..runs.max(1) {
            let timed = |(index, kernel, grid, args): Launch<'_>| {
                let [start, end] = [self.event()?, self.event()?];
                stream.record(&start).map_err(driver)?;
                // SAFETY: see `launches::OnStream`.
                unsafe { kernel.launch(stream, grid, args) }.map_err(driver)?;
                stream.record(&end).map_err(driver)?;
                marks.push((index, start, end));
                Ok(())
            };
            launches::run(pass, kernels, tensors, stream, timed)?;
        }
        let mut times = vec![Vec::new(); kernels.len()];
        for (index, start, end) in marks {
            times[index].push(between(&start, &end)?);
        }
        let median = |mut times: Vec<Duration>| {
            times.sort();
            times[times.len() / 2]
        };
        Ok(kernels
            .iter()
            .zip(times)
            .map(|(kernel, times)| (kernel.name().to_owned(), median(times)))
            .collect())
    }

    fn event(&self) -> Result<Event> {
        Event::new(self.device(), true).map_err(driver)
    }
}

/// The GPU's time from one event to another; waits for the latter.
fn between(start: &Event, end: &Event) -> Result<Duration> {
    end.synchronize().map_err(driver)?;
    let ms = start.elapsed_ms(end).map_err(driver)?;
    Ok(Duration::from_secs_f64(f64::from(ms) / 1e3))
}
