//! A picture of the blocks that are computed of one head.

use plotters::prelude::*;
use plotters::style::FontStyle;
use sageattention::sparse::BlockMap;
use sageattention::{Problem, Result};

use crate::plot::{Area, COLOURS, DrawResult, Figure, INK, text};
use crate::sparse_row::densities;

/// The map of one head: queries downwards, keys to the right.
#[derive(Clone, Debug)]
pub struct MapPicture {
    title: String,
    caption: String,
    rows: Vec<Vec<bool>>,
}

/// Points around the map: left, top, right, bottom.
const MARGINS: [u32; 4] = [24, 84, 24, 40];

impl MapPicture {
    /// The map of head `head` of all batch entries' heads, which must be there.
    ///
    /// # Errors
    /// When the map is not of the problem.
    pub fn new(map: &BlockMap, head: usize, setting: &str, problem: &Problem) -> Result<Self> {
        let [_, _, rows, _] = map.shape();
        let density = densities(map, problem)?.1.get(head).copied().unwrap_or(1.0);
        Ok(MapPicture {
            title: format!("Blocks computed of head {head}: {:.1} %", 100.0 * density),
            caption: format!("{setting}; queries downwards, keys to the right"),
            rows: map.rows().skip(head * rows).take(rows).map(<[bool]>::to_vec).collect(),
        })
    }

    fn columns(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    /// Points of a block's side: at least one, and as many as make the map about 600 wide.
    fn cell(&self) -> u32 {
        (600 / self.columns().max(self.rows.len()).max(1) as u32).clamp(1, 12)
    }
}

impl Figure for MapPicture {
    fn size(&self) -> (u32, u32) {
        let [left, top, right, bottom] = MARGINS;
        let side = |blocks: usize| blocks.min(4096) as u32 * self.cell();
        ((left + side(self.columns()) + right).max(560), top + side(self.rows.len()) + bottom)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<'_, B>, scale: f64) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        text(root, scale, (24.0, 30.0), &self.title, 20.0, FontStyle::Bold)?;
        text(root, scale, (24.0, 58.0), &self.caption, 14.0, FontStyle::Normal)?;
        let [left, top, ..] = MARGINS;
        let at = |row: usize, column: usize| {
            let place =
                |start: u32, block: usize| (f64::from(start + block as u32 * self.cell()) * scale) as i32;
            (place(left, column), place(top, row))
        };
        for (row, flags) in self.rows.iter().enumerate() {
            // A run of blocks is one rectangle, so that no seams show.
            let mut start = 0;
            for run in flags.chunk_by(|a, b| a == b) {
                if run[0] {
                    let corners = [at(row, start), at(row + 1, start + run.len())];
                    root.draw(&Rectangle::new(corners, COLOURS[0].filled()))?;
                }
                start += run.len();
            }
        }
        let frame = [at(0, 0), at(self.rows.len(), self.columns())];
        Ok(root.draw(&Rectangle::new(frame, INK.stroke_width(scale as u32)))?)
    }
}
