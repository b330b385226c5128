//! Median times of calls, warmed up.

use std::time::Duration;

use sageattention::cuda::{Cuda, Stream};

use crate::Result;

/// Calls between two events last this long together, so that launching the first does not count.
const GROUP: Duration = Duration::from_millis(1);
/// So many groups are timed at least and at most, and for [`TIMED`] where they are long.
const GROUPS: std::ops::RangeInclusive<usize> = 7..=50;
const TIMED: Duration = Duration::from_millis(80);

/// How calls come to the GPU while they are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launching {
    /// One after the other from the host, which short calls wait for.
    Queued,
    /// All of a group in a CUDA graph: what the GPU needs.
    Graphs,
}

/// Sorted times of a call that follows itself for `warm_up`: a GPU that waited has lowered its clock, and one that
/// was busy for less than a tenth of a second has not yet come down to the clock at which it stays within its power.
/// `scripts/bench_gpu.py` does as this.
pub fn times(
    gpu: &Cuda,
    stream: &Stream,
    (launching, warm_up): (Launching, Duration),
    call: impl Fn() -> sageattention::Result<()>,
) -> Result<Vec<Duration>> {
    let queued = |count: usize| gpu.time(stream, || (0..count).try_for_each(|_| call()));
    // The first call compiles kernels.
    call()?;
    let of_one = queued(1)?;
    let few = calls_of_a_group(of_one);
    let group = calls_of_a_group(queued(few)?.div_f64(few as f64));
    match launching {
        Launching::Queued => of_groups(group, warm_up, || Ok(queued(group)?)),
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
            of_groups(group, warm_up, || Ok(gpu.time(stream, launch)?))
        }
    }
}

fn calls_of_a_group(call: Duration) -> usize {
    (GROUP.as_secs_f64() / call.as_secs_f64()).ceil() as usize
}

/// Times of a call from those of groups of so many.
fn of_groups(calls: usize, warm_up: Duration, group: impl Fn() -> Result<Duration>) -> Result<Vec<Duration>> {
    let mut spent = Duration::ZERO;
    while spent < warm_up {
        spent += group()?;
    }
    let (mut times, mut spent) = (Vec::new(), Duration::ZERO);
    while times.len() < *GROUPS.start() || times.len() < *GROUPS.end() && spent < TIMED {
        let time = group()?;
        times.push(time.div_f64(calls as f64));
        spent += time;
    }
    times.sort();
    Ok(times)
}
