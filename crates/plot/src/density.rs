//! What leaving blocks out costs, against the share of blocks that is left.

use plotters::prelude::*;
use plotters::style::FontStyle;

use crate::{Area, COLOURS, DrawResult, Figure, draw_mesh, legend, text};

/// A positive quantity against density, a line for each name in a colour of its own; a name may have a second line, dashed.
/// The quantity's axis is logarithmic.
#[derive(Clone, Debug)]
pub struct DensityPlot {
    title: String,
    caption: String,
    quantity: String,
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
struct Line {
    name: String,
    dashed: bool,
    /// Density and quantity.
    points: Vec<(f64, f64)>,
}

/// The smallest quantity that is drawn: below it lies what rounding does.
const LEAST: f64 = 1e-4;

impl DensityPlot {
    /// A plot without lines as yet; `quantity` stands beside its axis.
    pub fn new(title: impl Into<String>, caption: impl Into<String>, quantity: impl Into<String>) -> Self {
        DensityPlot {
            title: title.into(),
            caption: caption.into(),
            quantity: quantity.into(),
            lines: Vec::new(),
        }
    }

    /// Adds a point, `[density, quantity]`, to the line of that name.
    pub fn add(&mut self, name: &str, dashed: bool, [density, quantity]: [f64; 2]) {
        let known = self.lines.iter().position(|line| line.name == name && line.dashed == dashed);
        let at = known.unwrap_or(self.lines.len());
        if known.is_none() {
            self.lines.push(Line { name: name.to_owned(), dashed, points: Vec::new() });
        }
        let points = &mut self.lines[at].points;
        points.push((density, quantity));
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
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

impl Figure for DensityPlot {
    fn size(&self) -> (u32, u32) {
        (820, 560)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        text(root, scale, (24.0, 30.0), &self.title, 22.0, FontStyle::Bold)?;
        text(root, scale, (24.0, 58.0), &self.caption, 13.0, FontStyle::Normal)?;
        let names = self.names();
        let colour = |name: &str| {
            COLOURS[names.iter().position(|known| *known == name).unwrap_or_default() % COLOURS.len()]
        };
        let entries: Vec<_> = names.iter().map(|name| ((*name).to_owned(), colour(name))).collect();
        let height = legend(root, scale, (24.0, 74.0), &entries)?;
        let (_, area) = root.split_vertically(((78.0 + height) * scale) as i32);
        let quantities = || self.lines.iter().flat_map(|line| &line.points).map(|point| point.1.max(LEAST));
        let (low, high) =
            (quantities().fold(1.0, f64::min) / 1.3, quantities().fold(2.0 * LEAST, f64::max) * 1.3);
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
                .y_desc(self.quantity.as_str()),
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
