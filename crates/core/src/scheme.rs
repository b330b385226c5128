//! Which operands of attention are quantised, and how.

use std::fmt;

use crate::{Error, Preset, Result};

/// How Q·Kᵀ and P·V are computed, and what is subtracted or rotated beforehand.
///
/// A scheme is a complete numerical description: [`crate::oracle`] computes any of them, and every backend's
/// kernels are compared with that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheme {
    /// Operands of Q·Kᵀ.
    pub qk: Qk,
    /// Operands of P·V.
    pub pv: Pv,
    /// What is subtracted before quantising, and added back where it matters.
    pub smooth: Smoothing,
    /// Multiply Q and K by the same orthogonal Hadamard matrix (of the next power of two) before quantising,
    /// which spreads an outlier channel over all channels and leaves Q·Kᵀ unchanged.
    pub rotate: bool,
}

/// Operands of Q·Kᵀ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Qk {
    /// As given.
    Full,
    /// Integers with a scale for each group of rows.
    Int(IntQuantizer),
    /// E2M1 values with a scale for each group of neighbouring channels (SageAttention3).
    Fp4(Fp4Format),
}

/// Operands of P·V.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pv {
    /// P and V in single precision; on a GPU in the inputs' 16 bits, summed in single precision.
    F32,
    /// P and V in half precision.
    F16(Accumulator),
    /// P and V in bfloat16.
    BF16(Accumulator),
    /// P and V in E4M3. V has a scale for each channel that maps its largest magnitude to `v_max`; P is in
    /// `(0, 448]` relative to the row maximum.
    Fp8 {
        /// Largest magnitude of quantised V: 448, or 2.25 where fp16 accumulates (SageAttention2++).
        v_max: f32,
        /// Rows of V whose largest magnitudes those are.
        rows: ScaleRows,
        /// Precision of the sums.
        accumulator: Accumulator,
    },
    /// INT8 P with the static scale 1/127, INT8 V with a scale for each channel (SageAttention1 "-v").
    Int8,
    /// 12-bit fixed point: for each `block` of keys, P has a scale for each row and V one for each channel.
    /// Exact integer sums; the CPU backend's fast form. On a GPU as [`Pv::F32`].
    Fixed12 {
        /// Keys that share a scale.
        block: usize,
    },
    /// E2M1 values with a scale for each group of neighbouring keys, V's for each channel (SageAttention3).
    Fp4 {
        /// Groups, and what their scales are.
        format: Fp4Format,
        /// Levels in which P is scaled.
        levels: PLevels,
    },
}

/// A 4-bit floating-point format: E2M1 values (0, ½, 1, 1½, 2, 3, 4, 6 and their negatives) with a scale of 8 bits for
/// each group of neighbours along the contracted dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp4Format {
    /// Groups of 16 with E4M3 scales: NVFP4, without its scale of the whole tensor.
    Nv,
    /// Groups of 32 with powers of two as scales (E8M0): MXFP4 of the OCP Microscaling Formats specification 1.0.
    Mx,
}

impl Fp4Format {
    /// Neighbours that share a scale.
    pub const fn group(self) -> usize {
        match self {
            Fp4Format::Nv => 16,
            Fp4Format::Mx => 32,
        }
    }

    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Fp4Format::Nv => "NVFP4",
            Fp4Format::Mx => "MXFP4",
        }
    }
}

/// Levels in which P, at most 1 relative to the row's maximum, is scaled before it becomes E2M1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PLevels {
    /// The groups' scales alone (Attn-QAT). An E4M3 scale of a group of P is at most 1/6, so that few of its codes are
    /// used; powers of two lose nothing.
    One,
    /// First the row, to at most 448 · 6 = 2688, which uses the whole range of E4M3 scales (SageAttention3 §3.2).
    Two,
}

/// Rows of V that the scales of FP8 channels are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleRows {
    /// All of the sequence.
    All,
    /// This many that lie evenly in the sequence, which spares V being read twice. Other rows may hold larger values,
    /// for which `v_max` must leave room; where some channel of a head has a value that would exceed 448, all of the
    /// head's rows are taken after all. A floating-point format loses no precision by such room.
    Sampled(usize),
}

impl ScaleRows {
    /// Which of `len` rows, those that count, the scales are taken from.
    pub fn of(self, len: usize) -> impl ExactSizeIterator<Item = usize> {
        let rows = match self {
            ScaleRows::All => len,
            ScaleRows::Sampled(rows) => rows.min(len),
        };
        (0..rows).map(move |index| evenly(index, rows, len))
    }
}

