//! Shared memory of a block: bytes, each access to which passes its shadow.

use super::access::Access;
use super::clocks::Clocks;
use super::layout::{BASE, Layout};
use super::shadow::Shadow;
use crate::fault::{FaultKind, Outcome, Trouble};

/// Shared memory of a block.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    shadow: Shadow,
}

impl Shared {
    /// Shared memory of so many bytes, read by so many components.
    pub fn new(bytes: u32, columns: usize) -> Shared {
        let words = bytes.div_ceil(4) as usize;
        Shared { bytes: vec![0; 4 * words], shadow: Shadow::new(words, columns) }
    }

    /// Tells the stores of one instruction from those of the next.
    pub fn next_store(&mut self) {
        self.shadow.next_store();
    }

    /// Up to 16 bytes, aligned to their number.
    pub fn read(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        address: u32,
        bytes: u32,
    ) -> Outcome<u128> {
        let offset = self.check(layout, clocks, who, address, bytes)?;
        Ok(self.peek(offset, bytes))
    }

    /// As [`Shared::read`].
    pub fn write(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        address: u32,
        bytes: u32,
        value: u128,
    ) -> Outcome<()> {
        let offset = self.check(layout, clocks, who, address, bytes)?;
        self.conflicts(layout, offset, bytes, value)?;
        self.poke(offset, bytes, value);
        Ok(())
    }

    /// Replaces 4 or 8 bytes by a function of them, and returns the old value.
    pub fn update(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        address: u32,
        bytes: u32,
        change: impl Fn(u64) -> u64,
    ) -> Outcome<u64> {
        let offset = self.check(layout, clocks, who, address, bytes)?;
        let old = self.peek(offset, bytes) as u64;
        self.poke(offset, bytes, u128::from(change(old)));
        Ok(old)
    }

    /// Checks an access and remembers it, without moving data; the offset.
    pub fn check(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        address: u32,
        bytes: u32,
    ) -> Outcome<usize> {
        if address & (bytes - 1) != 0 {
            let (place, name) = layout.place(address);
            let detail =
                format!("{bytes} bytes at {place} (shared address {address:#x}), no multiple of {bytes}");
            return Err(Trouble::new(FaultKind::Misaligned, detail).object(name));
        }
        let offset = layout.offset(address, bytes)?;
        if bytes >= 4 {
            for word in offset / 4..(offset + bytes as usize) / 4 {
                self.shadow.touch(layout, clocks, who, word, 0xf)?;
            }
        } else {
            self.shadow.touch(layout, clocks, who, offset / 4, ((1 << bytes) - 1) << (offset & 3))?;
        }
        Ok(offset)
    }

    #[inline]
    fn peek(&self, offset: usize, bytes: u32) -> u128 {
        let bytes = bytes as usize;
        match self.bytes.get(offset..offset + bytes) {
            Some(from) => {
                let mut value = [0; 16];
                value[..bytes].copy_from_slice(from);
                u128::from_le_bytes(value)
            }
            None => 0,
        }
    }

    #[inline]
    fn poke(&mut self, offset: usize, bytes: u32, value: u128) {
        let bytes = bytes as usize;
        if let Some(to) = self.bytes.get_mut(offset..offset + bytes) {
            to.copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
    }

    /// Two lanes of one store with different values for one byte.
    fn conflicts(&mut self, layout: &Layout<'_>, offset: usize, bytes: u32, value: u128) -> Outcome<()> {
        let mut i = 0;
        while i < bytes as usize {
            let (word, first) = ((offset + i) / 4, (offset + i) & 3);
            let count = (4 - first).min(bytes as usize - i);
            let mask = (((1u32 << count) - 1) << first) as u8;
            let both = self.shadow.stored_twice(word, mask);
            for byte in (0..4).filter(|byte| both >> byte & 1 == 1) {
                let new = (value >> (8 * (i + byte - first))) as u8;
                if self.bytes.get(4 * word + byte).is_some_and(|&old| old != new) {
                    let (place, name) = layout.place(BASE + (4 * word + byte) as u32);
                    let detail = format!("two lanes store different values to {place}");
                    return Err(Trouble::new(FaultKind::WriteConflict, detail).object(name));
                }
            }
            i += count;
        }
        Ok(())
    }

    /// An asynchronous copy begins: its bytes, which [`Shared::check`] has passed, may not be touched until it lands.
    pub fn begin_copy(&mut self, at: u32, warp: u32) -> u32 {
        self.shadow.begin_copy(at, warp)
    }

    /// Some of a copy's bytes, whole words.
    pub fn mark_busy(&mut self, offset: usize, bytes: u32, copy: u32) {
        for word in offset / 4..(offset + bytes as usize) / 4 {
            self.shadow.mark_busy(word, copy);
        }
    }

    /// Up to 16 bytes of a copy arrive: a write by `who`.
    pub fn land(&mut self, offset: usize, bytes: u32, value: u128, who: &Access) {
        self.poke(offset, bytes, value);
        for word in offset / 4..(offset + bytes as usize) / 4 {
            self.shadow.land(word, who);
        }
    }
}
