//! What the programs draw: curves over context length, and maps of layers and heads.

use std::fs;
use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use sage_plot::{Area, COLOURS, DrawResult, FONT, Figure, Format, INK, draw_mesh, legend, text};

use crate::Result;

/// A value against the context length, for several contestants.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What is shown.
    pub title: String,
    /// The vertical axis.
    pub axis: Axis,
    /// Contestants, with their points.
    pub series: Vec<(String, Vec<Point>)>,
}

/// A value at a context length.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Tokens.
    pub context: usize,
    /// What is shown.
    pub value: f64,
    /// How far rounds of measuring lie apart.
    pub range: Option<(f64, f64)>,
}

impl Point {
    fn context(&self) -> f64 {
        self.context as f64
    }

    fn low(&self) -> f64 {
        self.range.map_or(self.value, |range| range.0)
    }

    fn high(&self) -> f64 {
        self.range.map_or(self.value, |range| range.1)
    }
}

/// A vertical axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Begins at 0.
    FromZero,
    /// Begins near the smallest value.
    Near,
    /// A step up is a factor.
    Logarithmic,
}

/// Panels side by side, each with curves over context lengths.
///
/// # Errors
/// When the file has another ending than .png and .svg, or cannot be written.
pub fn lines(path: &Path, title: &str, caption: &str, panels: &[Panel]) -> Result<()> {
    write(path, &Lines { title, caption, panels })
}

/// A map for each contestant, one below another: a square for each layer and head, darker where the value is larger.
///
/// # Errors
/// As [`lines`].
pub fn heat_maps(path: &Path, title: &str, caption: &str, maps: &[(String, Vec<Vec<f32>>)]) -> Result<()> {
    write(path, &HeatMaps { title, caption, maps })
}

/// Draws a figure into a file.
///
/// # Errors
/// As [`lines`].
pub fn write(path: &Path, figure: &impl Figure) -> Result<()> {
    let bytes = Format::of(path).map_err(|reason| format!("--plot: {reason}"))?.render(figure);
    let bytes = bytes.map_err(|error| format!("{}: cannot be drawn: {error}", path.display()))?;
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Title and caption; what is below them is left.
fn headed<'a, B: DrawingBackend>(
    root: &Area<'a, B>,
    scale: f64,
    title: &str,
    caption: &str,
) -> std::result::Result<Area<'a, B>, Box<dyn std::error::Error>>
where
    B::ErrorType: 'static,
{
    text(root, scale, (20.0, 28.0), title, 21.0, FontStyle::Bold)?;
    text(root, scale, (20.0, 55.0), caption, 14.0, FontStyle::Normal)?;
    Ok(root.split_vertically((70.0 * scale) as i32).1)
}

struct Lines<'a> {
    title: &'a str,
    caption: &'a str,
    panels: &'a [Panel],
}

impl Lines<'_> {
    /// Every contestant of any panel, whose place here is its colour's everywhere.
    fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for (name, _) in self.panels.iter().flat_map(|panel| &panel.series) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names
    }
}

impl Figure for Lines<'_> {
    fn size(&self) -> (u32, u32) {
        (440 * self.panels.len().max(1) as u32, 470)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let below = headed(root, scale, self.title, self.caption)?;
        let names = self.names();
        let colour = |name: &str| {
            let place = names.iter().position(|known| *known == name).unwrap_or_default();
            COLOURS[place % COLOURS.len()]
        };
        let entries: Vec<_> = names.iter().map(|name| ((*name).to_owned(), colour(name))).collect();
        let height = legend(&below, scale, (20.0, 4.0), &entries)?;
        let area = below.split_vertically(((height + 10.0) * scale) as i32).1;
        for (area, panel) in area.split_evenly((1, self.panels.len())).iter().zip(self.panels) {
            text(area, scale, (20.0, 12.0), &panel.title, 15.0, FontStyle::Normal)?;
            let area = area.split_vertically((26.0 * scale) as i32).1;
            let (low, high) = bounds(panel, Point::low, Point::high);
            let room = (high - low).max(high.abs() * 0.002) * 0.15;
            match panel.axis {
                Axis::FromZero => curves(&area, scale, panel, 0.0..high * 1.08, colour)?,
                Axis::Near => curves(&area, scale, panel, low - room..high + room, colour)?,
                Axis::Logarithmic => curves(&area, scale, panel, Factors(low / 1.3, high * 1.3), colour)?,
            }
        }
        Ok(())
    }
}

fn bounds(panel: &Panel, low: fn(&Point) -> f64, high: fn(&Point) -> f64) -> (f64, f64) {
    let points = panel.series.iter().flat_map(|(_, points)| points);
    points.fold((f64::MAX, f64::MIN), |(l, h), point| (l.min(low(point)), h.max(high(point))))
}

