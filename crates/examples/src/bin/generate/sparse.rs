//! Perplexity of a long text over predicted blocks.

use std::path::PathBuf;

use sage_core::Preset;
use sage_examples::sparse::{LeftOut, Setting, SparseAttention};
use sage_examples::{Result, progress, table};
use sageattention_candle::Choice;

use crate::AtHand;
use crate::evaluate::{Contestant, Score, evaluate};

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
    /// Also where each block left out counts with its mean, by definition in double precision: slow.
    #[arg(long)]
    pooled_tail: bool,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let tokens = at_hand.tokens(args.text.as_ref(), args.tokens)?;
    let context = args.context.max(2);
    let mut left_out = vec![("", LeftOut::Nothing(Choice::Preset(args.scheme)))];
    if args.pooled_tail {
        left_out.push((" + tail", LeftOut::PooledTail));
    }
    let mut named: Vec<(String, SparseAttention)> = Vec::new();
    for setting in &args.blocks {
        for &(suffix, left_out) in &left_out {
            let predictor = setting.predictor.clone().sink_k(0..args.sink);
            named.push((format!("{setting}{suffix}"), SparseAttention::new(predictor, left_out)));
        }
    }
    let windows = tokens.len().div_ceil(context);
    let bar = progress::bar(windows * (named.len() + 1), "");
    let mut contestants: Vec<Contestant<'_>> = named
        .iter_mut()
        .map(|(name, attend)| Contestant { name: name.clone(), attend: Box::new(attend) })
        .collect();
    let scores = evaluate(&at_hand.model, &tokens, context, &mut contestants, &bar)?;
    drop(contestants);
    bar.finish_and_clear();
    let exact = scores[0].perplexity();
    let row = |name: &str, density: f64, score: &Score| {
        vec![
            name.to_owned(),
            format!("{density:.3}"),
            format!("{:.4}", score.perplexity()),
            format!("{:+.2}%", 100.0 * (score.perplexity() / exact - 1.0)),
            format!("{:.2}%", 100.0 * score.same_best()),
            format!("{:.2e}", score.divergence()),
            format!("{:.1}", score.attention.as_secs_f64()),
        ]
    };
    let mut rows = vec![row("exact", 1.0, &scores[0])];
    for ((name, attention), score) in named.iter().zip(&scores[1..]) {
        rows.push(row(name, attention.density(), score));
    }
    println!(
        "{} predictions in windows of {context}; sink: {} blocks of keys; blocks in {}\n",
        scores[0].predictions(),
        args.sink,
        args.scheme.name()
    );
    table::print(&["blocks", "density", "perplexity", "change", "same top-1", "KL", "attention s"], &rows);
    Ok(())
}
