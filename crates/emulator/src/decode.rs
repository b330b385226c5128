//! A program laid flat: statements as steps with the places to jump to, constants as registers.

use std::collections::HashMap;
use std::panic::Location;

use sage_ptx::Program;
use sage_ptx::isa::{Access, Control, Lane, Matrix, Memory, Op, Warp};
use sage_ptx::program::{Instr, Operand, Reg, Stmt};

use crate::fault::{FaultKind, Outcome, Trouble};

/// A value for each lane.
pub(crate) type Lanes = [u64; 32];

/// What a warp does next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Instr(u32),
    /// Lanes without `cond` go to `otherwise`; all meet at `end`.
    If {
        cond: u32,
        otherwise: u32,
        end: u32,
        at: &'static Location<'static>,
    },
    /// The end of the lanes' first way.
    Else,
    EndIf,
    Loop {
        end: u32,
        at: &'static Location<'static>,
    },
    /// Lanes without `cond` leave.
    Test {
        cond: u32,
        at: &'static Location<'static>,
    },
    Again {
        test: u32,
    },
    End,
}

/// An instruction whose operands are all registers.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub op: Op,
    pub dst: Box<[u32]>,
    pub src: Box<[u32]>,
    pub at: &'static Location<'static>,
}

/// A program, ready to run.
#[derive(Debug)]
pub(crate) struct Code<'a> {
    pub program: &'a Program,
    pub steps: Vec<Step>,
    pub instrs: Vec<Decoded>,
    /// Registers from [`Code::registers`] on are constants.
    pub constants: Vec<Lanes>,
    pub registers: u32,
    /// Registers that some `wgmma` accumulates in or reads; empty where there is none.
    pub wgmma_registers: Vec<bool>,
    pub uses_bulk_stores: bool,
}

impl<'a> Code<'a> {
    pub fn new(program: &'a Program) -> Outcome<Code<'a>> {
        let mut decoder = Decoder {
            code: Code {
                program,
                steps: Vec::new(),
                instrs: Vec::new(),
                constants: Vec::new(),
                registers: program.registers.len() as u32,
                wgmma_registers: Vec::new(),
                uses_bulk_stores: false,
            },
            known: HashMap::new(),
        };
        decoder.statements(&program.body)?;
        decoder.code.steps.push(Step::End);
        Ok(decoder.code)
    }

    /// An instruction as PTX writes it.
    pub fn text(&self, index: u32) -> String {
        let mut next = 0;
        let mut text = String::new();
        self.program.for_each_instr(|instr| {
            if next == index {
                text = self.program.instruction_text(instr);
            }
            next += 1;
        });
        text
    }

    /// How a fault names a register.
    pub fn register_name(&self, register: u32) -> String {
        let name = self.program.registers.get(register as usize).and_then(|register| register.name.as_ref());
        match name {
            Some(name) => format!("`{name}` (register {register})"),
            None => format!("register {register}"),
        }
    }
}

struct Decoder<'a> {
    code: Code<'a>,
    known: HashMap<u64, u32>,
}

impl<'a> Decoder<'a> {
    fn statements(&mut self, statements: &'a [Stmt]) -> Outcome<()> {
        for statement in statements {
            match statement {
                Stmt::Note(_) => {}
                Stmt::Instr(instr) => self.instr(instr)?,
                Stmt::If { cond, then, otherwise, at } => {
                    let cond = self.register(*cond)?;
                    let start = self.reserve();
                    self.statements(then)?;
                    let middle = self.reserve();
                    self.statements(otherwise)?;
                    let end = self.reserve();
                    self.patch(start, Step::If { cond, otherwise: middle + 1, end, at });
                    self.patch(middle, Step::Else);
                    self.patch(end, Step::EndIf);
                }
                Stmt::While { test, cond, body, at } => {
                    let start = self.reserve();
                    self.statements(test)?;
                    let cond = self.register(*cond)?;
                    self.code.steps.push(Step::Test { cond, at });
                    self.statements(body)?;
                    self.code.steps.push(Step::Again { test: start + 1 });
                    let end = self.code.steps.len() as u32;
                    self.patch(start, Step::Loop { end, at });
                }
            }
        }
        Ok(())
    }

    fn reserve(&mut self) -> u32 {
        self.code.steps.push(Step::End);
        self.code.steps.len() as u32 - 1
    }

    fn patch(&mut self, at: u32, step: Step) {
        if let Some(place) = self.code.steps.get_mut(at as usize) {
            *place = step;
        }
    }

    fn register(&self, register: Reg) -> Outcome<u32> {
        if register.0 < self.code.registers {
            return Ok(register.0);
        }
        let detail = format!("register {} of {}", register.0, self.code.registers);
        Err(Trouble::new(FaultKind::InvalidProgram, detail))
    }

    fn operand(&mut self, operand: Operand) -> Outcome<u32> {
        let bits = match operand {
            Operand::Reg(register) => return self.register(register),
            Operand::Const(constant) => constant.bits(),
        };
        let next = self.code.registers + self.code.constants.len() as u32;
        let index = *self.known.entry(bits).or_insert(next);
        if index == next {
            self.code.constants.push([bits; 32]);
        }
        Ok(index)
    }

