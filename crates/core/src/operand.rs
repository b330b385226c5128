//! What a check needs to know of a tensor, wherever its memory is.

use std::convert::Infallible;
use std::fmt::Debug;

use crate::{DType, Geometry, Mask, TensorView, View};

/// A tensor or mask as a check sees it. Where its memory lies is its backend's business.
pub trait Strided: Copy + Debug {
    /// Where each element lies.
    fn geometry(&self) -> &Geometry;
    /// The same memory, seen otherwise.
    #[must_use]
    fn with_geometry(&self, geometry: Geometry) -> Self;
}

/// A tensor of one of the element types that attention takes, and what may lie beside it in the same memory.
pub trait Operand: Strided {
    /// An explicit mask.
    type Mask: Strided;
    /// The flags of a block mask.
    type Blocks: Strided;
    /// Lengths that the host cannot read; [`Infallible`] where the memory is the host's.
    type List: List;
    /// Element type.
    fn dtype(&self) -> DType;
}

/// A list of 32-bit integers that the host cannot read.
pub trait List: Copy + Debug + PartialEq {
    /// Number of integers.
    fn entries(&self) -> usize;
}

impl List for Infallible {
    fn entries(&self) -> usize {
        match *self {}
    }
}

impl Strided for TensorView<'_> {
    fn geometry(&self) -> &Geometry {
        TensorView::geometry(self)
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        TensorView::with_geometry(self, geometry)
    }
}

impl<'a> Operand for TensorView<'a> {
    type Mask = Mask<'a>;
    type Blocks = View<'a, bool>;
    type List = Infallible;

    fn dtype(&self) -> DType {
        TensorView::dtype(self)
    }
}

impl Strided for Mask<'_> {
    fn geometry(&self) -> &Geometry {
        Mask::geometry(self)
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        Mask::with_geometry(self, geometry)
    }
}

impl Strided for View<'_, bool> {
    fn geometry(&self) -> &Geometry {
        View::geometry(self)
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        View::with_geometry(self, geometry)
    }
}
