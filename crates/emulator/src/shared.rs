//! Shared memory of a block, with a shadow for each word: who wrote and read it last, and what is on its way to it.

use std::collections::HashMap;

use sage_ptx::Program;

use crate::fault::{FaultKind, Outcome, Trouble};
use crate::races::Clocks;

/// Address of the first byte, so that null is no address; a multiple of every alignment in use.
pub(crate) const BASE: u32 = 1024;
/// What a block can have on the largest GPU.
const MAX_BYTES: u32 = 227 * 1024;

/// Which array each word of the program's shared memory belongs to.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    program: &'a Program,
    pub bytes: u32,
    /// Index of the array, by word; `u16::MAX` is none.
    home: Vec<u16>,
}

impl<'a> Layout<'a> {
    pub fn new(program: &'a Program) -> Outcome<Layout<'a>> {
        let mut bytes = 0;
        for array in &program.shared {
            let end = array.offset.checked_add(array.bytes).filter(|&end| end <= MAX_BYTES);
            let Some(end) = end else {
                let name = &array.name;
                let detail = format!(
                    "shared array `{name}`: offset {} and {} bytes, at most {MAX_BYTES} together",
                    array.offset, array.bytes
                );
                return Err(Trouble::new(FaultKind::InvalidProgram, detail).object(name));
            };
            if !array.align.is_power_of_two() || array.align > 1024 || array.offset % array.align != 0 {
                let name = &array.name;
                let detail = format!(
                    "shared array `{name}`: offset {} and alignment {}, expected a multiple of a power of two up to 1024",
                    array.offset, array.align
                );
                return Err(Trouble::new(FaultKind::InvalidProgram, detail).object(name));
            }
            bytes = bytes.max(end);
        }
        let mut home = vec![u16::MAX; bytes.div_ceil(4) as usize];
        let end_of = |i: u16| program.shared.get(usize::from(i)).map_or(0, |array| array.offset + array.bytes);
        for (i, array) in program.shared.iter().enumerate() {
            let words = (array.offset / 4) as usize..(array.offset + array.bytes).div_ceil(4) as usize;
            for place in home.get_mut(words).into_iter().flatten() {
                // Where arrays share their place in turns, the one that reaches further is the home.
                if end_of(*place) < array.offset + array.bytes {
                    *place = i as u16;
                }
            }
        }
        Ok(Layout { program, bytes, home })
    }

    /// Offset in the block's shared memory of an access that stays in one array.
    fn offset(&self, address: u32, bytes: u32) -> Outcome<usize> {
        let offset = address.wrapping_sub(BASE);
        let home = self.home.get((offset / 4) as usize);
        if let Some(array) = home.and_then(|&i| self.program.shared.get(usize::from(i)))
            && u64::from(offset) + u64::from(bytes) <= u64::from(array.offset) + u64::from(array.bytes)
        {
            return Ok(offset as usize);
        }
        Err(self.outside(address, bytes))
    }

    #[cold]
    fn outside(&self, address: u32, bytes: u32) -> Box<Trouble> {
        let offset = i64::from(address) - i64::from(BASE);
        let distance = |start: i64, end: i64| if offset < start { start - offset } else { (offset - end).max(0) };
        let nearest = self.program.shared.iter().min_by_key(|array| {
            distance(i64::from(array.offset), i64::from(array.offset) + i64::from(array.bytes))
        });
        let Some(array) = nearest else {
            let detail = format!("{bytes} bytes at shared address {address:#x}: the kernel has no shared memory");
            return Trouble::new(FaultKind::OutOfBounds, detail);
        };
        let detail = format!(
            "{bytes} bytes at offset {} of shared array `{}`, which has {} bytes",
            offset - i64::from(array.offset),
            array.name,
            array.bytes
        );
        Trouble::new(FaultKind::OutOfBounds, detail).object(&array.name)
    }

    /// `` `tile` + 16 ``, and the array's name.
    pub fn place(&self, address: u32) -> (String, String) {
        let offset = address.wrapping_sub(BASE);
        let array = self.home.get((offset / 4) as usize).and_then(|&i| self.program.shared.get(usize::from(i)));
        match array {
            Some(array) => {
                (format!("`{}` + {}", array.name, offset.wrapping_sub(array.offset)), array.name.clone())
            }
            None => (format!("shared address {address:#x}"), String::new()),
        }
    }
}

/// Who accesses shared memory, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// The warp on whose behalf it happens.
    pub warp: usize,
    /// The component that is remembered: the warp itself, or an asynchronous reader or writer.
    pub component: usize,
    /// That component's count.
    pub count: u32,
    /// The instruction.
    pub at: u32,
    pub kind: AccessKind,
    /// Whether it goes through the asynchronous proxy, which sees fenced stores only.
    pub proxy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AccessKind {
    Read,
    Write,
    /// Reads and writes, in no order with others of its kind.
    Atomic,
    /// A write that is checked now, and lands later.
    Announce,
    /// Use of an `mbarrier`, in no order with others but after its initialisation.
    Mbarrier,
    /// Initialisation of an `mbarrier`.
    MbarrierInit,
}

impl Access {
    pub fn of_warp(warp: usize, clocks: &Clocks, at: u32, kind: AccessKind) -> Access {
        Access { warp, component: warp, count: clocks.own(warp), at, kind, proxy: false }
    }

