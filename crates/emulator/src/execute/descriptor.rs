//! Where the elements of `wgmma`'s operands lie in shared memory: descriptors and the canonical layouts of PTX.

use crate::fault::{FaultKind, Outcome, Trouble};

/// A matrix in shared memory, as a descriptor says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    start: u32,
    leading: u32,
    stride: u32,
    base_offset: u32,
    /// Chunks of 16 bytes in a swizzled row: 1, 2, 4 or 8.
    chunks: u32,
}

impl Descriptor {
    pub fn decode(bits: u64) -> Outcome<Descriptor> {
        let field = |from: u32, bits_: u32| (bits >> from) as u32 & ((1 << bits_) - 1);
        let chunks = match field(62, 2) {
            0 => 1,
            1 => 8,
            2 => 4,
            _ => 2,
        };
        let reserved = !(0x3fff | 0x3fff << 16 | 0x3fff << 32 | 7 << 49 | 3 << 62);
        if bits & reserved != 0 {
            let detail = format!("wgmma descriptor {bits:#018x} has bits set that mean nothing");
            return Err(Trouble::new(FaultKind::Descriptor, detail));
        }
        Ok(Descriptor {
            start: field(0, 14) << 4,
            leading: field(16, 14) << 4,
            stride: field(32, 14) << 4,
            base_offset: field(49, 3),
            chunks,
        })
    }

    /// Address of the 16 bytes with rows' (columns' of B) `row` and the `chunk`-th 16 bytes of its depth.
    pub fn depth_major(self, row: u32, chunk: u32) -> u32 {
        let address = if self.chunks == 1 {
            self.start + row / 8 * self.stride + row % 8 * 16 + chunk * self.leading
        } else {
            // A swizzled row holds at least the 32 bytes of one instruction.
            self.start + row / 8 * self.stride + row % 8 * 16 * self.chunks + chunk * 16
        };
        self.swizzled(address)
    }

    /// Address of columns `8 · group..` at depth `k`, where columns are contiguous.
    pub fn column_major(self, group: u32, k: u32) -> u32 {
        let (across, down) =
            if self.chunks == 1 { (self.stride, self.leading) } else { (self.leading, self.stride) };
        let (outer, inner) = (group / self.chunks, group % self.chunks);
        let address = self.start + outer * across + inner * 16 + k / 8 * down + k % 8 * 16 * self.chunks;
        self.swizzled(address)
    }

    fn swizzled(self, address: u32) -> u32 {
        let row = (address >> 7).wrapping_sub(self.base_offset) & 7;
        address ^ (row & (self.chunks - 1)) << 4
    }
}

/// XORs the chunk of 16 bytes in a row of `chunks` with the row, by address bits: the pattern of swizzled tensors.
pub(crate) const fn swizzle(address: u32, chunks: u32) -> u32 {
    address ^ ((address >> 7) & (chunks - 1)) << 4
}
