//! Whether a program is one that a GPU could run.

use std::fmt;
use std::iter::repeat_n;
use std::panic::Location;

use crate::isa::{Group, Instruction, Memory, Op, Width};
use crate::launch::{Param, ParamType};
use crate::program::{Instr, Operand, Program, Reg, SharedArray, Stmt};

/// Most threads of a block, on every GPU.
const MAX_THREADS: u32 = 1024;
/// Most bytes of parameters, on GPUs and drivers of every age.
const MAX_PARAM_BYTES: usize = 4096;
/// What a block can have of shared memory on the largest GPU.
const MAX_SHARED_BYTES: u64 = 227 * 1024;
/// The largest alignment that the printed text gives to shared memory.
const MAX_ALIGN: u32 = 1024;

/// Why no GPU could run a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The kernel.
    pub kernel: String,
    /// Where the kernel's source says what is wrong; absent where it is none of its statements.
    pub at: Option<&'static Location<'static>>,
    /// What is wrong.
    pub what: String,
    /// How it is.
    pub found: String,
    /// How it should be.
    pub wanted: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Invalid { kernel, at, what, found, wanted } = self;
        write!(f, "{kernel}: ")?;
        if let Some(at) = at {
            write!(f, "{at}: ")?;
        }
        write!(f, "{what} is {found}, expected {wanted}")
    }
}

impl std::error::Error for Invalid {}

impl Program {
    /// Checks all that can be known of a program before it runs, whatever the GPU: that its instructions exist, that
    /// their operands are as many and of such kinds and widths as the instruction takes, that what they name is
    /// declared, and that parameters, shared memory and blocks are within every GPU's limits. Whether a target has the
    /// instructions is for [`Program::missing_on`] to say. Statements nest, so there are no labels that could be wrong.
    ///
    /// [`Program::ptx`] prints, and the emulator runs, no program that fails here, and neither looks again.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), Invalid> {
        let validator = Validator { program: self };
        validator.block()?;
        validator.names()?;
        validator.params()?;
        self.shared.iter().try_for_each(|array| validator.shared_array(array))?;
        validator.stmts(&self.body)
    }
}

struct Validator<'p> {
    program: &'p Program,
}

