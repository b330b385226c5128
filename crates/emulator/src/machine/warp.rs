//! A warp: its registers, and where it stands in the structured control flow.

use std::panic::Location;

use super::in_flight::{Copies, Products};
use crate::decode::{Code, Step};
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::lanes::{Lanes, mask_of};

/// A control statement that the warp is inside.
#[derive(Clone, Copy, Debug)]
enum Frame {
    If {
        /// Lanes active before it.
        before: u32,
        /// Lanes that go the other way yet.
        pending: u32,
        otherwise: u32,
        end: u32,
        at: &'static Location<'static>,
    },
    Loop {
        before: u32,
        end: u32,
        at: &'static Location<'static>,
    },
}

/// How a register is used by a `wgmma` in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hold {
    #[default]
    Free,
    Accumulator {
        group: u32,
        at: u32,
    },
    Operand {
        group: u32,
        at: u32,
    },
}

/// A warp.
#[derive(Debug, Default)]
pub(crate) struct Warp {
    pub index: u32,
    pub pc: u32,
    pub active: u32,
    /// Lanes that exist and have not exited.
    pub live: u32,
    pub steps: u64,
    /// Instruction being executed.
    pub instr: u32,
    registers: Vec<Lanes>,
    /// Lanes that wrote each register.
    written: Vec<u32>,
    frames: Vec<Frame>,
    /// Registers in use by `wgmma`s; empty while none is in flight.
    pub holds: Vec<Hold>,
    /// Registers of `wgmma`s that were written since the last `wgmma.fence`; empty in programs without `wgmma`.
    pub dirty: Vec<bool>,
    /// What this warp waits for of its asynchronous copies and products.
    pub copies: Copies,
    pub products: Products,
    /// What each instruction that polls memory saw last, since the warp last did anything else of effect.
    polls: Vec<(u32, u64)>,
    /// `try_wait`s that have said `false` since then, and the one that is about to.
    timed_out: Vec<u32>,
    timing_out: Option<u32>,
}

impl Warp {
    pub fn new(index: u32, lanes: u32, code: &Code<'_>) -> Warp {
        let count = code.registers as usize;
        Warp {
            index,
            active: lanes,
            live: lanes,
            registers: vec![[0; 32]; count],
            written: vec![0; count],
            dirty: vec![false; code.wgmma_registers.len()],
            ..Warp::default()
        }
    }

