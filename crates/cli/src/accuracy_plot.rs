//! The plot of `sageattn accuracy`: error per head, and what smoothing does to K.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::FontStyle;
use sageattention::{Preset, Result as CallResult};
use sageattn_files::qkv_file::printable;

use crate::accuracy_row::Row;
use crate::compare::{ComputedBy, Reference};
use crate::failure::Result;
use crate::plot::{Area, COLOURS, DrawResult, FONT, Figure, INK, PlotFile, draw_mesh, legend, text};

/// What is drawn when no scheme is asked for: one of each generation. Twice as many lines could not be told apart.
const SHOWN: [Preset; 6] = [
    Preset::INT8,
    Preset::SAGE2_INT8_FP16_PER_THREAD,
    Preset::SAGE1_INT8_INT8,
    Preset::SAGE2_INT8_FP8_PER_THREAD,
    Preset::SAGE2PP_INT4_FP8,
    Preset::SAGE3_NVFP4,
];

/// Relative L1 of each head, for one scheme.
#[derive(Clone, Debug)]
struct Series {
    scheme: &'static str,
    /// For each set of tensors, its heads.
    heads: Vec<Vec<f64>>,
}

/// K of the head whose channels lie furthest from zero, compared with their spread.
#[derive(Clone, Debug, Default)]
struct BiasedHead {
    name: String,
    ratio: f64,
    before: Vec<f32>,
    after: Vec<f32>,
}

/// What the plot shows, collected as results come in.
#[derive(Clone, Debug)]
pub struct AccuracyPlot {
    file: PlotFile,
    series: Vec<Series>,
    /// Names of the sets of tensors.
    sets: Vec<String>,
    worst: BiasedHead,
}

impl AccuracyPlot {
    /// An empty plot for `path`.
    pub fn new(path: &Path) -> Result<Self> {
        Ok(AccuracyPlot {
            file: PlotFile::new(path)?,
            series: Vec::new(),
            sets: Vec::new(),
            worst: BiasedHead::default(),
        })
    }

    /// The file that [`AccuracyPlot::write`] writes.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Adds one set of tensors and the schemes' results on it.
    pub fn add(&mut self, reference: &Reference<'_>, rows: &[Row]) -> CallResult<()> {
        let oracle: Vec<&Row> = rows.iter().filter(|row| row.computed_by == ComputedBy::Oracle).collect();
        let few = oracle.len() <= COLOURS.len();
        let shown = oracle.iter().filter(|row| few || SHOWN.iter().any(|preset| preset.name() == row.scheme));
        for row in shown {
            let heads = row.per_head.iter().map(|head| head.metrics.relative_l1).collect();
            match self.series.iter_mut().find(|series| series.scheme == row.scheme) {
                Some(series) => series.heads.push(heads),
                None => self.series.push(Series { scheme: row.scheme, heads: vec![heads] }),
            }
        }
        let name = rows.first().map(|row| printable(row.prefix.trim_end_matches('.'))).unwrap_or_default();
        for &head in reference.heads().list() {
            let place = if name.is_empty() { String::new() } else { format!("{name}, ") };
            let found = BiasedHead::new(
                format!("{place}batch {}, head {}", head.batch, head.head),
                reference.heads().keys(head)?,
                reference.heads().head_dim(),
            );
            if found.ratio > self.worst.ratio || self.worst.before.is_empty() {
                self.worst = found;
            }
        }
        self.sets.push(name);
        Ok(())
    }

    /// Draws and writes.
    pub fn write(&self) -> Result<()> {
        self.file.write(self)
    }
}

impl BiasedHead {
    /// `k` is `[kv_len, head_dim]`.
    fn new(name: String, k: Vec<f32>, head_dim: usize) -> Self {
        let rows = (k.len() / head_dim).max(1) as f64;
        let mut mean = vec![0f64; head_dim];
        k.iter().enumerate().for_each(|(i, &x)| mean[i % head_dim] += f64::from(x) / rows);
        let after: Vec<f32> = k.iter().enumerate().map(|(i, x)| x - mean[i % head_dim] as f32).collect();
        let bias: f64 = mean.iter().map(|m| m * m).sum::<f64>() * rows;
        let spread: f64 = after.iter().map(|&x| f64::from(x).powi(2)).sum();
        let ratio = if spread > 0.0 { (bias / spread).sqrt() } else { 0.0 };
        BiasedHead { name, ratio, before: k, after }
    }
}