impl Validator<'_> {
    fn invalid(
        &self,
        at: Option<&'static Location<'static>>,
        what: impl Into<String>,
        found: impl fmt::Display,
        wanted: impl fmt::Display,
    ) -> Invalid {
        Invalid {
            kernel: self.program.name.clone(),
            at,
            what: what.into(),
            found: found.to_string(),
            wanted: wanted.to_string(),
        }
    }

    fn block(&self) -> Result<(), Invalid> {
        let threads =
            self.program.block.iter().try_fold(1u32, |product, &threads| product.checked_mul(threads));
        if threads.is_some_and(|threads| (1..=MAX_THREADS).contains(&threads)) {
            return Ok(());
        }
        let found = format!("{:?} threads", self.program.block);
        Err(self.invalid(None, "block", found, format!("1 to {MAX_THREADS} threads together")))
    }

    /// Names stand in the text as they are.
    fn names(&self) -> Result<(), Invalid> {
        let Program { name, params, registers, .. } = self.program;
        let kernel = [("kernel's name", name)].into_iter();
        let params = params.iter().map(|param| ("parameter's name", &param.name));
        let registers =
            registers.iter().filter_map(|register| Some(("register's name", register.name.as_ref()?)));
        for (what, name) in kernel.chain(params).chain(registers) {
            let mut letters = name.chars().map(|letter| letter == '_' || letter.is_ascii_alphanumeric());
            if name.is_empty()
                || name.starts_with(|first: char| first.is_ascii_digit())
                || !letters.all(|fits| fits)
            {
                let wanted = "letters, digits and underscores, no digit first";
                return Err(self.invalid(None, what, format!("`{name}`"), wanted));
            }
        }
        Ok(())
    }

    fn params(&self) -> Result<(), Invalid> {
        let params = &self.program.params;
        for (index, Param { name, .. }) in params.iter().enumerate() {
            if params[..index].iter().any(|earlier| earlier.name == *name) {
                let found = format!("`{name}`, as an earlier one's");
                return Err(self.invalid(None, "parameter's name", found, "another for each"));
            }
        }
        let bytes = params.iter().fold(0, |end: usize, param| {
            let bytes = param.ty.bytes();
            end.next_multiple_of(bytes.min(64)) + bytes
        });
        if bytes > MAX_PARAM_BYTES {
            let wanted = format!("at most {MAX_PARAM_BYTES} bytes");
            return Err(self.invalid(None, "size of the parameters", bytes, wanted));
        }
        Ok(())
    }

    fn shared_array(&self, array: &SharedArray) -> Result<(), Invalid> {
        let SharedArray { name, bytes, align, offset } = array;
        let end = u64::from(*offset) + u64::from(*bytes);
        if end > MAX_SHARED_BYTES {
            let wanted = format!("at most {MAX_SHARED_BYTES} bytes");
            return Err(self.invalid(None, format!("end of shared array `{name}`"), end, wanted));
        }
        if !align.is_power_of_two() || *align > MAX_ALIGN {
            let wanted = format!("a power of two up to {MAX_ALIGN}");
            return Err(self.invalid(None, format!("alignment of shared array `{name}`"), align, wanted));
        }
        if !offset.is_multiple_of(*align) {
            let wanted = format!("a multiple of {align}");
            return Err(self.invalid(None, format!("offset of shared array `{name}`"), offset, wanted));
        }
        Ok(())
    }

    fn stmts(&self, stmts: &[Stmt]) -> Result<(), Invalid> {
        for stmt in stmts {
            match stmt {
                Stmt::Note(_) => {}
                Stmt::Instr(instr) => self.instr(instr)?,
                Stmt::If { cond, then, otherwise, at } => {
                    self.register(at, *cond, Width::Pred)?;
                    self.stmts(then)?;
                    self.stmts(otherwise)?;
                }
                Stmt::While { test, cond, body, at } => {
                    self.stmts(test)?;
                    self.register(at, *cond, Width::Pred)?;
                    self.stmts(body)?;
                }
            }
        }
        Ok(())
    }

    fn instr(&self, instr: &Instr) -> Result<(), Invalid> {
        let Instr { op, dst, src, at } = instr;
        if !op.exists() {
            return Err(self.invalid(Some(at), "instruction", format!("{op:?}"), "one that PTX has"));
        }
        let (results, operands) = (op.results(), op.operands());
        if results.count.is_some_and(|count| count != dst.len()) {
            return Err(self.count(instr, "results", dst.len(), results.count));
        }
        let wanted = operands.iter().filter_map(|group| group.count).sum();
        if src.len() != wanted {
            return Err(self.count(instr, "operands", src.len(), Some(wanted)));
        }
        dst.iter().try_for_each(|&register| self.register(at, register, results.width))?;
        let each = operands.iter().flat_map(|group| repeat_n(group, group.count.unwrap_or(0)));
        src.iter().zip(each).try_for_each(|(&operand, group)| self.operand(instr, operand, group))?;
        self.declared(instr)
    }

    #[cold]
    fn count(&self, instr: &Instr, what: &str, found: usize, wanted: Option<usize>) -> Invalid {
        let what = format!("number of {what} of {:?}", instr.op);
        self.invalid(Some(instr.at), what, found, wanted.unwrap_or(0))
    }

    fn operand(&self, instr: &Instr, operand: Operand, group: &Group) -> Result<(), Invalid> {
        let constant = match operand {
            Operand::Reg(register) => return self.register(instr.at, register, group.width),
            Operand::Const(constant) => constant,
        };
        if group.registers_only {
            let what = format!("operand of {:?}", instr.op);
            return Err(self.invalid(Some(instr.at), what, format!("the constant {constant}"), "a register"));
        }
        if constant.width() != group.width {
            let what = format!("width of the constant {constant}");
            return Err(self.invalid(Some(instr.at), what, constant.width().ptx(), group.width.ptx()));
        }
        Ok(())
    }

    fn register(&self, at: &'static Location<'static>, register: Reg, wanted: Width) -> Result<(), Invalid> {
        let declared = &self.program.registers;
        let Some(found) = declared.get(register.0 as usize) else {
            let wanted = format!("one of the {} declared", declared.len());
            return Err(self.invalid(Some(at), "register", register.0, wanted));
        };
        if found.width != wanted {
            let what = format!("width of register {}", register.0);
            return Err(self.invalid(Some(at), what, found.width.ptx(), wanted.ptx()));
        }
        Ok(())
    }

    /// Whether the program declares the parameter or array that an instruction reads the value or address of.
    fn declared(&self, instr: &Instr) -> Result<(), Invalid> {
        let Program { params, shared, .. } = self.program;
        if let Some(index) = instr.op.param() {
            let param = params.get(index as usize);
            let fits = match instr.op {
                Op::Memory(Memory::Param { ty, .. }) => param.is_some_and(|param| param.ty.ty() == Some(ty)),
                _ => param.is_some_and(|param| param.ty == ParamType::TensorMap),
            };
            if !fits {
                let found = param.map_or("not declared".to_owned(), |param| format!("{:?}", param.ty));
                let wanted = format!("what {:?} reads", instr.op);
                return Err(self.invalid(Some(instr.at), format!("parameter {index}"), found, wanted));
            }
        }
        if let Op::Memory(Memory::SharedAddress { array, offset }) = instr.op
            && shared.get(array as usize).map(|array| array.offset) != Some(offset)
        {
            let what = format!("shared array {array} at offset {offset}");
            return Err(self.invalid(Some(instr.at), what, "not declared", "one of the kernel's"));
        }
        Ok(())
    }
}
