//! Lengths of the sequences of a call, as Python hands them over.

use pyo3::prelude::*;
use sageattention::cuda::DeviceInts;
use sageattention::{AnyLengths, Error, Lengths, Result};

use crate::host;
use crate::tensor::RawTensor;

/// Boundaries of packed sequences: addresses of those of queries and of keys, 32-bit integers without gaps on the device
/// of the tensors; the number of sequences; the longest of queries and of keys.
#[derive(FromPyObject)]
pub(crate) struct Packed(u64, u64, usize, usize, usize);

/// What is known of lengths beside the shapes of the tensors.
pub(crate) enum GivenLengths {
    /// Nothing.
    Dense,
    /// How many keys each entry of the batch has: int32 `[batch]` without gaps, on the device of the tensors.
    KvLens(RawTensor),
    /// The tensors are packed.
    Packed(Packed),
}

impl GivenLengths {
    /// The one of both that is given.
    pub(crate) fn new(packed: Option<Packed>, kv_lens: Option<RawTensor>) -> Result<Self> {
        match (packed, kv_lens) {
            (Some(_), Some(_)) => {
                Err(Error::unsupported("kv_lens with cu_seqlens", "cu_seqlens_k has the lengths of the keys"))
            }
            (Some(packed), None) => Ok(GivenLengths::Packed(packed)),
            (None, Some(kv_lens)) => Ok(GivenLengths::KvLens(kv_lens)),
            (None, None) => Ok(GivenLengths::Dense),
        }
    }

    /// Those of tensors in this machine's memory.
    ///
    /// # Safety
    /// As for [`host::view`], of every list.
    pub(crate) unsafe fn on_cpu(&self) -> Result<AnyLengths<'_>> {
        // SAFETY: the caller's promise.
        let list = |name, list| unsafe { host::integers(name, list) };
        Ok(match self {
            GivenLengths::Dense => Lengths::Dense,
            GivenLengths::KvLens(kv_lens) => Lengths::KvLens(list("kv_lens", kv_lens.list("kv_lens")?)?),
            GivenLengths::Packed(Packed(q, k, sequences, ..)) => Lengths::Packed {
                cu_seqlens_q: list("cu_seqlens_q", (*q, sequences + 1))?,
                cu_seqlens_k: list("cu_seqlens_k", (*k, sequences + 1))?,
            },
        })
    }

    /// Those of tensors in a GPU's memory, where nobody reads them here.
    ///
    /// # Safety
    /// As for [`DeviceInts::from_raw`], of every list.
    pub(crate) unsafe fn on_gpu(&self) -> Result<AnyLengths<'_>> {
        // SAFETY: the caller's promise.
        let list = |(address, entries)| unsafe { DeviceInts::from_raw(address, entries) };
        Ok(match self {
            GivenLengths::Dense => Lengths::Dense,
            GivenLengths::KvLens(kv_lens) => Lengths::DeviceKvLens(list(kv_lens.list("kv_lens")?)),
            &GivenLengths::Packed(Packed(q, k, sequences, max_q_len, max_kv_len)) => Lengths::DevicePacked {
                cu_seqlens_q: list((q, sequences + 1)),
                cu_seqlens_k: list((k, sequences + 1)),
                max_q_len,
                max_kv_len,
            },
        })
    }
}
