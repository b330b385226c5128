//! Speed at several context lengths: attention alone, whole prompts, decoding; and memory of the KV cache.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Tensor;
use sage_examples::attend::{Attend, CandleCache, Method, SageCache, Stateless, Visible};
use sage_examples::llama::Llama;
use sage_examples::timing::{Rounds, median};
use sage_examples::{Result, progress, table};
use sageattention_candle::{Choice, KvCacheOptions, ValueFormat};

use crate::AtHand;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Context lengths.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192")]
    context: Vec<usize>,
    /// Turns of each contestant.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tokens decoded in a turn.
    #[arg(long, default_value_t = 8)]
    decode: usize,
    /// Longest context at which candle's own fused attention, which is slower, takes turns too.
    #[arg(long, default_value_t = 2048)]
    flash_up_to: usize,
    /// Whether whole prompts are timed, which takes long.
    #[arg(long)]
    prompts: bool,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

const SAGE: Method = Method::Sage(Choice::Automatic);

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let model = &at_hand.model;
    let longest = args.context.iter().copied().max().unwrap_or(0);
    let spare = (args.rounds + 1) * args.decode;
    let tokens = at_hand.tokens(args.text.as_ref(), (longest + spare).min(model.config().context))?;
    let (mut attention, mut prompts, mut decoding, mut memory) = (vec![], vec![], vec![], vec![]);
    let bar = progress::bar(args.context.len() * 3, "");
    for &context in &args.context {
        // The last tokens of the longest context are decoded.
        let context = context.min(tokens.len().saturating_sub(spare)).max(1);
        let step = |what: &str| {
            bar.set_message(format!("{what} at {context}"));
            bar.inc(1);
        };
        step("filling caches");
        let mut caches = Caches::new(model, context + spare)?;
        model.forward(&tokens[..context], 0, &mut caches)?;
        memory.push(caches.memory_row(model, context));
        step("attention");
        attention.extend(attention_rows(args, context, &caches.layer)?);
        if args.prompts {
            prompts.push(prompt_row(args, model, &tokens[..context])?);
        }
        step("decoding");
        decoding.push(decoding_row(args, model, &tokens[context..context + spare], context, &mut caches)?);
    }
    bar.finish_and_clear();
    println!(
        "Attention of one layer: milliseconds, and how many times as fast as exact attention (range of rounds)\n"
    );
    table::print(&["attention", "context", "ms", "speed-up", "range"], &attention);
    if args.prompts {
        println!("\nWhole prompts, tokens a second\n");
        table::print(&["context", "exact", "sage", "speed-up", "range"], &prompts);
    }
    println!("\nDecoding, tokens a second: candle's f32 cache and exact attention, our caches\n");
    table::print(&["context", "exact, f32", "sage, f16", "sage, INT8", "attention INT8/exact"], &decoding);
    println!("\nKV cache, MiB of all layers\n");
    table::print(&["context", "f32", "f16", "INT8 + f16", "of f16", "INT8 + INT8", "of f16"], &memory);
    Ok(())
}

fn attention_rows(args: &Args, context: usize, [q, k, v]: &[Tensor; 3]) -> Result<Vec<Vec<String>>> {
    let mut methods = vec![Method::Candle, SAGE];
    if context <= args.flash_up_to {
        methods.push(Method::CandleFlash);
    }
    let mut contestants: Vec<Box<dyn FnMut() -> Result<()>>> = methods
        .iter()
        .map(|method| {
            let run = move || method.compute(q, k, v, &Visible::Causal).map(drop);
            Box::new(run) as Box<dyn FnMut() -> Result<()>>
        })
        .collect();
    let rounds = Rounds::of(args.rounds, &mut contestants)?;
    let row = |(at, method): (usize, &Method)| {
        let [ratio, low, high] = rounds.speedup(at, 0);
        vec![
            method.to_string(),
            context.to_string(),
            format!("{:.2}", 1e3 * rounds.median(at)),
            format!("{ratio:.2}×"),
            format!("{low:.2}–{high:.2}"),
        ]
    };
    Ok(methods.iter().enumerate().map(row).collect())
}

