//! Plots as SVG files.

use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::Result;

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(45, 50, 60);
const FAINT: RGBColor = RGBColor(225, 228, 233);

/// Colours of series, told apart by people who see colours differently too (after Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(110, 110, 110),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A value against the context length, for several contestants.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What is shown.
    pub title: String,
    /// Contestants, with their points (context length, value).
    pub series: Vec<(String, Vec<(f64, f64)>)>,
    /// Whether the vertical axis begins at 0, or near the smallest value.
    pub from_zero: bool,
}

/// Panels side by side, each with lines over context lengths.
///
/// # Errors
/// When the file cannot be written.
pub fn lines(path: &Path, title: &str, caption: &str, panels: &[Panel]) -> Result<()> {
    draw(path, (470 * panels.len() as u32, 430), title, caption, |area| {
        for (area, panel) in area.split_evenly((1, panels.len())).iter().zip(panels) {
            panel_lines(area, panel)?;
        }
        Ok(())
    })
}

fn panel_lines(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let points = || panel.series.iter().flat_map(|(_, points)| points.iter());
    let bounds = |value: fn(&(f64, f64)) -> f64| {
        points().map(value).fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x), high.max(x)))
    };
    let ((left, right), (low, high)) = (bounds(|point| point.0.log2()), bounds(|point| point.1));
    let room = if panel.from_zero { high * 0.1 } else { (high - low).max(high.abs() * 0.01) * 0.15 };
    let bottom = if panel.from_zero { 0.0 } else { low - room };
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(&panel.title, (FONT, 16).into_font().color(&INK))
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(left - 0.15..right + 0.15, bottom..high + room)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(FAINT)
        .axis_style(FAINT)
        .label_style((FONT, 13).into_font().color(&INK))
        .x_labels((right - left).round() as usize + 1)
        .x_label_formatter(&|x| format!("{}", x.exp2().round()))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .x_desc("context length, tokens")
        .draw()?;
    for ((name, points), colour) in panel.series.iter().zip(COLOURS.iter().cycle()) {
        let at = || points.iter().map(|(x, y)| (x.log2(), *y));
        chart
            .draw_series(LineSeries::new(at(), colour.stroke_width(2)))?
            .label(name)
            .legend(|(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
        chart.draw_series(at().map(|point| Circle::new(point, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 13).into_font().color(&INK))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

/// A square for each layer and head, darker where the value is larger; and the largest and the mean value in words.
///
/// # Errors
/// When the file cannot be written.
pub fn heat_map(path: &Path, title: &str, caption: &str, layers: &[Vec<f32>]) -> Result<()> {
    let heads = layers.first().map_or(0, Vec::len);
    let largest = layers.iter().flatten().fold(f32::MIN_POSITIVE, |largest, &x| largest.max(x));
    // Layers from left to right: models have more of them than heads.
    let size = ((90 + 26 * layers.len() as u32).max(560), 150 + 26 * heads as u32);
    draw(path, size, title, caption, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(38)
            .y_label_area_size(44)
            .build_cartesian_2d(0f64..layers.len() as f64, heads as f64..0f64)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(FAINT)
            .label_style((FONT, 13).into_font().color(&INK))
            .x_desc("layer")
            .y_desc("head")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        for (x, layer) in layers.iter().enumerate() {
            chart.draw_series(layer.iter().enumerate().map(|(y, value)| {
                let (x, y) = (x as f64, y as f64);
                let shade = f64::from(value / largest).sqrt();
                Rectangle::new([(x, y), (x + 0.96, y + 0.96)], COLOURS[1].mix(0.04 + 0.96 * shade).filled())
            }))?;
        }
        Ok(())
    })
}

fn draw(
    path: &Path,
    (width, height): (u32, u32),
    title: &str,
    caption: &str,
    content: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<()> {
    for (style, bytes) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, bytes).map_err(|_| "the built-in font is damaged")?;
    }
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let bold = (FONT, 20, FontStyle::Bold).into_font().color(&INK);
        root.draw(&Text::new(title, (16, 14), bold))?;
        root.draw(&Text::new(caption, (16, 40), (FONT, 13).into_font().color(&INK)))?;
        content(&root.split_vertically(58).1)?;
        root.present()?;
    }
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}