    const fn reads(self) -> bool {
        matches!(self.kind, AccessKind::Read | AccessKind::Atomic)
    }

    const fn writes(self) -> bool {
        matches!(
            self.kind,
            AccessKind::Write | AccessKind::Atomic | AccessKind::Announce | AccessKind::MbarrierInit
        )
    }
}

const WRITTEN: u8 = 0xf;
const ATOMIC: u8 = 0x10;
const SPLIT: u8 = 0x20;
const MBARRIER: u8 = 0x40;

/// Shadow of four bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Word {
    /// Components that read since the last write.
    readers: u64,
    write_count: u32,
    write_at: u32,
    /// The asynchronous copy on its way here, plus one.
    busy: u32,
    /// The store instruction that wrote last, to tell conflicting lanes.
    serial: u32,
    write_component: u16,
    serial_mask: u8,
    /// Which bytes were written, and [`ATOMIC`], [`SPLIT`], [`MBARRIER`].
    flags: u8,
}

/// Shadow of one byte, where the bytes of a word went different ways.
#[derive(Clone, Debug, Default)]
struct ByteShadow {
    write: (u16, u32, u32),
    atomic: bool,
    reads: Vec<(u16, u32, u32)>,
}

/// Shared memory of a block.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    words: Vec<Word>,
    /// Count and instruction of each component's last read, for each word.
    reads: Vec<(u32, u32)>,
    columns: usize,
    split: HashMap<usize, Box<[ByteShadow; 4]>>,
    /// Instruction of each asynchronous copy ever started, and the warp.
    copies: Vec<(u32, u32)>,
    serial: u32,
}

impl Shared {
    pub fn new(bytes: u32, columns: usize) -> Shared {
        let words = bytes.div_ceil(4) as usize;
        Shared {
            bytes: vec![0; 4 * words],
            words: vec![Word::default(); words],
            reads: vec![(0, 0); words * columns],
            columns,
            ..Shared::default()
        }
    }

