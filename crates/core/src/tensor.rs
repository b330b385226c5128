//! Tensors: borrowed views with strides, and an owned one for results.

use half::{bf16, f16};

use crate::{DType, Element, Error, Geometry, MAX_RANK, Result};

/// A borrowed tensor of `T`: memory, and where each element lies in it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    data: &'a [T],
    geometry: Geometry,
}

impl<'a, T: Copy> View<'a, T> {
    /// A row-major tensor that fills `data`.
    ///
    /// # Errors
    /// When `data` does not hold exactly the elements of `shape`.
    pub fn contiguous(name: &str, data: &'a [T], shape: &[usize]) -> Result<Self> {
        let geometry = Geometry::contiguous(name, shape)?;
        if geometry.len() != data.len() {
            return Err(memory(name, data.len(), format!("{} for shape {shape:?}", geometry.len())));
        }
        Ok(View { data, geometry })
    }

    /// A tensor whose elements lie in `data` where `geometry` says.
    ///
    /// # Errors
    /// When an element would lie outside `data`.
    pub fn strided(name: &str, data: &'a [T], geometry: Geometry) -> Result<Self> {
        check_span(name, data.len(), &geometry)?;
        Ok(View { data, geometry })
    }

    /// Where each element lies in [`View::data`].
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The memory that the elements lie in, gaps included.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// One element; dimensions that the tensor lacks come first and are ignored.
    pub fn at(&self, at: [usize; MAX_RANK]) -> T {
        self.data[self.geometry.index(at) as usize]
    }

    pub(crate) fn with_geometry(&self, geometry: Geometry) -> Self {
        View { data: self.data, geometry }
    }
}

/// A borrowed tensor of `T` to write to. No two positions share memory.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    geometry: Geometry,
}

impl<'a, T: Copy> ViewMut<'a, T> {
    /// A tensor whose elements lie in `data` where `geometry` says.
    ///
    /// # Errors
    /// When an element would lie outside `data`, or two could share memory.
    pub fn strided(name: &str, data: &'a mut [T], geometry: Geometry) -> Result<Self> {
        check_span(name, data.len(), &geometry)?;
        if geometry.overlaps_itself() {
            return Err(Error::Strides {
                name: name.to_owned().into(),
                found: format!("{:?}", geometry.strides()),
                wanted: format!("no two elements of shape {:?} in one place", geometry.shape()),
            });
        }
        Ok(ViewMut { data, geometry })
    }

    /// Where each element lies in [`ViewMut::data_mut`].
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The memory that the elements lie in, gaps included.
    pub fn data_mut(&mut self) -> &mut [T] {
        self.data
    }

    /// Sets one element; dimensions that the tensor lacks come first and are ignored.
    pub fn set(&mut self, at: [usize; MAX_RANK], value: T) {
        self.data[self.geometry.index(at) as usize] = value;
    }
}

/// A borrowed tensor in any of the element types that attention takes.
#[derive(Clone, Copy, Debug)]
pub enum TensorView<'a> {
    /// Single precision.
    F32(View<'a, f32>),
    /// Half precision.
    F16(View<'a, f16>),
    /// bfloat16.
    BF16(View<'a, bf16>),
}

/// A borrowed tensor to write to, in any of the element types that attention takes.
#[derive(Debug)]
pub enum TensorViewMut<'a> {
    /// Single precision.
    F32(ViewMut<'a, f32>),
    /// Half precision.
    F16(ViewMut<'a, f16>),
    /// bfloat16.
    BF16(ViewMut<'a, bf16>),
}

/// Runs one expression with the typed view inside a [`TensorView`] or [`TensorViewMut`].
macro_rules! typed {
    ($Enum:ident, $tensor:expr, $view:ident => $body:expr) => {
        match $tensor {
            $Enum::F32($view) => $body,
            $Enum::F16($view) => $body,
            $Enum::BF16($view) => $body,
        }
    };
}

impl<'a> TensorView<'a> {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            TensorView::F32(_) => DType::F32,
            TensorView::F16(_) => DType::F16,
            TensorView::BF16(_) => DType::BF16,
        }
    }

    /// Where each element lies.
    pub fn geometry(&self) -> &Geometry {
        typed!(TensorView, self, v => v.geometry())
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.geometry().shape()
    }

    /// One element; dimensions that the tensor lacks come first and are ignored.
    pub fn at(&self, at: [usize; MAX_RANK]) -> f32 {
        typed!(TensorView, self, v => v.at(at).to_f32())
    }

    pub(crate) fn with_geometry(&self, geometry: Geometry) -> TensorView<'a> {
        match self {
            TensorView::F32(v) => TensorView::F32(v.with_geometry(geometry)),
            TensorView::F16(v) => TensorView::F16(v.with_geometry(geometry)),
            TensorView::BF16(v) => TensorView::BF16(v.with_geometry(geometry)),
        }
    }
}

impl TensorViewMut<'_> {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            TensorViewMut::F32(_) => DType::F32,
            TensorViewMut::F16(_) => DType::F16,
            TensorViewMut::BF16(_) => DType::BF16,
        }
    }

    /// Where each element lies.
    pub fn geometry(&self) -> &Geometry {
        typed!(TensorViewMut, self, v => v.geometry())
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.geometry().shape()
    }

    /// Sets one element, rounding to nearest; dimensions that the tensor lacks come first and are ignored.
    pub fn set(&mut self, at: [usize; MAX_RANK], value: f64) {
        typed!(TensorViewMut, self, v => v.set(at, Element::from_f64(value)))
    }
}

