//! Tables: aligned columns under a thin rule, one look in every command.

use std::fmt::{self, Write};

use anstyle::{AnsiColor, Effects, Style};

/// Headings.
pub const TITLE: Style = Style::new().effects(Effects::BOLD);
/// What matters less.
pub const DIM: Style = Style::new().effects(Effects::DIMMED);
/// What is good.
pub const GOOD: Style = AnsiColor::Green.on_default();

/// Text in a style.
pub fn styled(style: Style, text: impl fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// A cell: its text, and how it looks.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// The same text in another style.
    pub fn style(self, style: Style) -> Self {
        Cell { style, ..self }
    }
}

impl<T: fmt::Display> From<T> for Cell {
    fn from(value: T) -> Self {
        Cell { text: value.to_string(), style: Style::new() }
    }
}

/// A ratio of speeds; green where it is a gain beyond noise.
pub fn ratio(ratio: f64) -> Cell {
    let cell = Cell::from(format!("{ratio:.2}×"));
    if ratio > 1.05 { cell.style(GOOD) } else { cell }
}

/// A table. Columns whose heading begins with `<` are aligned to the left, all others to the right.
#[derive(Clone, Debug)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub fn new(headings: &[&'static str]) -> Self {
        Table { headings: headings.to_vec(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }
}

/// Every character here is one column wide.
fn width(text: &str) -> usize {
    text.chars().count()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headings.iter().map(|h| h.trim_start_matches('<')).collect();
        let widths: Vec<usize> = (0..names.len())
            .map(|c| {
                let cells = self.rows.iter().filter_map(|row| row.get(c));
                cells.map(|cell| width(&cell.text)).chain([width(names[c])]).max().unwrap_or(0)
            })
            .collect();
        let line = |f: &mut fmt::Formatter<'_>, cells: &[Cell]| {
            let mut text = String::from(" ");
            for (c, cell) in cells.iter().enumerate().take(widths.len()) {
                let padding = " ".repeat(widths[c] - width(&cell.text));
                let shown = if cell.style == Style::new() {
                    cell.text.clone()
                } else {
                    styled(cell.style, &cell.text)
                };
                if self.headings[c].starts_with('<') {
                    write!(text, " {shown}{padding} ")?;
                } else {
                    write!(text, " {padding}{shown} ")?;
                }
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(f, &names.iter().map(|&name| Cell::from(name).style(TITLE)).collect::<Vec<_>>())?;
        line(f, &widths.iter().map(|&w| Cell::from("─".repeat(w)).style(DIM)).collect::<Vec<_>>())?;
        self.rows.iter().try_for_each(|row| line(f, row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["<scheme", "cosine"]);
        table.row(vec!["int8".into(), "0.9".into()]);
        table.row(vec!["a long one".into(), "0.99999".into()]);
        let plain = anstream::adapter::strip_str(&table.to_string()).to_string();
        assert_eq!(
            plain,
            "  scheme       cosine\n  ──────────  ───────\n  int8            0.9\n  a long one  0.99999\n"
        );
    }
}
