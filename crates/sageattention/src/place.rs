//! Where masks and lengths lie: those of a call in the memory of the backend that computes it.

use sage_core::{BlockMask, Error, Lengths, Mask, Operand, Result, SparseBackend, TensorView, View};
use sage_cpu::Cpu;
#[cfg(feature = "cuda")]
use sage_gpu::{
    Cuda, DeviceBytes, DeviceInts, DeviceMask, DeviceTensor, FlagsShape, HostTensors, MaskShape, TensorShape,
    WarmUp,
};

/// An explicit mask, in this machine's memory or a GPU's.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum AnyMask<'a> {
    /// In this machine's memory.
    Host(Mask<'a>),
    /// In a GPU's memory.
    #[cfg(feature = "cuda")]
    Device(DeviceMask<'a>),
    /// Without memory, for a [`WarmUp`].
    #[cfg(feature = "cuda")]
    Shape(MaskShape),
}

/// A block mask, in this machine's memory or a GPU's.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum AnyBlockMask<'a> {
    /// In this machine's memory.
    Host(BlockMask<View<'a, bool>>),
    /// In a GPU's memory.
    #[cfg(feature = "cuda")]
    Device(BlockMask<DeviceBytes<'a>>),
    /// Without memory, for a [`WarmUp`].
    #[cfg(feature = "cuda")]
    Shape(BlockMask<FlagsShape>),
}

/// Lengths of sequences, in this machine's memory or a GPU's.
#[cfg(feature = "cuda")]
pub type AnyLengths<'a> = Lengths<'a, DeviceInts<'a>>;
/// Lengths of sequences.
#[cfg(not(feature = "cuda"))]
pub type AnyLengths<'a> = Lengths<'a>;

impl<'a> From<Mask<'a>> for AnyMask<'a> {
    fn from(mask: Mask<'a>) -> Self {
        AnyMask::Host(mask)
    }
}

#[cfg(feature = "cuda")]
impl<'a> From<DeviceMask<'a>> for AnyMask<'a> {
    fn from(mask: DeviceMask<'a>) -> Self {
        AnyMask::Device(mask)
    }
}

impl<'a> From<BlockMask<View<'a, bool>>> for AnyBlockMask<'a> {
    fn from(mask: BlockMask<View<'a, bool>>) -> Self {
        AnyBlockMask::Host(mask)
    }
}

#[cfg(feature = "cuda")]
impl<'a> From<BlockMask<DeviceBytes<'a>>> for AnyBlockMask<'a> {
    fn from(mask: BlockMask<DeviceBytes<'a>>) -> Self {
        AnyBlockMask::Device(mask)
    }
}

#[cfg(feature = "cuda")]
impl From<MaskShape> for AnyMask<'_> {
    fn from(mask: MaskShape) -> Self {
        AnyMask::Shape(mask)
    }
}

#[cfg(feature = "cuda")]
impl From<BlockMask<FlagsShape>> for AnyBlockMask<'_> {
    fn from(mask: BlockMask<FlagsShape>) -> Self {
        AnyBlockMask::Shape(mask)
    }
}

