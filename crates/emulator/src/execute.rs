//! One instruction of one warp: arithmetic, loads and stores here, everything else where it belongs.

use sage_ptx::Arg;
use sage_ptx::isa::{Control, LoadMode, Matrix, Memory, Op, Space, Special, Warp as WarpOp, Word};

use crate::access::AccessKind;
use crate::arithmetic;
use crate::banks;
use crate::block::{Context, Flow, Status};
use crate::decode::{Decoded, Lanes};
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::layout::BASE;

/// Where kernel parameters lie, which only a bulk copy can look at.
pub(crate) const PARAM_BASE: u64 = 0x6000_0000_0000;
/// What each of them takes.
pub(crate) const PARAM_BYTES: u64 = 128;

impl Context<'_, '_> {
    pub fn execute(&mut self, instr: &Decoded) -> Outcome<Flow> {
        let active = self.warp.active;
        let (dst, src) = (&instr.dst, &instr.src);
        match instr.op {
            Op::Lane(op) => {
                let code = &self.cx.code;
                let mut operands = [&[0; 32]; 3];
                for (to, &register) in operands.iter_mut().zip(src.iter()) {
                    *to = self.warp.read(code, register, active)?;
                }
                let result = arithmetic::apply(op, &operands[..src.len().min(3)], active);
                self.warp.write(code, dst[0], active, &result)?;
                Ok(Flow::Next)
            }
            Op::Memory(op) => self.memory(op, dst, src),
            Op::Warp(op) => match op {
                WarpOp::LoadMatrix { count, transposed, offset } => {
                    self.load_matrix(dst, src[0], count, transposed, offset)
                }
                WarpOp::StoreMatrix { count, transposed, offset } => {
                    self.store_matrix(src, count, transposed, offset)
                }
                _ => self.warp_wide(op, dst, src),
            },
            Op::Matrix(op) => match op {
                Matrix::Mma(mma) => self.mma(mma, dst, src),
                Matrix::MmaBlockScaled => self.mma_block_scaled(dst, src),
                Matrix::Wgmma(_) => {
                    self.all_lanes("wgmma")?;
                    Ok(Flow::Retry(Status::Wgmma))
                }
                Matrix::WgmmaFence => self.wgmma_fence(),
                Matrix::WgmmaCommit => self.wgmma_commit(),
                Matrix::WgmmaWait(pending) => self.wgmma_wait(pending, dst),
            },
            Op::Control(op) => self.synchronise(op, dst, src),
        }
    }

    fn synchronise(&mut self, op: Control, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        match op {
            Control::Barrier { threads } => self.barrier(src[0], threads, true),
            Control::BarrierArrive { threads } => self.barrier(src[0], Some(threads), false),
            Control::FenceAsyncProxy => {
                let (index, lanes) = (self.index(), self.warp.active);
                self.state.clocks.fence(index, lanes);
                self.state.mbarriers.fence(index);
                Ok(Flow::Next)
            }
            Control::FenceMbarrierInit => {
                let index = self.index();
                self.state.mbarriers.fence(index);
                Ok(Flow::Next)
            }
            Control::MbarrierInit => self.mbarrier_init(src[0], src[1]),
            Control::MbarrierArrive => self.mbarrier_arrive(src[0], None),
            Control::MbarrierArriveExpect => self.mbarrier_arrive(src[0], Some(src[1])),
            Control::MbarrierTryWait => self.mbarrier_try_wait(dst[0], src[0], src[1]),
            Control::CopyAsync { bytes } => self.copy_async(u32::from(bytes), src),
            Control::CopyAsyncCommit => self.commit_copies(),
            Control::CopyAsyncWait(pending) => self.wait_copies(pending),
            Control::BulkTensorLoad { dims } => self.bulk_load(usize::from(dims), src),
            Control::BulkTensorStore { dims } => self.bulk_store(usize::from(dims), src),
            Control::BulkCommit => self.commit_bulk(),
            Control::BulkWaitRead(pending) => self.wait_bulk(pending),
            Control::RegistersIncrease(count) => self.set_registers(count, true),
            Control::RegistersDecrease(count) => self.set_registers(count, false),
            Control::Sleep => {
                self.warp.read(&self.cx.code, src[0], self.warp.active)?;
                Ok(Flow::Yield)
            }
            Control::Exit => {
                self.warp.exit();
                Ok(Flow::Next)
            }
            Control::Trap => Err(Trouble::new(FaultKind::Trap, "the kernel executed trap")),
        }
    }

    fn set_registers(&mut self, count: u32, more: bool) -> Outcome<Flow> {
        self.all_lanes("setmaxnreg")?;
        let index = self.index();
        let current = self.state.register_limits[index];
        if !count.is_multiple_of(8) || !(24..=256).contains(&count) {
            let detail = format!("setmaxnreg {count}, expected a multiple of 8 from 24 to 256");
            return Err(Trouble::new(FaultKind::RegisterBudget, detail));
        }
        if (more && count < current) || (!more && count > current) {
            let way = if more { "inc" } else { "dec" };
            let detail = format!("setmaxnreg.{way} to {count} where the warp has {current}");
            return Err(Trouble::new(FaultKind::RegisterBudget, detail));
        }
        let held: u32 = self.state.register_limits.iter().map(|limit| 32 * limit).sum();
        let budget = 65536 / self.cx.code.program.min_blocks.unwrap_or(1).max(1);
        if more && held + 32 * (count - current) > budget {
            return Ok(Flow::Retry(Status::Registers));
        }
        self.state.register_limits[index] = count;
        self.warp.progressed();
        Ok(Flow::Next)
    }

    fn memory(&mut self, op: Memory, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
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
                self.stats.shared(self.warp.instr, cost);
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
                self.stats.global(self.warp.instr, banks::sectors(&addresses, active, bytes), bytes);
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
                self.stats.shared(self.warp.instr, cost);
            }
            Space::Global => {
                let addresses = self.global_addresses(src[0], offset)?;
                for lane in lanes(active) {
                    let write = self.cx.global.write(addresses[lane], bytes, values[lane]);
                    write.map_err(|trouble| trouble.lane(lane))?;
                }
                self.stats.global(self.warp.instr, banks::sectors(&addresses, active, bytes), bytes);
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

/// Lanes of a mask.
pub(crate) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            lane
        })
    })
}