fn prompt_row(args: &Args, model: &Llama, tokens: &[u32]) -> Result<Vec<String>> {
    let run = |method: Method| move || model.forward(tokens, 0, &mut Stateless(method)).map(drop);
    let rounds = Rounds::of(args.rounds.min(3), &mut [Box::new(run(Method::Candle)), Box::new(run(SAGE))])?;
    let [ratio, low, high] = rounds.speedup(1, 0);
    let rate = |at: usize| format!("{:.0}", tokens.len() as f64 / rounds.median(at));
    let range = format!("{low:.2}–{high:.2}");
    Ok(vec![tokens.len().to_string(), rate(0), rate(1), format!("{ratio:.2}×"), range])
}

/// Each cache decodes the same tokens of the text, in turns.
fn decoding_row(
    args: &Args,
    model: &Llama,
    tokens: &[u32],
    context: usize,
    caches: &mut Caches,
) -> Result<Vec<String>> {
    let mut seconds = [const { Vec::new() }; 3];
    let mut attention = [const { Vec::new() }; 3];
    for (turn, tokens) in tokens.chunks(args.decode).enumerate() {
        let start = context + turn * args.decode;
        let mut decode = |at: usize, attend: &mut dyn Attend| -> Result<()> {
            let mut attend = sage_examples::attend::Timed::new(attend);
            let begin = Instant::now();
            for (i, token) in tokens.iter().enumerate() {
                let hidden = model.forward(&[*token], start + i, &mut attend)?;
                model.logits(&hidden)?;
            }
            // The first turn warms up.
            if turn > 0 {
                seconds[at].push(begin.elapsed().as_secs_f64());
                attention[at].push(attend.spent.as_secs_f64());
            }
            Ok(())
        };
        decode(0, &mut caches.exact)?;
        decode(1, &mut caches.half)?;
        decode(2, &mut caches.int8)?;
    }
    let rate = |at: usize| format!("{:.1}", args.decode as f64 / median(seconds[at].clone()));
    let ratios = attention[0].iter().zip(&attention[2]).map(|(exact, ours)| exact / ours).collect();
    Ok(vec![context.to_string(), rate(0), rate(1), rate(2), format!("{:.2}×", median(ratios))])
}

/// The contestants' caches, filled with the same keys and values; and one layer's tensors.
struct Caches {
    exact: CandleCache,
    half: SageCache,
    int8: SageCache,
    layer: [Tensor; 3],
    layers: usize,
}

impl Caches {
    fn new(model: &Llama, max_len: usize) -> Result<Self> {
        let config = model.config();
        let options = KvCacheOptions::new(config.kv_heads, config.head_dim);
        let none = Tensor::zeros((1, 1, 1, 1), candle_core::DType::F32, &candle_core::Device::Cpu)?;
        Ok(Caches {
            exact: CandleCache::new(Method::Candle, config.layers, max_len),
            half: SageCache::new(options.values(ValueFormat::F16), config.layers)?,
            int8: SageCache::new(options.values(ValueFormat::Int8), config.layers)?,
            layer: [none.clone(), none.clone(), none],
            layers: config.layers,
        })
    }

    fn memory_row(&self, model: &Llama, context: usize) -> Vec<String> {
        let config = model.config();
        let numbers = 2 * config.layers * config.kv_heads * config.head_dim * context;
        let mib = |bytes: usize| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
        let part = |cache: &SageCache| format!("{:.3}", cache.bytes() as f64 / (2 * numbers) as f64);
        vec![
            context.to_string(),
            mib(4 * numbers),
            mib(2 * numbers),
            mib(self.half.bytes()),
            part(&self.half),
            mib(self.int8.bytes()),
            part(&self.int8),
        ]
    }
}

impl Attend for Caches {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        visible: &Visible,
    ) -> Result<Tensor> {
        self.exact.append(layer, k, v)?;
        self.half.append(layer, k, v)?;
        self.int8.append(layer, k, v)?;
        if layer == self.layers / 2 {
            self.layer = [q.clone(), k.clone(), v.clone()];
        }
        SAGE.compute(q, k, v, visible)
    }
}
