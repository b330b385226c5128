//! Global memory: buffers far apart, shared by all workers, with a mark for each byte that was written.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::fault::{FaultKind, Outcome, Trouble};

/// Addresses start here, so that an address cut to 32 bits is no address.
const BASE: u64 = 0x7000_0000_0000;
/// Each buffer has this many addresses to itself: an offset that overflowed 32 bits stays in no other buffer.
const REGION_BITS: u32 = 36;
/// Largest buffer.
pub(crate) const MAX_BYTES: usize = 1 << 32;

/// Global memory.
#[derive(Default, Debug)]
pub(crate) struct Global {
    buffers: Vec<Allocation>,
}

/// A buffer in words of 8 bytes, each with 8 marks.
#[derive(Debug)]
struct Allocation {
    name: String,
    /// Offset of the first byte from the region's start.
    start: u64,
    bytes: u64,
    words: Vec<AtomicU64>,
    written: Vec<AtomicU8>,
}

impl Global {
    /// A buffer whose address is `offset` beyond a multiple of 256, and its index.
    pub fn allocate(&mut self, name: &str, bytes: usize, offset: u64) -> usize {
        let start = (1 << 20) + offset;
        let words = ((offset & 7) as usize + bytes).div_ceil(8);
        self.buffers.push(Allocation {
            name: name.to_owned(),
            start,
            bytes: bytes as u64,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            written: (0..words).map(|_| AtomicU8::new(0)).collect(),
        });
        self.buffers.len() - 1
    }

    pub fn len(&self, buffer: usize) -> usize {
        self.buffers.get(buffer).map_or(0, |buffer| buffer.bytes as usize)
    }

    pub fn address(&self, buffer: usize) -> u64 {
        region(buffer) + self.buffers.get(buffer).map_or(0, |buffer| buffer.start)
    }

    /// Name of the buffer around an address.
    pub fn name_of(&self, address: u64) -> Option<&str> {
        let index = address.checked_sub(BASE)? >> REGION_BITS;
        self.buffers.get(index as usize).map(|buffer| buffer.name.as_str())
    }

    fn locate(&self, address: u64, bytes: u64) -> Outcome<(&Allocation, u64)> {
        let index = address.wrapping_sub(BASE) >> REGION_BITS;
        if let Some(buffer) = self.buffers.get(index as usize) {
            let offset = (address & ((1 << REGION_BITS) - 1)).wrapping_sub(buffer.start);
            if offset < buffer.bytes && bytes <= buffer.bytes - offset {
                return Ok((buffer, offset));
            }
        }
        Err(self.outside(address, bytes))
    }

    /// Says which buffer is nearest, and how far.
    #[cold]
    fn outside(&self, address: u64, bytes: u64) -> Box<Trouble> {
        let distance = |i: usize, buffer: &Allocation| {
            let start = region(i) + buffer.start;
            let end = start + buffer.bytes;
            if address < start { start - address } else { address.saturating_add(bytes).saturating_sub(end) }
        };
        let nearest = self.buffers.iter().enumerate().min_by_key(|(i, buffer)| distance(*i, buffer));
        let Some((i, buffer)) = nearest else {
            return Trouble::new(FaultKind::OutOfBounds, format!("address {address:#x}: there is no buffer"));
        };
        let start = region(i) + buffer.start;
        let name = &buffer.name;
        let place = if address < start {
            format!("{} bytes before `{name}`", start - address)
        } else {
            format!("at offset {} of `{name}`, which has {} bytes", address - start, buffer.bytes)
        };
        let cut = if address >> 32 == 0 { "; only 32 bits of an address are left" } else { "" };
        let detail = format!("{bytes} bytes at global address {address:#x}, {place}{cut}");
        Trouble::new(FaultKind::OutOfBounds, detail).object(name)
    }

    /// Up to 16 bytes, aligned to their number (a power of two).
    pub fn read(&self, address: u64, bytes: u32) -> Outcome<u128> {
        self.aligned(address, bytes)?;
        let (buffer, offset) = self.locate(address, u64::from(bytes))?;
        let at = (buffer.start & 7) + offset;
        let (word, shift) = ((at / 8) as usize, (at & 7) as u32);
        let wanted = marks(bytes.min(8), shift);
        if bytes == 16 {
            // A buffer can begin at an odd word, so the second word is looked up by itself.
            let missing = !buffer.marks(word)
                | !buffer.marks(word + 1)
                | u8::from(shift != 0 || word + 1 >= buffer.words.len());
            if missing != 0 {
                return Err(buffer.unwritten(address, offset, bytes));
            }
            return Ok(u128::from(buffer.word(word)) | u128::from(buffer.word(word + 1)) << 64);
        }
        if buffer.marks(word) & wanted != wanted {
            return Err(buffer.unwritten(address, offset, bytes));
        }
        let value = buffer.word(word) >> (8 * shift);
        Ok(u128::from(if bytes == 8 { value } else { value & ((1 << (8 * bytes)) - 1) }))
    }

