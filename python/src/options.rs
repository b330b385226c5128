//! What a call asks for beside its tensors.

use pyo3::prelude::*;
use sageattention::{
    Alignment, Attention, Choice, Device, Error, Layout, Plan, Preset, Result, SmoothK, nearest_scheme,
};

use crate::errors::exception;

/// What a call asks for beside its tensors. Made once for each combination, and kept.
#[pyclass(frozen)]
pub(crate) struct Options {
    layout: Layout,
    causal: Option<Alignment>,
    window: (Option<usize>, Option<usize>),
    sm_scale: Option<f32>,
    logit_softcap: Option<f32>,
    preset: Option<Preset>,
    /// Whether a device that lacks the preset's kernels computes with its nearest.
    nearest: bool,
    smooth_k: bool,
}

#[pymethods]
impl Options {
    /// `causal` is None, "bottom_right" or "top_left"; `scheme` the name of a preset, or None for the backend's choice.
    #[new]
    #[pyo3(signature = (*, tensor_layout, causal, window, sm_scale, logit_softcap, scheme, nearest, smooth_k))]
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python constructor")]
    fn new(
        tensor_layout: &str,
        causal: Option<&str>,
        window: (Option<usize>, Option<usize>),
        sm_scale: Option<f32>,
        logit_softcap: Option<f32>,
        scheme: Option<&str>,
        nearest: bool,
        smooth_k: bool,
    ) -> PyResult<Self> {
        let layout = match tensor_layout {
            "HND" => Ok(Layout::Hnd),
            "NHD" => Ok(Layout::Nhd),
            other => Err(Error::value("tensor_layout", other, "HND or NHD")),
        };
        let causal = match causal {
            None => Ok(None),
            Some("bottom_right") => Ok(Some(Alignment::BottomRight)),
            Some("top_left") => Ok(Some(Alignment::TopLeft)),
            Some(other) => Err(Error::value("causal_alignment", other, "bottom_right or top_left")),
        };
        let preset = scheme.map(str::parse).transpose();
        Ok(Options {
            layout: layout.map_err(exception)?,
            causal: causal.map_err(exception)?,
            window,
            sm_scale,
            logit_softcap,
            preset: preset.map_err(exception)?,
            nearest,
            smooth_k,
        })
    }
}

impl Options {
    /// The options as the library takes them, but for masks, lengths and the scheme.
    pub(crate) fn attention<'a>(&self) -> Attention<'a> {
        let mut attention = Attention::new().layout(self.layout).window(self.window.0, self.window.1);
        if let Some(alignment) = self.causal {
            attention = attention.causal_alignment(alignment);
        }
        if let Some(sm_scale) = self.sm_scale {
            attention = attention.sm_scale(sm_scale);
        }
        if let Some(softcap) = self.logit_softcap {
            attention = attention.logit_softcap(softcap);
        }
        attention
    }

    /// What computes a call on a device; `automatic` says what the device itself would choose.
    pub(crate) fn choice(
        &self,
        device: Device,
        head_dim: usize,
        automatic: impl FnOnce() -> Result<Plan>,
    ) -> Result<Choice> {
        let scheme = match self.preset {
            Some(preset) if self.nearest => Some(nearest_scheme(preset.scheme(head_dim), device)),
            Some(preset) => Some(preset.scheme(head_dim)),
            None => None,
        };
        let mut scheme = match (scheme, self.smooth_k) {
            (None, true) => return Ok(Choice::Automatic),
            (None, false) => *automatic()?.scheme(),
            (Some(scheme), _) => scheme,
        };
        if !self.smooth_k {
            scheme.smooth.k = SmoothK::Off;
        }
        Ok(Choice::Scheme(scheme))
    }
}