/// A backend, and what it makes of masks and lengths: an error that names those which lie in another memory.
pub trait Place: SparseBackend {
    /// The same tensor for a shorter time, which generic code cannot know to be possible.
    fn reborrow<'short, 'long: 'short>(tensor: Self::Tensor<'long>) -> Self::Tensor<'short>;

    /// An explicit mask.
    ///
    /// # Errors
    /// When it lies elsewhere.
    fn mask(mask: AnyMask<'_>) -> Result<<Self::Tensor<'_> as Operand>::Mask>;

    /// A block mask.
    ///
    /// # Errors
    /// When it lies elsewhere.
    fn block_mask(mask: AnyBlockMask<'_>) -> Result<BlockMask<<Self::Tensor<'_> as Operand>::Blocks>>;

    /// Lengths.
    ///
    /// # Errors
    /// When they lie elsewhere.
    fn lengths(lengths: AnyLengths<'_>) -> Result<Lengths<'_, <Self::Tensor<'_> as Operand>::List>>;
}

/// The [`Place`] of a backend of host tensors.
macro_rules! host_place {
    ($backend:ty) => {
        impl Place for $backend {
            fn reborrow<'short, 'long: 'short>(tensor: TensorView<'long>) -> TensorView<'short> {
                tensor
            }

            fn mask(mask: AnyMask<'_>) -> Result<Mask<'_>> {
                match mask {
                    AnyMask::Host(mask) => Ok(mask),
                    #[cfg(feature = "cuda")]
                    AnyMask::Device(_) => Err(on_device("mask")),
                    #[cfg(feature = "cuda")]
                    AnyMask::Shape(_) => Err(nowhere("mask")),
                }
            }

            fn block_mask(mask: AnyBlockMask<'_>) -> Result<BlockMask<View<'_, bool>>> {
                match mask {
                    AnyBlockMask::Host(mask) => Ok(mask),
                    #[cfg(feature = "cuda")]
                    AnyBlockMask::Device(_) => Err(on_device("block_mask")),
                    #[cfg(feature = "cuda")]
                    AnyBlockMask::Shape(_) => Err(nowhere("block_mask")),
                }
            }

            fn lengths(lengths: AnyLengths<'_>) -> Result<Lengths<'_>> {
                on_this_machine(lengths)
            }
        }
    };
}

host_place!(Cpu);
#[cfg(feature = "cuda")]
host_place!(HostTensors);

#[cfg(feature = "cuda")]
impl Place for Cuda {
    fn reborrow<'short, 'long: 'short>(tensor: DeviceTensor<'long>) -> DeviceTensor<'short> {
        tensor
    }

    fn mask(mask: AnyMask<'_>) -> Result<DeviceMask<'_>> {
        match mask {
            AnyMask::Device(mask) => Ok(mask),
            AnyMask::Host(_) => Err(on_host("mask")),
            AnyMask::Shape(_) => Err(nowhere("mask")),
        }
    }

    fn block_mask(mask: AnyBlockMask<'_>) -> Result<BlockMask<DeviceBytes<'_>>> {
        match mask {
            AnyBlockMask::Device(mask) => Ok(mask),
            AnyBlockMask::Host(_) => Err(on_host("block_mask")),
            AnyBlockMask::Shape(_) => Err(nowhere("block_mask")),
        }
    }

    fn lengths(lengths: AnyLengths<'_>) -> Result<Lengths<'_, <DeviceTensor<'_> as Operand>::List>> {
        Ok(lengths)
    }
}

/// Of masks the shapes alone are used; lengths are read, and so are this machine's.
#[cfg(feature = "cuda")]
impl Place for WarmUp {
    fn reborrow<'short, 'long: 'short>(tensor: TensorShape) -> TensorShape {
        tensor
    }

    fn mask(mask: AnyMask<'_>) -> Result<MaskShape> {
        match mask {
            AnyMask::Shape(mask) => Ok(mask),
            AnyMask::Host(mask) => Ok(MaskShape::from(&mask)),
            AnyMask::Device(_) => Err(on_device("mask")),
        }
    }

    fn block_mask(mask: AnyBlockMask<'_>) -> Result<BlockMask<FlagsShape>> {
        match mask {
            AnyBlockMask::Shape(mask) => Ok(mask),
            AnyBlockMask::Host(BlockMask { blocks, block_q, block_k }) => {
                Ok(BlockMask { blocks: FlagsShape(*blocks.geometry()), block_q, block_k })
            }
            AnyBlockMask::Device(_) => Err(on_device("block_mask")),
        }
    }

    fn lengths(lengths: AnyLengths<'_>) -> Result<Lengths<'_>> {
        on_this_machine(lengths)
    }
}

/// Lengths in this machine's memory.
fn on_this_machine(lengths: AnyLengths<'_>) -> Result<Lengths<'_>> {
    match lengths {
        Lengths::Dense => Ok(Lengths::Dense),
        Lengths::KvLens(kv_lens) => Ok(Lengths::KvLens(kv_lens)),
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => Ok(Lengths::Packed { cu_seqlens_q, cu_seqlens_k }),
        Lengths::DeviceKvLens(_) => Err(on_device("kv_lens")),
        Lengths::DevicePacked { .. } => Err(on_device("cu_seqlens_q")),
    }
}

#[cfg(feature = "cuda")]
fn nowhere(name: &'static str) -> Error {
    Error::value(name, "a shape without memory", "one with memory, where q's is")
}

fn on_device(name: &'static str) -> Error {
    Error::value(name, "in a GPU's memory", "in this machine's, as q")
}

#[cfg(feature = "cuda")]
fn on_host(name: &'static str) -> Error {
    Error::value(name, "in this machine's memory", "in the GPU's, as q")
}
