//! Kernels in a line each.

use crate::attention::{AttentionConfig, MaskForm, Scores, Values};
use crate::forward::Step;
use crate::preprocess::{KeyMean, Source, ValueScales};
use crate::sequence::Lengths;

/// A kernel in one line.
pub(super) fn describe(step: &Step) -> String {
    let of = |source: &Source| {
        let lengths = lengths(source.lengths);
        let unaligned = if source.aligned { "" } else { ", unaligned rows" };
        let masked = if source.masked { ", masked" } else { "" };
        format!("{}, head_dim {}{lengths}{unaligned}{masked}", source.dtype, source.head_dim)
    };
    match step {
        Step::SeenKeys(config) => {
            format!("keys that some query sees; {}{}", config.mask.name(), lengths(config.lengths))
        }
        Step::RankKeys(_) => "how many keys before each tile count, behind a mask".to_owned(),
        Step::QueryMeans(config) => {
            format!("Q: means of {} rows; {}", config.block, of(&config.source))
        }
        Step::SampleK(config) => {
            format!("K: mean of {} rows of the sequence; {}", config.rows, of(&config.source))
        }
        Step::SampleV(config) => {
            format!("V: scales of {} rows of the sequence; {}", config.rows, of(&config.source))
        }
        Step::QuantizeK(config) => {
            let smooth = match config.mean {
                KeyMean::Zero => "",
                KeyMean::Collected => ", smoothed",
                KeyMean::Given => ", smoothed by a given mean",
            };
            let (bits, granularity) = (config.bits.name(), config.granularity.name());
            let rotated = if config.rotate { ", rotated" } else { "" };
            format!("K to {bits} {granularity}{smooth}{rotated}; {}", of(&config.source))
        }
        Step::DeltaS(config) => format!("products of Q's means with K; {}", of(&config.source)),
        Step::QuantizeV(config) => {
            let smooth = if config.smooth { ", smoothed" } else { "" };
            let scales = match config.scales {
                ValueScales::Collected => "",
                ValueScales::Given => ", with given scales",
                ValueScales::CollectedWhereMarked => ", of heads that given scales do not fit",
            };
            format!("V to E4M3{smooth}{scales}; {}", of(&config.source))
        }
        Step::ConvertV(config) => format!("V to {}; {}", config.to, of(&config.source)),
        Step::Attention(config) => describe_attention(config),
        Step::Combine(config) => {
            let lse = if config.lse { ", with LSE" } else { "" };
            format!("merges parts of split keys; {}, head_dim {}{lse}", config.dtype, config.head_dim)
        }
    }
}

fn describe_attention(config: &AttentionConfig) -> String {
    let scores = match config.scores {
        Scores::Full => "full QK".to_owned(),
        Scores::Int(quantizer) => format!("{} QK {}", quantizer.bits.name(), quantizer.granularity.name()),
    };
    let values = match config.values {
        Values::F16(accumulator) => format!("FP16 PV ({})", accumulator.name()),
        Values::BF16 => "BF16 PV (f32)".to_owned(),
        Values::Fp8(accumulator) => format!("FP8 PV ({})", accumulator.name()),
    };
    let mut text = format!("attention: {scores}, {values}; {}, head_dim {}", config.dtype, config.head_dim);
    match config.mask {
        MaskForm::None => {}
        MaskForm::Bool => text += ", boolean mask",
        MaskForm::Bias(dtype) => text += &format!(", additive mask in {dtype}"),
    }
    for (on, what) in [
        (config.softcap, ", softcap"),
        (config.lse && !config.split, ", with LSE"),
        (config.smooth_q.is_some(), ", smooth Q"),
        (config.smooth_v, ", smooth V"),
        (config.rotate, ", rotated Q"),
        (config.split, ", keys split"),
    ] {
        if on {
            text += what;
        }
    }
    text + lengths(config.lengths) + if config.aligned { "" } else { ", unaligned rows" }
}

fn lengths(lengths: Lengths) -> &'static str {
    match lengths {
        Lengths::Dense => "",
        Lengths::KvLens => ", kv_lens",
        Lengths::Packed => ", packed",
    }
}
