//! Tensors in memory of their own, laid out as a caller may lay them out.

use std::fmt;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use sage_core::{DType, Elements, Geometry, MAX_RANK, Tensor, TensorView, TensorViewMut, View, ViewMut};

/// Elements in memory, and where each of a tensor's lies.
#[derive(Clone, PartialEq)]
pub struct Memory {
    elements: Elements,
    geometry: Geometry,
}

/// The expression with the vector inside an [`Elements`].
macro_rules! typed {
    ($elements:expr, $data:ident => $body:expr) => {
        match $elements {
            Elements::F32($data) => $body,
            Elements::F16($data) => $body,
            Elements::BF16($data) => $body,
        }
    };
}

impl Memory {
    /// Elements in memory, rounded to `dtype`, and the tensor of them that `geometry` says.
    ///
    /// # Panics
    /// When the geometry reaches beyond the elements.
    pub fn new(elements: Vec<f32>, dtype: DType, geometry: Geometry) -> Self {
        let inside = |(first, last)| first >= 0 && last < elements.len() as i64;
        assert!(
            geometry.span().is_none_or(inside),
            "{geometry:?} reaches beyond {} elements",
            elements.len()
        );
        let elements = match dtype {
            DType::F32 => elements.into(),
            DType::F16 => elements.into_iter().map(f16::from_f32).collect::<Vec<_>>().into(),
            DType::BF16 => elements.into_iter().map(bf16::from_f32).collect::<Vec<_>>().into(),
        };
        Memory { elements, geometry }
    }

    /// The same tensor in memory that holds these bits of 16-bit elements.
    ///
    /// # Panics
    /// When the elements are f32, or their number is another.
    pub fn with_half_bits(&self, bits: &[u16]) -> Self {
        let elements: Elements = match self.elements {
            Elements::F32(_) => panic!("a tensor in f32 has no elements of 16 bits"),
            Elements::F16(_) => bits.reinterpret_cast::<f16>().to_vec().into(),
            Elements::BF16(_) => bits.reinterpret_cast::<bf16>().to_vec().into(),
        };
        assert_eq!(bits.len(), self.len(), "elements in memory");
        Memory { elements, geometry: self.geometry }
    }

    /// Elements in memory, those between the tensor's included.
    pub fn len(&self) -> usize {
        typed!(&self.elements, data => data.len())
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where each element lies.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.geometry.shape()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self.elements {
            Elements::F32(_) => DType::F32,
            Elements::F16(_) => DType::F16,
            Elements::BF16(_) => DType::BF16,
        }
    }

    /// The tensor, borrowed.
    pub fn view(&self) -> TensorView<'_> {
        typed!(&self.elements, data => View::strided("tensor", data, self.geometry).unwrap().into())
    }

    /// The tensor, borrowed to write to.
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        typed!(&mut self.elements, data => ViewMut::strided("tensor", data, self.geometry).unwrap().into())
    }

    /// Where an element lies.
    pub fn position(&self, index: &[usize]) -> usize {
        let mut at = [0; MAX_RANK];
        at[MAX_RANK - index.len()..].copy_from_slice(index);
        self.geometry.index(at) as usize
    }

    /// All elements in memory, widened.
    pub fn to_f32_memory(&self) -> Vec<f32> {
        match &self.elements {
            Elements::F32(data) => data.clone(),
            Elements::F16(data) => data.to_f32_vec(),
            Elements::BF16(data) => data.to_f32_vec(),
        }
    }

    /// The tensor's elements in row-major order, widened.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        let all = self.to_f32_memory();
        let mut elements = Vec::with_capacity(self.geometry.len());
        for_each_index(self.shape(), |index| elements.push(all[self.position(index)]));
        elements
    }

    /// The same values in another element type.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        Memory::new(self.to_f32_memory(), dtype, self.geometry)
    }

    /// The same with what `change` makes of each element in memory, given its place in memory.
    pub fn map(&self, mut change: impl FnMut(usize, f32) -> f32) -> Self {
        let elements = self.to_f32_memory().into_iter().enumerate().map(|(at, x)| change(at, x));
        Memory::new(elements.collect(), self.dtype(), self.geometry)
    }

    /// The same with `value` in those rows of which `which` says so, given their index in all dimensions but the last.
    pub fn with_rows(&self, value: f32, mut which: impl FnMut(&[usize]) -> bool) -> Self {
        let (shape, last) = (self.shape(), self.geometry.rank() - 1);
        let mut all = self.to_f32_memory();
        for_each_index(&shape[..last], |row| {
            if which(row) {
                let mut index = [row, &[0]].concat();
                for channel in 0..shape[last] {
                    index[last] = channel;
                    all[self.position(&index)] = value;
                }
            }
        });
        Memory::new(all, self.dtype(), self.geometry)
    }

    /// The first channels of each row, among the same elements in memory.
    pub fn first_channels(&self, channels: usize) -> Self {
        let (mut shape, strides) = (self.shape().to_vec(), self.geometry.strides());
        let last = shape.len() - 1;
        shape[last] = channels;
        let offset = if self.geometry.is_empty() { 0 } else { self.geometry.index([0; MAX_RANK]) };
        let geometry = Geometry::strided("tensor", &shape, &strides[..=last], offset).unwrap();
        Memory { elements: self.elements.clone(), geometry }
    }

    /// The bits of all elements in memory.
    pub fn bits(&self) -> Vec<u32> {
        match &self.elements {
            Elements::F32(data) => data.iter().map(|x| x.to_bits()).collect(),
            Elements::F16(data) => data.iter().map(|x| u32::from(x.to_bits())).collect(),
            Elements::BF16(data) => data.iter().map(|x| u32::from(x.to_bits())).collect(),
        }
    }

    /// The bits of all elements in memory, of 16-bit elements.
    ///
    /// # Panics
    /// When the elements are f32.
    pub fn half_bits(&self) -> &[u16] {
        match &self.elements {
            Elements::F32(_) => panic!("a tensor in f32 has no elements of 16 bits"),
            Elements::F16(data) => data.reinterpret_cast(),
            Elements::BF16(data) => data.reinterpret_cast(),
        }
    }
}

impl From<Tensor> for Memory {
    fn from(tensor: Tensor) -> Self {
        let geometry = *tensor.view().geometry();
        let elements = match tensor.view() {
            TensorView::F32(view) => view.data().to_vec().into(),
            TensorView::F16(view) => view.data().to_vec().into(),
            TensorView::BF16(view) => view.data().to_vec().into(),
        };
        Memory { elements, geometry }
    }
}

/// Everything but the elements.
impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.dtype(), self.geometry)
    }
}

/// Calls `each` with every index of a shape, in row-major order.
pub fn for_each_index(shape: &[usize], mut each: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product::<usize>() {
        each(&index);
        for (at, &size) in index.iter_mut().zip(shape).rev() {
            *at += 1;
            if *at < size {
                break;
            }
            *at = 0;
        }
    }
}
