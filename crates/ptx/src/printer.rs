//! PTX text of a program.

use std::collections::HashMap;
use std::fmt::Write;

use crate::isa::{Memory, Op, SHARED_SYMBOL};
use crate::launch::ParamType;
use crate::program::{Instr, Operand, Program, Reg, Stmt, Width};
use crate::target::{Needs, Target};

/// Largest static shared memory; more must be asked for at launch.
const STATIC_SHARED_BYTES: u32 = 48 * 1024;

/// A program uses an instruction that its target does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// The kernel.
    pub kernel: String,
    /// The target asked for.
    pub target: Target,
    /// The instruction's text.
    pub instruction: String,
    /// What it needs.
    pub needs: Needs,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Unsupported { kernel, target, instruction, needs } = self;
        write!(f, "{kernel}: target is {target}, expected {} for `{instruction}`", needs.target)
    }
}

impl std::error::Error for Unsupported {}

/// What every kernel for sm_90 and newer begins with. Where it is launched so that its blocks may take their places
/// while the last blocks of the launch before are still at work, it waits until that is over and its writes are visible.
const WAIT_FOR_LAUNCHES_BEFORE: &str = "griddepcontrol.wait";

/// First architecture that starts launches early.
const EARLY_START: u16 = 90;

impl Program {
    /// Bytes of shared memory that a launch must ask for: none where it fits the static limit.
    pub fn dynamic_shared_bytes(&self) -> u32 {
        let bytes = self.shared_bytes();
        if bytes > STATIC_SHARED_BYTES { bytes } else { 0 }
    }

    /// Whether the text for `target` begins with a wait for the end of the launches before, so that the kernel may be
    /// launched while they are still at work.
    pub fn waits_for_launches_before(&self, target: Target) -> bool {
        target.sm() >= EARLY_START
    }

    /// PTX text for `target`, of the lowest version that knows its instructions.
    ///
    /// # Errors
    /// When the target lacks an instruction.
    pub fn ptx(&self, target: Target) -> Result<String, Unsupported> {
        let names = Names::new(self);
        if let Some((instr, needs)) = self.missing_on(target) {
            let instruction = names.instr(instr);
            return Err(Unsupported { kernel: self.name.clone(), target, instruction, needs });
        }
        let mut out = String::new();
        let _ = self.print(&names, target, &mut out);
        Ok(out)
    }

    fn print(&self, names: &Names<'_>, target: Target, out: &mut String) -> std::fmt::Result {
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
        instr.op.text(&dst, &src, |index| self.program.param_name(index))
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

    fn block(&mut self, stmts: &[Stmt], depth: usize) -> std::fmt::Result {
        stmts.iter().try_for_each(|stmt| self.stmt(stmt, depth))
    }

    fn stmt(&mut self, stmt: &Stmt, depth: usize) -> std::fmt::Result {
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
    fn source_line(&mut self, instr: &Instr, indent: &str) -> std::fmt::Result {
        let here = (instr.at.file(), instr.at.line());
        if self.source == Some(here) {
            return Ok(());
        }
        self.source = Some(here);
        let file = here.0.rsplit(['/', '\\']).next().unwrap_or(here.0);
        writeln!(self.out, "{indent}// {file}:{}", here.1)
    }
}

/// Whether a conditional's body is better predicated than jumped over: a few instructions that do not change its condition.
fn is_short(stmts: &[Stmt]) -> bool {
    let predicable = |stmt: &Stmt| {
        matches!(stmt, Stmt::Instr(Instr { op, .. })
            if matches!(op, Op::Lane(_) | Op::Memory(_) | Op::Control(crate::isa::Control::Exit | crate::isa::Control::CopyAsync { .. }))
                && !matches!(op, Op::Memory(Memory::Atomic { .. })))
    };
    stmts.len() <= 4 && stmts.iter().all(predicable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::kernel;

    #[test]
    fn a_text_waits_where_its_program_says_so() {
        let program = kernel("empty", 32, |_| {});
        for (target, waits) in [
            (Target::SM_75, false),
            (Target::SM_80, false),
            (Target::SM_89, false),
            (Target::SM_90, true),
            (Target::SM_90A, true),
            (Target::SM_120A, true),
        ] {
            let ptx = program.ptx(target).unwrap();
            assert_eq!(ptx.matches("griddepcontrol.wait").count(), usize::from(waits), "{ptx}");
            assert_eq!(program.waits_for_launches_before(target), waits, "{target}");
        }
    }
}
