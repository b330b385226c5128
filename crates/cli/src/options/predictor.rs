//! Options of block-sparse attention: who predicts which blocks are computed, and how many.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use sageattention::sparse::{Predictor, Select};

use crate::failure::{Failure, Result};

/// A system that predicts block maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SystemName {
    /// SpargeAttn: --topk or --cdf among blocks that --simthreshd1 finds alike, 128x64, K smoothed
    Sparge,
    /// SLA, SageSLA: --topk, 64x64, K smoothed
    Sla,
    /// SpargeAttention2: the union of --topk and --topp, 128x64
    Sparge2,
    /// VSA: --topk as a number of blocks, 64x64
    Vsa,
    /// Sol-Attn: --tau standard deviations above the mean of the row, 64x64
    Sol,
}

impl SystemName {
    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            SystemName::Sparge => "sparge",
            SystemName::Sla => "sla",
            SystemName::Sparge2 => "sparge2",
            SystemName::Vsa => "vsa",
            SystemName::Sol => "sol",
        }
    }

    /// The options that say how many blocks it keeps.
    const fn takes(self) -> &'static [&'static str] {
        match self {
            SystemName::Sparge => &["--topk", "--cdf"],
            SystemName::Sla | SystemName::Vsa => &["--topk"],
            SystemName::Sparge2 => &["--topk", "--topp"],
            SystemName::Sol => &["--tau"],
        }
    }
}

/// Shares of key blocks that are tried where no amount is given.
const SHARES: [f32; 6] = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7];

/// Standard deviations that are tried where none are given.
const TAUS: [f32; 6] = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5];

/// SpargeAttention2's share of weight where none is given: the paper's.
const TOPP: f32 = 0.2;

/// SpargeAttn's own thresholds of similarity, with --topk and with --cdf.
const SIMTHRESHD1: [f32; 2] = [-0.1, 0.6];

/// Which blocks are computed.
#[derive(Clone, Debug, Default, Args)]
pub struct PredictorOptions {
    /// Compute only the blocks of scores that a predictor finds worth it
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME", help_heading = HEADING)]
    pub predictor: Vec<SystemName>,
    /// Share of the key blocks that each block of queries keeps, 0 to 1; for vsa their number
    #[arg(long, value_delimiter = ',', value_name = "X", requires = "predictor", help_heading = HEADING)]
    pub topk: Vec<f32>,
    /// sparge: share of weight that the kept blocks may have, instead of --topk
    #[arg(
        long, value_delimiter = ',', value_name = "X", requires = "predictor", conflicts_with = "topk",
        help_heading = HEADING,
    )]
    pub cdf: Vec<f32>,
    /// sparge2: share of weight that the kept blocks must have [default: 0.2]
    #[arg(long, value_delimiter = ',', value_name = "X", requires = "predictor", help_heading = HEADING)]
    pub topp: Vec<f32>,
    /// sol: standard deviations by which a block's score must exceed the mean of its row
    #[arg(
        long, value_delimiter = ',', value_name = "X", requires = "predictor", allow_hyphen_values = true,
        help_heading = HEADING,
    )]
    pub tau: Vec<f32>,
    /// sparge: similarity below which a block is computed with all others [default: -0.1 with --topk, 0.6 with --cdf]
    #[arg(
        long, value_name = "X", requires = "predictor", allow_hyphen_values = true, help_heading = HEADING
    )]
    pub simthreshd1: Option<f32>,
    /// Queries and keys of a block [default: the system's own]
    #[arg(long, value_delimiter = ',', value_name = "QxK", requires = "predictor", help_heading = HEADING)]
    pub blocks: Vec<BlockSize>,
    /// The first N key blocks are kept for every query [default: 0; without N: 1]
    #[arg(
        long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1",
        requires = "predictor", help_heading = HEADING,
    )]
    pub sink: Option<usize>,
    /// Each block left out counts with the means of its keys and values
    #[arg(long, requires = "predictor", help_heading = HEADING)]
    pub pooled_tail: bool,
}

/// Heading of these options in a command's help.
const HEADING: &str = "Block-sparse attention";

/// Tokens of a block of queries and of one of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    pub q: usize,
    pub k: usize,
}

impl FromStr for BlockSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected QUERIESxKEYS such as 128x64".to_owned();
        let (q, k) = text.split_once('x').ok_or_else(wrong)?;
        let size = |text: &str| text.trim().parse::<usize>().ok().filter(|&n| n > 0).ok_or_else(wrong);
        Ok(BlockSize { q: size(q)?, k: size(k)? })
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.q, self.k)
    }
}

/// One predictor with its hyper-parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    pub system: SystemName,
    /// How many blocks are kept, in the words of the options: `topk 0.25`.
    pub amount: String,
    pub predictor: Predictor,
}

