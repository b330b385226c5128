//! Times on a machine that others may use too: contestants take turns, and medians are compared.

use std::time::Instant;

use crate::Result;

/// Seconds of each contestant in each round.
#[derive(Clone, Debug)]
pub struct Rounds(pub Vec<Vec<f64>>);

impl Rounds {
    /// One unmeasured turn for each, then `rounds` of one turn for each.
    ///
    /// # Errors
    /// What a contestant says.
    pub fn of(rounds: usize, contestants: &mut [Box<dyn FnMut() -> Result<()> + '_>]) -> Result<Self> {
        contestants.iter_mut().try_for_each(|run| run())?;
        let mut seconds = vec![Vec::new(); contestants.len()];
        for _ in 0..rounds.max(1) {
            for (run, seconds) in contestants.iter_mut().zip(&mut seconds) {
                let start = Instant::now();
                run()?;
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(Rounds(seconds))
    }

    /// Median seconds of a contestant.
    pub fn median(&self, contestant: usize) -> f64 {
        median(self.0[contestant].clone())
    }

    /// How many times as fast as contestant `base` another is: the median of the rounds' ratios, the smallest and
    /// the largest.
    pub fn speedup(&self, contestant: usize, base: usize) -> [f64; 3] {
        let ratios: Vec<f64> =
            self.0[base].iter().zip(&self.0[contestant]).map(|(base, own)| base / own).collect();
        let (low, high) = ratios.iter().fold((f64::MAX, 0f64), |(l, h), &r| (l.min(r), h.max(r)));
        [median(ratios), low, high]
    }
}

/// The middle value, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { (values[(n - 1) / 2] + values[n / 2]) / 2.0 }
}
