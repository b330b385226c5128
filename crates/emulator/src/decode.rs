//! A program laid flat: statements as steps with the places to jump to, constants as registers.

use std::collections::HashMap;
use std::panic::Location;

use sage_ptx::Program;
use sage_ptx::isa::{Matrix, Op};
use sage_ptx::program::{Instr, Operand, Reg, Stmt};

use crate::lanes::Lanes;

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
}

impl<'a> Code<'a> {
    /// Lays out a [valid](Program::validate) program.
    pub fn new(program: &'a Program) -> Code<'a> {
        let mut decoder = Decoder {
            code: Code {
                program,
                steps: Vec::new(),
                instrs: Vec::new(),
                constants: Vec::new(),
                registers: program.registers.len() as u32,
                wgmma_registers: Vec::new(),
            },
            known: HashMap::new(),
        };
        decoder.statements(&program.body);
        decoder.code.steps.push(Step::End);
        decoder.code
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
    fn statements(&mut self, statements: &'a [Stmt]) {
        for statement in statements {
            match statement {
                Stmt::Note(_) => {}
                Stmt::Instr(instr) => self.instr(instr),
                Stmt::If { cond: Reg(cond), then, otherwise, at } => {
                    let start = self.reserve();
                    self.statements(then);
                    let middle = self.reserve();
                    self.statements(otherwise);
                    let end = self.reserve();
                    self.patch(start, Step::If { cond: *cond, otherwise: middle + 1, end, at });
                    self.patch(middle, Step::Else);
                    self.patch(end, Step::EndIf);
                }
                Stmt::While { test, cond: Reg(cond), body, at } => {
                    let start = self.reserve();
                    self.statements(test);
                    self.code.steps.push(Step::Test { cond: *cond, at });
                    self.statements(body);
                    self.code.steps.push(Step::Again { test: start + 1 });
                    let end = self.code.steps.len() as u32;
                    self.patch(start, Step::Loop { end, at });
                }
            }
        }
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

    fn operand(&mut self, operand: Operand) -> u32 {
        let bits = match operand {
            Operand::Reg(Reg(register)) => return register,
            Operand::Const(constant) => constant.bits(),
        };
        let next = self.code.registers + self.code.constants.len() as u32;
        let index = *self.known.entry(bits).or_insert(next);
        if index == next {
            self.code.constants.push([bits; 32]);
        }
        index
    }

    fn instr(&mut self, instr: &Instr) {
        let dst: Box<[u32]> = instr.dst.iter().map(|&Reg(register)| register).collect();
        let src: Box<[u32]> = instr.src.iter().map(|&operand| self.operand(operand)).collect();
        if let Op::Matrix(Matrix::Wgmma(wgmma)) = instr.op {
            self.code.wgmma_registers.resize(self.code.registers as usize, false);
            let a = if wgmma.a_in_registers { 4 } else { 0 };
            for &register in dst.iter().chain(&src[..a]) {
                self.code.wgmma_registers[register as usize] = true;
            }
        }
        self.code.steps.push(Step::Instr(self.code.instrs.len() as u32));
        self.code.instrs.push(Decoded { op: instr.op, dst, src, at: instr.at });
    }
}
