//! Speed at several context lengths: attention alone, whole prompts, decoding; and memory of the KV cache.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Tensor;
use sage_examples::attend::{Attend, Cache, Timed, Visible};
use sage_examples::caches::{CandleCache, SageCache};
use sage_examples::llama::Llama;
use sage_examples::method::{Method, Stateless};
use sage_examples::plot::{self, Axis, Panel, Point};
use sage_examples::timing::Rounds;
use sage_examples::{Result, progress, table};
use sageattention_candle::{KvCacheOptions, ValueFormat};

use crate::AtHand;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Context lengths.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192")]
    context: Vec<usize>,
    /// What is compared with exact attention. Left out, INT8 per token with rotation, or a GPU's own choice.
    #[arg(long)]
    method: Option<Method>,
    /// Turns of each contestant.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tokens decoded in a turn.
    #[arg(long, default_value_t = 8)]
    decode: usize,
    /// Longest context at which candle's own fused attention, which is slower, takes turns too.
    #[arg(long, default_value_t = 2048)]
    flash_up_to: usize,
    /// Longest context at which whole prompts are timed, which exact attention makes long.
    #[arg(long, default_value_t = 2048)]
    prompts_up_to: usize,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Draws the speed-ups of attention, of prompts if they are timed, and of decoding against context length.
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
}

/// How many times as fast as exact attention each contestant is, context by context.
type Curves = Vec<(String, Vec<Point>)>;

#[derive(Default)]
struct Tables {
    attention: Vec<Vec<String>>,
    prompts: Vec<Vec<String>>,
    decoding: Vec<Vec<String>>,
    memory: Vec<Vec<String>>,
    curves: [Curves; 3],
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let model = &at_hand.model;
    let sage = args.method.unwrap_or(Method::of_language(model.place().0));
    let longest = args.context.iter().copied().max().unwrap_or(0);
    let spare = (args.rounds + 1) * args.decode;
    let tokens = at_hand.tokens(args.text.as_ref(), (longest + spare).min(model.config().context))?;
    let mut tables = Tables::default();
    let bar = progress::bar(args.context.len() * 4, "");
    for &context in &args.context {
        // The last tokens of the longest context are decoded.
        let context = context.min(tokens.len().saturating_sub(spare)).max(1);
        let step = |what: &str| {
            bar.set_message(format!("{what} at {context}"));
            bar.inc(1);
        };
        step("filling caches");
        let mut filled = Filled {
            sage,
            caches: caches(model, sage, context + spare)?,
            middle: model.config().layers / 2,
            layer: None,
        };
        model.forward(&tokens[..context], 0, &mut filled)?;
        let Filled { mut caches, layer, .. } = filled;
        tables.memory(model, context, &caches)?;
        step("attention");
        tables.attention(args, sage, context, &layer.ok_or("the model has no layers")?)?;
        step("prompts");
        if context <= args.prompts_up_to {
            tables.prompts(args, sage, model, &tokens[..context])?;
        }
        step("decoding");
        tables.decoding(args, model, &tokens[context..context + spare], context, &mut caches)?;
    }
    bar.finish_and_clear();
    tables.print();
    if let Some(path) = &args.plot {
        let titles = ["Attention of one layer", "Whole prompts", "Decoding"];
        let axes = [Axis::Logarithmic, Axis::FromZero, Axis::FromZero];
        let panels: Vec<Panel> = titles
            .into_iter()
            .zip(axes)
            .zip(tables.curves)
            .filter(|(_, series)| !series.is_empty())
            .map(|((title, axis), series)| Panel { title: title.into(), axis, series })
            .collect();
        let (device, dtype) = model.place();
        let place = if device.is_cpu() { "CPU" } else { "GPU" };
        let caption = format!(
            "SmolLM2-135M-Instruct, {} on a {place}; medians of rounds in which contestants take turns, and their \
             range",
            dtype.as_str()
        );
        plot::lines(
            path,
            "Times as fast as exact attention, by candle's matmul and softmax",
            &caption,
            &panels,
        )?;
        println!("\nDrawn in {}.", path.display());
    }
    Ok(())
}