fn curves<B: DrawingBackend, Y: AsRangedCoord<Value = f64>>(
    area: &Area<'_, B>,
    scale: f64,
    panel: &Panel,
    y: Y,
    colour: impl Fn(&str) -> RGBColor,
) -> DrawResult
where
    B::ErrorType: 'static,
    Y::CoordDescType: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let (left, right) = bounds(panel, Point::context, Point::context);
    let mut chart = ChartBuilder::on(area)
        .margin_left((12.0 * scale) as i32)
        .margin_right((16.0 * scale) as i32)
        .margin_bottom((10.0 * scale) as i32)
        .x_label_area_size((46.0 * scale) as u32)
        .y_label_area_size((58.0 * scale) as u32)
        .build_cartesian_2d(Factors(left / 1.12, right * 1.12), y)?;
    draw_mesh(
        chart
            .configure_mesh()
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| number(*y))
            .y_labels(7)
            .x_desc("context length, tokens"),
        scale,
    )?;
    for (name, points) in &panel.series {
        let colour = colour(name);
        let line = colour.mix(0.7).stroke_width((2.0 * scale) as u32);
        let at = || points.iter().map(|point| (point.context(), point.value));
        chart.draw_series(LineSeries::new(at(), line))?;
        let whiskers = points.iter().map(|point| {
            let ends = vec![(point.context(), point.low()), (point.context(), point.high())];
            PathElement::new(ends, colour.stroke_width(scale as u32))
        });
        chart.draw_series(whiskers)?;
        chart.draw_series(at().map(|point| Circle::new(point, (4.0 * scale) as i32, colour.filled())))?;
    }
    Ok(())
}

/// Thousands as such, and as many digits as three that say something.
fn number(value: f64) -> String {
    match value {
        _ if value >= 1e4 => format!("{:.0}k", value / 1e3),
        _ if value >= 100.0 || value == value.round() => format!("{value:.0}"),
        _ => format!("{value:.1}"),
    }
}

/// A logarithmic axis with labels at powers of two, or of ten where the range is wide.
struct Factors(f64, f64);

impl Ranged for Factors {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let part = (value / self.0).ln() / (self.1 / self.0).ln();
        limit.0 + (part * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        let base: f64 = if self.1 / self.0 > 256.0 { 10.0 } else { 2.0 };
        let exponents = self.0.log(base).ceil() as i32..=self.1.log(base).floor() as i32;
        exponents.map(|exponent| base.powi(exponent)).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.0..self.1
    }
}

struct HeatMaps<'a> {
    title: &'a str,
    caption: &'a str,
    maps: &'a [(String, Vec<Vec<f32>>)],
}

impl HeatMaps<'_> {
    /// Points of a square's side.
    const SQUARE: u32 = 24;
    /// Points around a map for its name and labels.
    const FRAME: (u32, u32) = (84, 84);

    fn layers(&self) -> usize {
        self.maps.iter().map(|(_, layers)| layers.len()).max().unwrap_or(0)
    }

    fn heads(&self) -> usize {
        self.maps.iter().flat_map(|(_, layers)| layers).map(Vec::len).max().unwrap_or(0)
    }

    fn map_height(&self) -> u32 {
        Self::SQUARE * self.heads() as u32 + Self::FRAME.1
    }
}

impl Figure for HeatMaps<'_> {
    fn size(&self) -> (u32, u32) {
        let width = Self::SQUARE * self.layers() as u32 + Self::FRAME.0;
        (width.max(780), 116 + self.map_height() * self.maps.len() as u32)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let below = headed(root, scale, self.title, self.caption)?;
        let values = self.maps.iter().flat_map(|(_, layers)| layers.iter().flatten());
        let largest = values.fold(f32::MIN_POSITIVE, |largest, &x| largest.max(x));
        key(&below, scale, largest)?;
        let mut rest = below.split_vertically((36.0 * scale) as i32).1;
        for (name, layers) in self.maps {
            let (area, after) = rest.split_vertically((f64::from(self.map_height()) * scale) as i32);
            rest = after;
            let values = || layers.iter().flatten().copied();
            let (mean, worst) =
                (values().sum::<f32>() / values().count().max(1) as f32, values().fold(0f32, f32::max));
            let heading = format!("{name}: mean {mean:.4}, worst head {worst:.4}");
            text(&area, scale, (20.0, 16.0), &heading, 15.0, FontStyle::Normal)?;
            self.map(&area.split_vertically((30.0 * scale) as i32).1, scale, layers, largest)?;
        }
        Ok(())
    }
}

