//! Instructions on `mbarrier`s.

use super::context::Context;
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::lanes::lanes;
use crate::machine::{AccessKind, Flow, Mbarrier, Stamp, Status};

/// What the hardware can count of bytes.
const MAX_BYTES: u32 = (1 << 20) - 1;

impl Context<'_, '_> {
    /// Checks that an initialised `mbarrier` is at an address.
    pub fn use_mbarrier(&mut self, address: u32) -> Outcome<()> {
        let access = self.access(AccessKind::Mbarrier);
        self.state.shared.check(&self.cx.layout, &self.state.clocks, &access, address, 8)?;
        if self.state.mbarriers.get(address).is_none() {
            let (place, name) = self.cx.layout.place(address);
            let detail = format!("{place} is no initialised mbarrier");
            return Err(Trouble::new(FaultKind::Mbarrier, detail).object(name));
        }
        Ok(())
    }

    pub fn mbarrier_init(&mut self, address: u32, count: u32) -> Outcome<Flow> {
        let code = &self.cx.code;
        let addresses = *self.warp.read(code, address, self.warp.active)?;
        let counts = *self.warp.read(code, count, self.warp.active)?;
        for lane in lanes(self.warp.active) {
            let (address, expected) = (addresses[lane] as u32, counts[lane] as u32);
            if expected == 0 || expected > (1 << 20) - 1 {
                let detail = format!("mbarrier of {expected} arrivals, expected 1 to 1048575");
                return Err(Trouble::new(FaultKind::Mbarrier, detail).lane(lane));
            }
            let access = self.access(AccessKind::MbarrierInit);
            let check = self.state.shared.check(&self.cx.layout, &self.state.clocks, &access, address, 8);
            check.map_err(|trouble| trouble.lane(lane))?;
            let barrier = Mbarrier {
                index: self.state.mbarriers.count,
                expected,
                pending: expected,
                bytes: 0,
                phase: 0,
                stamp: Stamp::default(),
                completed: Stamp::default(),
                init_warp: self.index(),
                fenced: false,
                init_at: self.warp.instr,
            };
            self.state.mbarriers.count += 1;
            self.state.mbarriers.table.insert(address, barrier);
        }
        self.warp.progressed();
        Ok(Flow::Next)
    }

    /// Each active lane arrives once, and announces bytes.
    pub fn mbarrier_arrive(&mut self, address: u32, bytes: Option<u32>) -> Outcome<Flow> {
        let code = &self.cx.code;
        let addresses = *self.warp.read(code, address, self.warp.active)?;
        let bytes = match bytes {
            Some(bytes) => *self.warp.read(code, bytes, self.warp.active)?,
            None => [0; 32],
        };
        let index = self.index();
        for lane in lanes(self.warp.active) {
            let address = addresses[lane] as u32;
            self.use_mbarrier(address).map_err(|trouble| trouble.lane(lane))?;
            let Some(barrier) = self.state.mbarriers.get(address) else { continue };
            if barrier.pending == 0 {
                let (place, name) = self.cx.layout.place(address);
                let detail = format!(
                    "more than {} arrivals in one phase of the mbarrier at {place}",
                    barrier.expected
                );
                return Err(Trouble::new(FaultKind::Mbarrier, detail)
                    .lane(lane)
                    .object(name)
                    .other(barrier.init_at));
            }
            if bytes[lane] as u32 > MAX_BYTES {
                let detail = format!("{} bytes announced at once, at most {MAX_BYTES}", bytes[lane] as u32);
                return Err(Trouble::new(FaultKind::Mbarrier, detail).lane(lane));
            }
            barrier.pending -= 1;
            barrier.bytes += i64::from(bytes[lane] as u32);
            self.state.clocks.release(index, &mut barrier.stamp);
            self.state.settle_mbarrier(address);
        }
        self.warp.progressed();
        Ok(Flow::Next)
    }

    /// Waits as long as somebody else can run; then says `false`.
    pub fn mbarrier_try_wait(&mut self, dst: u32, address: u32, parity: u32) -> Outcome<Flow> {
        let code = &self.cx.code;
        let addresses = *self.warp.read(code, address, self.warp.active)?;
        let parities = *self.warp.read(code, parity, self.warp.active)?;
        let mut done = [0; 32];
        let (mut waits_for, mut checked) = (None, None);
        for lane in lanes(self.warp.active) {
            let address = addresses[lane] as u32;
            let parity = parities[lane] as u32;
            if parity > 1 {
                let detail = format!("mbarrier parity {parity}, expected 0 or 1");
                return Err(Trouble::new(FaultKind::Mbarrier, detail).lane(lane));
            }
            if checked.replace(address) != Some(address) {
                self.use_mbarrier(address).map_err(|trouble| trouble.lane(lane))?;
            }
            let Some(barrier) = self.state.mbarriers.get(address) else { continue };
            if barrier.phase & 1 == u64::from(parity) {
                waits_for = waits_for.or(Some(Status::Mbarrier { address, parity }));
            } else {
                done[lane] = 1;
            }
        }
        let pc = self.warp.pc - 1;
        match waits_for {
            Some(status) if !self.warp.take_time_out(pc) => return Ok(Flow::Retry(status)),
            Some(_) => {}
            None => self.warp.progressed(),
        }
        let index = self.index();
        let mut last = None;
        for lane in lanes(self.warp.active).filter(|&lane| done[lane] == 1) {
            if last.replace(addresses[lane]) == Some(addresses[lane]) {
                continue;
            }
            if let Some(barrier) = self.state.mbarriers.get(addresses[lane] as u32) {
                let completed = std::mem::take(&mut barrier.completed);
                self.state.clocks.acquire(index, &completed);
                if let Some(barrier) = self.state.mbarriers.get(addresses[lane] as u32) {
                    barrier.completed = completed;
                }
            }
        }
        self.warp.write(&self.cx.code, dst, self.warp.active, &done)?;
        Ok(Flow::Next)
    }
}
