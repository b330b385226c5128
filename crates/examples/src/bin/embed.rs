//! all-MiniLM-L6-v2 with exact attention and with ours: search in a text, quality and speed.
//!
//! `scripts/fetch_models.sh`, then `cargo run --release -p sage-examples --bin embed -- "How do I report a bug?"`

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Tensor;
use clap::Parser;
use sage_core::{Granularity, IntQuantizer, Preset, Qk, Scheme, SmoothK, Smoothing};
use sage_examples::attend::{Attend, Visible};
use sage_examples::bert::{Batch, MiniLm};
use sage_examples::files::Files;
use sage_examples::method::{Method, Recorded, Stateless, relative_l1_by_head};
use sage_examples::place::Place;
use sage_examples::timing::Rounds;
use sage_examples::{Result, plot, progress, table};
use sageattention_candle::Choice;

/// Searches a text by meaning, with exact attention and with SageAttention, and compares the embeddings.
#[derive(Debug, Parser)]
#[command(name = "embed")]
struct Args {
    #[command(flatten)]
    files: Files,
    /// What to look for.
    #[arg(default_values_t = QUESTIONS.map(String::from))]
    questions: Vec<String>,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Passages of the text to search.
    #[arg(long, default_value_t = 160)]
    passages: usize,
    /// Passages in a batch, padded to the longest.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// What is compared with exact attention. Left out, INT8 per token, or a GPU's own choice; `sage` leaves the choice
    /// open, and then a CPU does not quantise fewer than 128 queries.
    #[arg(long)]
    method: Option<Method>,
    /// cpu, or cuda:NUMBER in a build with --features cuda: there the model is in bf16.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Place,
    /// Compares many schemes: smoothing, granularity, values, rotation.
    #[arg(long)]
    ablation: bool,
    /// Draws the error of attention, layer by layer and head by head.
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
    /// Smallest cosine of an embedding and the exact one, or the program fails; so it does when passages change places
    /// whose exact scores are more than 0.002 apart.
    #[arg(long, value_name = "COSINE")]
    min_cosine: Option<f64>,
}

const QUESTIONS: [&str; 8] = [
    "How do I report a security vulnerability?",
    "Who may merge a change into the code?",
    "How are translations of the documentation organised?",
    "Which tests must I run before I send a patch?",
    "How long is a release supported?",
    "What is the style guide for Python code?",
    "How is a feature deprecated and removed?",
    "How do I get a ticket triaged?",
];

/// Best passages whose order is compared.
const TOP: usize = 10;
/// Exact scores that are further apart keep their order.
const TIE: f32 = 0.002;
/// Words of a passage: about as many tokens as the model takes.
const WORDS: usize = 150;