    /// Tells the stores of one instruction from those of the next.
    pub fn next_store(&mut self) {
        self.serial += 1;
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

    /// Checks an access and remembers it, without moving data.
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
            let detail = format!("{bytes} bytes at {place} (shared address {address:#x}), no multiple of {bytes}");
            return Err(Trouble::new(FaultKind::Misaligned, detail).object(name));
        }
        let offset = layout.offset(address, bytes)?;
        if bytes >= 4 {
            for word in offset / 4..(offset + bytes as usize) / 4 {
                self.touch(layout, clocks, who, word, 0xf)?;
            }
        } else {
            self.touch(layout, clocks, who, offset / 4, ((1 << bytes) - 1) << (offset & 3))?;
        }
        Ok(offset)
    }

    fn peek(&self, offset: usize, bytes: u32) -> u128 {
        let mut value = [0; 16];
        if let Some(from) = self.bytes.get(offset..offset + bytes as usize) {
            value[..from.len()].copy_from_slice(from);
        }
        u128::from_le_bytes(value)
    }

    fn poke(&mut self, offset: usize, bytes: u32, value: u128) {
        if let Some(to) = self.bytes.get_mut(offset..offset + bytes as usize) {
            let len = to.len();
            to.copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }

    /// Two lanes of one store with different values for one byte.
    fn conflicts(&mut self, layout: &Layout<'_>, offset: usize, bytes: u32, value: u128) -> Outcome<()> {
        let mut i = 0;
        while i < bytes as usize {
            let (word, first) = ((offset + i) / 4, (offset + i) & 3);
            let count = (4 - first).min(bytes as usize - i);
            let mask = (((1u32 << count) - 1) << first) as u8;
            let shadow = &mut self.words[word];
            if shadow.serial != self.serial {
                shadow.serial = self.serial;
                shadow.serial_mask = mask;
            } else {
                let both = shadow.serial_mask & mask;
                shadow.serial_mask |= mask;
                for byte in (0..4).filter(|byte| both >> byte & 1 == 1) {
                    let new = (value >> (8 * (i + byte - first))) as u8;
                    if self.bytes[4 * word + byte] != new {
                        let (place, name) = layout.place(BASE + (4 * word + byte) as u32);
                        let detail = format!("two lanes store different values to {place}");
                        return Err(Trouble::new(FaultKind::WriteConflict, detail).object(name));
                    }
                }
            }
            i += count;
        }
        Ok(())
    }

    /// Everything that is checked and remembered of an access to bytes of one word.
    #[inline]
    fn touch(&mut self, layout: &Layout<'_>, clocks: &Clocks, who: &Access, word: usize, mask: u8) -> Outcome<()> {
        let shadow = &self.words[word];
        if shadow.busy != 0 {
            return Err(self.in_flight(layout, word, who));
        }
        if shadow.flags & MBARRIER != 0 && !matches!(who.kind, AccessKind::Mbarrier | AccessKind::MbarrierInit) {
            let (place, name) = layout.place(BASE + 4 * word as u32);
            let detail = format!("{place} holds an mbarrier, which is not data");
            return Err(Trouble::new(FaultKind::Mbarrier, detail).object(name).other(shadow.write_at));
        }
        if who.reads() && shadow.flags & mask != mask {
            let (place, name) = layout.place(BASE + 4 * word as u32 + (mask & !shadow.flags).trailing_zeros());
            let detail = format!("{place} (shared memory) was never written");
            return Err(Trouble::new(FaultKind::UninitializedMemory, detail).object(name));
        }
        if mask != 0xf || shadow.flags & SPLIT != 0 {
            return self.touch_bytes(layout, clocks, who, word, mask);
        }
        let atomics = who.kind == AccessKind::Atomic && shadow.flags & ATOMIC != 0;
        let write = (shadow.write_component, shadow.write_count, shadow.write_at);
        if write.1 != 0 && !atomics {
            if !clocks.has_seen(who.warp, usize::from(write.0), write.1) {
                return Err(race(layout, clocks, who, BASE + 4 * word as u32, write, "wrote"));
            }
            if who.proxy && !clocks.knows_fenced(who.warp, usize::from(write.0), write.1) {
                return Err(unfenced(layout, who, BASE + 4 * word as u32, write));
            }
        }
        let row = word * self.columns;
        if who.writes() {
            let mut readers = shadow.readers;
            while readers != 0 {
                let component = readers.trailing_zeros() as usize;
                readers &= readers - 1;
                let (count, at) = self.reads[row + component];
                if !clocks.has_seen(who.warp, component, count) {
                    let read = (component as u16, count, at);
                    return Err(race(layout, clocks, who, BASE + 4 * word as u32, read, "read"));
                }
            }
            let shadow = &mut self.words[word];
            if who.kind != AccessKind::Announce {
                shadow.readers = 0;
                shadow.write_component = who.component as u16;
                shadow.write_count = who.count;
                shadow.write_at = who.at;
                shadow.flags = match who.kind {
                    AccessKind::Atomic => WRITTEN | ATOMIC,
                    AccessKind::MbarrierInit => WRITTEN | MBARRIER,
                    _ => WRITTEN,
                };
            }
        } else {
            self.words[word].readers |= 1 << who.component;
            self.reads[row + who.component] = (who.count, who.at);
        }
        Ok(())
    }

    #[cold]
    fn touch_bytes(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        word: usize,
        mask: u8,
    ) -> Outcome<()> {
        let Shared { words, split, reads, columns, .. } = self;
        let shadow = &mut words[word];
        let bytes = split.entry(word).or_insert_with(|| {
            let readers = (0..*columns).filter(|component| shadow.readers >> component & 1 == 1);
            let reads: Vec<_> = readers
                .map(|component| {
                    let (count, at) = reads[word * *columns + component];
                    (component as u16, count, at)
                })
                .collect();
            let byte = ByteShadow {
                write: (shadow.write_component, shadow.write_count, shadow.write_at),
                atomic: shadow.flags & ATOMIC != 0,
                reads,
            };
            Box::new([byte.clone(), byte.clone(), byte.clone(), byte])
        });
        shadow.flags |= SPLIT;
        for i in (0..4).filter(|i| mask >> i & 1 == 1) {
            let byte = &mut bytes[i];
            let address = BASE + (4 * word + i) as u32;
            let write = byte.write;
            if write.1 != 0 && !(who.kind == AccessKind::Atomic && byte.atomic) {
                if !clocks.has_seen(who.warp, usize::from(write.0), write.1) {
                    return Err(race(layout, clocks, who, address, write, "wrote"));
                }
                if who.proxy && !clocks.knows_fenced(who.warp, usize::from(write.0), write.1) {
                    return Err(unfenced(layout, who, address, write));
                }
            }
            if who.writes() {
                let unseen =
                    byte.reads.iter().find(|read| !clocks.has_seen(who.warp, usize::from(read.0), read.1));
                if let Some(&read) = unseen {
                    return Err(race(layout, clocks, who, address, read, "read"));
                }
                if who.kind != AccessKind::Announce {
                    byte.reads.clear();
                    byte.write = (who.component as u16, who.count, who.at);
                    byte.atomic = who.kind == AccessKind::Atomic;
                }
            } else {
                byte.reads.retain(|read| usize::from(read.0) != who.component);
                byte.reads.push((who.component as u16, who.count, who.at));
            }
        }
        if who.writes() && who.kind != AccessKind::Announce {
            shadow.flags |= mask;
            if mask == 0xf {
                // One writer of all four: the word is whole again.
                shadow.readers = 0;
                shadow.write_component = who.component as u16;
                shadow.write_count = who.count;
                shadow.write_at = who.at;
                shadow.flags = match who.kind {
                    AccessKind::Atomic => WRITTEN | ATOMIC,
                    AccessKind::MbarrierInit => WRITTEN | MBARRIER,
                    _ => WRITTEN,
                };
                split.remove(&word);
            }
        }
        Ok(())
    }

    // Asynchronous copies to shared memory.

    /// A copy begins: its bytes, which [`Shared::check`] has passed, may not be touched until it lands.
    pub fn begin_copy(&mut self, at: u32, warp: u32) -> u32 {
        self.copies.push((at, warp));
        self.copies.len() as u32
    }

    pub fn mark_busy(&mut self, offset: usize, bytes: u32, copy: u32) {
        for word in offset / 4..(offset + bytes as usize).div_ceil(4) {
            if let Some(shadow) = self.words.get_mut(word) {
                shadow.busy = copy;
            }
        }
    }

    /// Up to 16 bytes arrive: a write by `who`.
    pub fn land(&mut self, offset: usize, bytes: u32, value: u128, who: &Access) {
        self.poke(offset, bytes, value);
        for word in offset / 4..(offset + bytes as usize).div_ceil(4) {
            if let Some(shadow) = self.words.get_mut(word) {
                shadow.busy = 0;
                shadow.readers = 0;
                shadow.write_component = who.component as u16;
                shadow.write_count = who.count;
                shadow.write_at = who.at;
                shadow.flags = WRITTEN;
                self.split.remove(&word);
            }
        }
    }

    #[cold]
    fn in_flight(&self, layout: &Layout<'_>, word: usize, who: &Access) -> Box<Trouble> {
        let (place, name) = layout.place(BASE + 4 * word as u32);
        let copy = self.words[word].busy;
        let (at, warp) = self.copies.get(copy as usize - 1).copied().unwrap_or_default();
        let does = if who.writes() { "writes" } else { "reads" };
        let detail = format!("{does} {place} while a copy of warp {warp} to it is in flight");
        Trouble::new(FaultKind::MissingWait, detail).object(name).other(at)
    }
}

