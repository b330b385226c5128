//! One instruction of one warp.

mod arithmetic;
mod atomics;
mod barrier;
mod bulk;
mod collective;
mod context;
mod copies;
mod descriptor;
mod fragment;
mod load_store;
mod mbarrier;
mod tensor_core;
mod wgmma;

use sage_ptx::isa::{Control, MOST_OPERANDS, Matrix, Op, Warp as WarpOp};

use crate::decode::Decoded;
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::machine::{Flow, Status};

pub(crate) use context::Context;

impl Context<'_, '_> {
    pub fn execute(&mut self, instr: &Decoded) -> Outcome<Flow> {
        let active = self.warp.active;
        let (dst, src) = (&instr.dst, &instr.src);
        match instr.op {
            Op::Lane(op) => {
                let code = &self.cx.code;
                let mut operands = [&[0; 32]; MOST_OPERANDS];
                for (to, &register) in operands.iter_mut().zip(src.iter()) {
                    *to = self.warp.read(code, register, active)?;
                }
                let result = arithmetic::apply(op, &operands[..src.len().min(MOST_OPERANDS)], active);
                self.warp.write(code, dst[0], active, &result)?;
                Ok(Flow::Next)
            }
            Op::Memory(op) => self.memory(op, dst, src),
            Op::Warp(op) => match op {
                WarpOp::LoadMatrix { count, transposed, offset } => {
                    self.load_matrix(dst, src[0], count, transposed, offset)
                }
                _ => self.warp_wide(op, dst, src),
            },
            Op::Matrix(op) => match op {
                Matrix::Mma(mma) => self.mma(mma, dst, src),
                Matrix::HalfMma(mma) => self.half_mma(mma, dst, src),
                Matrix::MmaBlockScaled(mma) => self.mma_block_scaled(mma, dst, src),
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
            Control::BulkTensorLoad { dims, .. } => self.bulk_tensor_load(usize::from(dims), src),
            Control::BulkLoad => self.bulk_load(src),
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
        if more && held + 32 * (count - current) > self.state.register_pool {
            return Ok(Flow::Retry(Status::Registers));
        }
        self.state.register_limits[index] = count;
        self.warp.progressed();
        Ok(Flow::Next)
    }
}
