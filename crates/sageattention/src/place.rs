//! Where masks, lengths and attention sinks lie: those of a call in the memory of the backend that computes it.

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

/// Attention sinks, a number for each query head, in this machine's memory or a GPU's.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum AnySinks<'a> {
    /// A list in this machine's memory.
    List(&'a [f32]),
    /// A tensor in this machine's memory: f32 `[num_q_heads]`.
    Host(TensorView<'a>),
    /// In a GPU's memory: f32 `[num_q_heads]`.
    #[cfg(feature = "cuda")]
    Device(DeviceTensor<'a>),
    /// Without memory, for a [`WarmUp`].
    #[cfg(feature = "cuda")]
    Shape(TensorShape),
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

impl<'a> From<&'a [f32]> for AnySinks<'a> {
    fn from(sinks: &'a [f32]) -> Self {
        AnySinks::List(sinks)
    }
}

impl<'a> From<TensorView<'a>> for AnySinks<'a> {
    fn from(sinks: TensorView<'a>) -> Self {
        AnySinks::Host(sinks)
    }
}

impl<'a> From<&'a Vec<f32>> for AnySinks<'a> {
    fn from(sinks: &'a Vec<f32>) -> Self {
        AnySinks::List(sinks)
    }
}

#[cfg(feature = "cuda")]
impl<'a> From<DeviceTensor<'a>> for AnySinks<'a> {
    fn from(sinks: DeviceTensor<'a>) -> Self {
        AnySinks::Device(sinks)
    }
}

#[cfg(feature = "cuda")]
impl From<TensorShape> for AnySinks<'_> {
    fn from(sinks: TensorShape) -> Self {
        AnySinks::Shape(sinks)
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

    /// Attention sinks.
    ///
    /// # Errors
    /// When they lie elsewhere, or one that the host can read is NaN or +∞.
    fn sinks(sinks: AnySinks<'_>) -> Result<Self::Tensor<'_>>;
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

            fn sinks(sinks: AnySinks<'_>) -> Result<TensorView<'_>> {
                match sinks {
                    AnySinks::List(sinks) => host_sinks(list(sinks)?),
                    AnySinks::Host(sinks) => host_sinks(sinks),
                    #[cfg(feature = "cuda")]
                    AnySinks::Device(_) => Err(on_device("sinks")),
                    #[cfg(feature = "cuda")]
                    AnySinks::Shape(_) => Err(nowhere("sinks")),
                }
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

    fn sinks(sinks: AnySinks<'_>) -> Result<DeviceTensor<'_>> {
        match sinks {
            AnySinks::Device(sinks) => Ok(sinks),
            AnySinks::List(_) | AnySinks::Host(_) => Err(on_host("sinks")),
            AnySinks::Shape(_) => Err(nowhere("sinks")),
        }
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

    fn sinks(sinks: AnySinks<'_>) -> Result<TensorShape> {
        match sinks {
            AnySinks::Shape(sinks) => Ok(sinks),
            AnySinks::List(sinks) => Ok(TensorShape::from(&list(sinks)?)),
            AnySinks::Host(sinks) => Ok(TensorShape::from(&sinks)),
            AnySinks::Device(_) => Err(on_device("sinks")),
        }
    }
}

/// Attention sinks in this machine's memory.
fn host_sinks(sinks: TensorView<'_>) -> Result<TensorView<'_>> {
    let heads = match sinks.shape() {
        [heads] => *heads,
        // The call's check says what is wrong.
        _ => 0,
    };
    for head in 0..heads {
        let sink = sinks.at([0, 0, 0, head]);
        // As a score, either would make every row of its head NaN.
        if sink.is_nan() || sink == f32::INFINITY {
            return Err(Error::value(format!("sinks[{head}]"), sink, "a number, or -inf for none"));
        }
    }
    Ok(sinks)
}

/// A list as a tensor.
fn list(sinks: &[f32]) -> Result<TensorView<'_>> {
    View::contiguous("sinks", sinks, &[sinks.len()]).map(TensorView::F32)
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