    /// As [`Global::read`].
    pub fn write(&self, address: u64, bytes: u32, value: u128) -> Outcome<()> {
        self.aligned(address, bytes)?;
        let (buffer, offset) = self.locate(address, u64::from(bytes))?;
        let at = (buffer.start & 7) + offset;
        let (word, shift) = ((at / 8) as usize, (at & 7) as u32);
        if bytes == 16 {
            buffer.put(word, u64::MAX, value as u64, 0xff);
            buffer.put(word + 1, u64::MAX, (value >> 64) as u64, 0xff);
        } else {
            let mask = if bytes == 8 { u64::MAX } else { ((1 << (8 * bytes)) - 1) << (8 * shift) };
            buffer.put(word, mask, (value as u64) << (8 * shift), marks(bytes, shift));
        }
        Ok(())
    }

    /// Replaces 4 or 8 bytes by a function of them, and returns the old value.
    pub fn update(&self, address: u64, bytes: u32, change: impl Fn(u64) -> u64) -> Outcome<u64> {
        let _ = self.read(address, bytes)?;
        let (buffer, offset) = self.locate(address, u64::from(bytes))?;
        let at = (buffer.start & 7) + offset;
        let (word, shift) = ((at / 8) as usize, 8 * (at & 7) as u32);
        let mask = if bytes == 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 };
        let Some(cell) = buffer.words.get(word) else { return Ok(0) };
        let (Ok(old) | Err(old)) = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
            let new = change(old >> shift & mask) & mask;
            Some(old & !(mask << shift) | new << shift)
        });
        Ok(old >> shift & mask)
    }

    fn aligned(&self, address: u64, bytes: u32) -> Outcome<()> {
        if address & u64::from(bytes - 1) == 0 {
            return Ok(());
        }
        let name = self.name_of(address).unwrap_or("?");
        let detail =
            format!("{bytes} bytes at global address {address:#x} in `{name}`, no multiple of {bytes}");
        Err(Trouble::new(FaultKind::Misaligned, detail).object(name))
    }

    /// Fills a buffer; for the host.
    pub fn fill(&self, buffer: usize, bytes: &[u8]) {
        let Some(buffer) = self.buffers.get(buffer) else { return };
        for (i, &byte) in bytes.iter().enumerate().take(buffer.bytes as usize) {
            let at = (buffer.start & 7) as usize + i;
            let shift = (at & 7) as u32;
            buffer.put(at / 8, 0xff << (8 * shift), u64::from(byte) << (8 * shift), 1 << shift);
        }
    }

    /// The bytes of a buffer, and how many were ever written; for the host.
    pub fn dump(&self, buffer: usize) -> (Vec<u8>, usize) {
        let Some(buffer) = self.buffers.get(buffer) else { return (Vec::new(), 0) };
        let mut written = 0;
        let bytes = (0..buffer.bytes as usize).map(|i| {
            let at = (buffer.start & 7) as usize + i;
            written += usize::from(buffer.marks(at / 8) >> (at & 7) & 1);
            (buffer.word(at / 8) >> (8 * (at & 7))) as u8
        });
        (bytes.collect(), written)
    }
}

const fn region(buffer: usize) -> u64 {
    BASE + ((buffer as u64) << REGION_BITS)
}

const fn marks(bytes: u32, shift: u32) -> u8 {
    (((1u32 << bytes) - 1) << shift) as u8
}

impl Allocation {
    fn word(&self, i: usize) -> u64 {
        self.words.get(i).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn marks(&self, i: usize) -> u8 {
        self.written.get(i).map_or(0, |marks| marks.load(Ordering::Acquire))
    }

    fn put(&self, i: usize, mask: u64, value: u64, marks: u8) {
        let (Some(word), Some(written)) = (self.words.get(i), self.written.get(i)) else { return };
        if mask == u64::MAX {
            word.store(value, Ordering::Release);
        } else {
            // Neighbouring bytes may belong to another worker's store.
            let _ = word
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(old & !mask | value & mask));
        }
        if written.load(Ordering::Relaxed) & marks != marks {
            written.fetch_or(marks, Ordering::Release);
        }
    }

    #[cold]
    fn unwritten(&self, address: u64, offset: u64, bytes: u32) -> Box<Trouble> {
        let name = &self.name;
        let detail = format!(
            "{bytes} bytes at offset {offset} of `{name}` (global address {address:#x}) were never written"
        );
        Trouble::new(FaultKind::UninitializedMemory, detail).object(name)
    }
}
