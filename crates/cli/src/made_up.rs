//! Tensors and masks of a call that options describe: random, or stand-ins that take no memory.

use sage_core::Strided;
use sage_kernels::TensorArg;
use sageattention::{Attention, DType, Error, Geometry, Inputs, Mask, Result, Tensor, TensorView, View};

use crate::failure;
use crate::inputs;
use crate::options::{ProblemOptions, with_sinks};

/// What made-up tensors hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Normally distributed numbers, the same in every run.
    Normal,
    /// One row of zeros, repeated: enough to plan a call, however large it is.
    StandIn,
}

/// A call's tensors, mask and attention sinks.
#[derive(Clone, Debug)]
pub struct MadeUp<'o> {
    options: &'o ProblemOptions,
    tensors: [Laid<Tensor>; 3],
    mask: Option<Laid<MaskData>>,
    sinks: Option<Vec<f32>>,
}

/// Data, and where in it each element of a tensor lies.
#[derive(Clone, Debug)]
struct Laid<T> {
    data: T,
    geometry: Geometry,
}

/// The elements of a mask.
#[derive(Clone, Debug)]
enum MaskData {
    Bool(Vec<bool>),
    Additive(Tensor),
}

/// A key is seen where the random number of a mask is below this: about four in five are.
const SEEN_BELOW: f32 = 0.84;

impl<'o> MadeUp<'o> {
    /// Makes up what the options describe.
    ///
    /// # Errors
    /// When a shape is none that tensors can have, there is no memory for it, there is more padding than keys, or sinks
    /// cannot be read.
    pub fn new(options: &'o ProblemOptions, content: Content) -> failure::Result<Self> {
        let [q, k, v] = options.shapes()?;
        let dtype = options.dtype.dtype.into();
        let tensor = |name, shape: &[usize], seed| tensor(name, dtype, shape, content, seed);
        let tensors = [tensor("q", &q, 1)?, tensor("k", &k, 2)?, tensor("v", &v, 3)?];
        let sinks = options.forward.sinks.of_heads(options.sizes.heads, "")?;
        Ok(MadeUp { options, tensors, mask: mask(options, content)?, sinks })
    }

    /// Q, K and V in the layout that the options name.
    pub fn tensors(&self) -> [TensorView<'_>; 3] {
        self.tensors.each_ref().map(|Laid { data, geometry }| data.view().with_geometry(*geometry))
    }

    /// All that a call takes beside its options.
    ///
    /// # Errors
    /// None: what was made up is whole.
    pub fn inputs(&self) -> Result<Inputs<'_>> {
        let [q, k, v] = self.tensors();
        let mask = self.mask.as_ref().map(Laid::view).transpose()?;
        let sinks = self.sinks().map(inputs::sinks).transpose()?;
        Ok(Inputs::new(q, k, v).mask(mask).lengths(self.options.lengths()).sinks(sinks))
    }

    /// The attention sinks.
    pub fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_deref()
    }

    /// The mask as kernels take it, where it has memory without gaps: strides of batch, heads, queries and keys, 0 where it
    /// is broadcast. All 0 without a mask.
    pub fn mask_argument(&self) -> TensorArg<4> {
        let mut strides = [0; 4];
        if let Some(Laid { geometry, .. }) = &self.mask {
            let shape = geometry.shape();
            let mut elements = 1;
            for (stride, &size) in strides[4 - shape.len()..].iter_mut().zip(shape).rev() {
                *stride = if size == 1 { 0 } else { elements };
                elements *= size as i64;
            }
        }
        TensorArg { address: 0, strides }
    }

    /// Attention with all options, the mask and sinks included.
    ///
    /// # Errors
    /// None: what was made up is whole.
    pub fn attention(&self) -> Result<Attention<'_>> {
        let attention = with_sinks(self.options.attention(), self.sinks());
        Ok(match &self.mask {
            Some(mask) => attention.mask(mask.view()?),
            None => attention,
        })
    }
}

impl Laid<MaskData> {
    fn view(&self) -> Result<Mask<'_>> {
        Ok(match &self.data {
            MaskData::Bool(seen) => Mask::Bool(View::strided("mask", seen, self.geometry)?),
            MaskData::Additive(bias) => Mask::Additive(bias.view().with_geometry(self.geometry)),
        })
    }
}

fn tensor(name: &str, dtype: DType, shape: &[usize], content: Content, seed: u64) -> Result<Laid<Tensor>> {
    // First of all: an error about the shape names the tensor.
    let contiguous = Geometry::contiguous(name, shape)?;
    let Some((&row, outer)) = shape.split_last().filter(|_| content == Content::StandIn) else {
        return Ok(Laid { data: inputs::normal(dtype, shape, seed)?, geometry: contiguous });
    };
    let strides: Vec<i64> = outer.iter().map(|_| 0).chain([1]).collect();
    Ok(Laid { data: Tensor::zeros(dtype, &[row])?, geometry: Geometry::strided(name, shape, &strides, 0)? })
}

fn mask(options: &ProblemOptions, content: Content) -> Result<Option<Laid<MaskData>>> {
    let (sizes, kv_len) = (&options.sizes, options.sizes.kv_len());
    if let Some(padding) = options.padding {
        let seen = kv_len.checked_sub(padding);
        let seen =
            seen.ok_or_else(|| Error::value("padding", padding, format!("at most the {kv_len} keys")))?;
        let shape = [kv_len];
        let data = match content {
            Content::Normal => (0..kv_len).map(|key| key < seen).collect(),
            Content::StandIn => vec![true],
        };
        return Ok(Some(laid_mask(MaskData::Bool(data), &shape, content)?));
    }
    let Some(dtype) = options.mask else { return Ok(None) };
    let shape = [sizes.batch, 1, sizes.seq, kv_len];
    let data = match (content, dtype.bias()) {
        (Content::Normal, None) => {
            let random = inputs::normal(DType::F32, &shape, 4)?.to_f32_vec();
            MaskData::Bool(random.into_iter().map(|x| x < SEEN_BELOW).collect())
        }
        (Content::Normal, Some(dtype)) => {
            let random = inputs::normal(DType::F32, &shape, 4)?.to_f32_vec();
            let bias = random.into_iter().map(|x| if x < SEEN_BELOW { x } else { f32::NEG_INFINITY });
            MaskData::Additive(Tensor::new(bias.collect::<Vec<f32>>(), &shape)?.to_dtype(dtype))
        }
        (Content::StandIn, None) => MaskData::Bool(vec![true]),
        (Content::StandIn, Some(dtype)) => MaskData::Additive(Tensor::zeros(dtype, &[1])?),
    };
    Ok(Some(laid_mask(data, &shape, content)?))
}

fn laid_mask(data: MaskData, shape: &[usize], content: Content) -> Result<Laid<MaskData>> {
    let geometry = match content {
        Content::Normal => Geometry::contiguous("mask", shape)?,
        Content::StandIn => Geometry::strided("mask", shape, &vec![0; shape.len()], 0)?,
    };
    Ok(Laid { data, geometry })
}