    fn instr(&mut self, instr: &Instr) -> Outcome<()> {
        let (dst, src) = arity(instr.op);
        let enough = |wanted: Count, found: usize| match wanted {
            Count::Exactly(n) => n == found,
            Count::AtLeast(n) => n <= found,
        };
        if !enough(dst, instr.dst.len()) || !enough(src, instr.src.len()) {
            let detail = format!(
                "{}: {:?} has {} results and {} operands, expected {dst:?} and {src:?}",
                instr.at,
                instr.op,
                instr.dst.len(),
                instr.src.len(),
            );
            return Err(Trouble::new(FaultKind::InvalidProgram, detail));
        }
        let mixed = match instr.op {
            Op::Memory(Memory::Load { access, .. }) => access == Access::Release,
            Op::Memory(Memory::Store { access, .. }) => access == Access::Acquire,
            _ => false,
        };
        if mixed {
            let detail = format!("{}: a load that releases, or a store that acquires", instr.at);
            return Err(Trouble::new(FaultKind::InvalidProgram, detail));
        }
        let to =
            instr.dst.iter().map(|&register| self.register(register)).collect::<Outcome<Box<[u32]>>>()?;
        let from = instr.src.iter().map(|&operand| self.operand(operand)).collect::<Outcome<Box<[u32]>>>()?;
        match instr.op {
            Op::Matrix(Matrix::Wgmma(wgmma)) => {
                let registers = self.code.registers as usize;
                self.code.wgmma_registers.resize(registers, false);
                let a = if wgmma.a_in_registers { 4 } else { 0 };
                for &register in to.iter().chain(&from[..a]) {
                    if let Some(mark) = self.code.wgmma_registers.get_mut(register as usize) {
                        *mark = true;
                    }
                }
            }
            Op::Control(Control::BulkTensorStore { .. }) => self.code.uses_bulk_stores = true,
            _ => {}
        }
        self.code.steps.push(Step::Instr(self.code.instrs.len() as u32));
        self.code.instrs.push(Decoded { op: instr.op, dst: to, src: from, at: instr.at });
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Count {
    Exactly(usize),
    AtLeast(usize),
}

/// Results and operands of an instruction: execution indexes them without looking.
fn arity(op: Op) -> (Count, Count) {
    use Count::*;
    let (dst, src) = match op {
        Op::Lane(op) => (1, lane_operands(op)),
        Op::Memory(Memory::Load { count, .. }) => (usize::from(count), 1),
        Op::Memory(Memory::Store { count, .. }) => (0, 1 + usize::from(count)),
        Op::Memory(Memory::Atomic { .. }) => (1, 2),
        Op::Memory(_) => (1, 0),
        Op::Warp(Warp::Shuffle(_)) => (1, 2),
        Op::Warp(Warp::Vote(_) | Warp::Redux(..)) => (1, 1),
        Op::Warp(Warp::Elect) => (1, 0),
        Op::Warp(Warp::Sync) => (0, 0),
        Op::Warp(Warp::LoadMatrix { count, .. }) => (usize::from(count), 1),
        Op::Warp(Warp::StoreMatrix { count, .. }) => (0, 1 + usize::from(count)),
        Op::Matrix(Matrix::Mma(mma)) => (mma.acc_registers(), 6 + mma.acc_registers()),
        Op::Matrix(Matrix::MmaBlockScaled) => (4, 12),
        Op::Matrix(Matrix::Wgmma(wgmma)) => (wgmma.acc_registers(), if wgmma.a_in_registers { 6 } else { 3 }),
        Op::Matrix(Matrix::WgmmaWait(_)) => return (AtLeast(0), Exactly(0)),
        Op::Matrix(_) => (0, 0),
        Op::Control(control) => match control {
            Control::Barrier { .. }
            | Control::BarrierArrive { .. }
            | Control::MbarrierArrive
            | Control::Sleep => (0, 1),
            Control::MbarrierInit | Control::MbarrierArriveExpect => (0, 2),
            Control::MbarrierTryWait => (1, 2),
            Control::CopyAsync { .. } => (0, 3),
            Control::BulkTensorLoad { dims } => (0, 3 + usize::from(dims)),
            Control::BulkTensorStore { dims } => (0, 2 + usize::from(dims)),
            _ => (0, 0),
        },
    };
    (Exactly(dst), Exactly(src))
}

fn lane_operands(op: Lane) -> usize {
    use sage_ptx::isa::Convert;
    match op {
        Lane::Fma(_) | Lane::MadWide(_) | Lane::Select(_) | Lane::Permute | Lane::BitField(_) => 3,
        Lane::FunnelLeft | Lane::Dot4 => 3,
        Lane::Convert(
            Convert::F32ToF16x2
            | Convert::F32ToBF16x2
            | Convert::F32ToE4M3x2
            | Convert::F32ToE5M2x2
            | Convert::F32ToE2M1x2,
        ) => 2,
        Lane::Mov(_)
        | Lane::Not(_)
        | Lane::Neg(_)
        | Lane::Abs(_)
        | Lane::Reciprocal
        | Lane::ReciprocalApprox
        | Lane::Sqrt
        | Lane::Exp2
        | Lane::Exp2F16x2
        | Lane::Log2
        | Lane::Tanh
        | Lane::Convert(_)
        | Lane::PopCount
        | Lane::LeadingZeros
        | Lane::Low16
        | Lane::High16
        | Lane::Low32
        | Lane::High32 => 1,
        _ => 2,
    }
}
