//! Two real models on candle, small enough for a laptop, whose attention is a parameter: what the programs `generate`,
//! `embed` and `attention` share. `scripts/fetch_models.sh` fetches the weights.

pub mod attend;
pub mod bert;
pub mod caches;
pub mod files;
pub mod llama;
pub mod method;
pub mod oracle;
pub mod place;
pub mod plot;
pub mod progress;
pub mod sparse;
pub mod table;
pub mod timing;

use std::process::ExitCode;

/// Result of the examples' functions.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// How a program ends: an error goes to standard error in words, with exit code 1.
pub fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