/// The `index`-th of `rows` rows that lie evenly in `len`.
fn evenly(index: usize, rows: usize, len: usize) -> usize {
    index * len / rows
}

/// Precision in which products of P and V are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accumulator {
    /// Single precision (on FP8 tensor cores: about 22 bits).
    F32,
    /// Half precision throughout.
    F16,
    /// Half precision within a block of keys, single across blocks.
    F16ThenF32,
    /// The tensor core's own within a block of keys, single across blocks: two-level accumulation.
    F32ThenF32,
}

impl Accumulator {
    /// The name used in messages and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Accumulator::F32 => "f32",
            Accumulator::F16 => "f16",
            Accumulator::F16ThenF32 => "f16+f32",
            Accumulator::F32ThenF32 => "f32+f32",
        }
    }
}

/// What is subtracted before quantising.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smoothing {
    /// Subtract a mean of query rows; its product with K is added to the scores again.
    pub q: SmoothQ,
    /// Subtract a mean of K's rows, which changes no probability (SageAttention §4.2).
    pub k: SmoothK,
    /// Subtract V's mean over the sequence, and add it to the output.
    pub v: bool,
}

/// Rows of K whose mean is subtracted from all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SmoothK {
    /// Nothing is subtracted.
    Off,
    /// The mean of the whole sequence.
    Mean,
    /// The mean of this many rows that lie evenly in the sequence, or of all where it has no more. Softmax takes no
    /// notice of any constant, so this is as exact, and it spares K being read twice: a mean of `n` rows is off by `1 /
    /// √n` of K's spread, which makes scales larger by `1 / 2n`.
    Sampled(usize),
}

impl SmoothK {
    /// Whether a mean is subtracted.
    pub const fn is_on(self) -> bool {
        !matches!(self, SmoothK::Off)
    }

    /// How many of `len` rows the mean is of.
    pub fn rows(self, len: usize) -> usize {
        match self {
            SmoothK::Off => 0,
            SmoothK::Mean => len,
            SmoothK::Sampled(rows) => rows.min(len),
        }
    }

    /// Which of `len` rows is the `index`-th that the mean is of.
    pub fn row(self, index: usize, len: usize) -> usize {
        evenly(index, self.rows(len), len)
    }
}

/// Rows of Q that share a mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmoothQ {
    /// Nothing is subtracted.
    Off,
    /// The rows of each query block of this many rows (SageAttention2 §3.1, SageAttention3).
    Block(usize),
    /// All rows of the sequence.
    Sequence,
}

/// Rows of Q and K that share an integer scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// All rows.
    PerTensor,
    /// The rows of a tile.
    PerBlock,
    /// The rows of Q that a warp owns; for K the rows of a tile.
    PerWarp,
    /// The rows that one thread of a tensor-core instruction holds (SageAttention2 §3.2).
    PerThread,
    /// Each row alone.
    PerToken,
}

impl Granularity {
    /// The name used in messages and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Granularity::PerTensor => "per-tensor",
            Granularity::PerBlock => "per-block",
            Granularity::PerWarp => "per-warp",
            Granularity::PerThread => "per-thread",
            Granularity::PerToken => "per-token",
        }
    }
}

/// Rows of the tiles that granularities refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Query rows of a tile.
    pub block_q: usize,
    /// Query rows of a warp.
    pub warp_q: usize,
    /// Key rows of a tile.
    pub block_k: usize,
    /// Key rows of a warp.
    pub warp_k: usize,
}

/// Width of quantised integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IntBits {
    /// −7..=7.
    Four,
    /// −127..=127.
    Eight,
}

impl IntBits {
    /// Largest magnitude.
    pub const fn max(self) -> i32 {
        match self {
            IntBits::Four => 7,
            IntBits::Eight => 127,
        }
    }

    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            IntBits::Four => "INT4",
            IntBits::Eight => "INT8",
        }
    }
}

/// How a quotient becomes an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Halves away from zero: the Triton quantisers.
    HalfAwayFromZero,
    /// Halves to even: the CUDA quantisers, and ours.
    NearestEven,
}

/// What keeps the scale of an all-zero group from being zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroGroup {
    /// Scale `max|x| / max_int`, and zeros wherever it is zero.
    Guard,
    /// `max|x| / max_int + 1e-7`: Triton, per thread and in SpargeAttn.
    AddToScale,
    /// `max(max|x|, 1e-7) / max_int`: CUDA.
    ClampMaximum,
}

