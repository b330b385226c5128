//! Relative L1 error of attention, layer by layer and head by head.

use std::path::PathBuf;

use sage_examples::attend::Visible;
use sage_examples::method::{Method, Recorded, relative_l1_by_head};
use sage_examples::{Result, plot, table};

use crate::AtHand;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of the text.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// What is compared with exact attention; several for a comparison. Left out, INT8 per token with rotation, or a
    /// GPU's own choice.
    #[arg(long, value_delimiter = ',')]
    method: Vec<Method>,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Draws the errors.
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let tokens = at_hand.tokens(args.text.as_ref(), args.tokens)?;
    let mut recorded = Recorded::default();
    at_hand.model.forward(&tokens, 0, &mut recorded)?;
    let methods = at_hand.methods(&args.method);
    let mut maps: Vec<_> = methods.iter().map(|method| (method.to_string(), Vec::new())).collect();
    for [q, k, v] in &recorded.layers {
        let exact = Method::Exact.compute(q, k, v, &Visible::Causal)?;
        for (method, (_, layers)) in methods.iter().zip(&mut maps) {
            layers.push(relative_l1_by_head(&method.compute(q, k, v, &Visible::Causal)?, &exact)?);
        }
    }
    for (name, layers) in &maps {
        let heads = layers.first().map_or(0, Vec::len);
        let heading: Vec<String> =
            std::iter::once("layer".to_owned()).chain((0..heads).map(|h| format!("head {h}"))).collect();
        let row = |(i, layer): (usize, &Vec<f32>)| {
            std::iter::once(i.to_string()).chain(layer.iter().map(|e| format!("{e:.4}"))).collect()
        };
        let rows: Vec<Vec<String>> = layers.iter().enumerate().map(row).collect();
        table::print(&heading.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
        let all: Vec<f32> = layers.iter().flatten().copied().collect();
        let (mean, largest) =
            (all.iter().sum::<f32>() / all.len() as f32, all.iter().fold(0f32, |l, &e| l.max(e)));
        println!("\nRelative L1 error of {name}: mean {mean:.4}, worst head {largest:.4}.\n");
    }
    if let Some(path) = &args.plot {
        let title = "Relative L1 error of attention, layer by layer and head by head";
        let caption =
            format!("SmolLM2-135M-Instruct on {} tokens of prose, against exact attention", tokens.len());
        plot::heat_maps(path, title, &caption, &maps)?;
        println!("Drawn in {}.", path.display());
    }
    Ok(())
}
