//! Values of options that stand for something by its name.

use std::str::FromStr;

use clap::ValueEnum;
use sageattention::{Alignment, Choice, DType, Layout, Preset, ValueFormat};

/// Where the diagonal of a causal mask lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AlignmentName {
    /// The last query sees the last key
    BottomRight,
    /// The first query sees the first key
    TopLeft,
}

impl AlignmentName {
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            AlignmentName::BottomRight => "bottom-right",
            AlignmentName::TopLeft => "top-left",
        }
    }
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

/// Element type of tensors.
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

/// Element type of an explicit mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MaskName {
    /// A key is seen or not
    Bool,
    /// Single precision, added to scores
    F32,
    /// Half precision, added to scores
    F16,
    /// bfloat16, added to scores
    Bf16,
}

impl MaskName {
    /// The element type of what is added to scores; none of a boolean mask.
    pub const fn bias(self) -> Option<DType> {
        match self {
            MaskName::Bool => None,
            MaskName::F32 => Some(DType::F32),
            MaskName::F16 => Some(DType::F16),
            MaskName::Bf16 => Some(DType::BF16),
        }
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

    /// Whether it names a function of the original, and not a scheme of our own.
    pub fn is_of_the_original(self) -> bool {
        self.0.is_some_and(|preset| preset.original().is_some())
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

/// How a KV cache stores values, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueFormatName(pub ValueFormat);

impl FromStr for ValueFormatName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = ValueFormat::ALL.into_iter().find(|format| format.name() == text);
        named.map(ValueFormatName).ok_or_else(|| {
            "expected one of ".to_owned() + &ValueFormat::ALL.map(ValueFormat::name).join(", ")
        })
    }
}
