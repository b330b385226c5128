//! A tile of keys and values in the order that the kernels read it.

use sage_core::{Fp4Format, Granularity, IntQuantizer, MAX_HEAD_DIM, PLevels, ScaleRows, SmoothQ};

use crate::isa::IntWord;
use crate::kernels::fp4;

/// Keys in a tile: what the softmax sees at once, and what 12-bit P and V share scales over.
///
/// 128 · 4095 · 4095 is the largest sum of 12-bit products that stays below 2³¹.
pub(crate) const TILE_KEYS: usize = 128;

/// Most channels of a row of Q or K that is rotated.
pub(crate) const MAX_QK_DIM: usize = MAX_HEAD_DIM.next_power_of_two();

/// How Q·Kᵀ is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum QkForm {
    /// In single precision.
    Float,
    /// In bfloat16: what is neither smoothed nor rotated is the same in it, and the products are exact.
    Bf16,
    /// In integers.
    Int(IntQuantizer),
    /// In FP4: see [`crate::kernels::fp4`].
    Fp4(Fp4Format),
}

/// How P·V is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum PvForm {
    /// In single precision.
    Float,
    /// In single precision, of P and V that are rounded to fewer bits first: their products are exact in it, or nearly.
    Rounded(Rounded),
    /// In FP4: see [`crate::kernels::fp4`].
    Fp4(Fp4Format, PLevels),
    /// In bfloat16.
    Bf16,
    /// In 12-bit fixed point.
    Fixed12,
}

/// What P and V are rounded to, as [`sage_core::Pv`] says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rounded {
    F16,
    BF16,
    /// E4M3; the largest magnitude of each of V's channels in some rows is scaled to `v_max`.
    Fp8 {
        v_max: f32,
        rows: ScaleRows,
    },
    Int8,
}

impl Rounded {
    /// The rows of V whose largest magnitudes are those that its channels are scaled by, where they have one scale for
    /// the whole sequence.
    pub fn channel_rows(self) -> Option<ScaleRows> {
        match self {
            Rounded::Fp8 { rows, .. } => Some(rows),
            Rounded::Int8 => Some(ScaleRows::All),
            Rounded::F16 | Rounded::BF16 => None,
        }
    }
}

/// How 12-bit P and V are laid out in 32-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fixed12Word {
    /// Of two keys, 16 bits each.
    Pair,
    /// Of four keys, 8 bits each, two digits to the base 64: `64 · upper + lower`, the lower ones of V from −32 to 31. A row
    /// of P, and a panel of V, has all upper digits first.
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        expect(dead_code, reason = "AMX alone has them")
    )]
    Digits,
}

impl Fixed12Word {
    /// Keys of a word.
    pub const fn keys(self) -> usize {
        match self {
            Fixed12Word::Pair => 2,
            Fixed12Word::Digits => 4,
        }
    }
}

/// How the kernels of an instruction set want their operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Keys of a K panel, channels of a V panel.
    pub width: usize,
    /// Quantised Q and K.
    pub word: IntWord,
    /// Rows of Q and K in integers and in bfloat16 are padded with zeros to a multiple of this many words.
    pub depth_step: usize,
    pub fixed12: Fixed12Word,
}

impl Packing {
    /// What nothing more is asked of.
    pub const fn plain(width: usize, word: IntWord) -> Self {
        Packing { width, word, depth_step: 1, fixed12: Fixed12Word::Pair }
    }
}

/// Sizes of a packed tile, in 32-bit words. A tile is one contiguous run of memory:
/// K panels, K scales, panels of K as it is before it is rotated and rounded where Q is smoothed, V panels, V scales (of
/// numbers and FP4 one, of the whole tile; as K's of FP4).
///
/// A K panel holds `width` keys: for integers their start values, then for each word of depth the words of all keys.
/// A V panel holds `width` channels: for each key (bfloat16: pair of keys; 12 bits: as [`Fixed12Word`] says) the words of
/// all channels. FP4's panels are as [`crate::kernels::fp4`] says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TileLayout {
    pub qk: QkForm,
    pub pv: PvForm,
    /// Channels of Q and K.
    pub head_dim: usize,
    /// Channels of V and of the output.
    pub value_dim: usize,
    /// Whether Q and K are rotated.
    pub rotate: bool,
    /// How Q is smoothed: then its means are multiplied by K as it is.
    pub smooth_q: SmoothQ,
    /// Channels of Q and K after rotation.
    pub qk_dim: usize,
    pub word: IntWord,
    pub fixed12: Fixed12Word,
    /// Keys of a K panel, channels of a V panel.
    pub width: usize,
    /// Words of a row of Q, and of a key.
    pub depth: usize,
    /// Words of a K panel.
    pub k_panel: usize,
    /// Words of a V panel.
    pub v_panel: usize,
    /// V panels.
    pub channel_panels: usize,
}

