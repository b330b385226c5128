//! `sageattn` without a command: what quantised attention is worth, on tensors of a real model, in a few seconds.

use std::path::Path;

use sage_core::{SmoothK, Smoothing};
use sageattention::{Attention, DType, Device, Preset, Scheme, Tensor};
use sageattn_files::qkv_file::Qkv;
use serde::Serialize;
use serde_json::json;

use crate::accuracy_row;
use crate::compare::{ComputedBy, Reference};
use crate::console::Console;
use crate::failure::Result;
use crate::inputs;
use crate::options::SchemeName;
use crate::shape::Shape;
use crate::speed::{self, Subject, runnable};
use crate::table::{Cell, DIM, GOOD, TITLE, Table, ratio, styled};

/// Where the example comes from.
const SOURCE: &str = "all-MiniLM-L6-v2 (Apache-2.0)";

/// One of each generation.
const SHOWN: [Preset; 7] = [
    Preset::FULL,
    Preset::INT8,
    Preset::INT8_PER_TOKEN,
    Preset::SAGE1_INT8_FP16,
    Preset::SAGE2_INT8_FP8_PER_THREAD,
    Preset::SAGE2PP_INT4_FP8,
    Preset::SAGE3_NVFP4,
];

/// Schemes that are computed with and without smoothing.
const SMOOTHED: [Preset; 2] = [Preset::INT8, Preset::SAGE2PP_INT4_FP8];

/// What is added to one channel of every key to show what smoothing is for.
const BIAS: f32 = 10.0;

/// Repetitions of each scheme that is timed on the example.
const REPS: usize = 15;

/// Shapes that are timed on random numbers: the example is too short to show what longer sequences gain.
const TIMED: [Shape; 2] = [
    Shape { batch: 1, heads: 8, kv_heads: 8, q_len: 1024, kv_len: 1024, head_dim: 64, value_dim: 64 },
    Shape { batch: 1, heads: 8, kv_heads: 8, q_len: 2048, kv_len: 2048, head_dim: 128, value_dim: 128 },
];

/// Schemes that are timed on them, and how often.
const TIMED_SCHEMES: [Preset; 3] = [Preset::FULL, Preset::INT8, Preset::INT8_PER_TOKEN];
const TIMED_REPS: usize = 5;

/// The error of one scheme on one layer, with K as given and with its mean subtracted.
#[derive(Clone, Debug, Serialize)]
struct SmoothingRow {
    layer: String,
    scheme: &'static str,
    relative_l1_without: f64,
    relative_l1_with: f64,
}

/// Computes and prints.
pub fn execute(console: Console) -> Result<()> {
    let name = Path::new("built-in example");
    let file = inputs::parse(name, inputs::EXAMPLE)?;
    let mut layers = inputs::load(name, &file, None)?;
    if let Some(layer) = layers.last() {
        layers.push(biased(layer)?);
    }
    let progress = console.progress("exact attention", 0);
    let references = layers
        .iter()
        .map(|layer| Reference::new(layer, Attention::new(), Device::Cpu, None, None, &progress))
        .collect::<Result<Vec<_>, _>>()?;
    let heads: usize = references.iter().map(|reference| reference.heads().list().len()).sum();
    progress.inc_length((heads * 2 * SMOOTHED.len()) as u64);
    progress.set_message("schemes");

    let mut accuracy = Vec::new();
    if let (Some(reference), Some(layer)) = (references.first(), layers.first()) {
        for preset in SHOWN {
            let comparison = match reference.kernel(preset)? {
                Some(comparison) => comparison,
                None => {
                    progress.inc_length(reference.heads().list().len() as u64);
                    reference.oracle(&preset.scheme(head_dim(layer)), &progress)?
                }
            };
            accuracy.push(accuracy_row::Row::new(name, &layer.prefix, layer.q.dtype(), preset, comparison));
        }
    }
    let smoothing = smoothing(&layers, &references, &progress)?;
    let speed = match layers.first() {
        Some(layer) => speed(layer, &progress)?,
        None => Vec::new(),
    };
    let mut by_shape = Vec::new();
    progress.inc_length((TIMED.len() * TIMED_SCHEMES.len() * TIMED_REPS) as u64);
    for shape in &TIMED {
        let subject = Subject::random(shape, DType::F32, Attention::new(), None)?;
        by_shape.extend(subject.measure(
            &TIMED_SCHEMES.map(SchemeName::from),
            TIMED_REPS,
            None,
            &progress,
        )?);
    }
    progress.finish_and_clear();
    if console.json {
        return console.print_json(&json!({
            "command": "demo", "source": SOURCE, "accuracy": accuracy, "speed": speed, "speed_by_shape": by_shape,
            "smoothing": smoothing,
        }));
    }
    console.print(&text(&layers, &accuracy, &speed, &by_shape, &smoothing))
}

fn head_dim(layer: &Qkv) -> usize {
    layer.q.shape().last().copied().unwrap_or(0)
}

/// The layer with the same vector added to every key, which changes no probability: exact attention stays what it was.
fn biased(layer: &Qkv) -> Result<Qkv> {
    let mut k = layer.k.to_f32_vec();
    k.iter_mut().step_by(head_dim(layer).max(1)).for_each(|x| *x += BIAS);
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
    Ok(Qkv {
        prefix: format!("{} + {BIAS} in a channel", layer.prefix.trim_end_matches('.')),
        q: wide(&layer.q),
        k: Tensor::new(k, layer.k.shape())?,
        v: wide(&layer.v),
    })
}

