//! Median times of calls, warmed up.

use std::time::Duration;

use sageattention::cuda::{Cuda, Stream};

use crate::Result;

/// A contestant is run so often at least before times are taken, and for [`Budget::warm_up`].
const WARM_UP_RUNS: usize = 3;
/// Calls between two events last this long together, so that launching the first does not count.
const GROUP: Duration = Duration::from_millis(1);
/// So many groups are timed at least and at most.
const GROUPS: std::ops::RangeInclusive<usize> = 7..=50;

/// How much time a contestant gets. `scripts/bench_gpu.py` does as [`Budget::CONTEST`].
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Before times are taken: a GPU that waited has lowered its clock.
    warm_up: Duration,
    /// While they are taken.
    timed: Duration,
}

impl Budget {
    /// Beside other programs.
    pub const CONTEST: Budget =
        Budget { warm_up: Duration::from_millis(60), timed: Duration::from_millis(80) };
    /// One of many in a row.
    pub const ONE_OF_MANY: Budget =
        Budget { warm_up: Duration::from_millis(4), timed: Duration::from_millis(20) };
}

/// How calls come to the GPU while they are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launching {
    /// One after the other from the host, which short calls wait for.
    Queued,
    /// All of a group in a CUDA graph: what the GPU needs.
    Graphs,
}

/// Sorted times of a call, warmed up.
pub fn times(
    gpu: &Cuda,
    stream: &Stream,
    (launching, budget): (Launching, Budget),
    call: impl Fn() -> sageattention::Result<()>,
) -> Result<Vec<Duration>> {
    let queued = |count: usize| gpu.time(stream, || (0..count).try_for_each(|_| call()));
    let (mut runs, mut spent) = (0, Duration::ZERO);
    while runs < WARM_UP_RUNS || spent < budget.warm_up {
        spent += queued(1)?;
        runs += 1;
    }
    let group = (GROUP.as_secs_f64() * runs as f64 / spent.as_secs_f64()).ceil() as usize;
    match launching {
        Launching::Queued => of_groups(group, budget, || Ok(queued(group)?)),
        Launching::Graphs => {
            stream.begin_capture()?;
            let captured = (0..group).try_for_each(|_| call());
            let graph = stream.end_capture()?;
            captured?;
            let graph = graph.instantiate()?;
            let launch = || {
                // SAFETY: the tensors of the caller outlive this function, which waits for each launch.
                let launched = unsafe { graph.launch(stream) };
                launched.map_err(|error| sageattention::Error::backend(error.to_string()))
            };
            of_groups(group, budget, || Ok(gpu.time(stream, launch)?))
        }
    }
}

/// Times of a call from those of groups of so many.
fn of_groups(calls: usize, budget: Budget, group: impl Fn() -> Result<Duration>) -> Result<Vec<Duration>> {
    let (mut times, mut spent) = (Vec::new(), Duration::ZERO);
    while times.len() < *GROUPS.start() || times.len() < *GROUPS.end() && spent < budget.timed {
        let time = group()?;
        times.push(time.div_f64(calls as f64));
        spent += time;
    }
    times.sort();
    Ok(times)
}
