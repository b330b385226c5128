//! What a call asks for beside its tensors.

use pyo3::prelude::*;
use sageattention::{Alignment, Attention, Error, Layout, Preset, Result};

use crate::errors::exception;

/// What a call asks for beside its tensors. Made once for each combination, and kept.
#[pyclass(frozen)]
pub(crate) struct Options {
    layout: Layout,
    is_causal: bool,
    alignment: Alignment,
    window: (Option<usize>, Option<usize>),
    sm_scale: Option<f32>,
    logit_softcap: Option<f32>,
    preset: Option<Preset>,
    /// Whether a device that lacks the preset's kernels computes with its nearest.
    nearest: bool,
    smooth_k: bool,
    pooled_tail: bool,
}

#[pymethods]
impl Options {
    /// `causal_alignment` is "bottom_right" or "top_left"; `scheme` the name of a preset, or None for the backend's
    /// choice; `window_left` and `window_right` are None for no limit.
    #[new]
    #[pyo3(signature = (
        *, tensor_layout, is_causal, causal_alignment, window_left, window_right, sm_scale, logit_softcap, scheme, nearest,
        smooth_k, pooled_tail
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python constructor")]
    fn new(
        tensor_layout: &str,
        is_causal: bool,
        causal_alignment: &str,
        window_left: Option<usize>,
        window_right: Option<usize>,
        sm_scale: Option<f64>,
        logit_softcap: Option<f64>,
        scheme: Option<&str>,
        nearest: bool,
        smooth_k: bool,
        pooled_tail: bool,
    ) -> PyResult<Self> {
        let layout = match tensor_layout {
            "HND" => Ok(Layout::Hnd),
            "NHD" => Ok(Layout::Nhd),
            other => Err(Error::value("tensor_layout", other, "HND or NHD")),
        };
        let alignment = match causal_alignment {
            "bottom_right" => Ok(Alignment::BottomRight),
            "top_left" => Ok(Alignment::TopLeft),
            other => Err(Error::value("causal_alignment", other, "bottom_right or top_left")),
        };
        let preset = scheme.map(str::parse).transpose();
        Ok(Options {
            layout: layout.map_err(exception)?,
            is_causal,
            alignment: alignment.map_err(exception)?,
            window: (window_left, window_right),
            sm_scale: narrowed("sm_scale", sm_scale).map_err(exception)?,
            logit_softcap: narrowed("logit_softcap", logit_softcap).map_err(exception)?,
            preset: preset.map_err(exception)?,
            nearest,
            smooth_k,
            pooled_tail,
        })
    }
}

impl Options {
    /// Whether tensors are `[batch, seq, heads, head_dim]`.
    pub(crate) fn is_nhd(&self) -> bool {
        matches!(self.layout, Layout::Nhd)
    }

    /// The options as the library takes them, but for masks, lengths and predictors.
    pub(crate) fn attention<'a>(&self) -> Attention<'a> {
        // The alignment is a window's too, so it is said whether or not there is a causal mask.
        let mut attention = Attention::new()
            .layout(self.layout)
            .window(self.window.0, self.window.1)
            .causal_alignment(self.alignment)
            .causal(self.is_causal)
            .nearest(self.nearest)
            .smooth_k(self.smooth_k)
            .pooled_tail(self.pooled_tail);
        if let Some(preset) = self.preset {
            attention = attention.scheme(preset);
        }
        if let Some(sm_scale) = self.sm_scale {
            attention = attention.sm_scale(sm_scale);
        }
        if let Some(softcap) = self.logit_softcap {
            attention = attention.logit_softcap(softcap);
        }
        attention
    }
}

/// A number of Python's in single precision; the message has the number that the caller gave.
fn narrowed(name: &'static str, value: Option<f64>) -> Result<Option<f32>> {
    let Some(value) = value else { return Ok(None) };
    let narrow = value as f32;
    let lost = (narrow == 0.0 && value != 0.0) || (narrow.is_infinite() && value.is_finite());
    if lost {
        return Err(Error::value(name, format!("{value:e}"), "a finite number above 0 that float32 holds"));
    }
    Ok(Some(narrow))
}
