//! The same question, answered with exact attention and with ours.

use std::time::{Duration, Instant};

use candle_core::{D, IndexOp, Tensor};
use sage_examples::attend::Attend;
use sage_examples::caches::{CandleCache, SageCache};
use sage_examples::llama::{Llama, chat_prompt};
use sage_examples::method::Method;
use sage_examples::{Result, progress};
use sageattention_candle::{Choice, KvCacheOptions, ValueFormat};

use crate::AtHand;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to ask.
    #[arg(default_value = "Explain in a few sentences why the sky is blue.")]
    question: String,
    /// Most tokens of the answer.
    #[arg(long, default_value_t = 120)]
    tokens: usize,
    /// Fewest tokens that must be the same in both answers, or the program fails.
    #[arg(long, default_value_t = 0)]
    min_equal: usize,
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let AtHand { model, tokenizer, .. } = at_hand;
    let config = model.config();
    let prompt = tokenizer.encode(chat_prompt(&args.question), false)?.get_ids().to_vec();
    let end = tokenizer.token_to_id("<|im_end|>").ok_or("the model lacks <|im_end|>")?;

    let candles = |method| CandleCache::new(method, config.layers, prompt.len() + args.tokens);
    let (device, dtype) = model.place();
    // The quantised cache is in this process's memory.
    let (mut sage, kept): (Box<dyn Attend>, &str) = if device.is_cpu() {
        let options = KvCacheOptions::new(config.kv_heads, config.head_dim).values(ValueFormat::Int8);
        (Box::new(SageCache::new(options, config.layers)?), "INT8")
    } else {
        (Box::new(candles(Method::Sage(Choice::Automatic))), dtype.as_str())
    };
    let exact = answer("exact attention", model, &prompt, args.tokens, end, &mut candles(Method::Exact))?;
    let sage = answer("SageAttention", model, &prompt, args.tokens, end, &mut &mut *sage)?;

    println!("{}\n", args.question);
    let names =
        [format!("exact attention, {} cache", dtype.as_str()), format!("SageAttention, {kept} cache")];
    for (name, answer) in names.iter().zip([&exact, &sage]) {
        let text = tokenizer.decode(&answer.tokens, true)?;
        let rate = answer.tokens.len() as f64 / answer.decoding.as_secs_f64();
        println!("── {name} ── {rate:.1} tokens/s\n{}\n", text.trim());
    }
    let equal = exact.tokens.iter().zip(&sage.tokens).take_while(|(a, b)| a == b).count();
    let all = exact.tokens.len().max(sage.tokens.len());
    if equal == all {
        println!("The answers are the same, all {all} tokens.");
    } else {
        let word = |tokens: &[u32]| match tokens.get(equal) {
            Some(&token) => tokenizer.decode(&[token], true).map(|word| format!("{word:?}")),
            None => Ok("the end".into()),
        };
        let (exact_word, sage_word) = (word(&exact.tokens)?, word(&sage.tokens)?);
        let margin = exact.margins.get(equal).copied().unwrap_or(f32::NAN);
        println!(
            "The first {equal} of {all} tokens are the same; then exact attention has {exact_word} and ours \
             {sage_word}. Exact attention preferred its token by {margin:.3} in logits over the next best."
        );
    }
    if equal < args.min_equal.min(all) {
        return Err(format!("{equal} tokens are the same, expected at least {}", args.min_equal).into());
    }
    Ok(())
}

struct Answer {
    tokens: Vec<u32>,
    /// How far the best logit was above the second, token by token.
    margins: Vec<f32>,
    decoding: Duration,
}

fn answer(
    name: &str,
    model: &Llama,
    prompt: &[u32],
    len: usize,
    end: u32,
    attend: &mut impl Attend,
) -> Result<Answer> {
    let bar = progress::bar(len, name);
    let mut hidden = model.forward(prompt, 0, attend)?;
    let mut answer = Answer { tokens: Vec::new(), margins: Vec::new(), decoding: Duration::ZERO };
    let start = Instant::now();
    while answer.tokens.len() < len {
        let logits = model.logits(&hidden.i(hidden.dim(0)? - 1)?.unsqueeze(0)?)?;
        let (token, margin) = best(&logits)?;
        if token == end {
            break;
        }
        answer.tokens.push(token);
        answer.margins.push(margin);
        bar.inc(1);
        hidden = model.forward(&[token], prompt.len() + answer.tokens.len() - 1, attend)?;
    }
    answer.decoding = start.elapsed();
    bar.finish_and_clear();
    Ok(answer)
}

/// The most likely token, and its lead.
fn best(logits: &Tensor) -> Result<(u32, f32)> {
    let token = logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0];
    let values = logits.i(0)?.to_vec1::<f32>()?;
    let second = values.iter().enumerate().filter(|(i, _)| *i != token as usize).map(|(_, x)| *x);
    Ok((token, values[token as usize] - second.fold(f32::MIN, f32::max)))
}
