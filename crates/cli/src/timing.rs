//! Measuring: repetitions of several candidates in turn, and the bandwidth of memory.

use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

/// Times of one candidate's repetitions, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Times {
    pub median_ms: f64,
    pub min_ms: f64,
    pub max_ms: f64,
}

impl Times {
    /// The median, and both ends. At least one duration is needed for figures other than NaN.
    pub fn of(durations: &[Duration]) -> Self {
        let mut ms: Vec<f64> = durations.iter().map(|d| d.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let middle = ms.len() / 2;
        let median_ms = match ms.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => ms[middle],
            _ => (ms[middle - 1] + ms[middle]) / 2.0,
        };
        let at = |x: Option<&f64>| x.copied().unwrap_or(f64::NAN);
        Times { median_ms, min_ms: at(ms.first()), max_ms: at(ms.last()) }
    }
}

/// Takes every candidate's time `reps` times, in turn: whatever slows the machine for a while slows all of them. Each
/// turn begins with another candidate, so that none always follows the same one.
pub fn interleaved<E>(
    candidates: usize,
    reps: usize,
    mut run: impl FnMut(usize) -> Result<Duration, E>,
    mut after: impl FnMut(),
) -> Result<Vec<Times>, E> {
    let mut durations = vec![Vec::with_capacity(reps); candidates];
    for turn in 0..reps {
        for i in 0..candidates {
            let candidate = (turn + i) % candidates;
            durations[candidate].push(run(candidate)?);
            after();
        }
    }
    Ok(durations.iter().map(|durations| Times::of(durations)).collect())
}

/// GB/s (10⁹ bytes) at which all threads together read memory: the best of several passes over a buffer larger than
/// caches.
pub fn read_bandwidth_gbs() -> f64 {
    const BYTES: usize = 512 << 20;
    const PASSES: usize = 5;
    let buffer: Vec<u64> = (0..(BYTES / 8) as u64).into_par_iter().collect();
    let pass = || {
        let start = Instant::now();
        // Several sums at once, or each addition would wait for the one before.
        let sum: u64 = buffer
            .par_chunks(1 << 17)
            .map(|chunk| {
                let mut lanes = [0u64; 16];
                let (groups, _) = chunk.as_chunks::<16>();
                for group in groups {
                    for (lane, x) in lanes.iter_mut().zip(group) {
                        *lane = lane.wrapping_add(*x);
                    }
                }
                lanes.iter().fold(0u64, |a, &b| a.wrapping_add(b))
            })
            .reduce(|| 0, u64::wrapping_add);
        std::hint::black_box(sum);
        BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_the_middle() {
        let ms =
            |list: &[u64]| Times::of(&list.iter().map(|&ms| Duration::from_millis(ms)).collect::<Vec<_>>());
        assert_eq!(ms(&[3, 1, 2]), Times { median_ms: 2.0, min_ms: 1.0, max_ms: 3.0 });
        assert_eq!(ms(&[4, 1]).median_ms, 2.5);
        assert!(ms(&[]).median_ms.is_nan());
    }

    #[test]
    fn candidates_take_turns() {
        let mut order = Vec::new();
        interleaved::<()>(
            2,
            2,
            |i| {
                order.push(i);
                Ok(Duration::ZERO)
            },
            || {},
        )
        .unwrap();
        assert_eq!(order, [0, 1, 1, 0]);
    }
}