macro_rules! view_of {
    ($T:ty, $Variant:ident) => {
        impl<'a> From<View<'a, $T>> for TensorView<'a> {
            fn from(view: View<'a, $T>) -> Self {
                TensorView::$Variant(view)
            }
        }
        impl<'a> From<ViewMut<'a, $T>> for TensorViewMut<'a> {
            fn from(view: ViewMut<'a, $T>) -> Self {
                TensorViewMut::$Variant(view)
            }
        }
        impl From<Vec<$T>> for Elements {
            fn from(data: Vec<$T>) -> Self {
                Elements::$Variant(data)
            }
        }
    };
}
view_of!(f32, F32);
view_of!(f16, F16);
view_of!(bf16, BF16);

/// Elements of a [`Tensor`], in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
}

/// An owned, row-major tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    elements: Elements,
    geometry: Geometry,
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// When there are more than [`MAX_RANK`] dimensions, or more elements than memory holds.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
        let geometry = Geometry::contiguous("tensor", shape)?;
        let elements = match dtype {
            DType::F32 => zeros::<f32>(geometry.len()).map(Elements::from),
            DType::F16 => zeros::<f16>(geometry.len()).map(Elements::from),
            DType::BF16 => zeros::<bf16>(geometry.len()).map(Elements::from),
        };
        let elements = elements.ok_or_else(|| {
            Error::unsupported(
                format!("a tensor of shape {shape:?} in {dtype}"),
                "there is not enough memory",
            )
        })?;
        Ok(Tensor { elements, geometry })
    }

    /// A tensor of `shape` with the given elements in row-major order.
    ///
    /// # Errors
    /// When `elements` are not exactly those of `shape`.
    pub fn new(elements: impl Into<Elements>, shape: &[usize]) -> Result<Self> {
        let elements = elements.into();
        let geometry = Geometry::contiguous("tensor", shape)?;
        let len = match &elements {
            Elements::F32(data) => data.len(),
            Elements::F16(data) => data.len(),
            Elements::BF16(data) => data.len(),
        };
        if geometry.len() != len {
            return Err(memory("tensor", len, format!("{} for shape {shape:?}", geometry.len())));
        }
        Ok(Tensor { elements, geometry })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.view().dtype()
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.geometry.shape()
    }

    /// This tensor, borrowed.
    pub fn view(&self) -> TensorView<'_> {
        match &self.elements {
            Elements::F32(data) => TensorView::F32(View { data, geometry: self.geometry }),
            Elements::F16(data) => TensorView::F16(View { data, geometry: self.geometry }),
            Elements::BF16(data) => TensorView::BF16(View { data, geometry: self.geometry }),
        }
    }

    /// This tensor, borrowed to write to.
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        match &mut self.elements {
            Elements::F32(data) => TensorViewMut::F32(ViewMut { data, geometry: self.geometry }),
            Elements::F16(data) => TensorViewMut::F16(ViewMut { data, geometry: self.geometry }),
            Elements::BF16(data) => TensorViewMut::BF16(ViewMut { data, geometry: self.geometry }),
        }
    }

    /// All elements in row-major order, widened.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match &self.elements {
            Elements::F32(data) => data.clone(),
            Elements::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Elements::BF16(data) => data.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The same values in another element type, rounded to nearest.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        let wide = self.to_f32_vec();
        let elements = match dtype {
            DType::F32 => wide.into(),
            DType::F16 => wide.into_iter().map(f16::from_f32).collect::<Vec<_>>().into(),
            DType::BF16 => wide.into_iter().map(bf16::from_f32).collect::<Vec<_>>().into(),
        };
        Tensor { elements, geometry: self.geometry }
    }
}

impl<'a> From<&'a Tensor> for TensorView<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
    }
}

/// `len` zeros, or `None` where memory does not hold them.
fn zeros<T: Element>(len: usize) -> Option<Vec<T>> {
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).ok()?;
    elements.resize(len, T::ZERO);
    Some(elements)
}

fn memory(name: &str, found: usize, wanted: String) -> Error {
    Error::Memory { name: name.to_owned().into(), found, wanted }
}

fn check_span(name: &str, len: usize, geometry: &Geometry) -> Result<()> {
    match geometry.span() {
        Some((low, _)) if low < 0 => {
            Err(memory(name, len, format!("none before the first, but {geometry:?} reaches index {low}")))
        }
        Some((_, high)) if high as u64 >= len as u64 => {
            Err(memory(name, len, format!("at least {} for {geometry:?}", high as u64 + 1)))
        }
        _ => Ok(()),
    }
}
