//! Plots: one way to draw, for PNG and SVG alike, with a font that travels in the binary.

#![forbid(unsafe_code)]

mod density;

use std::error::Error;
use std::path::Path;

use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

pub use density::DensityPlot;

/// Whatever goes wrong while drawing.
pub type DrawResult = Result<(), Box<dyn Error>>;

/// A part of a plot.
pub type Area<'a, B> = DrawingArea<B, Shift>;

/// The text's font, in every plot.
pub const FONT: &str = "sans-serif";
/// Ordinary text and axes.
pub const INK: RGBColor = RGBColor(45, 50, 60);
/// Grid lines.
pub const FAINT: RGBColor = RGBColor(225, 228, 233);

/// Colours of series, told apart by people who see colours differently too (after Okabe and Ito).
pub const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(110, 110, 110),
    RGBColor(148, 103, 60),
];

/// Something that can be drawn.
pub trait Figure {
    /// Width and height, in points.
    fn size(&self) -> (u32, u32);

    /// Draws it; every length is to be multiplied by `scale`.
    ///
    /// # Errors
    /// When something does not fit where it is drawn.
    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static;
}

/// How a plot is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Pixels, two for each point.
    Png,
    /// Lines and letters; the viewer brings the font.
    Svg,
}

impl Format {
    /// The format that a file's name ends in, in either case.
    ///
    /// # Errors
    /// Names the file and the endings wanted.
    pub fn of(path: &Path) -> Result<Self, String> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        match extension.as_deref() {
            Some("png") => Ok(Format::Png),
            Some("svg") => Ok(Format::Svg),
            _ => Err(format!("file is {}, expected a name ending in .png or .svg", path.display())),
        }
    }

    /// The contents of a file with the figure.
    ///
    /// # Errors
    /// What the figure says.
    pub fn render(self, figure: &impl Figure) -> Result<Vec<u8>, Box<dyn Error>> {
        register_fonts()?;
        match self {
            Format::Png => png(figure),
            Format::Svg => svg(figure),
        }
    }
}

fn register_fonts() -> DrawResult {
    for (style, bytes) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, bytes).map_err(|_| "the built-in font is damaged")?;
    }
    Ok(())
}

fn svg(figure: &impl Figure) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, figure.size()).into_drawing_area();
        root.fill(&WHITE)?;
        figure.draw(&root, 1.0)?;
        root.present()?;
    }
    Ok(text.into_bytes())
}

/// Drawn four times as large as it is stored twice as large: the mean of each square of pixels smooths the edges,
/// which the bitmap backend itself leaves ragged.
fn png(figure: &impl Figure) -> Result<Vec<u8>, Box<dyn Error>> {
    const STORED: u32 = 2;
    const SAMPLES: u32 = 2;
    let (width, height) = figure.size();
    let (width, height) = (width * STORED, height * STORED);
    let (wide, high) = (width * SAMPLES, height * SAMPLES);
    let mut drawn = vec![0u8; (wide * high * 3) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut drawn, (wide, high)).into_drawing_area();
        root.fill(&WHITE)?;
        figure.draw(&root, f64::from(STORED * SAMPLES))?;
        root.present()?;
    }
    let mut stored = Vec::with_capacity((width * height * 3) as usize);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let sample = |dx: u32, dy: u32| {
                    let at = ((y * SAMPLES + dy) * wide + x * SAMPLES + dx) * 3 + channel;
                    u32::from(drawn[at as usize])
                };
                let sum: u32 = (0..SAMPLES * SAMPLES).map(|i| sample(i % SAMPLES, i / SAMPLES)).sum();
                stored.push((sum / (SAMPLES * SAMPLES)) as u8);
            }
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&stored)?;
    Ok(bytes)
}

/// A line of text with its left end at `(x, y)`, in points; `y` is the text's middle.
///
/// # Errors
/// What the backend says.
pub fn text<B: DrawingBackend>(
    area: &Area<'_, B>,
    scale: f64,
    (x, y): (f64, f64),
    text: &str,
    size: f64,
    style: FontStyle,
) -> DrawResult
where
    B::ErrorType: 'static,
{
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    let font = TextStyle::from((FONT, size * scale, style).into_font())
        .color(&INK)
        .pos(Pos::new(HPos::Left, VPos::Center));
    Ok(area.draw(&Text::new(text.to_owned(), ((x * scale) as i32, (y * scale) as i32), font))?)
}