impl HeatMaps<'_> {
    fn map<B: DrawingBackend>(
        &self,
        area: &Area<'_, B>,
        scale: f64,
        layers: &[Vec<f32>],
        largest: f32,
    ) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        // Squares and labels are placed by hand: a label is the name of a square, not of its edge.
        let side = f64::from(Self::SQUARE);
        let (left, top) = (58.0, 0.0);
        let at = |x: f64, y: f64| ((x * scale).round() as i32, (y * scale).round() as i32);
        let label = |horizontal, vertical| {
            let style = TextStyle::from((FONT, 12.0 * scale).into_font()).color(&INK);
            style.pos(Pos::new(horizontal, vertical))
        };
        for (layer, heads) in layers.iter().enumerate() {
            let x = left + side * layer as f64;
            for (head, value) in heads.iter().enumerate() {
                let y = top + side * head as f64;
                let corners = [at(x, y), at(x + side - 1.0, y + side - 1.0)];
                area.draw(&Rectangle::new(corners, shade(value / largest).filled()))?;
            }
            let bottom = top + side * heads.len() as f64 + 5.0;
            let centre = at(x + side / 2.0, bottom);
            area.draw(&Text::new(layer.to_string(), centre, label(HPos::Center, VPos::Top)))?;
        }
        for head in 0..self.heads() {
            let beside = at(left - 7.0, top + side * (head as f64 + 0.5));
            area.draw(&Text::new(head.to_string(), beside, label(HPos::Right, VPos::Center)))?;
        }
        let middle = at(left + side * layers.len() as f64 / 2.0, top + side * self.heads() as f64 + 24.0);
        area.draw(&Text::new("layer", middle, label(HPos::Center, VPos::Top)))?;
        let style = label(HPos::Center, VPos::Center).transform(FontTransform::Rotate270);
        let beside = at(24.0, top + side * self.heads() as f64 / 2.0);
        area.draw(&Text::new("head", beside, style))?;
        Ok(())
    }
}

/// White for 0, dark blue for 1.
fn shade(part: f32) -> RGBColor {
    const DARK: [f32; 3] = [8.0, 48.0, 107.0];
    const MIDDLE: [f32; 3] = [66.0, 146.0, 198.0];
    const LIGHT: [f32; 3] = [240.0, 246.0, 252.0];
    let (from, to, part) =
        if part < 0.5 { (LIGHT, MIDDLE, 2.0 * part) } else { (MIDDLE, DARK, 2.0 * part - 1.0) };
    let mix = |i: usize| (from[i] + (to[i] - from[i]) * part.clamp(0.0, 1.0)).round() as u8;
    RGBColor(mix(0), mix(1), mix(2))
}

/// What the shades mean.
fn key<B: DrawingBackend>(area: &Area<'_, B>, scale: f64, largest: f32) -> DrawResult
where
    B::ErrorType: 'static,
{
    const STEPS: usize = 60;
    let (left, width) = (58.0, 240.0);
    text(area, scale, (42.0, 12.0), "0", 13.0, FontStyle::Normal)?;
    for step in 0..STEPS {
        let x = |step: usize| ((left + width * step as f64 / STEPS as f64) * scale).round() as i32;
        let corners = [(x(step), (5.0 * scale) as i32), (x(step + 1), (19.0 * scale) as i32)];
        area.draw(&Rectangle::new(corners, shade((step as f32 + 0.5) / STEPS as f32).filled()))?;
    }
    text(area, scale, (left + width + 8.0, 12.0), &format!("{largest:.3}"), 13.0, FontStyle::Normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_equally_far_apart_and_labelled_at_powers() {
        let axis = Factors(256.0, 1024.0);
        let x = [256.0, 512.0, 1024.0].map(|value| axis.map(&value, (10, 110)));
        assert_eq!(x, [10, 60, 110]);
        assert_eq!(axis.key_points(5), [256.0, 512.0, 1024.0]);
        assert_eq!(Factors(5.0, 2000.0).key_points(5), [10.0, 100.0, 1000.0]);
        assert_eq!(Factors(0.4, 5.0).key_points(5), [0.5, 1.0, 2.0, 4.0]);
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0.5, 20.0, 15.84, 99.96, 512.4, 8160.0, 12_345.0].map(number);
        assert_eq!(numbers, ["0.5", "20", "15.8", "100.0", "512", "8160", "12k"]);
    }

    #[test]
    fn shades_darken_with_the_value() {
        let light = |part: f32| shade(part).0;
        assert_eq!([light(-1.0), light(0.0), light(1.0), light(2.0)], [240, 240, 8, 8]);
        assert!((0..10).all(|i| light(i as f32 / 10.0) > light((i + 1) as f32 / 10.0)));
    }
}
