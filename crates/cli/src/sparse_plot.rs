//! The plot of `sageattn sparse`: error against density.

use sage_plot::DensityPlot;

use crate::sparse_row::Row;

/// Relative L1 against density, a line for each predictor and size of blocks; dashed with pooled terms.
pub fn sparse_plot(rows: &[Row]) -> DensityPlot {
    let tails = rows.iter().any(|row| row.errors.pooled_tail.is_some());
    let dashed = if tails { "; dashed: with a pooled tail" } else { "" };
    let caption = rows.first().map_or(String::new(), |row| {
        format!("{}, {}, relative L1 against exact dense attention{dashed}", row.source, row.scheme)
    });
    let mut plot = DensityPlot::new("Error against density", caption, "relative L1");
    let prefixed = rows.iter().any(|row| !row.prefix.is_empty());
    for row in rows {
        let mut name = format!("{} {}x{}", row.predictor, row.block_q, row.block_k);
        if prefixed {
            name = format!("{} {name}", row.prefix.trim_end_matches('.'));
        }
        plot.add(&name, false, [row.density, row.errors.against_exact.relative_l1]);
        if let Some(tail) = row.errors.pooled_tail {
            plot.add(&name, true, [row.density, tail.relative_l1]);
        }
    }
    plot
}
