//! A tile of keys and values in the order that the kernels read it.

use sage_core::IntQuantizer;

use crate::isa::IntWord;

/// Keys in a tile: what the softmax sees at once, and what 12-bit P and V share scales over.
///
/// 128 · 4095 · 4095 is the largest sum of 12-bit products that stays below 2³¹.
pub(crate) const TILE_KEYS: usize = 128;

/// How Q·Kᵀ is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum QkForm {
    /// In single precision.
    Float,
    /// In integers.
    Int(IntQuantizer),
}

/// How P·V is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PvForm {
    /// In single precision.
    Float,
    /// In 12-bit fixed point.
    Fixed12,
}

/// Sizes of a packed tile, in 32-bit words. A tile is one contiguous run of memory:
/// K panels, K scales, V panels, V scales (of numbers one, of the whole tile).
///
/// A K panel holds `width` keys: for integers their start values, then for each word of depth the words of all keys.
/// A V panel holds `width` channels: for each key (12-bit: pair of keys) the words of all channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TileLayout {
    pub qk: QkForm,
    pub pv: PvForm,
    pub head_dim: usize,
    /// Whether Q and K are rotated.
    pub rotate: bool,
    /// Channels of Q and K after rotation.
    pub qk_dim: usize,
    pub word: IntWord,
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
    pub v: &'a [u32],
    pub v_scale: &'a [u32],
}

impl TileLayout {
    pub fn new(
        (width, word): (usize, IntWord),
        head_dim: usize,
        qk: QkForm,
        pv: PvForm,
        rotate: bool,
    ) -> Self {
        let qk_dim = if rotate { head_dim.next_power_of_two() } else { head_dim };
        let (depth, start) = match qk {
            QkForm::Float => (qk_dim, 0),
            QkForm::Int(_) => (qk_dim.div_ceil(word.channels()), 1),
        };
        let v_rows = match pv {
            PvForm::Float => TILE_KEYS,
            PvForm::Fixed12 => TILE_KEYS / 2,
        };
        TileLayout {
            qk,
            pv,
            head_dim,
            rotate,
            qk_dim,
            word,
            width,
            depth,
            k_panel: (start + depth) * width,
            v_panel: v_rows * width,
            channel_panels: head_dim.div_ceil(width),
        }
    }

    /// Channels of the output, padded to whole panels.
    pub fn padded_dim(&self) -> usize {
        self.channel_panels * self.width
    }

    /// Words of a tile.
    pub fn words(&self) -> usize {
        self.lengths().iter().sum()
    }

    /// The parts of a packed tile.
    pub fn parts<'a>(&self, tile: &'a [u32]) -> Tile<'a> {
        let [k, k_scale, v, _] = self.lengths();
        let (k, rest) = tile.split_at(k);
        let (k_scale, rest) = rest.split_at(k_scale);
        let (v, v_scale) = rest.split_at(v);
        Tile { k, k_scale, v, v_scale }
    }

    /// Words of each part of a tile, in order.
    pub fn lengths(&self) -> [usize; 4] {
        let k_scales = if self.qk == QkForm::Float { 0 } else { TILE_KEYS };
        let v_scales = match self.pv {
            // One, and room that keeps the next tile on a cache line.
            PvForm::Float => 16,
            PvForm::Fixed12 => self.padded_dim(),
        };
        [self.k_panel * (TILE_KEYS / self.width), k_scales, self.v_panel * self.channel_panels, v_scales]
    }
}