/// An integer quantiser of Q and K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IntQuantizer {
    /// Width.
    pub bits: IntBits,
    /// Rows that share a scale.
    pub granularity: Granularity,
    /// The tiles that the granularity refers to.
    pub tile: Tile,
    /// How quotients are rounded.
    pub rounding: Rounding,
    /// How a group of zeros is treated.
    pub zero_group: ZeroGroup,
    /// Whether Q is multiplied by `sm_scale · log₂e` before quantising (per-block kernels) or the scores after.
    pub scale_q_first: bool,
}

impl Scheme {
    /// Checks that the scheme's blocks and tiles can be formed.
    ///
    /// # Errors
    /// When a block has no rows, a block is not whole warps, a warp per thread is not whole groups of 8 rows, V's
    /// largest quantised magnitude is not one that E4M3 has room for, or P has two levels in MXFP4.
    pub fn check(&self) -> Result<()> {
        if let Qk::Int(IntQuantizer { granularity, tile, .. }) = self.qk {
            for (name, block, warp) in [("q", tile.block_q, tile.warp_q), ("k", tile.block_k, tile.warp_k)] {
                if block == 0 {
                    return Err(Error::value(format!("tile.block_{name}"), block, "at least 1"));
                }
                if warp == 0 || !block.is_multiple_of(warp) {
                    return Err(Error::value(
                        format!("tile.warp_{name}"),
                        warp,
                        format!("a divisor of block_{name}, {block}"),
                    ));
                }
                if granularity == Granularity::PerThread && !warp.is_multiple_of(8) {
                    return Err(Error::value(
                        format!("tile.warp_{name}"),
                        warp,
                        "a multiple of 8, for scales per thread",
                    ));
                }
            }
        }
        match self.pv {
            Pv::Fixed12 { block: 0 } => return Err(Error::value("pv.block", 0, "at least 1")),
            Pv::Fp8 { v_max, .. } if !(v_max > 0.0 && v_max <= 448.0) => {
                return Err(Error::value("pv.v_max", v_max, "above 0 and at most 448"));
            }
            Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::Two } => {
                let wanted = "one with MXFP4, whose scales are powers of two and have range enough";
                return Err(Error::value("pv.levels", "two", wanted));
            }
            Pv::Fp8 { rows: ScaleRows::Sampled(0), .. } => {
                return Err(Error::value("pv.rows", 0, "at least 1"));
            }
            Pv::Fp8 {
                rows: ScaleRows::Sampled(_),
                accumulator: accumulator @ (Accumulator::F16 | Accumulator::F16ThenF32),
                ..
            } => {
                let wanted = "f32 or f32+f32 where V's scales are sampled: its values may reach 448";
                return Err(Error::value("pv.accumulator", accumulator.name(), wanted));
            }
            _ => {}
        }
        if self.smooth.k == SmoothK::Sampled(0) {
            return Err(Error::value("smooth.k rows", 0, "at least 1"));
        }
        match self.smooth.q {
            SmoothQ::Block(0) => Err(Error::value("smooth.q block", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

impl Scheme {
    /// The preset that this is, for heads of `head_dim` channels.
    pub fn preset(&self, head_dim: usize) -> Option<Preset> {
        Preset::ALL.iter().find(|preset| preset.scheme(head_dim) == *self).copied()
    }

    /// The scheme in a line, with its name where it is a preset for heads of `head_dim` channels, and else with that of
    /// another that is as accurate: for messages.
    pub fn named_or(&self, head_dim: usize, other: Preset) -> String {
        match self.preset(head_dim) {
            Some(preset) => format!("`{preset}`, {self}"),
            None => format!("{self}, or by name `{other}`"),
        }
    }
}

/// For example `INT8 QK per-thread · smooth K · FP8 PV (448, f32+f32)`.
impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.qk {
            Qk::Full => write!(f, "full QK")?,
            Qk::Int(quantizer) => write!(f, "{} QK {}", quantizer.bits.name(), quantizer.granularity.name())?,
            Qk::Fp4(format) => write!(f, "{} QK", format.name())?,
        }
        match self.smooth.q {
            SmoothQ::Off => {}
            SmoothQ::Block(block) => write!(f, " · smooth Q ({block})")?,
            SmoothQ::Sequence => write!(f, " · smooth Q (sequence)")?,
        }
        match self.smooth.k {
            SmoothK::Off => {}
            SmoothK::Mean => write!(f, " · smooth K")?,
            SmoothK::Sampled(rows) => write!(f, " · smooth K (of {rows} rows)")?,
        }
        for (on, part) in [(self.smooth.v, "smooth V"), (self.rotate, "rotated")] {
            if on {
                write!(f, " · {part}")?;
            }
        }
        match &self.pv {
            Pv::F32 => write!(f, " · FP32 PV"),
            Pv::F16(accumulator) => write!(f, " · FP16 PV ({})", accumulator.name()),
            Pv::BF16(accumulator) => write!(f, " · BF16 PV ({})", accumulator.name()),
            Pv::Fp8 { v_max, rows, accumulator } => {
                write!(f, " · FP8 PV ({v_max}")?;
                if let ScaleRows::Sampled(rows) = rows {
                    write!(f, " of {rows} rows")?;
                }
                write!(f, ", {})", accumulator.name())
            }
            Pv::Int8 => write!(f, " · INT8 PV"),
            Pv::Fixed12 { block } => write!(f, " · 12-bit PV ({block})"),
            Pv::Fp4 { format, levels } => {
                write!(f, " · {} PV", format.name())?;
                match (format, levels) {
                    (Fp4Format::Nv, PLevels::One) => write!(f, " (one level)"),
                    _ => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Preset;

    #[test]
    fn a_scheme_prints_as_one_line() {
        let printed = |preset: Preset| preset.scheme(128).to_string();
        assert_eq!(printed(Preset::FULL), "full QK · FP32 PV");
        assert_eq!(printed(Preset::INT8), "INT8 QK per-block · smooth K · 12-bit PV (128)");
        assert_eq!(printed(Preset::SAGE3_NVFP4), "NVFP4 QK · smooth Q (128) · smooth K · NVFP4 PV");
        assert_eq!(printed(Preset::SAGE3_MXFP4), "MXFP4 QK · smooth Q (128) · smooth K · MXFP4 PV");
        assert_eq!(printed(Preset::ATTN_QAT_NVFP4), "NVFP4 QK · NVFP4 PV (one level)");
        assert_eq!(
            printed(Preset::SAGE2PP_INT4_FP8),
            "INT4 QK per-thread · smooth Q (128) · smooth K · FP8 PV (2.25, f16+f32)"
        );
        assert_eq!(
            printed(Preset::SAGE2_INT8_FP16_F16_SMOOTH_V_PER_WARP),
            "INT8 QK per-warp · smooth K · smooth V · FP16 PV (f16)"
        );
    }

    #[test]
    fn impossible_blocks_are_refused() {
        let Scheme { qk: Qk::Int(quantizer), .. } = Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64) else {
            unreachable!("an integer scheme")
        };
        let scheme = |tile| Scheme {
            qk: Qk::Int(IntQuantizer { tile, ..quantizer }),
            ..Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64)
        };
        let refused = |scheme: Scheme, wanted: &str| {
            let message = scheme.check().unwrap_err().to_string();
            assert_eq!(message, wanted);
        };
        let tile = quantizer.tile;
        refused(scheme(Tile { block_q: 0, ..tile }), "tile.block_q: value is 0, expected at least 1");
        refused(
            scheme(Tile { warp_k: 48, ..tile }),
            "tile.warp_k: value is 48, expected a divisor of block_k, 64",
        );
        refused(
            scheme(Tile { warp_q: 4, ..tile }),
            "tile.warp_q: value is 4, expected a multiple of 8, for scales per thread",
        );
        let int8 = Preset::INT8.scheme(64);
        refused(Scheme { pv: Pv::Fixed12 { block: 0 }, ..int8 }, "pv.block: value is 0, expected at least 1");
        let smooth = Smoothing { k: SmoothK::Sampled(0), ..int8.smooth };
        refused(Scheme { smooth, ..int8 }, "smooth.k rows: value is 0, expected at least 1");
        let levels = Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::Two };
        refused(
            Scheme { pv: levels, ..int8 },
            "pv.levels: value is two, expected one with MXFP4, whose scales are powers of two and have range enough",
        );
        let fp8 = |v_max, rows, accumulator| Scheme { pv: Pv::Fp8 { v_max, rows, accumulator }, ..int8 };
        let (all, sampled) = (ScaleRows::All, ScaleRows::Sampled);
        refused(
            fp8(500.0, all, Accumulator::F32),
            "pv.v_max: value is 500, expected above 0 and at most 448",
        );
        refused(fp8(56.0, sampled(0), Accumulator::F32), "pv.rows: value is 0, expected at least 1");
        refused(
            fp8(2.25, sampled(8), Accumulator::F16ThenF32),
            "pv.accumulator: value is f16+f32, expected f32 or f32+f32 where V's scales are sampled: its values may reach 448",
        );
    }
}
