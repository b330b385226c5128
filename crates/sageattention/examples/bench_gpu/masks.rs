//! Masks in the GPU's memory.

use sage_core::Geometry;
use sageattention::cuda::{Buffer, CudaTensor, DeviceBytes, DeviceMask, Stream};
use sageattention::{BlockMask, Tensor};

use crate::Result;
use crate::noise::{bits, normal};
use crate::shape::{MaskKind, Shape};

/// A block mask of random blocks on the GPU.
pub struct Blocks {
    flags: Buffer,
    shape: [usize; 4],
    sizes: [usize; 2],
}

impl Blocks {
    pub fn new(stream: &Stream, shape: &Shape, (q, k, density): (usize, usize, f64)) -> Result<Self> {
        let blocks = [shape.batch, shape.heads, shape.q_len.div_ceil(q), shape.kv_len.div_ceil(k)];
        let mut random = uniform(4);
        let flags: Vec<u8> = (0..blocks.iter().product()).map(|_| u8::from(random() < density)).collect();
        Ok(Blocks { flags: Buffer::from_slice(stream, &flags)?, shape: blocks, sizes: [q, k] })
    }

    pub fn view(&self) -> Result<BlockMask<DeviceBytes<'_>>> {
        let [block_q, block_k] = self.sizes;
        Ok(BlockMask { blocks: bytes(&self.flags, &self.shape)?, block_q, block_k })
    }
}

/// An explicit mask on the GPU.
pub enum ExplicitMask {
    Bool(Buffer, [usize; 4]),
    Additive(CudaTensor),
}

impl ExplicitMask {
    pub fn new(stream: &Stream, shape: &Shape, kind: MaskKind) -> Result<Self> {
        let Shape { q_len, kv_len, .. } = *shape;
        let scores = [1, 1, q_len, kv_len];
        let count = q_len * kv_len;
        let bools =
            |flags: Vec<u8>, sizes| Ok(ExplicitMask::Bool(Buffer::from_slice(stream, &flags)?, sizes));
        match kind {
            MaskKind::Padding => bools(
                (0..kv_len).map(|key| u8::from(key < kv_len - kv_len / 10)).collect(),
                [1, 1, 1, kv_len],
            ),
            MaskKind::Dense => {
                let mut random = uniform(5);
                bools((0..count).map(|_| u8::from(random() < 0.5)).collect(), scores)
            }
            MaskKind::Triangle => {
                // The last query sees the last key.
                bools(
                    (0..count).map(|at| u8::from(at % kv_len + q_len <= at / kv_len + kv_len)).collect(),
                    scores,
                )
            }
            MaskKind::Bias => {
                let biases = Tensor::new(normal(6, count), &scores)?;
                Ok(ExplicitMask::Additive(CudaTensor::upload(stream, &biases.view())?))
            }
        }
    }

    pub fn view(&self) -> Result<DeviceMask<'_>> {
        Ok(match self {
            ExplicitMask::Bool(flags, shape) => DeviceMask::Bool(bytes(flags, shape)?),
            ExplicitMask::Additive(biases) => DeviceMask::Additive(biases.view()),
        })
    }
}

/// A buffer's bytes as a row-major tensor of such a shape, which it has.
fn bytes<'a>(buffer: &'a Buffer, shape: &[usize]) -> Result<DeviceBytes<'a>> {
    let geometry = Geometry::contiguous("mask", shape)?;
    // SAFETY: the buffer was made of as many bytes as the shape has elements.
    Ok(unsafe { DeviceBytes::from_raw(geometry, buffer.address()) })
}

/// Numbers from 0 to 1.
fn uniform(seed: u64) -> impl FnMut() -> f64 {
    let mut bits = bits(seed);
    move || (bits() >> 11) as f64 / (1u64 << 53) as f64
}
