//! Aligned tables for a terminal, which Markdown takes as well.

/// Prints rows under a heading; the first column is aligned left, the others right.
pub fn print(heading: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].chars().count()]).max().unwrap_or(0)
    };
    let line = |cells: &[String]| {
        let padded = cells.iter().enumerate().map(|(column, cell)| {
            let width = width(column);
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        println!("| {} |", padded.collect::<Vec<_>>().join(" | "));
    };
    line(&heading.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>());
    let rule = (0..heading.len()).map(|column| {
        let dashes = "-".repeat(width(column).max(2) - 1);
        if column == 0 { format!("{dashes}-") } else { format!("{dashes}:") }
    });
    line(&rule.collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
}