#[cold]
fn race(
    layout: &Layout<'_>,
    clocks: &Clocks,
    who: &Access,
    address: u32,
    (component, _, at): (u16, u32, u32),
    did: &str,
) -> Box<Trouble> {
    let (place, name) = layout.place(address);
    let does = match who.kind {
        AccessKind::Read => "reads",
        AccessKind::Mbarrier => "uses the mbarrier at",
        AccessKind::MbarrierInit => "initialises an mbarrier at",
        AccessKind::Announce => "copies to",
        AccessKind::Atomic => "updates",
        AccessKind::Write => "writes",
    };
    let component = usize::from(component);
    let (kind, earlier) = if component < clocks.warps {
        (FaultKind::Race, format!("warp {component} {did}, with no barrier between"))
    } else if component == clocks.bulk_component() {
        (FaultKind::BulkStoreInFlight, "a bulk store reads, without waiting for it".to_owned())
    } else if component < clocks.bulk_component() {
        let group = component - clocks.warps;
        (FaultKind::WgmmaInFlight, format!("a wgmma of warpgroup {group} reads, without waiting for it"))
    } else {
        (FaultKind::MissingWait, "a bulk copy wrote, without waiting at its mbarrier".to_owned())
    };
    let detail = format!("warp {} {does} {place}, which {earlier}", who.warp);
    Trouble::new(kind, detail).object(name).other(at)
}

#[cold]
fn unfenced(layout: &Layout<'_>, who: &Access, address: u32, write: (u16, u32, u32)) -> Box<Trouble> {
    let (place, name) = layout.place(address);
    let detail = format!(
        "the asynchronous proxy accesses {place} for warp {}; warp {} wrote it with no fence.proxy.async between its \
         write and the barrier",
        who.warp, write.0
    );
    Trouble::new(FaultKind::MissingProxyFence, detail).object(name).other(write.2)
}