impl Figure for AccuracyPlot {
    fn size(&self) -> (u32, u32) {
        (1240, 560)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let (title, body) = root.split_vertically((52.0 * scale) as i32);
        text(&title, scale, (24.0, 30.0), "Accuracy of quantised attention", 22.0, FontStyle::Bold)?;
        let (left, right) = body.split_horizontally((720.0 * scale) as i32);
        self.draw_errors(&left, scale)?;
        self.draw_smoothing(&right, scale)
    }
}

impl AccuracyPlot {
    fn draw_errors<B: DrawingBackend>(&self, area: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        text(
            area,
            scale,
            (24.0, 12.0),
            "Relative L1 error of each head, against exact attention",
            16.0,
            FontStyle::Normal,
        )?;
        let colour = |i: usize| COLOURS[i % COLOURS.len()];
        let entries: Vec<_> =
            self.series.iter().enumerate().map(|(i, series)| (series.scheme.to_owned(), colour(i))).collect();
        let height = legend(area, scale, (24.0, 28.0), &entries)?;
        let (_, area) = area.split_vertically(((28.0 + height) * scale) as i32);
        let positive = || {
            self.series
                .iter()
                .flat_map(|s| s.heads.iter().flatten().copied())
                .filter(|&x| x > 0.0 && x.is_finite())
        };
        let low = positive().fold(f64::INFINITY, f64::min);
        let high = positive().fold(0.0, f64::max);
        let (low, high) = if low < high { (low / 1.25, high * 1.25) } else { (1e-6, 1.0) };
        let counts: Vec<usize> =
            self.series.first().map(|s| s.heads.iter().map(Vec::len).collect()).unwrap_or_default();
        let total: usize = counts.iter().sum();
        let mut chart = ChartBuilder::on(&area)
            .margin_left((14.0 * scale) as i32)
            .margin_right((16.0 * scale) as i32)
            .margin_top((8.0 * scale) as i32)
            .margin_bottom((12.0 * scale) as i32)
            .x_label_area_size((46.0 * scale) as u32)
            .y_label_area_size((74.0 * scale) as u32)
            .build_cartesian_2d(-0.7..(total.max(1) as f64 - 0.3), (low..high).log_scale())?;
        let head_at = |x: &f64| {
            let mut index = x.round().max(0.0) as usize;
            for &count in &counts {
                if index < count {
                    return index.to_string();
                }
                index -= count;
            }
            String::new()
        };
        draw_mesh(
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_labels(total.clamp(2, 26))
                .x_label_formatter(&head_at)
                .y_labels(8)
                .y_label_formatter(&|y| if *y < 1e-4 { format!("{y:.0e}") } else { y.to_string() })
                .y_desc("relative L1 (log scale)")
                .x_desc(if self.sets.len() > 1 { "head, within each set of tensors" } else { "head" }),
            scale,
        )?;
        let mut start = 0;
        for (set, &count) in counts.iter().enumerate() {
            if set > 0 {
                let x = start as f64 - 0.5;
                let line = [(x, low), (x, high)];
                chart.draw_series(LineSeries::new(line, INK.mix(0.35).stroke_width(scale as u32)))?;
            }
            let label = (FONT, 13.0 * scale).into_font().color(&INK);
            if self.sets.len() > 1 {
                chart.draw_series([Text::new(
                    self.sets[set].clone(),
                    (start as f64 - 0.25, high / 1.03),
                    label,
                )])?;
            }
            for (i, series) in self.series.iter().enumerate() {
                let Some(heads) = series.heads.get(set) else { continue };
                let points: Vec<(f64, f64)> = heads
                    .iter()
                    .enumerate()
                    .filter(|(_, y)| **y > 0.0 && y.is_finite())
                    .map(|(h, &y)| ((start + h) as f64, y))
                    .collect();
                let line = colour(i).mix(0.55).stroke_width((1.6 * scale) as u32);
                chart.draw_series(LineSeries::new(points.iter().copied(), line))?;
                let radius = if total > 80 { 2.0 } else { 4.0 };
                let dot =
                    |&point: &(f64, f64)| Circle::new(point, (radius * scale) as i32, colour(i).filled());
                chart.draw_series(points.iter().map(dot))?;
            }
            start += count;
        }
        Ok(())
    }