impl Setting {
    /// The size of its blocks.
    pub fn blocks(&self) -> BlockSize {
        BlockSize { q: self.predictor.block_q, k: self.predictor.block_k }
    }
}

/// All of it in a few words, for titles.
impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.system.name(), self.amount, self.blocks())?;
        match &self.predictor.sink_k {
            Range { end: 0, .. } => Ok(()),
            sink => write!(f, ", sink {}", sink.end),
        }
    }
}

impl PredictorOptions {
    /// The one predictor that the options describe, or none where none is named.
    ///
    /// # Errors
    /// When they describe several, leave open how many blocks are kept, or do not go together.
    pub fn single(&self) -> Result<Option<Setting>> {
        let Some(&system) = self.predictor.first() else { return Ok(None) };
        if self.predictor.len() > 1 {
            return Err(usage("--predictor", format!("found {}, expected one", self.predictor.len())));
        }
        let given = |option: &&str| !self.amounts(option).is_empty();
        if !system.takes().iter().any(given) {
            let wanted = system.takes().join(" or ");
            return Err(usage(
                "--predictor",
                format!("found {} without an amount, expected {wanted}", system.name()),
            ));
        }
        let mut settings = self.settings(0)?;
        match settings.len() {
            1 => Ok(settings.pop()),
            n => Err(usage(
                "--predictor",
                format!("found {n} settings, expected one: one value of each option"),
            )),
        }
    }

    /// Every combination of predictor, block size and amount; where no amount is given, some of a customary range, for
    /// sequences of `kv_len` keys.
    ///
    /// # Errors
    /// When an option belongs to none of the predictors, or a number of blocks is none.
    pub fn settings(&self, kv_len: usize) -> Result<Vec<Setting>> {
        self.check()?;
        let mut settings = Vec::new();
        for &system in &self.predictor {
            let own = match system {
                SystemName::Sparge | SystemName::Sparge2 => BlockSize { q: 128, k: 64 },
                _ => BlockSize { q: 64, k: 64 },
            };
            for blocks in if self.blocks.is_empty() { vec![own] } else { self.blocks.clone() } {
                for (amount, predictor) in self.amounts_of(system, kv_len.div_ceil(blocks.k))? {
                    let predictor =
                        predictor.blocks(blocks.q, blocks.k).sink_k(0..self.sink.unwrap_or_default());
                    settings.push(Setting { system, amount, predictor });
                }
            }
        }
        Ok(settings)
    }

    /// The options as words of a command line.
    pub fn words(&self) -> Vec<String> {
        let joined = |values: Vec<String>| values.join(",");
        let numbers = |values: &[f32]| joined(values.iter().map(f32::to_string).collect());
        let lists = [
            ("predictor", joined(self.predictor.iter().map(|system| system.name().to_owned()).collect())),
            ("topk", numbers(&self.topk)),
            ("cdf", numbers(&self.cdf)),
            ("topp", numbers(&self.topp)),
            ("tau", numbers(&self.tau)),
            ("simthreshd1", self.simthreshd1.map(|x| x.to_string()).unwrap_or_default()),
            ("blocks", joined(self.blocks.iter().map(BlockSize::to_string).collect())),
            ("sink", self.sink.map(|blocks| blocks.to_string()).unwrap_or_default()),
        ];
        let given = lists.into_iter().filter(|(_, value)| !value.is_empty());
        let tail = self.pooled_tail.then(|| "--pooled-tail".to_owned());
        given.map(|(option, value)| format!("--{option}={value}")).chain(tail).collect()
    }

    /// The values of an option that says how many blocks are kept.
    fn amounts(&self, option: &str) -> &[f32] {
        match option {
            "--topk" => &self.topk,
            "--cdf" => &self.cdf,
            "--topp" => &self.topp,
            _ => &self.tau,
        }
    }

    /// Refuses options that none of the predictors takes: nothing is dropped in silence.
    fn check(&self) -> Result<()> {
        let names = || self.predictor.iter().map(|system| system.name()).collect::<Vec<_>>().join(", ");
        for option in ["--topk", "--cdf", "--topp", "--tau"] {
            let taken = self.predictor.iter().any(|system| system.takes().contains(&option));
            if !self.amounts(option).is_empty() && !taken {
                return Err(usage(option, format!("found with --predictor {}, which has none", names())));
            }
        }
        if self.simthreshd1.is_some() && !self.predictor.contains(&SystemName::Sparge) {
            return Err(usage(
                "--simthreshd1",
                format!("found with --predictor {}, expected sparge", names()),
            ));
        }
        Ok(())
    }

