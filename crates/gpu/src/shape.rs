//! Tensors, masks and maps without memory: what calls look like that are planned and not computed.

use std::convert::Infallible;

use sage_core::{Call, DType, Geometry, Mask, Operand, Result, Strided, TensorView};

use crate::{DeviceBytes, DeviceCall, DeviceMask, DeviceTensor};

/// Address of what stands in for a tensor: allocations begin at multiples of 256.
const START: u64 = 1 << 8;

/// A tensor without memory: its element type, and where each element would lie, counted from an address that is a
/// multiple of 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorShape {
    dtype: DType,
    geometry: Geometry,
}

impl TensorShape {
    /// A tensor of these strides.
    pub fn new(dtype: DType, geometry: Geometry) -> Self {
        TensorShape { dtype, geometry }
    }

    /// A row-major tensor without gaps.
    ///
    /// # Errors
    /// When no tensor can have such a shape.
    pub fn contiguous(dtype: DType, shape: &[usize]) -> Result<Self> {
        Ok(TensorShape { dtype, geometry: Geometry::contiguous("tensor", shape)? })
    }
}

impl From<&TensorView<'_>> for TensorShape {
    fn from(tensor: &TensorView<'_>) -> Self {
        TensorShape { dtype: tensor.dtype(), geometry: *tensor.geometry() }
    }
}

impl Strided for TensorShape {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        TensorShape { geometry, ..*self }
    }
}

impl Operand for TensorShape {
    type Mask = MaskShape;
    type Blocks = FlagsShape;
    type List = Infallible;

    fn dtype(&self) -> DType {
        self.dtype
    }
}

/// An explicit mask without memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskShape {
    /// A byte for each score.
    Bool(FlagsShape),
    /// A bias for each score.
    Additive(TensorShape),
}

impl From<&Mask<'_>> for MaskShape {
    fn from(mask: &Mask<'_>) -> Self {
        match mask {
            Mask::Bool(flags) => MaskShape::Bool(FlagsShape(*flags.geometry())),
            Mask::Additive(biases) => MaskShape::Additive(biases.into()),
        }
    }
}

impl Strided for MaskShape {
    fn geometry(&self) -> &Geometry {
        match self {
            MaskShape::Bool(flags) => &flags.0,
            MaskShape::Additive(biases) => &biases.geometry,
        }
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        match self {
            MaskShape::Bool(_) => MaskShape::Bool(FlagsShape(geometry)),
            MaskShape::Additive(biases) => MaskShape::Additive(biases.with_geometry(geometry)),
        }
    }
}

/// Flags without memory, a byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlagsShape(pub Geometry);

impl Strided for FlagsShape {
    fn geometry(&self) -> &Geometry {
        &self.0
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        FlagsShape(geometry)
    }
}

/// A call of host tensors without their memory.
pub(crate) fn without_memory<'a>(call: &Call<'a>) -> Call<'a, TensorShape> {
    let mask = call.mask.as_ref().map(MaskShape::from);
    let blocks = call.block_mask.as_ref().map(|mask| FlagsShape(*mask.blocks.geometry()));
    let sinks = call.sinks.as_ref().map(TensorShape::from);
    call.moved([&call.q, &call.k, &call.v].map(TensorShape::from), mask, blocks, sinks)
}

/// The call as if its tensors lay in a GPU's memory: for planning alone, nothing may be launched with them.
pub(crate) fn stand_in<'a>(call: &Call<'a, TensorShape>) -> DeviceCall<'a> {
    // SAFETY: nothing is launched with it.
    let tensor = |x: &TensorShape| unsafe { DeviceTensor::from_raw(x.dtype, x.geometry, START) };
    let mask = call.mask.as_ref().map(|mask| match mask {
        MaskShape::Bool(flags) => DeviceMask::Bool(flags_stand_in(&flags.0)),
        MaskShape::Additive(biases) => DeviceMask::Additive(tensor(biases)),
    });
    let blocks = call.block_mask.as_ref().map(|mask| flags_stand_in(&mask.blocks.0));
    call.moved([&call.q, &call.k, &call.v].map(tensor), mask, blocks, call.sinks.as_ref().map(tensor))
}

/// Flags as if they lay in a GPU's memory: for planning alone.
pub(crate) fn flags_stand_in<'a>(geometry: &Geometry) -> DeviceBytes<'a> {
    // SAFETY: nothing is launched with them.
    unsafe { DeviceBytes::from_raw(*geometry, START) }
}
