//! How well a model predicts a text under one method of attention, compared with exact attention.

use std::time::Duration;

use candle_core::Tensor;
use indicatif::ProgressBar;
use rayon::prelude::*;
use sage_examples::Result;
use sage_examples::attend::{Attend, Timed};
use sage_examples::llama::Llama;
use sage_examples::method::{Method, Stateless};

/// Rows of logits at once: the vocabulary is large.
const ROWS: usize = 256;

/// Sums over the predictions of a text.
#[derive(Clone, Debug, Default)]
pub struct Score {
    nll: f64,
    predictions: usize,
    same_best: usize,
    divergence: f64,
    /// Time spent in attention.
    pub attention: Duration,
}

impl Score {
    /// exp of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.predictions as f64).exp()
    }

    /// Part of the predictions whose most likely token is the reference's.
    pub fn same_best(&self) -> f64 {
        self.same_best as f64 / self.predictions as f64
    }

    /// Mean Kullback-Leibler divergence from the reference's predictions, in nats.
    pub fn divergence(&self) -> f64 {
        self.divergence / self.predictions as f64
    }

    /// Tokens that were predicted.
    pub fn predictions(&self) -> usize {
        self.predictions
    }
}

/// A way to compute attention of whole sequences, under a name.
pub struct Contestant<'a> {
    /// What progress calls it.
    pub name: String,
    /// What computes.
    pub attend: Box<dyn Attend + 'a>,
}

impl From<Method> for Contestant<'_> {
    fn from(method: Method) -> Self {
        Contestant { name: method.to_string(), attend: Box::new(Stateless(method)) }
    }
}

/// Scores of the reference, first, and of each contestant, over windows of `context` tokens.
pub fn evaluate(
    model: &Llama,
    tokens: &[u32],
    context: usize,
    reference: Method,
    contestants: &mut [Contestant<'_>],
    bar: &ProgressBar,
) -> Result<Vec<Score>> {
    let mut reference = Contestant::from(reference);
    let mut scores = vec![Score::default(); contestants.len() + 1];
    for window in tokens.chunks(context).filter(|window| window.len() > 1) {
        let inputs = &window[..window.len() - 1];
        let mut hidden = Vec::new();
        let all = std::iter::once(&mut reference).chain(&mut *contestants);
        for (Contestant { name, attend }, score) in all.zip(&mut scores) {
            bar.set_message(name.clone());
            let mut attend = Timed::new(&mut **attend);
            hidden.push(model.forward(inputs, 0, &mut attend)?);
            score.attention += attend.spent;
            bar.inc(1);
        }
        for start in (0..inputs.len()).step_by(ROWS) {
            let rows = ROWS.min(inputs.len() - start);
            let targets = &window[start + 1..=start + rows];
            let logits = |hidden: &Tensor| -> Result<Vec<Vec<f32>>> {
                Ok(model.logits(&hidden.narrow(0, start, rows)?)?.to_vec2()?)
            };
            let reference = logits(&hidden[0])?;
            add(&mut scores[0], &reference, &reference, targets);
            for (hidden, score) in hidden[1..].iter().zip(&mut scores[1..]) {
                add(score, &logits(hidden)?, &reference, targets);
            }
        }
    }
    Ok(scores)
}

fn add(score: &mut Score, logits: &[Vec<f32>], reference: &[Vec<f32>], targets: &[u32]) {
    let rows = logits.par_iter().zip(reference).zip(targets).map(|((logits, reference), &target)| {
        let (own, of_reference) = (Row::of(logits), Row::of(reference));
        let divergence: f64 = logits
            .iter()
            .zip(reference)
            .map(|(&x, &e)| {
                let log_p = f64::from(e) - of_reference.lse;
                log_p.exp() * (log_p - (f64::from(x) - own.lse))
            })
            .sum();
        (own.lse - f64::from(logits[target as usize]), own.best == of_reference.best, divergence)
    });
    for (nll, same, divergence) in rows.collect::<Vec<_>>() {
        score.nll += nll;
        score.predictions += 1;
        score.same_best += usize::from(same);
        score.divergence += divergence;
    }
}

/// Logarithm of the sum of exponentials of a row, and where its largest value is.
struct Row {
    lse: f64,
    best: usize,
}

impl Row {
    fn of(logits: &[f32]) -> Self {
        let mut best = 0;
        for (i, &x) in logits.iter().enumerate() {
            if x > logits[best] {
                best = i;
            }
        }
        let max = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|&x| f64::from((x - logits[best]).exp())).sum();
        Row { lse: max + sum.ln(), best }
    }
}
