//! What the planner weighed for a call on a GPU, in a table.

use sage_kernels::forward::{Alternative, ForwardPlan};
use serde_json::{Value, json};

use crate::table::{TITLE, Table, styled};

/// Alternatives of which times are predicted, the shortest first.
#[derive(Debug, Default)]
pub struct Weighed(Vec<(Alternative, f64)>);

impl Weighed {
    /// Those of all that are predicted.
    pub fn new(alternatives: Vec<Alternative>) -> Self {
        let timed = alternatives.into_iter().filter_map(|found| Some((found, found.predicted?)));
        let mut timed: Vec<_> = timed.collect();
        timed.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        Weighed(timed)
    }

    /// A table that marks the plan; empty where nothing is predicted.
    pub fn table(&self, plan: &ForwardPlan) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["<scheme", "<tile shape", "parts of keys", "predicted µs", "<"]);
        for (found, time) in &self.0 {
            table.row(vec![
                found.scheme.to_string().into(),
                found.tiling.to_string().into(),
                found.splits.to_string().into(),
                format!("{time:.1}").into(),
                if is_planned(found, plan) { "planned".into() } else { "".into() },
            ]);
        }
        format!("\n\n{}\n{table}", styled(TITLE, "Weighed"))
    }

    /// As JSON.
    pub fn json(&self, plan: &ForwardPlan) -> Value {
        let row = |(found, time): &(Alternative, f64)| {
            json!({
                "scheme": found.scheme.to_string(),
                "tiling": found.tiling.to_string(),
                "splits": found.splits,
                "predicted_us": time,
                "planned": is_planned(found, plan),
            })
        };
        self.0.iter().map(row).collect()
    }
}

fn is_planned(found: &Alternative, plan: &ForwardPlan) -> bool {
    found.scheme == *plan.scheme() && found.tiling == plan.tiling() && found.splits == plan.splits()
}