/// The schemes of the table that this machine computes.
fn speed(layer: &Qkv, progress: &indicatif::ProgressBar) -> Result<Vec<speed::Row>> {
    let subject = Subject {
        attention: Attention::new(),
        device: Device::Cpu,
        sinks: None,
        q: layer.q.clone(),
        k: layer.k.clone(),
        v: layer.v.clone(),
    };
    let names: Vec<SchemeName> = SHOWN.into_iter().map(SchemeName::from).collect();
    let mut timed = runnable(&subject.attention, &subject.q, &subject.k, &subject.v);
    timed.retain(|name| names.contains(name));
    progress.inc_length((timed.len() * REPS) as u64);
    Ok(subject.measure(&timed, REPS, None, progress)?)
}

fn smoothing(
    layers: &[Qkv],
    references: &[Reference<'_>],
    progress: &indicatif::ProgressBar,
) -> Result<Vec<SmoothingRow>> {
    let mut rows = Vec::new();
    for (layer, reference) in layers.iter().zip(references) {
        for preset in SMOOTHED {
            let given = preset.scheme(head_dim(layer));
            let error = |k| {
                let scheme = Scheme { smooth: Smoothing { k, ..given.smooth }, ..given };
                reference.oracle(&scheme, progress).map(|comparison| comparison.overall.relative_l1)
            };
            rows.push(SmoothingRow {
                layer: layer.prefix.trim_end_matches('.').to_owned(),
                scheme: preset.name(),
                relative_l1_without: error(SmoothK::Off)?,
                relative_l1_with: error(SmoothK::Mean)?,
            });
        }
    }
    Ok(rows)
}

fn text(
    layers: &[Qkv],
    accuracy: &[accuracy_row::Row],
    speed: &[speed::Row],
    by_shape: &[speed::Row],
    smoothing: &[SmoothingRow],
) -> String {
    let shape =
        layers.first().map(|layer| format!("{:?} {}", layer.q.shape(), layer.q.dtype())).unwrap_or_default();
    let title = styled(TITLE, "SageAttention in Rust: attention in 8 and 4 bits");
    let mut text =
        format!("{title}\n{}\n\n", styled(DIM, format!("{SOURCE}, {shape}, against exact attention")));

    let mut table = Table::new(&["<scheme", "cosine", "relative L1", "ms", "vs full", "<computed by"]);
    for row in accuracy {
        let timed = speed.iter().find(|timed| timed.scheme == row.scheme);
        table.row(vec![
            row.scheme.into(),
            format!("{:.5}", row.overall.cosine).into(),
            format!("{:.4}", row.overall.relative_l1).into(),
            timed.map_or("–".into(), |timed| format!("{:.2}", timed.times.median_ms).into()),
            timed.map_or("–".into(), |timed| ratio(timed.ratio_to_full_precision)),
            computed_by(row.computed_by),
        ]);
    }
    text.push_str(&format!("{table}\n"));

    let title = format!("Speed on longer sequences: random f32, {} threads", rayon::current_num_threads());
    let mut table = Table::new(&["<batch,heads,seq,dim", "<scheme", "ms", "GFLOP/s", "vs full"]);
    for row in by_shape {
        table.row(vec![
            row.shape.into(),
            row.scheme.into(),
            format!("{:.2}", row.times.median_ms).into(),
            format!("{:.1}", row.gflops).into(),
            ratio(row.ratio_to_full_precision),
        ]);
    }
    text.push_str(&format!("{}\n\n{table}\n", styled(TITLE, title)));

    text.push_str(&format!(
        "{}\n\n",
        styled(TITLE, "Smoothing: relative L1 without and with K's mean subtracted")
    ));
    let mut table = Table::new(&["<K of", "<scheme", "without", "with", "error shrinks"]);
    for row in smoothing {
        let gain = row.relative_l1_without / row.relative_l1_with;
        let cell = Cell::from(format!("{gain:.2}×"));
        table.row(vec![
            (&row.layer).into(),
            row.scheme.into(),
            format!("{:.4}", row.relative_l1_without).into(),
            format!("{:.4}", row.relative_l1_with).into(),
            if gain > 1.05 { cell.style(GOOD) } else { cell },
        ]);
    }
    let note = "A constant in a channel of K changes nothing in exact attention; models for images and video have \
                such channels.";
    text.push_str(&format!("{table}\n{}\n\n{}\n\n", styled(DIM, note), styled(TITLE, "Next")));
    for (command, why) in [
        ("sageattn run qkv.safetensors -o out.safetensors --causal", "attention of your own tensors"),
        ("sageattn accuracy qkv.safetensors --plot accuracy.png", "every scheme on them, head by head"),
        ("sageattn bench --causal --plot speed.png", "speed on this machine"),
        ("sageattn explain --heads 32 --seq 4096 --head-dim 128", "what would be computed, and why"),
    ] {
        text.push_str(&format!("  {command:<58} {}\n", styled(DIM, why)));
    }
    text
}

fn computed_by(by: ComputedBy) -> Cell {
    match by {
        ComputedBy::CpuKernel | ComputedBy::GpuKernel => by.name().into(),
        ComputedBy::Oracle => Cell::from(by.name()).style(DIM),
    }
}
