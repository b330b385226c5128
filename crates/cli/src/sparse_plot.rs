//! The plot of `sageattn sparse`: error against density.

use plotters::prelude::*;
use plotters::style::FontStyle;

use crate::plot::{Area, COLOURS, DrawResult, Figure, draw_mesh, legend, text};
use crate::sparse_row::Row;

/// Relative L1 against density, a line for each predictor and size of blocks; dashed with pooled terms.
#[derive(Clone, Debug)]
pub struct SparsePlot {
    caption: String,
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
struct Line {
    name: String,
    dashed: bool,
    /// Density and error, in ascending order.
    points: Vec<(f64, f64)>,
}

/// The smallest error that is drawn: below it lies what rounding does.
const LEAST: f64 = 1e-4;

impl SparsePlot {
    /// The rows of a run.
    pub fn new(rows: &[Row]) -> Self {
        let mut lines: Vec<Line> = Vec::new();
        let mut add = |name: &str, dashed: bool, point: (f64, f64)| match lines
            .iter_mut()
            .find(|line| line.name == name && line.dashed == dashed)
        {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name: name.to_owned(), dashed, points: vec![point] }),
        };
        let prefixed = rows.iter().any(|row| !row.prefix.is_empty());
        for row in rows {
            let mut name = format!("{} {}x{}", row.predictor, row.block_q, row.block_k);
            if prefixed {
                name = format!("{} {name}", row.prefix.trim_end_matches('.'));
            }
            add(&name, false, (row.density, row.errors.against_exact.relative_l1));
            if let Some(tail) = row.errors.pooled_tail {
                add(&name, true, (row.density, tail.relative_l1));
            }
        }
        lines.iter_mut().for_each(|line| line.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
        let dashed = if lines.iter().any(|line| line.dashed) { "; dashed: with a pooled tail" } else { "" };
        let caption = rows.first().map_or(String::new(), |row| {
            format!("{}, {}, relative L1 against exact dense attention{dashed}", row.source, row.scheme)
        });
        SparsePlot { caption, lines }
    }

    /// Names of the lines, each once, in the order of their colours.
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for line in &self.lines {
            if !names.contains(&line.name.as_str()) {
                names.push(&line.name);
            }
        }
        names
    }
}

impl Figure for SparsePlot {
    fn size(&self) -> (u32, u32) {
        (820, 560)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        text(root, scale, (24.0, 30.0), "Error against density", 22.0, FontStyle::Bold)?;
        text(root, scale, (24.0, 58.0), &self.caption, 13.0, FontStyle::Normal)?;
        let names = self.names();
        let colour = |name: &str| {
            COLOURS[names.iter().position(|known| *known == name).unwrap_or_default() % COLOURS.len()]
        };
        let entries: Vec<_> = names.iter().map(|name| ((*name).to_owned(), colour(name))).collect();
        let height = legend(root, scale, (24.0, 74.0), &entries)?;
        let (_, area) = root.split_vertically(((78.0 + height) * scale) as i32);
        let errors = || self.lines.iter().flat_map(|line| &line.points).map(|point| point.1.max(LEAST));
        let (low, high) = (errors().fold(1.0, f64::min) / 1.3, errors().fold(2.0 * LEAST, f64::max) * 1.3);
        let mut chart = ChartBuilder::on(&area)
            .margin_left((14.0 * scale) as i32)
            .margin_right((24.0 * scale) as i32)
            .margin_top((8.0 * scale) as i32)
            .margin_bottom((12.0 * scale) as i32)
            .x_label_area_size((50.0 * scale) as u32)
            .y_label_area_size((70.0 * scale) as u32)
            .build_cartesian_2d(0.0..1.0, (low..high).log_scale())?;
        draw_mesh(
            chart
                .configure_mesh()
                .x_labels(11)
                .y_labels(8)
                .x_label_formatter(&|x| format!("{x:.1}"))
                .y_label_formatter(&|y| format!("{y:.4}").trim_end_matches('0').to_owned())
                .x_desc("density: share of blocks computed")
                .y_desc("relative L1"),
            scale,
        )?;
        for line in &self.lines {
            let style = colour(&line.name).stroke_width((2.0 * scale) as u32);
            let points = line.points.iter().map(|&(x, y)| (x, y.max(LEAST)));
            match line.dashed {
                true => chart.draw_series(DashedLineSeries::new(
                    points.clone(),
                    (6.0 * scale) as u32,
                    (4.0 * scale) as u32,
                    style,
                ))?,
                false => chart.draw_series(LineSeries::new(points.clone(), style))?,
            };
            let radius = (3.0 * scale) as i32;
            chart.draw_series(points.map(|point| Circle::new(point, radius, colour(&line.name).filled())))?;
        }
        Ok(())
    }
}
