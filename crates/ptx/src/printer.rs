//! PTX text of a program.

use std::collections::HashMap;
use std::fmt::{self, Write};

use crate::isa::{Control, Memory, Op, SHARED_SYMBOL, Width};
use crate::launch::ParamType;
use crate::program::{Instr, Operand, Program, Reg, Stmt};
use crate::requirements::Unsupported;
use crate::target::Target;
use crate::validate::Invalid;

/// Why there is no text of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PtxError {
    /// No GPU could run it.
    Invalid(Invalid),
    /// The target cannot.
    Unsupported(Unsupported),
}

impl fmt::Display for PtxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PtxError::Invalid(error) => error.fmt(f),
            PtxError::Unsupported(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for PtxError {}

impl From<Invalid> for PtxError {
    fn from(error: Invalid) -> PtxError {
        PtxError::Invalid(error)
    }
}

impl From<Unsupported> for PtxError {
    fn from(error: Unsupported) -> PtxError {
        PtxError::Unsupported(error)
    }
}

/// What every kernel for sm_90 and newer begins with. Where it is launched so that its blocks may take their places
/// while the last blocks of the launch before are still at work, it waits until that is over and its writes are
/// visible.
const WAIT_FOR_LAUNCHES_BEFORE: &str = "griddepcontrol.wait";

impl Program {
    /// PTX text for `target`, of the lowest version that knows its instructions. What the target lacks is put together
    /// from what it has, as [`Program::lowered`] says.
    ///
    /// No driver is given the text of a program that is not valid.
    ///
    /// # Errors
    /// When the program is not [valid](Program::validate), or the target lacks an instruction.
    pub fn ptx(&self, target: Target) -> Result<String, PtxError> {
        self.validate()?;
        if let Some(missing) = self.missing_on(target) {
            return Err(missing.into());
        }
        let lowered = self.lowered(target);
        let mut out = String::new();
        let _ = lowered.print(&Names::new(&lowered), target, &mut out);
        Ok(out)
    }

    fn print(&self, names: &Names<'_>, target: Target, out: &mut String) -> fmt::Result {
        writeln!(out, ".version {}\n.target {target}\n.address_size 64\n", self.version(target))?;
        let bytes = self.shared_bytes();
        if bytes > 0 {
            for array in &self.shared {
                let (from, to) = (array.offset, array.offset + array.bytes);
                writeln!(out, "// shared {from:>6}..{to:<6} {}", array.name)?;
            }
            let align = 1024;
            match self.dynamic_shared_bytes() {
                0 => writeln!(out, ".shared .align {align} .b8 {SHARED_SYMBOL}[{bytes}];\n")?,
                _ => writeln!(out, ".extern .shared .align {align} .b8 {SHARED_SYMBOL}[];\n")?,
            }
        }
        writeln!(out, ".visible .entry {}(", self.name)?;
        for (index, param) in self.params.iter().enumerate() {
            let comma = if index + 1 < self.params.len() { "," } else { "" };
            let array = if param.ty == ParamType::TensorMap { "[128]" } else { "" };
            writeln!(out, "    .param {} {}{array}{comma}", param.ty.ptx(), self.param_name(index as u32))?;
        }
        let [x, y, z] = self.block;
        writeln!(out, ")\n.maxntid {x}, {y}, {z}")?;
        if let Some(blocks) = self.min_blocks {
            writeln!(out, ".minnctapersm {blocks}")?;
        }
        writeln!(out, "{{")?;
        for width in [Width::Pred, Width::B16, Width::B32, Width::B64] {
            for (index, register) in self.registers.iter().enumerate() {
                if register.width == width && names.used[index] {
                    writeln!(out, "    .reg {} {};", width.ptx(), names.registers[index])?;
                }
            }
        }
        writeln!(out)?;
        if self.waits_for_launches_before(target) {
            writeln!(out, "    {WAIT_FOR_LAUNCHES_BEFORE};")?;
        }
        let mut printer = Printer { names, out, labels: 0, source: None };
        printer.block(&self.body, 1)?;
        writeln!(out, "    ret;\n}}")
    }

    fn param_name(&self, index: u32) -> String {
        self.params.get(index as usize).map_or_else(String::new, |param| format!("param_{}", param.name))
    }

    /// The PTX text of one instruction of this program.
    pub fn instruction_text(&self, instr: &Instr) -> String {
        Names::new(self).instr(instr)
    }
}

/// Names of registers: those of the kernel's source, made unique.
struct Names<'p> {
    program: &'p Program,
    registers: Vec<String>,
    used: Vec<bool>,
}