fn main() -> ExitCode {
    sage_examples::finish(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let model = MiniLm::load(&args.files.minilm()?, args.device)?;
    let method = args.method.unwrap_or(Method::Sage(match args.device {
        Place::Cpu => Preset::INT8_PER_TOKEN.into(),
        Place::Cuda(_) => Choice::Automatic,
    }));
    let text = args.files.text(args.text.as_deref())?;
    let words: Vec<&str> = text.split_whitespace().collect();
    // Of different lengths, so that batches are padded.
    let passages: Vec<String> = Lengths(0)
        .scan(0, |start, len| {
            let passage = words.get(*start..(*start + len).min(words.len()))?;
            *start += len;
            (!passage.is_empty()).then(|| passage.join(" "))
        })
        .take(args.passages)
        .collect();
    let batches: Vec<Batch> =
        passages.chunks(args.batch.max(1)).map(|batch| model.tokenize(batch)).collect::<Result<_>>()?;
    let questions = model.tokenize(&args.questions)?;

    let exact = embed_all(&model, &batches, Method::Exact)?;
    let ours = embed_all(&model, &batches, method)?;
    let exact_questions = model.embed(&questions, &mut Stateless(Method::Exact))?;
    let our_questions = model.embed(&questions, &mut Stateless(method))?;

    let rankings = (rank(&exact_questions, &exact)?, rank(&our_questions, &ours)?);
    for (at, question) in args.questions.iter().enumerate() {
        let [(exact_best, exact_score), (best, score)] = [rankings.0[at][0], rankings.1[at][0]];
        let start: String = passages[best].chars().take(90).collect();
        println!(
            "{question}\n  {score:.4} (exact {exact_score:.4}, passage {exact_best})  [{best}] {start}…"
        );
    }
    let cosines = cosines(&ours, &exact)?;
    let smallest = cosines.iter().copied().fold(f64::MAX, f64::min);
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let same = |upto: usize| {
        let order = |ranking: &[(usize, f32)]| {
            ranking.iter().take(upto).map(|(passage, _)| *passage).collect::<Vec<_>>()
        };
        rankings.0.iter().zip(&rankings.1).filter(|(exact, ours)| order(exact) == order(ours)).count()
    };
    let (first, top) = (same(1), same(TOP));
    let swapped = largest_swap(&rankings.0, &rankings.1);
    println!(
        "\n{} passages in batches of {}, {} against exact attention: cosine mean {mean:.6}, smallest \
         {smallest:.6}; of {} questions, {first} have the same best passage and {top} the same first {TOP} in the same \
         order; passages that changed places anywhere were at most {swapped:.5} apart.",
        passages.len(),
        args.batch,
        method,
        args.questions.len(),
    );
    speed(&model, &batches, method)?;
    if args.ablation {
        ablation(&model, &batches, &exact)?;
    }
    if let Some(path) = &args.plot {
        errors(&model, &batches[0], method, path)?;
    }
    match args.min_cosine {
        Some(limit) if smallest < limit => {
            Err(format!("the smallest cosine is {smallest}, expected {limit}").into())
        }
        Some(_) if swapped > TIE => {
            Err(format!("passages {swapped} apart have changed places, expected at most {TIE}").into())
        }
        _ => Ok(()),
    }
}

/// Words of passage after passage: 30 to [`WORDS`], always the same.
struct Lengths(usize);

impl Iterator for Lengths {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.0 += 1;
        Some(30 + self.0 * 53 % (WORDS - 29))
    }
}

