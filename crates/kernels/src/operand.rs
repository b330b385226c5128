//! What the operands of both products are, said once: their elements, where these come from, and how they are scaled.

use sage_core::{Accumulator, DType, Fp4Format, Granularity, IntBits, IntQuantizer, PLevels, Qk};

use crate::fp4::ScaleWords;
use crate::key_order::KeyOrder;

/// An element as tensor cores take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Integers of −7 to 7.
    I4,
    /// Integers of −127 to 127.
    I8,
    /// 4-bit floats, up to 6.
    E2M1,
    /// 8-bit floats with 4 bits of exponent, up to 448.
    E4M3,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl Element {
    /// That of tensors as given, which are in f16 or bf16 on a GPU.
    pub const fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Element::BF16,
            DType::F16 | DType::F32 => Element::F16,
        }
    }

    /// Integers of that width.
    pub const fn of_bits(bits: IntBits) -> Self {
        match bits {
            IntBits::Eight => Element::I8,
            IntBits::Four => Element::I4,
        }
    }

    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Element::I4 => "INT4",
            Element::I8 => "INT8",
            Element::E2M1 => "FP4",
            Element::E4M3 => "FP8",
            Element::F16 => "f16",
            Element::BF16 => "bf16",
        }
    }

    /// Bits of an element: in shared memory, in registers and in the workspace alike.
    pub const fn bits(self) -> usize {
        match self {
            Element::I4 | Element::E2M1 => 4,
            Element::I8 | Element::E4M3 => 8,
            Element::F16 | Element::BF16 => 16,
        }
    }

    /// Elements of a 32-bit register.
    pub const fn per_register(self) -> usize {
        32 / self.bits()
    }
}

/// Where the attention kernel finds an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperandSource {
    /// In the caller's tensor, whose elements it takes as they are, or quantises itself.
    Given,
    /// In tiles of the workspace, which an earlier launch wrote.
    Workspace,
    /// In its own registers.
    Registers,
}

/// What elements are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// Nothing.
    None,
    /// A scale for each group of rows.
    Rows(Granularity),
    /// A scale for each channel.
    Channels,
    /// A scale for each group of neighbours along the contracted dimension.
    Blocks(Fp4Format),
}

/// Columns of tiles whose rows hold so many channels of a head: 64, 128, or a larger multiple of 64.
pub(crate) const fn tile_columns(channels: usize) -> usize {
    match channels {
        0..=64 => 64,
        65..=128 => 128,
        _ => channels.next_multiple_of(64),
    }
}

/// An operand of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operand {
    /// Its elements.
    pub element: Element,
    /// Where the attention kernel finds it.
    pub source: OperandSource,
    /// Its scales.
    pub scales: Scales,
}

impl Operand {
    /// Bytes of so many elements.
    pub const fn bytes(&self, elements: usize) -> usize {
        elements * self.element.bits() / 8
    }

    /// Columns of its tiles whose rows hold so many channels of a head: [`tile_columns`], or where scales of blocks lie
    /// behind them, a power of two.
    pub(crate) const fn columns(&self, channels: usize) -> usize {
        match self.scales {
            Scales::Blocks(_) if channels > 64 => channels.next_power_of_two(),
            Scales::Blocks(_) | Scales::None | Scales::Rows(_) | Scales::Channels => tile_columns(channels),
        }
    }

    /// Bytes of a tile of so many rows of so many elements, in the workspace and in shared memory: scales of blocks are
    /// part of it.
    pub(crate) const fn tile_bytes(&self, rows: usize, elements: usize) -> usize {
        self.bytes(rows * elements)
            + match self.scales {
                Scales::Blocks(_) => ScaleWords::new(rows, elements).bytes(),
                Scales::None | Scales::Rows(_) | Scales::Channels => 0,
            }
    }

    /// Rows of such a tile: those of scales, which are as long as the others, are the last of them.
    pub(crate) const fn tile_rows(&self, rows: usize, elements: usize) -> usize {
        self.tile_bytes(rows, elements) / self.bytes(elements)
    }

    /// Its 4-bit format, where it has one.
    pub const fn fp4(&self) -> Option<Fp4Format> {
        match self.scales {
            Scales::Blocks(format) => Some(format),
            Scales::None | Scales::Rows(_) | Scales::Channels => None,
        }
    }
}