    /// A register's values, which the lanes in `lanes` must have written.
    #[inline]
    pub fn read<'w>(&'w self, code: &'w Code<'_>, register: u32, lanes: u32) -> Outcome<&'w Lanes> {
        let index = register as usize;
        match self.written.get(index) {
            Some(&written)
                if written & lanes == lanes && (self.holds.is_empty() || self.holds[index] == Hold::Free) =>
            {
                Ok(&self.registers[index])
            }
            Some(&written) => Err(self.unreadable(code, register, lanes, written)),
            None => Ok(&code.constants[index - code.registers as usize]),
        }
    }

    #[cold]
    fn unreadable(&self, code: &Code<'_>, register: u32, lanes: u32, written: u32) -> Box<Trouble> {
        let name = code.register_name(register);
        if written & lanes == lanes {
            return held(self.holds.get(register as usize).copied().unwrap_or_default(), "reads", name);
        }
        let detail = format!("{name} was never written by these lanes");
        Trouble::new(FaultKind::UninitializedRegister, detail).lanes(lanes & !written).object(name)
    }

    /// Sets a register in the lanes of `lanes`.
    #[inline]
    pub fn write(&mut self, code: &Code<'_>, register: u32, lanes: u32, values: &Lanes) -> Outcome<()> {
        if !self.dirty.is_empty() {
            self.watch(code, register)?;
        }
        let index = register as usize;
        let to = &mut self.registers[index];
        if lanes == u32::MAX {
            *to = *values;
        } else {
            for lane in (0..32).filter(|lane| lanes >> lane & 1 == 1) {
                to[lane] = values[lane];
            }
        }
        self.written[index] |= lanes;
        Ok(())
    }

    /// Whether a `wgmma` in flight forbids writing the register.
    fn watch(&mut self, code: &Code<'_>, register: u32) -> Outcome<()> {
        match self.holds.get(register as usize) {
            None | Some(Hold::Free) => {}
            Some(&hold) => return Err(held(hold, "writes", code.register_name(register))),
        }
        if code.wgmma_registers.get(register as usize) == Some(&true) {
            self.dirty[register as usize] = true;
        }
        Ok(())
    }

    /// A register's values, for a `wgmma` that may share it with others.
    pub fn raw(&mut self, register: u32) -> &mut Lanes {
        &mut self.registers[register as usize]
    }

    pub fn mark_written(&mut self, register: u32) {
        self.written[register as usize] = u32::MAX;
    }

    pub fn written(&self, register: u32) -> u32 {
        self.written[register as usize]
    }

    pub fn finished(&self) -> bool {
        self.live == 0
    }

    // Waiting.

    /// The warp did something that others can see: what it polls may change now.
    pub fn progressed(&mut self) {
        self.polls.clear();
        self.timed_out.clear();
        self.timing_out = None;
    }

    /// Whether the current instruction sees what it saw before, nothing having happened since.
    pub fn polls_in_vain(&mut self, seen: u64) -> bool {
        let instr = self.instr;
        match self.polls.iter_mut().find(|poll| poll.0 == instr) {
            Some(poll) => std::mem::replace(&mut poll.1, seen) == seen,
            None => {
                self.polls.push((instr, seen));
                false
            }
        }
    }

    pub fn timed_out_at(&self, pc: u32) -> bool {
        self.timed_out.contains(&pc)
    }

    pub fn note_time_out(&mut self, pc: u32) {
        self.timed_out.push(pc);
        self.timing_out = Some(pc);
    }

    pub fn take_time_out(&mut self, pc: u32) -> bool {
        self.timing_out.take_if(|at| *at == pc).is_some()
    }

    // Control flow.

    /// Does a control step.
    pub fn control(&mut self, code: &Code<'_>, step: Step) -> Outcome<()> {
        match step {
            Step::Instr(_) => {}
            Step::If { cond, otherwise, end, at } => {
                let cond = mask_of(self.read(code, cond, self.active)?);
                let (then, other) = (self.active & cond, self.active & !cond);
                let mut frame = Frame::If { before: self.active, pending: other, otherwise, end, at };
                if then == 0 {
                    if let Frame::If { pending, .. } = &mut frame {
                        *pending = 0;
                    }
                    self.active = other;
                    self.pc = otherwise;
                } else {
                    self.active = then;
                    self.pc += 1;
                }
                self.frames.push(frame);
            }
            Step::Else | Step::EndIf => self.leave(),
            Step::Loop { end, at } => {
                self.frames.push(Frame::Loop { before: self.active, end, at });
                self.pc += 1;
            }
            Step::Test { cond, .. } => {
                self.active &= mask_of(self.read(code, cond, self.active)?);
                if self.active == 0 { self.leave() } else { self.pc += 1 }
            }
            Step::Again { test } => self.pc = test,
            Step::End => {
                self.live &= !self.active;
                self.leave();
            }
        }
        Ok(())
    }

    /// The active lanes have come to the end of a way: goes on with the lanes that wait for them.
    fn leave(&mut self) {
        loop {
            match self.frames.last_mut() {
                None => return,
                Some(Frame::If { pending, otherwise, .. }) if *pending & self.live != 0 => {
                    self.active = *pending & self.live;
                    *pending = 0;
                    self.pc = *otherwise;
                    return;
                }
                Some(&mut Frame::If { before, end, .. }) => {
                    self.frames.pop();
                    self.active = before & self.live;
                    self.pc = end + 1;
                }
                Some(&mut Frame::Loop { before, end, .. }) => {
                    self.frames.pop();
                    self.active = before & self.live;
                    self.pc = end;
                }
            }
            if self.active != 0 {
                return;
            }
        }
    }

    /// The active lanes end.
    pub fn exit(&mut self) {
        self.live &= !self.active;
        self.active = 0;
        // Lanes of a loop that have left it earlier wait in its frame.
        self.leave();
    }

    /// The loops that the warp is in, the outermost first.
    pub fn loops(&self) -> impl Iterator<Item = &'static Location<'static>> + '_ {
        self.frames.iter().filter_map(|frame| match frame {
            Frame::Loop { at, .. } => Some(*at),
            Frame::If { .. } => None,
        })
    }

    /// Where the lanes that are not active were left.
    pub fn branches(&self) -> impl Iterator<Item = &'static Location<'static>> + '_ {
        self.frames.iter().map(|frame| match frame {
            Frame::Loop { at, .. } | Frame::If { at, .. } => *at,
        })
    }
}

#[cold]
fn held(hold: Hold, does: &str, name: String) -> Box<Trouble> {
    let (role, at) = match hold {
        Hold::Operand { at, .. } => ("an operand", at),
        Hold::Accumulator { at, .. } => ("the accumulator", at),
        Hold::Free => ("nothing", 0),
    };
    let detail = format!("{does} {name}, {role} of a wgmma that was not waited for");
    Trouble::new(FaultKind::WgmmaInFlight, detail).object(name).other(at)
}
