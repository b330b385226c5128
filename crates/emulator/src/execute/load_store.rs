//! Loads, stores, parameters and special registers.

use sage_ptx::Arg;
use sage_ptx::isa::{LoadMode, Memory, Space, Special, Word};

use super::context::Context;
use crate::banks;
use crate::fault::Outcome;
use crate::lanes::{Lanes, lanes};
use crate::machine::{AccessKind, BASE, Flow, PARAM_BASE, PARAM_BYTES, Status};

impl Context<'_, '_> {
    pub fn memory(&mut self, op: Memory, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        let active = self.warp.active;
        let constant = match op {
            Memory::Load { space, word, count, offset, mode } => {
                return self.load(space, word, count, offset, mode, dst, src[0]);
            }
            Memory::Store { space, word, count, offset, mode: _ } => {
                return self.store(space, word, count, offset, src);
            }
            Memory::Atomic { space, op, ty, offset } => {
                return self.atomic(space, op, ty, offset, dst[0], src);
            }
            Memory::Special(special) => {
                let values = self.special(special);
                self.warp.write(&self.cx.code, dst[0], active, &values)?;
                return Ok(Flow::Next);
            }
            Memory::Param { index, .. } => {
                // A valid program reads no tensor map as a number.
                self.cx.args.get(index as usize).and_then(Arg::bits).unwrap_or_default()
            }
            Memory::ParamAddress { index } => PARAM_BASE + PARAM_BYTES * u64::from(index),
            Memory::SharedAddress { offset, .. } => u64::from(BASE + offset),
        };
        self.warp.write(&self.cx.code, dst[0], active, &[constant; 32])?;
        Ok(Flow::Next)
    }

    fn special(&self, special: Special) -> Lanes {
        let [x, ..] = self.cx.code.program.block;
        let [bx, by, bz] = self.state.index;
        let [gx, gy, gz] = self.cx.grid;
        std::array::from_fn(|lane| {
            u64::from(match special {
                Special::TidX => (32 * self.warp.index + lane as u32) % x,
                Special::CtaIdX => bx,
                Special::CtaIdY => by,
                Special::CtaIdZ => bz,
                Special::NumCtaX => gx,
                Special::NumCtaY => gy,
                Special::NumCtaZ => gz,
            })
        })
    }

    /// Shared addresses of the active lanes.
    pub fn shared_addresses(&self, register: u32, lanes: u32, offset: i32) -> Outcome<[u32; 32]> {
        let base = self.warp.read(&self.cx.code, register, lanes)?;
        Ok(std::array::from_fn(|lane| (base[lane] as u32).wrapping_add(offset as u32)))
    }

    pub fn global_addresses(&self, register: u32, offset: i32) -> Outcome<[u64; 32]> {
        let base = self.warp.read(&self.cx.code, register, self.warp.active)?;
        Ok(std::array::from_fn(|lane| base[lane].wrapping_add(offset as i64 as u64)))
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one instruction")]
    fn load(
        &mut self,
        space: Space,
        word: Word,
        count: u8,
        offset: i32,
        mode: LoadMode,
        dst: &[u32],
        address: u32,
    ) -> Outcome<Flow> {
        let active = self.warp.active;
        let size = word.bytes();
        let bytes = size * u32::from(count);
        let mut result = [[0; 32]; 4];
        let mut put = |lane: usize, value: u128| {
            for (i, result) in result.iter_mut().enumerate().take(usize::from(count)) {
                result[lane] = extend(word, (value >> (8 * size as usize * i)) as u64);
            }
        };
        let mut flow = Flow::Next;
        match space {
            Space::Shared => {
                let addresses = self.shared_addresses(address, active, offset)?;
                let access = self.access(AccessKind::Read);
                for lane in lanes(active) {
                    let (layout, clocks) = (&self.cx.layout, &self.state.clocks);
                    let value = self.state.shared.read(layout, clocks, &access, addresses[lane], bytes);
                    put(lane, value.map_err(|trouble| trouble.lane(lane))?);
                }
                let cost = banks::wavefronts(&addresses, active, bytes);
                self.stats.count_shared(self.warp.instr, cost);
            }
            Space::Global => {
                let addresses = self.global_addresses(address, offset)?;
                let mut seen = 0u64;
                for lane in lanes(active) {
                    let value =
                        self.cx.global.read(addresses[lane], bytes).map_err(|trouble| trouble.lane(lane))?;
                    put(lane, value);
                    seen = (seen ^ value as u64 ^ addresses[lane])
                        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                        .rotate_left(23);
                }
                self.stats.count_global(self.warp.instr, banks::sectors(&addresses, active, bytes));
                if mode == LoadMode::Acquire {
                    flow =
                        if self.warp.polls_in_vain(seen) { Flow::Wait(Status::Polling) } else { Flow::Yield };
                }
            }
        }
        for (&register, values) in dst.iter().zip(&result) {
            self.warp.write(&self.cx.code, register, active, values)?;
        }
        Ok(flow)
    }

    fn store(&mut self, space: Space, word: Word, count: u8, offset: i32, src: &[u32]) -> Outcome<Flow> {
        let active = self.warp.active;
        let size = word.bytes();
        let bytes = size * u32::from(count);
        let code = &self.cx.code;
        let mut values = [0u128; 32];
        for (i, &register) in src[1..].iter().enumerate() {
            let from = self.warp.read(code, register, active)?;
            let mask = if size == 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
            for lane in 0..32 {
                values[lane] |= u128::from(from[lane] & mask) << (8 * size as usize * i);
            }
        }
        match space {
            Space::Shared => {
                let addresses = self.shared_addresses(src[0], active, offset)?;
                self.store_shared(&addresses, &values, active, bytes)?;
                let cost = banks::wavefronts(&addresses, active, bytes);
                self.stats.count_shared(self.warp.instr, cost);
            }
            Space::Global => {
                let addresses = self.global_addresses(src[0], offset)?;
                for lane in lanes(active) {
                    let write = self.cx.global.write(addresses[lane], bytes, values[lane]);
                    write.map_err(|trouble| trouble.lane(lane))?;
                }
                self.stats.count_global(self.warp.instr, banks::sectors(&addresses, active, bytes));
                self.stats.global_changes += 1;
            }
        }
        self.warp.progressed();
        Ok(Flow::Next)
    }

    /// The stores of one instruction to shared memory.
    pub fn store_shared(
        &mut self,
        addresses: &[u32; 32],
        values: &[u128; 32],
        active: u32,
        bytes: u32,
    ) -> Outcome<()> {
        let access = self.access(AccessKind::Write);
        let index = self.index();
        self.state.shared.next_store();
        for lane in lanes(active) {
            let (layout, clocks) = (&self.cx.layout, &self.state.clocks);
            let write =
                self.state.shared.write(layout, clocks, &access, addresses[lane], bytes, values[lane]);
            write.map_err(|trouble| trouble.lane(lane))?;
        }
        self.state.clocks.stored(index, active);
        Ok(())
    }
}

/// What a register gets of a word in memory.
fn extend(word: Word, bits: u64) -> u64 {
    match word {
        Word::U8 => bits & 0xff,
        Word::S8 => bits as i8 as i32 as u32 as u64,
        Word::B16 | Word::U16 => bits & 0xffff,
        Word::B32 => bits & 0xffff_ffff,
        Word::B64 => bits,
    }
}
