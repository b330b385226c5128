//! What the operands of both products are, said once: their elements, where these come from, and how they are scaled.

use sage_core::{Accumulator, DType, Granularity, IntBits, IntQuantizer};

/// An element as tensor cores take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Integers of −7 to 7.
    I4,
    /// Integers of −127 to 127.
    I8,
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

    /// Bits of an element: in shared memory, in registers and in the workspace alike.
    pub const fn bits(self) -> usize {
        match self {
            Element::I4 => 4,
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
}

impl Operands {
    /// For tensors of type `dtype`: Q and K as given or as `quantizer` makes them, P and V as elements of type
    /// `values`.
    pub fn new(dtype: DType, quantizer: Option<IntQuantizer>, values: Element, sums: Accumulator) -> Self {
        let given =
            Operand { element: Element::of(dtype), source: OperandSource::Given, scales: Scales::None };
        let (q, k) = match quantizer {
            None => (given, given),
            Some(IntQuantizer { bits, granularity, .. }) => {
                let element = Element::of_bits(bits);
                let q = Operand { element, source: OperandSource::Given, scales: Scales::Rows(granularity) };
                (q, Operand { source: OperandSource::Workspace, ..q })
            }
        };
        let p = Operand { element: values, source: OperandSource::Registers, scales: Scales::None };
        let v = match values {
            Element::E4M3 => {
                Operand { element: values, source: OperandSource::Workspace, scales: Scales::Channels }
            }
            own if own == given.element => given,
            other => Operand { element: other, source: OperandSource::Workspace, ..given },
        };
        Operands { q, k, p, v, sums, quantizer }
    }

    /// Whether P·V of a tile is summed by itself first.
    pub fn sums_tiles_first(&self) -> bool {
        matches!(self.sums, Accumulator::F16ThenF32 | Accumulator::F32ThenF32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_core::{Preset, Qk};

    #[test]
    fn operands_lie_where_kernels_read_them() {
        let Qk::Int(quantizer) = Preset::SAGE2_INT4_FP8.scheme(64).qk else { panic!("not of integers") };
        let f32 = Accumulator::F32;
        let given = Operands::new(DType::BF16, None, Element::BF16, f32);
        assert_eq!((given.k.source, given.v.source), (OperandSource::Given, OperandSource::Given));
        assert_eq!(given.k.bytes(64), 128);
        let converted = Operands::new(DType::BF16, None, Element::F16, f32);
        assert_eq!((converted.v.source, converted.v.scales), (OperandSource::Workspace, Scales::None));
        let quantised = Operands::new(DType::F16, Some(quantizer), Element::E4M3, f32);
        assert_eq!(
            (quantised.q.source, quantised.k.source),
            (OperandSource::Given, OperandSource::Workspace)
        );
        assert_eq!((quantised.k.bytes(64), quantised.v.bytes(64)), (32, 64));
        assert_eq!(quantised.v.scales, Scales::Channels);
    }
}
