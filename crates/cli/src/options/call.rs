//! Options of a call to attention, the same in every command that makes one.

use std::fmt;
use std::str::FromStr;

use clap::Args;
use sageattention::Attention;

use super::SinksOption;
use super::names::{AlignmentName, LayoutName, SchemeName};

/// What is visible, and how scores are scaled.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct CallOptions {
    /// Causal mask; top-left and bottom-right differ where there are more or fewer keys than queries
    #[arg(
        long, value_name = "ALIGNMENT", num_args = 0..=1, require_equals = true,
        default_missing_value = "bottom-right",
    )]
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
}

impl CallOptions {
    /// Attention with these options.
    pub fn attention<'a>(&self) -> Attention<'a> {
        let mut attention = Attention::new();
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

    /// The options as words of a command line.
    pub fn words(&self) -> Vec<String> {
        let CallOptions { causal, window, sm_scale, softcap } = self;
        let words = [
            causal.map(|alignment| format!("--causal={}", alignment.name())),
            window.map(|window| format!("--window={window}")),
            sm_scale.map(|x| format!("--sm-scale={x}")),
            softcap.map(|x| format!("--softcap={x}")),
        ];
        words.into_iter().flatten().collect()
    }
}

/// The options in a few words, for titles.
impl fmt::Display for CallOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CallOptions { causal, window, sm_scale, softcap } = self;
        let mask = match (causal, window) {
            (None, None) => "no mask".to_owned(),
            (Some(AlignmentName::BottomRight), None) => "causal".to_owned(),
            (Some(AlignmentName::TopLeft), None) => "causal top-left".to_owned(),
            (None, Some(window)) => format!("window {window}"),
            (Some(_), Some(window)) => format!("causal, window {window}"),
        };
        f.write_str(&mask)?;
        sm_scale.map_or(Ok(()), |x| write!(f, ", sm_scale {x}"))?;
        softcap.map_or(Ok(()), |x| write!(f, ", soft cap {x}"))
    }
}

/// How dense tensors lie in memory.
#[derive(Clone, Copy, Debug, Args)]
pub struct LayoutOption {
    /// Order of the tensors' dimensions
    #[arg(long, value_enum, default_value_t)]
    pub layout: LayoutName,
}

/// One call as a whole: what `run` computes, `explain` plans, and `emulate` runs in the emulator.
#[derive(Clone, Debug, Args)]
pub struct ForwardOptions {
    #[command(flatten)]
    pub call: CallOptions,
    #[command(flatten)]
    pub layout: LayoutOption,
    /// Scheme, or "auto" for the fastest that is accurate
    #[arg(long, value_name = "NAME", default_value = SchemeName::AUTOMATIC)]
    pub scheme: SchemeName,
    /// Valid keys of each batch entry
    #[arg(long, value_name = "N,…", value_delimiter = ',', allow_hyphen_values = true)]
    pub kv_lens: Option<Vec<i32>>,
    #[command(flatten)]
    pub sinks: SinksOption,
    /// Also compute each row's log-sum-exp
    #[arg(long)]
    pub lse: bool,
}

impl ForwardOptions {
    /// Attention with these options, but for sinks, whose numbers are for whoever knows the heads.
    pub fn attention(&self) -> Attention<'_> {
        let attention = self
            .call
            .attention()
            .layout(self.layout.layout.into())
            .scheme(self.scheme.choice())
            .return_lse(self.lse);
        match &self.kv_lens {
            Some(kv_lens) => attention.kv_lens(kv_lens),
            None => attention,
        }
    }
}

/// A number in single precision, unless that would make 0 or infinity of another number: whoever reads of those in an
/// error would not know them.
pub(super) fn single(text: &str) -> Result<f32, String> {
    let x: f32 = text.parse().map_err(|error: std::num::ParseFloatError| error.to_string())?;
    let mantissa = text.split(['e', 'E']).next().unwrap_or(text);
    let vanishes = x == 0.0 && mantissa.contains(|digit: char| matches!(digit, '1'..='9'));
    let overflows = x.is_infinite() && text.contains(|digit: char| digit.is_ascii_digit());
    if vanishes || overflows {
        return Err(format!("single precision makes {} of it, expected 1e-45 to 3.4e38", x.abs()));
    }
    Ok(x)
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

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |side: Option<usize>| side.map_or("any".to_owned(), |keys| keys.to_string());
        write!(f, "{},{}", side(self.left), side(self.right))
    }
}