fn embed_all(model: &MiniLm, batches: &[Batch], method: Method) -> Result<Tensor> {
    let bar = progress::bar(batches.len(), method.to_string());
    let parts = batches.iter().map(|batch| {
        bar.inc(1);
        model.embed(batch, &mut Stateless(method))
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    Ok(Tensor::cat(&parts, 0)?)
}

/// For each question all passages with their cosines, best first.
fn rank(questions: &Tensor, passages: &Tensor) -> Result<Vec<Vec<(usize, f32)>>> {
    let scores = questions.matmul(&passages.t()?)?.to_vec2::<f32>()?;
    let ranked = scores.into_iter().map(|scores| {
        let mut ranking: Vec<(usize, f32)> = scores.into_iter().enumerate().collect();
        ranking.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranking
    });
    Ok(ranked.collect())
}

/// The largest distance of exact scores of two passages that ours puts in the other order.
fn largest_swap(exact: &[Vec<(usize, f32)>], ours: &[Vec<(usize, f32)>]) -> f32 {
    let mut largest = 0f32;
    for (exact, ours) in exact.iter().zip(ours) {
        let place: HashMap<usize, usize> =
            ours.iter().enumerate().map(|(place, (passage, _))| (*passage, place)).collect();
        for (i, (better, high)) in exact.iter().enumerate() {
            for (worse, low) in &exact[i + 1..] {
                if place[better] > place[worse] {
                    largest = largest.max(high - low);
                }
            }
        }
    }
    largest
}

fn cosines(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    let (a, b) = (a.to_dtype(candle_core::DType::F64)?, b.to_dtype(candle_core::DType::F64)?);
    let norm = |x: &Tensor| x.sqr()?.sum(1)?.sqrt();
    Ok(((&a * &b)?.sum(1)? / (norm(&a)? * norm(&b)?)?)?.to_vec1()?)
}

/// Attention of the largest batch's layers, in turns.
fn speed(model: &MiniLm, batches: &[Batch], method: Method) -> Result<()> {
    let batch = batches.iter().max_by_key(|batch| batch.ids.elem_count()).ok_or("the text is empty")?;
    let recorded = record(model, batch)?;
    let visible = Visible::Padded(batch.lens.clone());
    let run = |method: Method| {
        let (layers, visible) = (&recorded.layers, &visible);
        move || {
            layers.iter().try_for_each(|[q, k, v]| method.compute(q, k, v, visible).map(drop))?;
            Ok(batch.ids.device().synchronize()?)
        }
    };
    let rounds = Rounds::of(5, &mut [Box::new(run(Method::Exact)), Box::new(run(method))])?;
    let [ratio, low, high] = rounds.speedup(1, 0);
    println!(
        "Attention of {:?} tokens, 6 layers: exact {:.1} ms, {method} {:.1} ms: {ratio:.2}× ({low:.2}–{high:.2}).",
        batch.ids.dims(),
        1e3 * rounds.median(0),
        1e3 * rounds.median(1)
    );
    Ok(())
}

fn record(model: &MiniLm, batch: &Batch) -> Result<Recorded> {
    let mut recorded = Recorded::default();
    model.embed(batch, &mut recorded)?;
    Ok(recorded)
}

fn ablation(model: &MiniLm, batches: &[Batch], exact: &Tensor) -> Result<()> {
    let int8 = Preset::INT8_PER_TOKEN.scheme(32);
    let rough = |scheme: Scheme| Scheme { smooth: Smoothing { k: SmoothK::Off, ..scheme.smooth }, ..scheme };
    let granular = |granularity| match int8.qk {
        Qk::Int(quantizer) => Scheme { qk: Qk::Int(IntQuantizer { granularity, ..quantizer }), ..int8 },
        _ => int8,
    };
    let per_block = granular(Granularity::PerBlock);
    let schemes = [
        int8,
        granular(Granularity::PerThread),
        per_block,
        rough(int8),
        rough(per_block),
        Scheme { rotate: true, ..rough(per_block) },
        Scheme { rotate: true, ..per_block },
    ];
    let mut rows = Vec::new();
    for scheme in schemes {
        let embeddings = embed_all(model, batches, Method::Sage(scheme.into()))?;
        let cosines = cosines(&embeddings, exact)?;
        rows.push(vec![
            scheme.to_string(),
            format!("{:.6}", cosines.iter().sum::<f64>() / cosines.len() as f64),
            format!("{:.6}", cosines.iter().copied().fold(f64::MAX, f64::min)),
        ]);
    }
    println!();
    table::print(&["scheme", "cosine, mean", "smallest"], &rows);
    Ok(())
}

fn errors(model: &MiniLm, batch: &Batch, method: Method, path: &std::path::Path) -> Result<()> {
    let visible = Visible::Padded(batch.lens.clone());
    let mut layers = Vec::new();
    for [q, k, v] in &record(model, batch)?.layers {
        let exact = Method::Exact.compute(q, k, v, &visible)?;
        layers.push(relative_l1_by_head(&Stateless(method).attend(0, [q, k, v], &visible)?, &exact)?);
    }
    let caption = format!("all-MiniLM-L6-v2 on {:?} tokens, against exact attention", batch.ids.dims());
    let title = "Relative L1 error of attention, layer by layer and head by head";
    plot::heat_maps(path, title, &caption, &[(method.to_string(), layers)])?;
    println!("Drawn in {}.", path.display());
    Ok(())
}
