//! SmolLM2-135M-Instruct with exact attention and with ours: text, quality and speed.
//!
//! `scripts/fetch_models.sh`, then `cargo run --release -p sage-examples --bin generate -- chat "Why is the sky blue?"`

#![forbid(unsafe_code)]

mod ablation;
mod chat;
mod errors;
mod evaluate;
mod perplexity;
mod sparse;
mod speed;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use sage_examples::Result;
use sage_examples::files::Files;
use sage_examples::llama::Llama;
use sage_examples::method::Method;
use sage_examples::place::Place;
use tokenizers::Tokenizer;

/// SmolLM2-135M-Instruct with exact attention and with SageAttention.
#[derive(Debug, Parser)]
#[command(name = "generate")]
struct Args {
    #[command(flatten)]
    files: Files,
    /// cpu, or cuda:NUMBER in a build with --features cuda: there the model is in bf16.
    #[arg(long, default_value = "cpu", value_name = "DEVICE", global = true)]
    device: Place,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answers a question, greedily, twice: with exact attention, and with ours and a quantised KV cache.
    Chat(chat::Args),
    /// Perplexity of a text, and how often the most likely next token is the same one.
    Perplexity(perplexity::Args),
    /// Perplexity of a short text under many schemes: smoothing, granularity, values, rotation.
    Ablation(ablation::Args),
    /// Relative L1 error of attention, layer by layer and head by head.
    Errors(errors::Args),
    /// Perplexity of a text where attention computes only the blocks that a predictor finds worth it.
    Sparse(sparse::Args),
    /// Speed of attention, prompts and decoding at several context lengths, and memory of the KV cache.
    Speed(speed::Args),
}

fn main() -> ExitCode {
    sage_examples::finish(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let (model, tokenizer) = Llama::load(&args.files.smollm2()?, args.device)?;
    let at_hand = AtHand { model, tokenizer, files: args.files.clone() };
    match &args.command {
        Command::Chat(args) => chat::run(args, &at_hand),
        Command::Perplexity(args) => perplexity::run(args, &at_hand),
        Command::Ablation(args) => ablation::run(args, &at_hand),
        Command::Errors(args) => errors::run(args, &at_hand),
        Command::Sparse(args) => sparse::run(args, &at_hand),
        Command::Speed(args) => speed::run(args, &at_hand),
    }
}

/// The model, and where texts lie.
struct AtHand {
    model: Llama,
    tokenizer: Tokenizer,
    files: Files,
}

impl AtHand {
    /// The methods given, or the one that suits the model.
    fn methods(&self, given: &[Method]) -> Vec<Method> {
        match given {
            [] => vec![Method::of_language(self.model.place().0)],
            given => given.to_vec(),
        }
    }

    /// The first `count` tokens of a text.
    fn tokens(&self, text: Option<&PathBuf>, count: usize) -> Result<Vec<u32>> {
        let text = self.files.text(text.map(PathBuf::as_path))?;
        let mut tokens = self.tokenizer.encode(text, false)?.get_ids().to_vec();
        if tokens.len() < count {
            return Err(format!("text: {} tokens, expected at least {count}", tokens.len()).into());
        }
        tokens.truncate(count);
        Ok(tokens)
    }
}
