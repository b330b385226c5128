//! How far a result is from another, as every table and report says it.

use sage_core::metrics::Accuracy;
use serde::Serialize;

use crate::table::Cell;

/// [`Accuracy`], with the field names of every report.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Metrics {
    pub cosine: f64,
    pub relative_l1: f64,
    pub rmse: f64,
    pub max_abs_error: f64,
}

impl From<Accuracy> for Metrics {
    fn from(d: Accuracy) -> Self {
        Metrics { cosine: d.cosine, relative_l1: d.relative_l1, rmse: d.rmse, max_abs_error: d.max_abs_error }
    }
}

impl Metrics {
    /// Headings of [`Metrics::cells`].
    pub const HEADINGS: [&'static str; 4] = ["cosine", "relative L1", "RMSE", "max error"];

    /// The four numbers as they stand in every table.
    pub fn cells(&self) -> [Cell; 4] {
        [
            format!("{:.6}", self.cosine).into(),
            format!("{:.5}", self.relative_l1).into(),
            format!("{:.2e}", self.rmse).into(),
            format!("{:.2e}", self.max_abs_error).into(),
        ]
    }
}