impl Tables {
    /// Adds a point to a contestant's curve.
    fn point(&mut self, curve: usize, name: &str, context: usize, [value, low, high]: [f64; 3]) {
        let curves = &mut self.curves[curve];
        let at = curves.iter().position(|(known, _)| known == name).unwrap_or(curves.len());
        if at == curves.len() {
            curves.push((name.to_owned(), Vec::new()));
        }
        curves[at].1.push(Point { context, value, range: Some((low, high)) });
    }

    fn attention(
        &mut self,
        args: &Args,
        sage: Method,
        context: usize,
        [q, k, v]: &[Tensor; 3],
    ) -> Result<()> {
        let mut methods = vec![Method::Exact, sage];
        if context <= args.flash_up_to && q.device().is_cpu() {
            methods.push(Method::CandleFlash);
        }
        let mut contestants: Vec<Box<dyn FnMut() -> Result<()>>> = methods
            .iter()
            .map(|method| {
                let run = move || {
                    method.compute(q, k, v, &Visible::Causal)?;
                    Ok(q.device().synchronize()?)
                };
                Box::new(run) as Box<dyn FnMut() -> Result<()>>
            })
            .collect();
        let rounds = Rounds::of(args.rounds, &mut contestants)?;
        for (at, method) in methods.iter().enumerate() {
            let [ratio, low, high] = rounds.speedup(at, 0);
            self.attention.push(vec![
                method.to_string(),
                context.to_string(),
                format!("{:.2}", 1e3 * rounds.median(at)),
                format!("{ratio:.2}×"),
                format!("{low:.2}–{high:.2}"),
            ]);
            self.point(0, &method.to_string(), context, [ratio, low, high]);
        }
        Ok(())
    }

    fn prompts(&mut self, args: &Args, sage: Method, model: &Llama, tokens: &[u32]) -> Result<()> {
        let run = |method: Method| {
            move || {
                model.forward(tokens, 0, &mut Stateless(method))?;
                Ok(model.place().0.synchronize()?)
            }
        };
        let mut contestants: [Box<dyn FnMut() -> Result<()>>; 2] =
            [Box::new(run(Method::Exact)), Box::new(run(sage))];
        let rounds = Rounds::of(args.rounds.min(3), &mut contestants)?;
        let [ratio, low, high] = rounds.speedup(1, 0);
        let whole = |at: usize| format!("{:.0}", tokens.len() as f64 / rounds.median(at));
        let range = format!("{low:.2}–{high:.2}");
        self.prompts.push(vec![tokens.len().to_string(), whole(0), whole(1), format!("{ratio:.2}×"), range]);
        self.point(1, &Method::Exact.to_string(), tokens.len(), [1.0; 3]);
        self.point(1, &sage.to_string(), tokens.len(), [ratio, low, high]);
        Ok(())
    }

