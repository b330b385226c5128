//! The plot of `sageattn bench`: GFLOP/s of each scheme, shape by shape.

use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::options::CallOptions;
use crate::plot::{Area, COLOURS, DrawResult, FONT, Figure, INK, draw_mesh, legend, text};
use crate::speed::Row;

/// Bars, grouped by shape.
#[derive(Clone, Debug)]
pub struct BenchPlot {
    shapes: Vec<String>,
    schemes: Vec<&'static str>,
    bars: Vec<Bar>,
    caption: String,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    shape: usize,
    scheme: usize,
    gflops: f64,
    ratio: f64,
}

impl BenchPlot {
    /// The rows of a run, in its order, all of calls with the same options.
    pub fn new(rows: &[Row], call: &CallOptions) -> Self {
        let mut plot = BenchPlot {
            shapes: Vec::new(),
            schemes: Vec::new(),
            bars: Vec::new(),
            caption: rows.first().map_or(String::new(), |row| {
                format!(
                    "{}, {call}, {} threads; above each bar: times full precision's speed",
                    row.dtype,
                    rayon::current_num_threads()
                )
            }),
        };
        for row in rows {
            let (shape, scheme) =
                (position(&mut plot.shapes, row.shape.to_string()), position(&mut plot.schemes, row.scheme));
            plot.bars.push(Bar { shape, scheme, gflops: row.gflops, ratio: row.ratio_to_full_precision });
        }
        plot
    }
}

/// Where `item` is in `list`, at its end if it was not there.
fn position<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    list.iter().position(|known| *known == item).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}

impl Figure for BenchPlot {
    fn size(&self) -> (u32, u32) {
        let bars = (self.shapes.len() * (self.schemes.len() + 1)) as u32;
        ((120 + bars * 46).clamp(760, 3000), 540)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        text(root, scale, (24.0, 30.0), "Speed of attention", 22.0, FontStyle::Bold)?;
        text(root, scale, (24.0, 58.0), &self.caption, 15.0, FontStyle::Normal)?;
        let colour = |scheme: usize| COLOURS[scheme % COLOURS.len()];
        let entries: Vec<_> =
            self.schemes.iter().enumerate().map(|(i, scheme)| ((*scheme).to_owned(), colour(i))).collect();
        let height = legend(root, scale, (24.0, 74.0), &entries)?;
        let (_, area) = root.split_vertically(((78.0 + height) * scale) as i32);
        let top = self.bars.iter().map(|bar| bar.gflops).fold(0.0, f64::max).max(1e-3) * 1.12;
        let mut chart = ChartBuilder::on(&area)
            .margin_left((14.0 * scale) as i32)
            .margin_right((16.0 * scale) as i32)
            .margin_top((8.0 * scale) as i32)
            .margin_bottom((12.0 * scale) as i32)
            .x_label_area_size((50.0 * scale) as u32)
            .y_label_area_size((70.0 * scale) as u32)
            .build_cartesian_2d(-0.5..(self.shapes.len() as f64 - 0.5), 0.0..top)?;
        let name = |x: &f64| {
            let near = (x - x.round()).abs() < 0.01;
            let index = x.round().max(0.0) as usize;
            if near { self.shapes.get(index).cloned().unwrap_or_default() } else { String::new() }
        };
        draw_mesh(
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_labels(self.shapes.len().max(2))
                .x_label_formatter(&name)
                .y_labels(7)
                .y_label_formatter(&|y| format!("{y:.0}"))
                .x_desc("batch, heads, sequence, head_dim")
                .y_desc("GFLOP/s"),
            scale,
        )?;
        let width = 0.8 / self.schemes.len().max(1) as f64;
        let left = |bar: &Bar| bar.shape as f64 - 0.4 + bar.scheme as f64 * width;
        chart.draw_series(self.bars.iter().map(|bar| {
            let corners = [(left(bar) + 0.06 * width, 0.0), (left(bar) + 0.94 * width, bar.gflops)];
            Rectangle::new(corners, colour(bar.scheme).filled())
        }))?;
        let style = TextStyle::from((FONT, 12.0 * scale).into_font())
            .color(&INK)
            .pos(Pos::new(HPos::Center, VPos::Bottom));
        chart.draw_series(self.bars.iter().map(|bar| {
            let above = (left(bar) + width / 2.0, bar.gflops + top * 0.01);
            Text::new(format!("{:.2}×", bar.ratio), above, style.clone())
        }))?;
        Ok(())
    }
}