/// The operands of `S = Q·Kᵀ` and of `O = P·V`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operands {
    /// Queries.
    pub q: Operand,
    /// Keys.
    pub k: Operand,
    /// Probabilities.
    pub p: Operand,
    /// Values.
    pub v: Operand,
    /// How P·V is summed.
    pub sums: Accumulator,
    /// How Q and K become integers, where they do.
    pub quantizer: Option<IntQuantizer>,
    /// Levels in which P is scaled, where it is in 4 bits.
    pub levels: Option<PLevels>,
}

/// What P and V are multiplied as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValueForm {
    /// Their elements.
    pub element: Element,
    /// How P·V is summed.
    pub sums: Accumulator,
    /// For 4-bit elements, their format and the levels in which P is scaled.
    pub fp4: Option<(Fp4Format, PLevels)>,
}

impl Operands {
    /// For tensors of type `dtype`: Q and K as `qk` has them, P and V as `values`.
    pub fn new(dtype: DType, qk: Qk, values: ValueForm) -> Self {
        let given =
            Operand { element: Element::of(dtype), source: OperandSource::Given, scales: Scales::None };
        let quantised = |element, scales| {
            let q = Operand { element, source: OperandSource::Given, scales };
            (q, Operand { source: OperandSource::Workspace, ..q })
        };
        let (q, k) = match qk {
            Qk::Full => (given, given),
            Qk::Int(IntQuantizer { bits, granularity, .. }) => {
                quantised(Element::of_bits(bits), Scales::Rows(granularity))
            }
            Qk::Fp4(format) => quantised(Element::E2M1, Scales::Blocks(format)),
        };
        let quantizer = if let Qk::Int(quantizer) = qk { Some(quantizer) } else { None };
        let ValueForm { element, sums, fp4 } = values;
        let blocks = fp4.map_or(Scales::None, |(format, _)| Scales::Blocks(format));
        let p = Operand { element, source: OperandSource::Registers, scales: blocks };
        let v = match element {
            Element::E4M3 => Operand { element, source: OperandSource::Workspace, scales: Scales::Channels },
            Element::E2M1 => Operand { element, source: OperandSource::Workspace, scales: blocks },
            own if own == given.element => given,
            other => Operand { element: other, source: OperandSource::Workspace, ..given },
        };
        Operands { q, k, p, v, sums, quantizer, levels: fp4.map(|(_, levels)| levels) }
    }

    /// In which order the keys of a tile are multiplied.
    pub const fn key_order(&self) -> KeyOrder {
        match self.p.element {
            Element::E2M1 => KeyOrder::Octets,
            _ => KeyOrder::Natural,
        }
    }

    /// Whether P·V of a tile is summed by itself first.
    pub fn sums_tiles_first(&self) -> bool {
        matches!(self.sums, Accumulator::F16ThenF32 | Accumulator::F32ThenF32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_core::Preset;

    #[test]
    fn operands_lie_where_kernels_read_them() {
        let of = |element| ValueForm { element, sums: Accumulator::F32, fp4: None };
        let given = Operands::new(DType::BF16, Qk::Full, of(Element::BF16));
        assert_eq!((given.k.source, given.v.source), (OperandSource::Given, OperandSource::Given));
        assert_eq!(given.k.bytes(64), 128);
        let converted = Operands::new(DType::BF16, Qk::Full, of(Element::F16));
        assert_eq!((converted.v.source, converted.v.scales), (OperandSource::Workspace, Scales::None));
        let quantised = Operands::new(DType::F16, Preset::SAGE2_INT4_FP8.scheme(64).qk, of(Element::E4M3));
        assert_eq!(
            (quantised.q.source, quantised.k.source),
            (OperandSource::Given, OperandSource::Workspace)
        );
        assert_eq!((quantised.k.bytes(64), quantised.v.bytes(64)), (32, 64));
        assert_eq!(quantised.v.scales, Scales::Channels);
        let fp4 = ValueForm { fp4: Some((Fp4Format::Nv, PLevels::Two)), ..of(Element::E2M1) };
        let four_bits = Operands::new(DType::F16, Qk::Fp4(Fp4Format::Nv), fp4);
        assert_eq!((four_bits.q.fp4(), four_bits.v.fp4()), (Some(Fp4Format::Nv), Some(Fp4Format::Nv)));
        assert_eq!((four_bits.k.tile_bytes(64, 128), four_bits.v.tile_bytes(128, 64)), (4608, 4608));
        assert_eq!((four_bits.key_order(), quantised.key_order()), (KeyOrder::Octets, KeyOrder::Natural));
    }
}