/// Draws axes and a grid of the bold lines alone, as all plots have them.
///
/// # Errors
/// What the backend says.
pub fn draw_mesh<X, Y, B>(mesh: &mut MeshStyle<'_, '_, X, Y, B>, scale: f64) -> DrawResult
where
    X: Ranged + ValueFormatter<X::ValueType>,
    Y: Ranged + ValueFormatter<Y::ValueType>,
    B: DrawingBackend,
    B::ErrorType: 'static,
{
    Ok(mesh
        .set_all_tick_mark_size((5.0 * scale) as i32)
        .axis_desc_style((FONT, 14.0 * scale).into_font().color(&INK))
        .label_style((FONT, 13.0 * scale).into_font().color(&INK))
        .axis_style(INK.stroke_width(scale as u32))
        .bold_line_style(FAINT.stroke_width(scale as u32))
        .light_line_style(TRANSPARENT)
        .draw()?)
}

/// Dots with names, from left to right and on as many lines as they need. Returns the height, in points.
///
/// # Errors
/// What the backend says.
pub fn legend<B: DrawingBackend>(
    area: &Area<'_, B>,
    scale: f64,
    (left, top): (f64, f64),
    entries: &[(String, RGBColor)],
) -> Result<f64, Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    const SIZE: f64 = 14.0;
    const LINE: f64 = 22.0;
    let width = f64::from(area.dim_in_pixel().0) / scale;
    let (mut x, mut y) = (left, top + LINE / 2.0);
    for (name, colour) in entries {
        let style = TextStyle::from((FONT, SIZE * scale).into_font());
        let advance = f64::from(area.estimate_text_size(name, &style)?.0) / scale + 38.0;
        if x > left && x + advance > width {
            (x, y) = (left, y + LINE);
        }
        // The text's middle is that of its capitals' and descenders' box; a dot looks level a little higher.
        let centre = (((x + 7.0) * scale) as i32, ((y - 1.0) * scale) as i32);
        area.draw(&Circle::new(centre, (5.0 * scale) as i32, colour.filled()))?;
        text(area, scale, (x + 18.0, y), name, SIZE, FontStyle::Normal)?;
        x += advance;
    }
    Ok(y + LINE / 2.0 - top)
}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use super::*;

    /// A square of ink in the upper left corner.
    struct Corner;

    impl Figure for Corner {
        fn size(&self) -> (u32, u32) {
            (8, 4)
        }

        fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
        where
            B::ErrorType: 'static,
        {
            let side = (2.0 * scale) as i32;
            Ok(root.draw(&Rectangle::new([(0, 0), (side, side)], INK.filled()))?)
        }
    }

    #[test]
    fn the_format_is_that_of_the_name() {
        assert_eq!(Format::of(Path::new("a.b/c.PNG")), Ok(Format::Png));
        assert_eq!(Format::of(Path::new("c.svg")), Ok(Format::Svg));
        for wrong in ["png", "c.jpg", "c.svg.gz"] {
            let message = format!("file is {wrong}, expected a name ending in .png or .svg");
            assert_eq!(Format::of(Path::new(wrong)), Err(message));
        }
    }

    #[test]
    fn pixels_are_two_for_each_point() {
        let bytes = Format::Png.render(&Corner).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (16, 8));
        for (at, pixel) in pixels.chunks(3).enumerate() {
            let inside = at % 16 < 4 && at / 16 < 4;
            let expected = if inside { [INK.0, INK.1, INK.2] } else { [255; 3] };
            assert_eq!(pixel, expected, "pixel {at}");
        }
    }

    #[test]
    fn an_svg_has_the_size_in_points() {
        let text = String::from_utf8(Format::Svg.render(&Corner).unwrap()).unwrap();
        assert!(text.starts_with("<svg width=\"8\" height=\"4\""), "{text}");
        assert!(text.contains("#2D323C"), "{text}");
    }
}