impl<'p> Names<'p> {
    fn new(program: &'p Program) -> Self {
        let mut taken: HashMap<&str, u32> = HashMap::new();
        let registers = program.registers.iter().map(|register| {
            let name = register.name.as_deref().unwrap_or(match register.width {
                Width::Pred => "p",
                Width::B16 => "h",
                Width::B32 => "r",
                Width::B64 => "d",
            });
            let count = taken.entry(name).or_default();
            *count += 1;
            format!("%{name}_{count}")
        });
        let registers = registers.collect();
        let mut used = vec![false; program.registers.len()];
        program.for_each_instr(|instr| {
            let read = instr.src.iter().filter_map(|operand| match operand {
                Operand::Reg(reg) => Some(*reg),
                Operand::Const(_) => None,
            });
            for Reg(reg) in read.chain(instr.dst.iter().copied()) {
                used[reg as usize] = true;
            }
        });
        Names { program, registers, used }
    }

    fn reg(&self, reg: Reg) -> String {
        self.registers[reg.0 as usize].clone()
    }

    fn instr(&self, instr: &Instr) -> String {
        let dst: Vec<String> = instr.dst.iter().map(|&reg| self.reg(reg)).collect();
        let src: Vec<String> = instr
            .src
            .iter()
            .map(|operand| match operand {
                Operand::Reg(reg) => self.reg(*reg),
                Operand::Const(constant) => constant.to_string(),
            })
            .collect();
        let param = instr.op.param().map(|index| self.program.param_name(index)).unwrap_or_default();
        instr.op.text(&dst, &src, &param)
    }
}

struct Printer<'a> {
    names: &'a Names<'a>,
    out: &'a mut String,
    labels: u32,
    /// Line of the kernel's source that was last named in a comment.
    source: Option<(&'static str, u32)>,
}

impl Printer<'_> {
    fn label(&mut self) -> u32 {
        self.labels += 1;
        self.labels
    }

    fn block(&mut self, stmts: &[Stmt], depth: usize) -> fmt::Result {
        stmts.iter().try_for_each(|stmt| self.stmt(stmt, depth))
    }

    fn stmt(&mut self, stmt: &Stmt, depth: usize) -> fmt::Result {
        let indent = "    ".repeat(depth);
        match stmt {
            Stmt::Note(text) => writeln!(self.out, "\n{indent}// {text}"),
            Stmt::Instr(instr) => {
                self.source_line(instr, &indent)?;
                writeln!(self.out, "{indent}{};", self.names.instr(instr))
            }
            Stmt::If { cond, then, otherwise, .. } => {
                let cond = self.names.reg(*cond);
                if otherwise.is_empty() && is_short(then) {
                    for stmt in then {
                        if let Stmt::Instr(instr) = stmt {
                            self.source_line(instr, &indent)?;
                            writeln!(self.out, "{indent}@{cond} {};", self.names.instr(instr))?;
                        }
                    }
                    return Ok(());
                }
                let label = self.label();
                writeln!(self.out, "{indent}@!{cond} bra $else_{label};")?;
                self.block(then, depth + 1)?;
                if otherwise.is_empty() {
                    return writeln!(self.out, "$else_{label}:");
                }
                writeln!(self.out, "{indent}bra $end_{label};\n$else_{label}:")?;
                self.block(otherwise, depth + 1)?;
                writeln!(self.out, "$end_{label}:")
            }
            Stmt::While { test, cond, body, .. } => {
                let (label, cond) = (self.label(), self.names.reg(*cond));
                writeln!(self.out, "$loop_{label}:")?;
                self.block(test, depth)?;
                writeln!(self.out, "{indent}@!{cond} bra $done_{label};")?;
                self.block(body, depth + 1)?;
                writeln!(self.out, "{indent}bra $loop_{label};\n$done_{label}:")
            }
        }
    }

    /// Names the line of the kernel's source that an instruction comes from, where it is another than before.
    fn source_line(&mut self, instr: &Instr, indent: &str) -> fmt::Result {
        let here = (instr.at.file(), instr.at.line());
        if self.source == Some(here) {
            return Ok(());
        }
        self.source = Some(here);
        let file = here.0.rsplit(['/', '\\']).next().unwrap_or(here.0);
        writeln!(self.out, "{indent}// {file}:{}", here.1)
    }
}

/// Whether a conditional's body is better predicated than jumped over: a few instructions that do not change its
/// condition.
fn is_short(stmts: &[Stmt]) -> bool {
    let predicable = |stmt: &Stmt| match stmt {
        Stmt::Instr(Instr { op: Op::Memory(op), .. }) => !matches!(op, Memory::Atomic { .. }),
        Stmt::Instr(Instr { op, .. }) => {
            matches!(op, Op::Lane(_) | Op::Control(Control::Exit | Control::CopyAsync { .. }))
        }
        _ => false,
    };
    stmts.len() <= 4 && stmts.iter().all(predicable)
}