    /// The predictors of a system, of its own block size, with the words for how many blocks they keep.
    fn amounts_of(&self, system: SystemName, k_blocks: usize) -> Result<Vec<(String, Predictor)>> {
        let shares = if self.topk.is_empty() { &SHARES[..] } else { &self.topk };
        let similar = |cdf: bool| self.simthreshd1.unwrap_or(SIMTHRESHD1[usize::from(cdf)]);
        Ok(match system {
            SystemName::Sparge if !self.cdf.is_empty() => {
                named("cdf", &self.cdf, |x| Predictor::sparge_attn(Select::Cdf(x.into()), similar(true)))
            }
            SystemName::Sparge => {
                named("topk", shares, |x| Predictor::sparge_attn(Select::TopK(x.into()), similar(false)))
            }
            SystemName::Sla => named("topk", shares, Predictor::sla),
            SystemName::Sparge2 => {
                let topp = if self.topp.is_empty() { &[TOPP][..] } else { &self.topp };
                // Where only shares of weight vary, top-k adds nothing.
                let shares = if self.topk.is_empty() && !self.topp.is_empty() { &[0.0][..] } else { shares };
                let both = |&p: &f32| {
                    named("topk", shares, |k| Predictor::sparge_attn2(k, p))
                        .into_iter()
                        .map(move |(amount, predictor)| (format!("{amount} topp {p}"), predictor))
                };
                topp.iter().flat_map(both).collect()
            }
            SystemName::Vsa => {
                let default = || SHARES.map(|share| ((share * k_blocks as f32) as usize).max(1)).to_vec();
                let counts = if self.topk.is_empty() { default() } else { self.counts()? };
                counts.into_iter().map(|n| (format!("topk {n} blocks"), Predictor::vsa(n))).collect()
            }
            SystemName::Sol => {
                let taus = if self.tau.is_empty() { &TAUS[..] } else { &self.tau };
                named("tau", taus, Predictor::sol_attn)
            }
        })
    }

    /// `--topk` as numbers of blocks.
    fn counts(&self) -> Result<Vec<usize>> {
        let count = |&x: &f32| {
            if x >= 1.0 && x.fract() == 0.0 && x < 1e9 {
                return Ok(x as usize);
            }
            Err(usage("--topk", format!("value is {x}, expected a number of blocks of at least 1 for vsa")))
        };
        self.topk.iter().map(count).collect()
    }
}

/// A predictor for each value of an option.
fn named(option: &str, values: &[f32], predictor: impl Fn(f32) -> Predictor) -> Vec<(String, Predictor)> {
    values.iter().map(|&x| (format!("{option} {x}"), predictor(x))).collect()
}

fn usage(option: &str, message: String) -> Failure {
    Failure::Usage(format!("{option}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(settings: &[Setting]) -> Vec<String> {
        settings.iter().map(Setting::to_string).collect()
    }

    #[test]
    fn every_combination_is_a_setting() {
        let options = PredictorOptions {
            predictor: vec![SystemName::Sla, SystemName::Sol],
            topk: vec![0.25, 0.5],
            tau: vec![1.0],
            blocks: vec![BlockSize { q: 64, k: 64 }, BlockSize { q: 128, k: 64 }],
            sink: Some(1),
            ..PredictorOptions::default()
        };
        let settings = options.settings(1000).unwrap();
        assert_eq!(
            words(&settings),
            [
                "sla topk 0.25 64x64, sink 1",
                "sla topk 0.5 64x64, sink 1",
                "sla topk 0.25 128x64, sink 1",
                "sla topk 0.5 128x64, sink 1",
                "sol tau 1 64x64, sink 1",
                "sol tau 1 128x64, sink 1",
            ]
        );
        assert_eq!(settings[2].predictor, Predictor::sla(0.25).blocks(128, 64).sink_k(0..1));
        assert!(options.single().is_err());
    }

    #[test]
    fn a_system_without_an_amount_has_a_range_of_its_own() {
        let amounts = |system| {
            let options = PredictorOptions { predictor: vec![system], ..PredictorOptions::default() };
            assert!(options.single().is_err(), "a single call must say how many");
            words(&options.settings(640).unwrap())
        };
        assert_eq!(amounts(SystemName::Vsa)[..2], ["vsa topk 1 blocks 64x64", "vsa topk 1 blocks 64x64"]);
        assert_eq!(amounts(SystemName::Sparge2)[0], "sparge2 topk 0.05 topp 0.2 128x64");
        for system in SystemName::value_variants() {
            assert_eq!(amounts(*system).len(), SHARES.len());
        }
    }

    #[test]
    fn words_say_the_options_again() {
        let options = PredictorOptions {
            predictor: vec![SystemName::Sparge],
            cdf: vec![0.98],
            simthreshd1: Some(-0.5),
            blocks: vec![BlockSize { q: 64, k: 128 }],
            ..PredictorOptions::default()
        };
        assert_eq!(
            options.words(),
            ["--predictor=sparge", "--cdf=0.98", "--simthreshd1=-0.5", "--blocks=64x128"]
        );
        let single = options.single().unwrap().unwrap();
        assert_eq!(single.predictor, Predictor::sparge_attn(Select::Cdf(0.98.into()), -0.5).blocks(64, 128));
    }
}
