//! `cp.async`: data that is fetched now and lands in shared memory when its thread waits for it.

use super::context::Context;
use crate::banks;
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::lanes::lanes;
use crate::machine::{Access, AccessKind, AsyncCopy, Flow};

impl Context<'_, '_> {
    pub fn copy_async(&mut self, bytes: u32, src: &[u32]) -> Outcome<Flow> {
        let active = self.warp.active;
        let code = &self.cx.code;
        let to = self.shared_addresses(src[0], active, 0)?;
        let from = *self.warp.read(code, src[1], active)?;
        let valid = *self.warp.read(code, src[2], active)?;
        let access = self.access(AccessKind::Announce);
        let at = self.warp.instr;
        let copy = self.state.shared.begin_copy(at, self.warp.index);
        let mut fetched = 0;
        for lane in lanes(active) {
            let wanted = valid[lane] as u32;
            if wanted > bytes {
                let detail = format!("cp.async of {wanted} valid bytes of {bytes}");
                return Err(Trouble::new(FaultKind::InvalidProgram, detail).lane(lane));
            }
            let data = self.fetch(from[lane], wanted, bytes).map_err(|trouble| trouble.lane(lane))?;
            fetched |= u32::from(wanted != 0) << lane;
            let (layout, clocks) = (&self.cx.layout, &self.state.clocks);
            let offset = self.state.shared.check(layout, clocks, &access, to[lane], bytes);
            let offset = offset.map_err(|trouble| trouble.lane(lane))?;
            self.state.shared.mark_busy(offset, bytes, copy);
            let copy_of_lane =
                AsyncCopy { lane: lane as u8, bytes: bytes as u8, offset: offset as u32, at, data };
            self.warp.copies.uncommitted.push(copy_of_lane);
        }
        self.stats.count_shared(at, banks::wavefronts(&to, active, bytes));
        self.stats.count_global(at, banks::sectors(&from, fetched, bytes));
        self.warp.progressed();
        Ok(Flow::Next)
    }

    /// The first `wanted` bytes at an address that must suit `bytes`; the rest is zeros.
    fn fetch(&self, address: u64, wanted: u32, bytes: u32) -> Outcome<u128> {
        let global = self.cx.global;
        if wanted == bytes {
            return global.read(address, bytes);
        }
        if !address.is_multiple_of(u64::from(bytes)) {
            let name = global.name_of(address).unwrap_or("?");
            let detail =
                format!("cp.async of {bytes} bytes from {address:#x} in `{name}`, no multiple of {bytes}");
            return Err(Trouble::new(FaultKind::Misaligned, detail).object(name));
        }
        let mut data = 0;
        for i in 0..wanted {
            data |= global.read(address + u64::from(i), 1)? << (8 * i);
        }
        Ok(data)
    }

    pub fn commit_copies(&mut self) -> Outcome<Flow> {
        let active = self.warp.active;
        let copies = &mut self.warp.copies;
        let mine: Vec<AsyncCopy> =
            copies.uncommitted.extract_if(.., |copy| active >> copy.lane & 1 == 1).collect();
        copies.groups.push((active, mine));
        Ok(Flow::Next)
    }

    pub fn wait_copies(&mut self, pending: u32) -> Outcome<Flow> {
        let active = self.warp.active;
        let access = self.access(AccessKind::Write);
        let mut later = [0; 32];
        let mut landed = 0;
        let groups = &mut self.warp.copies.groups;
        for (committed, copies) in groups.iter_mut().rev() {
            let mut arrive = 0;
            for lane in lanes(active & *committed) {
                if later[lane] >= pending {
                    arrive |= 1 << lane;
                }
                later[lane] += 1;
            }
            *committed &= !arrive;
            for copy in copies.extract_if(.., |copy| arrive >> copy.lane & 1 == 1) {
                let who = Access { at: copy.at, ..access };
                self.state.shared.land(copy.offset as usize, u32::from(copy.bytes), copy.data, &who);
                landed |= 1 << copy.lane;
            }
        }
        groups.retain(|(committed, _)| *committed != 0);
        let index = self.index();
        if landed != 0 {
            self.state.clocks.stored(index, landed);
        }
        Ok(Flow::Next)
    }
}