    fn draw_smoothing<B: DrawingBackend>(&self, area: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let worst = &self.worst;
        text(
            area,
            scale,
            (10.0, 12.0),
            "K of the head with the largest channel means",
            16.0,
            FontStyle::Normal,
        )?;
        let (before, after) = (COLOURS[1], COLOURS[0]);
        let entries = [("as given".to_owned(), before), ("minus the mean of each channel".to_owned(), after)];
        let height = legend(area, scale, (10.0, 28.0), &entries)?;
        let caption = format!("{}: means are {:.1} × the spread", worst.name, worst.ratio);
        text(area, scale, (10.0, 40.0 + height), &caption, 13.0, FontStyle::Normal)?;
        let (_, area) = area.split_vertically(((50.0 + height) * scale) as i32);
        let (low, high) = range(worst.before.iter().chain(&worst.after));
        let histograms =
            [(&worst.before, before), (&worst.after, after)].map(|(k, c)| (histogram(k, low, high), c));
        let top = histograms.iter().flat_map(|(h, _)| h.iter().copied()).fold(0.0, f64::max) * 1.08;
        let mut chart = ChartBuilder::on(&area)
            .margin_right((24.0 * scale) as i32)
            .margin_top((8.0 * scale) as i32)
            .margin_bottom((12.0 * scale) as i32)
            .x_label_area_size((46.0 * scale) as u32)
            .y_label_area_size((64.0 * scale) as u32)
            .build_cartesian_2d(low..high, 0.0..top.max(1e-9))?;
        draw_mesh(
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_labels(9)
                .y_labels(6)
                .x_label_formatter(&|x| format!("{x:.0}"))
                .y_label_formatter(&|y| format!("{y:.0} %"))
                .x_desc("value of an element of K")
                .y_desc("share of elements"),
            scale,
        )?;
        let edge = |bin: usize| low + bin as f64 * (high - low) / BINS as f64;
        let [(given, _), (smoothed, _)] = &histograms;
        let bar = |(bin, &share): (usize, &f64)| {
            Rectangle::new([(edge(bin), 0.0), (edge(bin + 1), share)], before.mix(0.5).filled())
        };
        chart.draw_series(given.iter().enumerate().filter(|(_, share)| **share > 0.0).map(bar))?;
        // The other as an outline: two fills would mix to a third colour.
        let steps = smoothed
            .iter()
            .enumerate()
            .flat_map(|(bin, &share)| [(edge(bin), share), (edge(bin + 1), share)]);
        chart.draw_series(LineSeries::new(steps, after.stroke_width((2.2 * scale) as u32)))?;
        Ok(())
    }
}

/// Bars of a histogram.
const BINS: usize = 60;

/// Per cent of the values in each bar.
fn histogram(values: &[f32], low: f64, high: f64) -> Vec<f64> {
    let mut shares = vec![0f64; BINS];
    for &x in values.iter().filter(|x| x.is_finite()) {
        let bin = ((f64::from(x) - low) / (high - low) * BINS as f64) as usize;
        shares[bin.min(BINS - 1)] += 100.0 / values.len() as f64;
    }
    shares
}

/// The finite values' range, never empty.
fn range<'a>(values: impl Iterator<Item = &'a f32>) -> (f64, f64) {
    let finite = values.copied().filter(|x| x.is_finite()).map(f64::from);
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
    if low < high { (low, high) } else { (-1.0, 1.0) }
}
