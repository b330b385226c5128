//! Options of a call to attention, the same in every command that makes one.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use sageattention::{Alignment, Attention, Choice, DType, Device, Layout, Preset};

/// What is visible, and how scores are scaled.
#[derive(Clone, Debug, Default, Args)]
pub struct CallOptions {
    /// Causal mask; top-left and bottom-right differ where there are more or fewer keys than queries
    #[arg(long, value_name = "ALIGNMENT", num_args = 0..=1, require_equals = true, default_missing_value = "bottom-right")]
    pub causal: Option<AlignmentName>,
    /// Sliding window: keys visible before and after the diagonal, "any" for no limit
    #[arg(long, value_name = "L,R", allow_hyphen_values = true)]
    pub window: Option<Window>,
    /// Factor on Q·Kᵀ [default: 1 / √head_dim]
    #[arg(long, value_name = "X", allow_hyphen_values = true, value_parser = single)]
    pub sm_scale: Option<f32>,
    /// Scaled scores s become X·tanh(s / X)
    #[arg(long, value_name = "X", allow_hyphen_values = true, value_parser = single)]
    pub softcap: Option<f32>,
    /// What computes: cpu, or cuda:N for an NVIDIA GPU (f16 and bf16)
    #[arg(long, default_value_t)]
    pub device: Device,
}

impl CallOptions {
    /// Attention with these options.
    pub fn attention<'a>(&self) -> Attention<'a> {
        let mut attention = Attention::new().device(self.device);
        if let Some(Window { left, right }) = self.window {
            attention = attention.window(left, right);
        }
        if let Some(alignment) = self.causal {
            attention = attention.causal_alignment(alignment.into());
        }
        if let Some(sm_scale) = self.sm_scale {
            attention = attention.sm_scale(sm_scale);
        }
        if let Some(softcap) = self.softcap {
            attention = attention.logit_softcap(softcap);
        }
        attention
    }
}

/// A number in single precision, unless that would make 0 or infinity of another number: whoever reads of those in an
/// error would not know them.
fn single(text: &str) -> Result<f32, String> {
    let x: f32 = text.parse().map_err(|error: std::num::ParseFloatError| error.to_string())?;
    let mantissa = text.split(['e', 'E']).next().unwrap_or(text);
    let vanishes = x == 0.0 && mantissa.contains(|digit: char| matches!(digit, '1'..='9'));
    let overflows = x.is_infinite() && text.contains(|digit: char| digit.is_ascii_digit());
    if vanishes || overflows {
        return Err(format!("single precision makes {} of it, expected 1e-45 to 3.4e38", x.abs()));
    }
    Ok(x)
}

/// Where the diagonal of a causal mask lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AlignmentName {
    /// The last query sees the last key
    BottomRight,
    /// The first query sees the first key
    TopLeft,
}

impl From<AlignmentName> for Alignment {
    fn from(name: AlignmentName) -> Self {
        match name {
            AlignmentName::BottomRight => Alignment::BottomRight,
            AlignmentName::TopLeft => Alignment::TopLeft,
        }
    }
}

/// Order of the dimensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LayoutName {
    /// [batch, heads, seq, head_dim]
    #[default]
    Hnd,
    /// [batch, seq, heads, head_dim]
    Nhd,
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Hnd => Layout::Hnd,
            LayoutName::Nhd => Layout::Nhd,
        }
    }
}

/// Element type of made-up tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DTypeName {
    /// Single precision
    F32,
    /// Half precision
    #[default]
    F16,
    /// bfloat16
    Bf16,
}

impl From<DTypeName> for DType {
    fn from(name: DTypeName) -> Self {
        match name {
            DTypeName::F32 => DType::F32,
            DTypeName::F16 => DType::F16,
            DTypeName::Bf16 => DType::BF16,
        }
    }
}

/// A sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Keys visible before the diagonal.
    pub left: Option<usize>,
    /// Keys visible after it.
    pub right: Option<usize>,
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| match text.trim() {
            "any" | "-1" => Ok(None),
            number => number.parse().map(Some).map_err(|_| {
                "expected two numbers L,R of at least 0, or \"any\" for no limit, such as 128,0".to_owned()
            }),
        };
        let (left, right) = text.split_once(',').unwrap_or((text, ""));
        Ok(Window { left: side(left)?, right: side(right)? })
    }
}

/// A scheme by its name, or the backend's own choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SchemeName(Option<Preset>);

impl SchemeName {
    /// What stands for the backend's own choice.
    pub const AUTOMATIC: &str = "auto";

    /// The backend's own choice.
    pub const fn automatic() -> Self {
        SchemeName(None)
    }

    /// The choice that the name stands for.
    pub fn choice(self) -> Choice {
        self.0.map_or(Choice::Automatic, Choice::Preset)
    }

    /// The name.
    pub fn name(self) -> &'static str {
        self.0.map_or(Self::AUTOMATIC, |preset| preset.name())
    }
}

impl From<Preset> for SchemeName {
    fn from(preset: Preset) -> Self {
        SchemeName(Some(preset))
    }
}

impl FromStr for SchemeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == Self::AUTOMATIC {
            return Ok(SchemeName(None));
        }
        text.parse().map(|PresetName(preset)| preset.into())
    }
}

/// A scheme by its name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PresetName(pub Preset);

impl FromStr for PresetName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(PresetName).map_err(|_| {
            "not a scheme; those with names: ".to_owned()
                + &Preset::ALL.iter().map(|preset| preset.name()).collect::<Vec<_>>().join(", ")
        })
    }
}
