//! Tile shapes that were measured on the GPU at hand, in place of the kernels' own table: what `sageattn tune` writes.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use sage_core::{BackendErrorKind, Choice, Error, Result};
use sage_cuda::{Device, Stream};
use sage_kernels::Tiling;
use sage_kernels::tuning::{Key, candidates};
use serde::{Deserialize, Serialize};

use crate::backend::Forced;
use crate::{Cuda, DeviceCall, DeviceTensor};

/// Names a file with measured tile shapes.
const VARIABLE: &str = "SAGEATTENTION_TUNING";

/// Runs of a tile shape before it is timed, and timed runs.
const WARM_UP: usize = 2;
const RUNS: usize = 7;

/// Measured tile shapes of a GPU.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TuningTable {
    /// The GPU that they were measured on, by the driver's name.
    pub gpu: String,
    /// The tile shapes.
    pub rows: Vec<TunedShape>,
}

/// The fastest tile shape for kernels of a kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TunedShape {
    /// The kind.
    pub shape: Key,
    /// The tile shape.
    pub tiling: Tiling,
    /// What was measured, in words.
    pub reason: String,
}

/// A tile shape that was tried.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The tile shape.
    pub tiling: Tiling,
    /// Median time of the attention kernel, or why there is none.
    pub time: Result<Duration>,
}

impl TuningTable {
    /// An empty table of a device.
    pub fn new(device: &Device) -> Self {
        TuningTable { gpu: device.info().name.clone(), rows: Vec::new() }
    }

    /// Where a device's table is looked for: the file that `SAGEATTENTION_TUNING` names, or one for the GPU's name in
    /// the kernel cache's folder; none where there is no such folder.
    pub fn path(device: &Device) -> Option<PathBuf> {
        if let Some(path) = env::var_os(VARIABLE) {
            return Some(path.into());
        }
        let name: String =
            device.info().name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        Some(device.disk_cache()?.folder().join(format!("tuning-{name}.json")))
    }

    /// A file's table.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |error: String| Error::backend(format!("tuning table {}: {error}", path.display()));
        let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))
    }

    /// The device's table: empty where there is none, and with a warning where it is unreadable or another GPU's.
    pub(super) fn of(device: &Device) -> Self {
        let empty = TuningTable::new(device);
        let Some(path) = TuningTable::path(device).filter(|path| path.exists()) else { return empty };
        match TuningTable::read(&path) {
            Ok(table) if table.gpu == empty.gpu => table,
            Ok(table) => {
                tracing::warn!(
                    "tuning table {}: gpu is {}, expected {}; not used",
                    path.display(),
                    table.gpu,
                    empty.gpu
                );
                empty
            }
            Err(error) => {
                tracing::warn!("{error}; not used");
                empty
            }
        }
    }

    /// The tile shape for kernels of a kind.
    pub fn tiling(&self, shape: &Key) -> Option<Tiling> {
        self.rows.iter().find(|row| row.shape == *shape).map(|row| row.tiling)
    }

    /// Puts a row in, in place of one for the same kind.
    pub fn set(&mut self, row: TunedShape) {
        self.rows.retain(|old| old.shape != row.shape);
        self.rows.push(row);
    }

    /// The table as a file holds it.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|error| Error::backend(error.to_string()))
    }
}

impl Cuda {
    /// Times a call's attention kernel in every tile shape worth trying, that of the kernels' own table first: the
    /// kind of kernel, and the trials. Calls `tried` after each. Waits for the GPU.
    ///
    /// # Errors
    /// As [`sage_core::Backend::run`]. A tile shape that does not compile is a trial with its error, but a GPU that
    /// is lost ends the trials, all of which would fail from there on.
    pub fn tune(
        &self,
        stream: &Stream,
        call: &DeviceCall<'_>,
        choice: Choice,
        out: DeviceTensor<'_>,
        mut tried: impl FnMut(usize, usize),
    ) -> Result<Option<(Key, Vec<Trial>)>> {
        let Some(own) = self.prepare(stream, call, choice, (out, None), Forced::default())? else {
            return Ok(None);
        };
        let shape = *own.plan.forward.key();
        let tilings = candidates(self.machine(), &shape);
        let time = |tiling: Tiling| -> Result<Duration> {
            let prepared = self.prepare(
                stream,
                call,
                choice,
                (out, None),
                Forced { tiling: Some(tiling), splits: None },
            )?;
            let Some(prepared) = prepared else { return Ok(Duration::ZERO) };
            // Clocks fall under load: the first runs warm up.
            self.time_prepared(stream, &prepared, WARM_UP)?;
            let times = self.time_prepared(stream, &prepared, RUNS)?;
            let attention = times.iter().find(|(name, _)| name.starts_with("attention"));
            attention
                .map(|(_, time)| *time)
                .ok_or_else(|| Error::unsupported("tuning", "the call has no attention kernel"))
        };
        let mut trials = Vec::new();
        for (index, &tiling) in tilings.iter().enumerate() {
            let time = time(tiling);
            if let Err(error) = &time
                && matches!(error.backend_kind(), Some(BackendErrorKind::Lost | BackendErrorKind::Forked))
            {
                return Err(error.clone());
            }
            trials.push(Trial { tiling, time });
            tried(index + 1, tilings.len());
        }
        Ok(Some((shape, trials)))
    }
}
