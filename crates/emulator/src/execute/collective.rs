//! What the lanes of a warp do together: shuffles, votes, reductions, matrix loads.

use sage_ptx::isa::{Lane, Redux, Shuffle, Vote, Warp as WarpOp};

use super::context::Context;
use crate::banks;
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::lanes::{Lanes, lanes, mask_of};
use crate::machine::{AccessKind, Flow};

impl Context<'_, '_> {
    pub fn warp_wide(&mut self, op: WarpOp, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        let active = self.warp.active;
        let code = &self.cx.code;
        let result: Lanes = match op {
            WarpOp::Shuffle(mode) => {
                self.together("a shuffle")?;
                let values = self.warp.read(code, src[0], active)?;
                let picks = self.warp.read(code, src[1], active)?;
                shuffle(mode, values, picks, active)?
            }
            WarpOp::Vote(vote) => {
                self.together("a vote")?;
                let votes = mask_of(self.warp.read(code, src[0], active)?) & active;
                let result = match vote {
                    Vote::All => u64::from(votes == active),
                    Vote::Any => u64::from(votes != 0),
                    Vote::Ballot => u64::from(votes),
                };
                [result; 32]
            }
            WarpOp::Redux(op, ty) => {
                self.together("a reduction")?;
                let values = self.warp.read(code, src[0], active)?;
                let op = match op {
                    Redux::Add => Lane::Add(ty),
                    Redux::Min => Lane::Min(ty),
                    Redux::Max => Lane::Max(ty),
                };
                let all = lanes(active).map(|lane| values[lane]).reduce(|a, b| op.eval([a, b, 0]));
                [all.unwrap_or(0); 32]
            }
            WarpOp::Sync => {
                self.together("bar.warp.sync")?;
                return Ok(Flow::Next);
            }
            WarpOp::LoadMatrix { .. } => return Ok(Flow::Next),
        };
        self.warp.write(code, dst[0], active, &result)?;
        Ok(Flow::Next)
    }

    pub fn load_matrix(
        &mut self,
        dst: &[u32],
        address: u32,
        count: u8,
        transposed: bool,
        offset: i32,
    ) -> Outcome<Flow> {
        self.all_lanes("ldmatrix")?;
        let rows = matrix_rows(count);
        let addresses = self.shared_addresses(address, rows, offset)?;
        let access = self.access(AccessKind::Read);
        let mut row_bits = [0u128; 32];
        for lane in lanes(rows) {
            let (layout, clocks) = (&self.cx.layout, &self.state.clocks);
            let row = self.state.shared.read(layout, clocks, &access, addresses[lane], 16);
            row_bits[lane] = row.map_err(|trouble| trouble.lane(lane))?;
        }
        let cost = banks::wavefronts(&addresses, rows, 16);
        self.stats.count_shared(self.warp.instr, cost);
        for (matrix, &register) in dst.iter().enumerate() {
            let rows = &row_bits[8 * matrix..8 * matrix + 8];
            let element = |row: usize, column: usize| (rows[row] >> (16 * column)) as u64 & 0xffff;
            let values = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, 2 * (lane % 4));
                if transposed {
                    element(column, row) | element(column + 1, row) << 16
                } else {
                    element(row, column) | element(row, column + 1) << 16
                }
            });
            self.warp.write(&self.cx.code, register, u32::MAX, &values)?;
        }
        Ok(Flow::Next)
    }
}

/// Lanes whose addresses count: eight for each matrix.
const fn matrix_rows(count: u8) -> u32 {
    match count {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

fn shuffle(mode: Shuffle, values: &Lanes, picks: &Lanes, active: u32) -> Outcome<Lanes> {
    let mut result = [0; 32];
    for lane in lanes(active) {
        let from = mode.source(lane as u32, picks[lane] as u32) as usize;
        if active >> from & 1 == 0 {
            let detail = format!("a shuffle reads lane {from}, which has exited or never was");
            return Err(Trouble::new(FaultKind::Divergent, detail).lane(lane));
        }
        result[lane] = values[from];
    }
    Ok(result)
}