    /// Each cache decodes the same tokens of the text, in turns.
    fn decoding(
        &mut self,
        args: &Args,
        model: &Llama,
        tokens: &[u32],
        context: usize,
        caches: &mut [Contestant],
    ) -> Result<()> {
        let mut seconds = vec![Vec::new(); caches.len()];
        let mut attention = seconds.clone();
        for (turn, tokens) in tokens.chunks(args.decode).enumerate() {
            let start = context + turn * args.decode;
            for (at, (_, cache)) in caches.iter_mut().enumerate() {
                let mut attend = Timed::new(&mut **cache as &mut dyn Attend);
                let begin = Instant::now();
                for (i, token) in tokens.iter().enumerate() {
                    let hidden = model.forward(&[*token], start + i, &mut attend)?;
                    model.logits(&hidden)?;
                }
                model.place().0.synchronize()?;
                // The first turn warms up.
                if turn > 0 {
                    seconds[at].push(begin.elapsed().as_secs_f64());
                    attention[at].push(attend.spent.as_secs_f64());
                }
            }
        }
        let (seconds, attention) = (Rounds(seconds), Rounds(attention));
        for (at, (name, _)) in caches.iter().enumerate() {
            let [ratio, low, high] = seconds.speedup(at, 0);
            let [of_attention, least, most] = attention.speedup(at, 0);
            self.decoding.push(vec![
                name.clone(),
                context.to_string(),
                format!("{:.1}", args.decode as f64 / seconds.median(at)),
                format!("{ratio:.2}×"),
                format!("{low:.2}–{high:.2}"),
                format!("{of_attention:.2}×"),
                format!("{least:.2}–{most:.2}"),
            ]);
            self.point(2, name, context, [ratio, low, high]);
        }
        Ok(())
    }

    fn memory(&mut self, model: &Llama, context: usize, caches: &[Contestant]) -> Result<()> {
        let config = model.config();
        let numbers = 2 * config.layers * config.kv_heads * config.head_dim * context;
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        let half = 2.0 * numbers as f64;
        self.memory.push(vec!["16 bits".into(), context.to_string(), mib(half), "1.000".into()]);
        for (name, cache) in caches {
            let bytes = cache.bytes()? as f64;
            let part = format!("{:.3}", bytes / half);
            self.memory.push(vec![name.clone(), context.to_string(), mib(bytes), part]);
        }
        Ok(())
    }

    fn print(&self) {
        println!(
            "Attention of one layer: milliseconds, and how many times as fast as exact attention (range of rounds)\n"
        );
        table::print(&["attention", "context", "ms", "speed-up", "range"], &self.attention);
        if !self.prompts.is_empty() {
            println!("\nWhole prompts, tokens a second\n");
            table::print(&["context", "exact", "ours", "speed-up", "range"], &self.prompts);
        }
        println!("\nDecoding: speed-ups are those of a token, and of its attention\n");
        table::print(
            &["cache", "context", "tokens a second", "speed-up", "range", "of attention", "range"],
            &self.decoding,
        );
        println!("\nKV cache of all layers\n");
        table::print(&["cache", "context", "MiB", "of 16 bits"], &self.memory);
    }
}

/// A cache and its name.
type Contestant = (String, Box<dyn Cache>);

/// Exact attention over candle's own cache, and ours: over quantised caches on a CPU, over candle's on a GPU.
fn caches(model: &Llama, sage: Method, max_len: usize) -> Result<Vec<Contestant>> {
    let config = model.config();
    let candles = |name: &str, method| -> Contestant {
        (name.to_owned(), Box::new(CandleCache::new(method, config.layers, max_len)))
    };
    let mut caches = vec![candles("exact", Method::Exact)];
    if model.place().0.is_cpu() {
        let options = KvCacheOptions::new(config.kv_heads, config.head_dim);
        for (name, values) in [("INT8 + f16 cache", ValueFormat::F16), ("INT8 cache", ValueFormat::Int8)] {
            caches.push((name.into(), Box::new(SageCache::new(options.values(values), config.layers)?)));
        }
    } else {
        caches.push(candles(&sage.to_string(), sage));
    }
    Ok(caches)
}

/// Fills every contestant's cache with the same keys and values, and keeps the tensors of the layer in the middle.
struct Filled {
    sage: Method,
    caches: Vec<Contestant>,
    middle: usize,
    layer: Option<[Tensor; 3]>,
}

impl Attend for Filled {
    fn attend(&mut self, layer: usize, [q, k, v]: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        for (_, cache) in &mut self.caches {
            cache.append(layer, k, v)?;
        }
        if layer == self.middle {
            self.layer = Some([q.clone(), k.clone(), v.clone()]);
        }
        self.sage.compute(q, k, v, visible)
    }
}
