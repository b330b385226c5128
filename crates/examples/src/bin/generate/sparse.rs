//! Perplexity of a long text over predicted blocks.

use std::path::PathBuf;

use sage_core::Preset;
use sage_examples::method::Method;
use sage_examples::sparse::{Setting, SparseAttention};
use sage_examples::{Result, plot, progress, table};
use sage_plot::DensityPlot;
use sageattention_candle::Choice;

use crate::AtHand;
use crate::evaluate::{Contestant, Score, evaluate};

/// What the name of a setting with pooled terms ends with.
const TAIL: &str = " + tail";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of the text.
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Tokens of a window, whose later tokens are predicted from its earlier ones.
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// Predictors with how many blocks they keep: sla:SHARE, sparge:SHARE, sparge-cdf:SHARE, sparge2:SHARE, vsa:BLOCKS,
    /// sol:SIGMAS.
    #[arg(long, value_delimiter = ',', default_value = "sla:0.1,sla:0.25,sla:0.5")]
    blocks: Vec<Setting>,
    /// The first N blocks of keys are kept for every query: a language model's attention sink.
    #[arg(long, default_value_t = 1, value_name = "N")]
    sink: usize,
    /// A scheme for the blocks that are computed.
    #[arg(long, default_value = "full", value_name = "SCHEME")]
    scheme: Preset,
    /// Also where each block left out counts with the means of its keys and values.
    #[arg(long)]
    pooled_tail: bool,
    /// What dense attention computes that all others are compared with: exact, which holds all scores in memory, or a
    /// scheme.
    #[arg(long, default_value = "exact", value_name = "METHOD")]
    reference: Method,
    /// Draws the divergence from the reference against density; dashed with pooled terms.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let tokens = at_hand.tokens(args.text.as_ref(), args.tokens)?;
    let context = args.context.max(2);
    let mut named: Vec<(String, SparseAttention)> = Vec::new();
    for setting in &args.blocks {
        let predictor = setting.predictor.clone().sink_k(0..args.sink);
        let blocks = |tail| SparseAttention::new(predictor.clone(), Choice::Preset(args.scheme), tail);
        named.push((setting.to_string(), blocks(false)));
        if args.pooled_tail {
            named.push((format!("{setting}{TAIL}"), blocks(true)));
        }
    }
    let windows = tokens.len().div_ceil(context);
    let bar = progress::bar(windows * (named.len() + 1), "");
    let mut contestants: Vec<Contestant<'_>> = named
        .iter_mut()
        .map(|(name, attend)| Contestant { name: name.clone(), attend: Box::new(attend) })
        .collect();
    let scores = evaluate(&at_hand.model, &tokens, context, args.reference, &mut contestants, &bar)?;
    drop(contestants);
    bar.finish_and_clear();
    let reference = scores[0].perplexity();
    let row = |name: &str, density: f64, score: &Score| {
        vec![
            name.to_owned(),
            format!("{density:.3}"),
            format!("{:.4}", score.perplexity()),
            format!("{:+.2}%", 100.0 * (score.perplexity() / reference - 1.0)),
            format!("{:.2}%", 100.0 * score.same_best()),
            format!("{:.2e}", score.divergence()),
            format!("{:.1}", score.attention.as_secs_f64()),
        ]
    };
    let mut rows = vec![row(&args.reference.to_string(), 1.0, &scores[0])];
    for ((name, attention), score) in named.iter().zip(&scores[1..]) {
        rows.push(row(name, attention.density(), score));
    }
    println!(
        "{} predictions in windows of {context}; sink: {} blocks of keys; blocks in {}\n",
        scores[0].predictions(),
        args.sink,
        args.scheme.name()
    );
    if let Some(path) = &args.plot {
        let caption = format!("SmolLM2-135M-Instruct, {context} tokens of prose; dashed: with a pooled tail");
        let quantity = format!("KL divergence from {}, nats", args.reference);
        let mut figure =
            DensityPlot::new("What leaving blocks out costs a language model", caption, quantity);
        for ((name, attention), score) in named.iter().zip(&scores[1..]) {
            let (system, amount) = name.split_once(':').unwrap_or((name, ""));
            figure.add(system, amount.ends_with(TAIL), [attention.density(), score.divergence()]);
        }
        plot::write(path, &figure)?;
    }
    table::print(&["blocks", "density", "perplexity", "change", "same top-1", "KL", "attention s"], &rows);
    Ok(())
}
