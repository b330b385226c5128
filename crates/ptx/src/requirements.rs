//! What a program asks of a GPU, its driver and its launch.

use crate::isa::{Control, Instruction, Matrix, Op};
use crate::program::Program;
use crate::target::{Needs, Target, Version};

/// Largest static shared memory; more must be asked for at launch.
const STATIC_SHARED_BYTES: u32 = 48 * 1024;

/// First architecture that starts launches early.
const EARLY_START: u16 = 90;

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

    /// Whether the program needs a compiler that sees the whole of it, for its products of warpgroups or because it
    /// moves registers between warpgroups. A linker, which compiles for programs of several parts, ignores the latter,
    /// so that registers spill, and waits for each of the former at once (ptxas C7504, C7509): a third of the speed.
    pub fn needs_whole_compilation(&self) -> bool {
        let mut needs = false;
        self.for_each_instr(|instr| {
            needs |= matches!(
                instr.op,
                Op::Matrix(
                    Matrix::Wgmma(_) | Matrix::WgmmaFence | Matrix::WgmmaCommit | Matrix::WgmmaWait(_)
                ) | Op::Control(Control::RegistersIncrease(_) | Control::RegistersDecrease(_))
            );
        });
        needs
    }

    /// The first instruction that `target` does not have, and that [`Program::lowered`] cannot put together from those
    /// that it has.
    pub fn missing_on(&self, target: Target) -> Option<Unsupported> {
        let lowered = self.lowered(target);
        let mut missing = None;
        lowered.for_each_instr(|instr| {
            if missing.is_none() && !instr.op.needs().met_by(target) {
                missing = Some(instr);
            }
        });
        missing.map(|instr| Unsupported {
            kernel: self.name.clone(),
            target,
            instruction: lowered.instruction_text(instr),
            needs: instr.op.needs(),
        })
    }

    /// Lowest PTX version that knows every instruction used for `target`, and `target`.
    pub fn version(&self, target: Target) -> Version {
        let mut version = target.version();
        self.lowered(target).for_each_instr(|instr| version = version.max(instr.op.needs().version));
        version
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{Code, kernel};
    use crate::isa::{MmaTy, Wgmma, Width};
    use crate::program::Reg;

    #[test]
    fn a_program_with_any_instruction_of_warpgroups_is_compiled_as_a_whole() {
        let wgmma = Wgmma {
            n: 8,
            a: MmaTy::F16,
            b: MmaTy::F16,
            acc: MmaTy::F32,
            a_in_registers: false,
            b_transposed: false,
        };
        let product = |code: &Code| {
            let registers: Vec<Reg> = (0..wgmma.acc_registers()).map(|_| code.register(Width::B32)).collect();
            let matrix = || code.thread().widen().operand();
            code.emit(Matrix::Wgmma(wgmma), &registers, &[matrix(), matrix(), code.thread().eq(0).operand()]);
        };
        let write: [&dyn Fn(&Code); 6] = [
            &product,
            &|code| code.emit(Matrix::WgmmaFence, &[], &[]),
            &|code| code.emit(Matrix::WgmmaCommit, &[], &[]),
            &|code| code.emit(Matrix::WgmmaWait(1), &[], &[]),
            &|code| code.more_registers(200),
            &|code| code.fewer_registers(40),
        ];
        for write in write {
            // An instruction counts wherever it stands.
            let nested = kernel("nested", 128, |code| {
                code.if_else(
                    code.thread().eq(0),
                    || code.barrier(),
                    || code.while_loop(|| code.thread().eq(1), || write(code)),
                );
            });
            for program in [kernel("flat", 128, |code| write(code)), nested] {
                let ptx = program.ptx(Target::SM_90A).unwrap();
                assert!(program.needs_whole_compilation(), "{ptx}");
                assert!(ptx.contains("wgmma.") || ptx.contains("setmaxnreg"), "{ptx}");
            }
        }
        let other = kernel("other", 128, |code| {
            code.barrier();
            code.commit_copies();
            code.fence_async_proxy();
        });
        assert!(!other.needs_whole_compilation());
    }

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
