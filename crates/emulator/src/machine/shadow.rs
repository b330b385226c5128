//! What is known of each word of shared memory beside its value: who wrote and read it last, and what is on its way.

use std::collections::HashMap;

use super::access::{Access, AccessKind, race, unfenced};
use super::clocks::Clocks;
use super::layout::{BASE, Layout};
use crate::fault::{FaultKind, Outcome, Trouble};

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

impl Word {
    fn wrote(&mut self, who: &Access) {
        self.readers = 0;
        self.write_component = who.component as u16;
        self.write_count = who.count;
        self.write_at = who.at;
        self.flags = match who.kind {
            AccessKind::Atomic => WRITTEN | ATOMIC,
            AccessKind::MbarrierInit => WRITTEN | MBARRIER,
            _ => WRITTEN,
        };
    }
}

/// A component, its count at an access, and the instruction.
type Event = (u16, u32, u32);

/// Shadow of one byte, where the bytes of a word went different ways.
#[derive(Clone, Debug, Default)]
struct ByteShadow {
    write: Event,
    atomic: bool,
    reads: Vec<Event>,
}

/// The shadow of a block's shared memory.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    words: Vec<Word>,
    /// Count and instruction of each component's last read, for each word.
    reads: Vec<(u32, u32)>,
    columns: usize,
    split: HashMap<usize, Box<[ByteShadow; 4]>>,
    /// Instruction and warp of each asynchronous copy ever started.
    copies: Vec<(u32, u32)>,
    serial: u32,
}

impl Shadow {
    /// The shadow of so many words, read by so many components.
    pub fn new(words: usize, columns: usize) -> Shadow {
        Shadow {
            words: vec![Word::default(); words],
            reads: vec![(0, 0); words * columns],
            columns,
            ..Shadow::default()
        }
    }

    /// Checks and remembers an access to the bytes `mask` of a word.
    #[inline]
    pub fn touch(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        word: usize,
        mask: u8,
    ) -> Outcome<()> {
        let Some(shadow) = self.words.get_mut(word) else { return Ok(()) };
        if mask == 0xf && shadow.flags == WRITTEN && shadow.busy == 0 && !who.proxy {
            // The commonest accesses, in order.
            let me = 1 << who.component;
            let seen = clocks.seen_by(who.warp);
            let ordered = |component: usize, count: u32| {
                component == who.warp || seen.get(component).is_some_and(|&seen| seen >= count)
            };
            if ordered(usize::from(shadow.write_component), shadow.write_count) {
                let row = word * self.columns;
                if who.kind == AccessKind::Read {
                    shadow.readers |= me;
                    if let Some(last) = self.reads.get_mut(row + who.component) {
                        *last = (who.count, who.at);
                    }
                    return Ok(());
                }
                if who.kind == AccessKind::Write {
                    let mut readers = shadow.readers & !me;
                    while readers != 0 {
                        let component = readers.trailing_zeros() as usize;
                        if !self.reads.get(row + component).is_some_and(|read| ordered(component, read.0)) {
                            break;
                        }
                        readers &= readers - 1;
                    }
                    if readers == 0 {
                        shadow.readers = 0;
                        shadow.write_component = who.component as u16;
                        shadow.write_count = who.count;
                        shadow.write_at = who.at;
                        return Ok(());
                    }
                }
            }
        }
        self.touch_carefully(layout, clocks, who, word, mask)
    }

    #[inline(never)]
    fn touch_carefully(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        word: usize,
        mask: u8,
    ) -> Outcome<()> {
        let address = BASE + 4 * word as u32;
        let shadow = &mut self.words[word];
        if shadow.busy != 0 {
            return Err(self.in_flight(layout, word, who));
        }
        let of_mbarrier = matches!(who.kind, AccessKind::Mbarrier | AccessKind::MbarrierInit);
        if shadow.flags & MBARRIER != 0 && !of_mbarrier {
            let (place, name) = layout.place(address);
            let detail = format!("{place} holds an mbarrier, which is not data");
            return Err(Trouble::new(FaultKind::Mbarrier, detail).object(name).other(shadow.write_at));
        }
        if who.reads() && shadow.flags & mask != mask {
            let (place, name) = layout.place(address + (mask & !shadow.flags).trailing_zeros());
            let detail = format!("{place} (shared memory) was never written");
            return Err(Trouble::new(FaultKind::UninitializedMemory, detail).object(name));
        }
        if mask != 0xf || shadow.flags & SPLIT != 0 {
            return self.touch_bytes(layout, clocks, who, word, mask);
        }
        let write = (shadow.write_component, shadow.write_count, shadow.write_at);
        check_write(layout, clocks, who, address, write, shadow.flags & ATOMIC != 0)?;
        let row = word * self.columns;
        if who.writes() {
            let mut readers = shadow.readers;
            while readers != 0 {
                let component = readers.trailing_zeros() as usize;
                readers &= readers - 1;
                let (count, at) = self.reads[row + component];
                if !clocks.has_seen(who.warp, component, count) {
                    let read = (component as u16, count, at);
                    return Err(race(layout, clocks, who, address, read, "read"));
                }
            }
            if who.kind != AccessKind::Announce {
                shadow.wrote(who);
            }
        } else {
            shadow.readers |= 1 << who.component;
            self.reads[row + who.component] = (who.count, who.at);
        }
        Ok(())
    }

