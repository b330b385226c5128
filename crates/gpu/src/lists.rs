//! Lengths of a call's sequences, where kernels read them.

use sage_core::{Lengths, Result};
use sage_cuda::{Buffer, Stream};

use crate::{DeviceInts, driver};

/// Addresses of the lengths on the GPU, and what was copied there.
pub(crate) struct Lists {
    /// Boundaries of packed queries.
    pub q: u64,
    /// Boundaries of packed keys, or valid keys of each batch entry.
    pub k: u64,
    _copies: [Option<Buffer>; 2],
}

/// Where kernels learn the lengths.
pub(crate) fn kernel_lengths(lengths: &Lengths<'_, DeviceInts<'_>>) -> sage_kernels::Lengths {
    match lengths {
        Lengths::Dense => sage_kernels::Lengths::Dense,
        Lengths::KvLens(_) | Lengths::DeviceKvLens(_) => sage_kernels::Lengths::KvLens,
        Lengths::Packed { .. } | Lengths::DevicePacked { .. } => sage_kernels::Lengths::Packed,
    }
}

impl Lists {
    /// Lengths in the host's memory are copied, which waits for the stream.
    pub fn new(stream: &Stream, lengths: &Lengths<'_, DeviceInts<'_>>) -> Result<Self> {
        let copy = |values: &[i32]| Buffer::from_slice(stream, values).map_err(driver);
        let address = |copy: &Option<Buffer>| copy.as_ref().map_or(0, Buffer::address);
        let copies = match *lengths {
            Lengths::KvLens(kv_lens) => [None, Some(copy(kv_lens)?)],
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
                [Some(copy(cu_seqlens_q)?), Some(copy(cu_seqlens_k)?)]
            }
            Lengths::Dense => [None, None],
            Lengths::DeviceKvLens(k) => return Ok(Lists { q: 0, k: k.address(), _copies: [None, None] }),
            Lengths::DevicePacked { cu_seqlens_q: q, cu_seqlens_k: k, .. } => {
                return Ok(Lists { q: q.address(), k: k.address(), _copies: [None, None] });
            }
        };
        Ok(Lists { q: address(&copies[0]), k: address(&copies[1]), _copies: copies })
    }
}
