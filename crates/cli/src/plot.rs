//! Plots in files.

use std::path::{Path, PathBuf};

use sage_plot::Format;
pub use sage_plot::{Area, COLOURS, DrawResult, FONT, Figure, INK, draw_mesh, legend, text};

use crate::atomic_file;
use crate::failure::{Failure, Result};

/// A file to draw into.
#[derive(Clone, Debug)]
pub struct PlotFile {
    path: PathBuf,
    format: Format,
}

impl PlotFile {
    /// The file of `--plot`.
    pub fn new(path: &Path) -> Result<Self> {
        Self::of("--plot", path)
    }

    /// The file of an option. Takes the format from its name.
    pub fn of(option: &str, path: &Path) -> Result<Self> {
        let format = Format::of(path).map_err(|reason| Failure::Usage(format!("{option}: {reason}")))?;
        Ok(PlotFile { path: path.to_owned(), format })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Draws, and writes the file whole.
    pub fn write(&self, figure: &impl Figure) -> Result<()> {
        let bytes = self
            .format
            .render(figure)
            .map_err(|error| Failure::Failed(format!("{}: cannot be drawn: {error}", self.path.display())))?;
        atomic_file::write(&self.path, &bytes)
    }
}