    /// As [`Shadow::touch`], byte by byte.
    fn touch_bytes(
        &mut self,
        layout: &Layout<'_>,
        clocks: &Clocks,
        who: &Access,
        word: usize,
        mask: u8,
    ) -> Outcome<()> {
        let Shadow { words, split, reads, columns, .. } = self;
        let shadow = &mut words[word];
        let bytes = split.entry(word).or_insert_with(|| {
            let readers = (0..*columns).filter(|component| shadow.readers >> component & 1 == 1);
            let reads: Vec<Event> = readers
                .map(|component| {
                    let (count, at) = reads[word * *columns + component];
                    (component as u16, count, at)
                })
                .collect();
            let write = (shadow.write_component, shadow.write_count, shadow.write_at);
            let byte = ByteShadow { write, atomic: shadow.flags & ATOMIC != 0, reads };
            Box::new([byte.clone(), byte.clone(), byte.clone(), byte])
        });
        shadow.flags |= SPLIT;
        for (i, byte) in bytes.iter_mut().enumerate().filter(|(i, _)| mask >> i & 1 == 1) {
            let address = BASE + (4 * word + i) as u32;
            check_write(layout, clocks, who, address, byte.write, byte.atomic)?;
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
                shadow.wrote(who);
                split.remove(&word);
            }
        }
        Ok(())
    }

    // Two lanes of one store.

    /// Tells the stores of one instruction from those of the next.
    pub fn next_store(&mut self) {
        self.serial = self.serial.wrapping_add(1);
    }

    /// Bytes of `mask` that the current instruction has stored to before.
    pub fn stored_twice(&mut self, word: usize, mask: u8) -> u8 {
        let Some(shadow) = self.words.get_mut(word) else { return 0 };
        if shadow.serial != self.serial {
            shadow.serial = self.serial;
            shadow.serial_mask = mask;
            return 0;
        }
        let both = shadow.serial_mask & mask;
        shadow.serial_mask |= mask;
        both
    }

    // Asynchronous copies to shared memory.

    /// A copy begins.
    pub fn begin_copy(&mut self, at: u32, warp: u32) -> u32 {
        self.copies.push((at, warp));
        self.copies.len() as u32
    }

    /// A copy's words may not be touched until it lands.
    pub fn mark_busy(&mut self, word: usize, copy: u32) {
        if let Some(shadow) = self.words.get_mut(word) {
            shadow.busy = copy;
        }
    }

    /// A word arrives: a write by `who`.
    pub fn land(&mut self, word: usize, who: &Access) {
        if let Some(shadow) = self.words.get_mut(word) {
            shadow.busy = 0;
            if shadow.flags & SPLIT != 0 {
                self.split.remove(&word);
            }
            shadow.wrote(who);
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

/// Whether the last write is ordered before an access, and fenced where that matters.
fn check_write(
    layout: &Layout<'_>,
    clocks: &Clocks,
    who: &Access,
    address: u32,
    write: Event,
    atomic: bool,
) -> Outcome<()> {
    let (component, count, _) = write;
    let component = usize::from(component);
    if count == 0 || (who.kind == AccessKind::Atomic && atomic) {
        return Ok(());
    }
    if !clocks.has_seen(who.warp, component, count) {
        return Err(race(layout, clocks, who, address, write, "wrote"));
    }
    if who.proxy && !clocks.knows_fenced(who.warp, component, count) {
        return Err(unfenced(layout, who, address, write));
    }
    Ok(())
}
