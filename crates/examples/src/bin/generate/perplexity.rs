//! Perplexity of a long text, at one or several context lengths.

use std::path::PathBuf;

use sage_core::Preset;
use sage_examples::method::Method;
use sage_examples::plot::{self, Axis, Panel, Point};
use sage_examples::{Result, progress, table};
use sageattention_candle::Choice;

use crate::AtHand;
use crate::evaluate::{Contestant, evaluate};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of the text.
    #[arg(long, default_value_t = 20_480)]
    tokens: usize,
    /// Tokens of a window, whose later tokens are predicted from its earlier ones; several for a plot.
    #[arg(long, value_delimiter = ',', default_value = "2048")]
    context: Vec<usize>,
    /// exact, sage, candle-flash or a scheme; several for a comparison. Left out, INT8 per token with rotation, or a
    /// GPU's own choice.
    #[arg(long, value_delimiter = ',')]
    method: Vec<Method>,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Draws perplexity and agreement against context length.
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
    /// Largest change of perplexity, in percent, or the program fails.
    #[arg(long, value_name = "PERCENT")]
    max_change: Option<f64>,
    /// Smallest part of equal most likely tokens, in percent, or the program fails.
    #[arg(long, value_name = "PERCENT")]
    min_agreement: Option<f64>,
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let tokens = at_hand.tokens(args.text.as_ref(), args.tokens)?;
    let methods = at_hand.methods(&args.method);
    let windows: usize = args.context.iter().map(|&context| tokens.len().div_ceil(context.max(2))).sum();
    let bar = progress::bar(windows * (methods.len() + 1), "");
    let names: Vec<String> =
        std::iter::once(Method::Exact).chain(methods.iter().copied()).map(|m| m.to_string()).collect();
    let mut perplexities: Vec<_> = names.iter().map(|name| (name.clone(), Vec::new())).collect();
    let mut agreements = perplexities.clone();
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for &context in &args.context {
        let mut contestants: Vec<Contestant<'_>> = methods.iter().map(|&method| method.into()).collect();
        let scores =
            evaluate(&at_hand.model, &tokens, context.max(2), Method::Exact, &mut contestants, &bar)?;
        let exact = scores[0].perplexity();
        for (at, (name, score)) in names.iter().zip(&scores).enumerate() {
            let change = 100.0 * (score.perplexity() / exact - 1.0);
            let agreement = 100.0 * score.same_best();
            rows.push(vec![
                name.clone(),
                context.to_string(),
                score.predictions().to_string(),
                format!("{:.4}", score.perplexity()),
                format!("{change:+.3}%"),
                format!("{agreement:.2}%"),
                format!("{:.2e}", score.divergence()),
                format!("{:.1}", score.attention.as_secs_f64()),
            ]);
            perplexities[at].1.push(Point { context, value: score.perplexity(), range: None });
            agreements[at].1.push(Point { context, value: agreement, range: None });
            if args.max_change.is_some_and(|limit| change.abs() > limit) {
                failures.push(format!("{name} at {context}: perplexity changes by {change:+.3}%"));
            }
            if args.min_agreement.is_some_and(|limit| agreement < limit) {
                failures.push(format!("{name} at {context}: {agreement:.2}% of the tokens agree"));
            }
        }
    }
    bar.finish_and_clear();
    table::print(
        &["attention", "context", "predictions", "perplexity", "change", "same top-1", "KL", "attention s"],
        &rows,
    );
    let on_cpu = at_hand.model.place().0.is_cpu();
    if on_cpu && methods.contains(&Method::Sage(Choice::Automatic)) {
        let name = Preset::INT8_PER_TOKEN.name();
        println!("\nsage quantises as {name} does, from 128 queries on; with AMX from 128 keys on.");
    }
    if let Some(path) = &args.plot {
        let panel = |title: &str, series, axis| Panel { title: title.into(), axis, series };
        let caption = format!(
            "SmolLM2-135M-Instruct, {} tokens of prose in windows, each computed whole",
            tokens.len()
        );
        let panels = [
            panel("Perplexity", perplexities, Axis::Near),
            panel("Most likely tokens that are the same, %", agreements, Axis::Near),
        ];
        plot::lines(path, "Quality against context length", &caption, &panels)?;
        println!("Drawn in {}.", path.display());
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ").into()) }
}