/// A packed tile.
pub(crate) struct Tile<'a> {
    pub k: &'a [u32],
    pub k_scale: &'a [u32],
    /// Panels of `head_dim` times `width` numbers, where Q is smoothed.
    pub k_given: &'a [u32],
    pub v: &'a [u32],
    pub v_scale: &'a [u32],
}

impl TileLayout {
    pub fn new(
        packing: Packing,
        [head_dim, value_dim]: [usize; 2],
        qk: QkForm,
        pv: PvForm,
        rotate: bool,
        smooth_q: SmoothQ,
    ) -> Self {
        let Packing { width, word, depth_step, fixed12 } = packing;
        let qk_dim = if rotate { head_dim.next_power_of_two() } else { head_dim };
        let (depth, key_words) = match qk {
            QkForm::Float => (qk_dim, qk_dim),
            QkForm::Bf16 => {
                let depth = qk_dim.div_ceil(2).next_multiple_of(depth_step);
                (depth, depth)
            }
            QkForm::Int(_) => {
                let depth = qk_dim.div_ceil(word.channels()).next_multiple_of(depth_step);
                (depth, 1 + depth)
            }
            QkForm::Fp4(_) => {
                let blocks = qk_dim.div_ceil(fp4::BLOCK);
                (blocks * fp4::ROW_WORDS, blocks * fp4::PANEL_WORDS)
            }
        };
        let v_rows = match pv {
            PvForm::Float | PvForm::Rounded(_) => TILE_KEYS,
            PvForm::Fp4(..) => TILE_KEYS / fp4::BLOCK * fp4::PANEL_WORDS,
            PvForm::Fixed12 | PvForm::Bf16 => TILE_KEYS / 2,
        };
        TileLayout {
            qk,
            pv,
            head_dim,
            value_dim,
            rotate,
            smooth_q,
            qk_dim,
            word,
            fixed12,
            width,
            depth,
            k_panel: key_words * width,
            v_panel: v_rows * width,
            channel_panels: value_dim.div_ceil(width),
        }
    }

    /// Channels of the output, padded to whole panels.
    pub fn padded_dim(&self) -> usize {
        self.channel_panels * self.width
    }

    /// Neighbouring keys whose probabilities share a scale; 1 where none do.
    pub fn p_group(&self) -> usize {
        match self.pv {
            PvForm::Fp4(format, _) => format.group(),
            _ => 1,
        }
    }

    /// Words of a tile.
    pub fn words(&self) -> usize {
        self.lengths().iter().sum()
    }

    /// The parts of a packed tile.
    pub fn parts<'a>(&self, tile: &'a [u32]) -> Tile<'a> {
        let [k, k_scale, k_given, v, _] = self.lengths();
        let (k, rest) = tile.split_at(k);
        let (k_scale, rest) = rest.split_at(k_scale);
        let (k_given, rest) = rest.split_at(k_given);
        let (v, v_scale) = rest.split_at(v);
        Tile { k, k_scale, k_given, v, v_scale }
    }

    /// Whether keys that share a scale may lie in several tiles.
    pub fn groups_cross_tiles(&self) -> bool {
        let QkForm::Int(IntQuantizer { granularity, tile, .. }) = self.qk else { return false };
        match granularity {
            Granularity::PerTensor => true,
            Granularity::PerBlock | Granularity::PerWarp => !TILE_KEYS.is_multiple_of(tile.block_k),
            Granularity::PerThread => !TILE_KEYS.is_multiple_of(tile.warp_k),
            Granularity::PerToken => false,
        }
    }

    /// Whether means of Q are subtracted from it.
    pub fn smooths_q(&self) -> bool {
        self.smooth_q != SmoothQ::Off
    }

    /// Words of a panel of [`Tile::k_given`].
    pub fn given_panel(&self) -> usize {
        self.head_dim * self.width
    }

    /// Words of each part of a tile, in order.
    pub fn lengths(&self) -> [usize; 5] {
        /// One, and room that keeps what follows on a cache line.
        const ONE: usize = 16;
        let panels = TILE_KEYS / self.width;
        let k_scales = match self.qk {
            QkForm::Float | QkForm::Bf16 => 0,
            QkForm::Int(_) => TILE_KEYS,
            QkForm::Fp4(_) => ONE,
        };
        let k_given = if self.smooths_q() { panels * self.given_panel() } else { 0 };
        let v_scales = match self.pv {
            PvForm::Float | PvForm::Rounded(_) | PvForm::Fp4(..) | PvForm::Bf16 => ONE,
            PvForm::Fixed12 => self.padded_dim(),
        };
        [self.k_panel * panels, k_scales, k_given, self.v_panel * self.channel_panels, v_scales]
    }
}
