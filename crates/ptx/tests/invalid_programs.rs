//! Programs that no GPU could run are refused, each for what is wrong with it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::panic::Location;

use sage_ptx::isa::{
    Control, Lane, LoadMode, Matrix, Memory, Mma, MmaTy, Op, Redux, SharedWindow, Space, Special, Ty, Warp,
    Width, Word,
};
use sage_ptx::program::{Const, Instr, Operand, Program, Reg, Register, Stmt};
use sage_ptx::{Param, ParamType, Target, kernel};

/// A program of one instruction, with registers 0 to 3 of 32 bits, 4 of 64 and 5 for a predicate.
fn program(op: impl Into<Op>, dst: &[u32], src: &[Operand]) -> Program {
    let mut program = kernel("broken", 32, |_| {});
    let widths = [Width::B32, Width::B32, Width::B32, Width::B32, Width::B64, Width::Pred];
    program.registers = widths.map(|width| Register { width, name: None }).into();
    let dst = dst.iter().map(|&register| Reg(register)).collect();
    program.body.push(Stmt::Instr(Instr { op: op.into(), dst, src: src.to_vec(), at: Location::caller() }));
    program
}

fn valid() -> Program {
    kernel("valid", 64, |code| {
        let (x, rows) = (code.global::<f32>("x"), code.param::<i32>("rows"));
        let tile = code.shared::<f32>("tile", 64);
        code.when(code.thread().lt(rows), || tile.at(code.thread()).store(x.at(code.thread()).load()));
    })
}

fn reg(register: u32) -> Operand {
    Operand::Reg(Reg(register))
}

fn complaint(program: &Program) -> String {
    program.validate().expect_err("the program is broken").to_string()
}

#[test]
fn what_the_language_writes_is_valid() {
    assert_eq!(valid().validate(), Ok(()));
}

#[test]
fn what_a_kernel_declares_is_checked() {
    let broken = |change: fn(&mut Program)| {
        let mut program = valid();
        change(&mut program);
        complaint(&program)
    };
    type Change = fn(&mut Program);
    let rows: [(Change, &str); 12] = [
        (|p| p.block = [0, 1, 1], "valid: block is [0, 1, 1] threads, expected 1 to 1024 threads together"),
        (|p| p.block = [64, 64, 1], "block is [64, 64, 1] threads"),
        (|p| p.block = [u32::MAX; 3], "expected 1 to 1024 threads together"),
        (
            |p| p.name = "a kernel".into(),
            "kernel's name is `a kernel`, expected letters, digits and underscores",
        ),
        (|p| p.params[0].name.clear(), "parameter's name is ``"),
        (|p| p.registers[0].name = Some("ä".into()), "register's name is `ä`"),
        (|p| p.params[1].name = "x".into(), "parameter's name is `x`, as an earlier one's"),
        (
            |p| p.params.extend((0..32).map(|i| Param { name: format!("map{i}"), ty: ParamType::TensorMap })),
            "size of the parameters is 4160, expected at most 4096 bytes",
        ),
        (
            |p| p.shared[0].bytes = u32::MAX,
            "end of shared array `tile` is 4294967295, expected at most 232448",
        ),
        (
            |p| p.shared[0].align = 2048,
            "alignment of shared array `tile` is 2048, expected a power of two up to",
        ),
        (|p| p.shared[0].offset = 8, "offset of shared array `tile` is 8, expected a multiple of 256"),
        (|p| p.shared.clear(), "shared array 0 at offset 0 is not declared, expected one of the kernel's"),
    ];
    for (change, wanted) in rows {
        let found = broken(change);
        assert!(found.contains(wanted), "{found}\nwithout: {wanted}");
    }
}

#[test]
fn parameters_are_read_as_what_they_are() {
    let mut program = valid();
    program.params[1].ty = ParamType::F32;
    assert!(
        complaint(&program).contains("parameter 1 is F32, expected what Memory(Param { index: 1, ty: S32 })")
    );
    program.params.truncate(1);
    assert!(complaint(&program).contains("parameter 1 is not declared"));
    let mut program = kernel("map", 32, |code| {
        code.tensor_map("map");
    });
    program.params[0].ty = ParamType::Pointer;
    assert!(complaint(&program).contains("parameter 0 is Pointer, expected what Memory(ParamAddress"));
}

#[test]
fn instructions_that_ptx_lacks_are_refused() {
    let load =
        Memory::Load { space: Space::Shared, word: Word::B64, count: 4, offset: 0, mode: LoadMode::Plain };
    let acquire =
        Memory::Load { space: Space::Shared, word: Word::B32, count: 1, offset: 0, mode: LoadMode::Acquire };
    let ops: [Op; 9] = [
        Lane::Rem(Ty::F32).into(),
        Lane::Neg(Ty::U32).into(),
        load.into(),
        acquire.into(),
        Warp::Redux(Redux::Add, Ty::F32).into(),
        Warp::LoadMatrix { count: 3, transposed: false, offset: 0 }.into(),
        Matrix::Mma(Mma { a: MmaTy::S8, b: MmaTy::F16, acc: MmaTy::S32 }).into(),
        Control::CopyAsync { bytes: 3 }.into(),
        Control::BulkTensorLoad { dims: 6, window: SharedWindow::Cluster }.into(),
    ];
    for op in ops {
        let found = complaint(&program(op, &[], &[]));
        assert!(found.contains(&format!("instruction is {op:?}, expected one that PTX has")), "{found}");
        assert!(found.contains(file!()), "{found}");
    }
}

#[test]
fn operands_fit_their_instruction() {
    let add = Lane::Add(Ty::S32);
    let one = Operand::Const(Const::I32(1));
    let long = Operand::Const(Const::I64(1));
    let select = Lane::Select(Ty::B32);
    let rows: [(Program, &str); 9] = [
        (program(add, &[], &[one, one]), "number of results of Lane(Add(S32)) is 0, expected 1"),
        (program(add, &[0], &[one]), "number of operands of Lane(Add(S32)) is 1, expected 2"),
        (program(add, &[0], &[one, one, one]), "number of operands of Lane(Add(S32)) is 3, expected 2"),
        (program(add, &[6], &[one, one]), "register is 6, expected one of the 6 declared"),
        (program(add, &[0], &[reg(u32::MAX), one]), "register is 4294967295, expected one of the 6 declared"),
        (program(add, &[4], &[one, one]), "width of register 4 is .b64, expected .b32"),
        (program(add, &[0], &[reg(5), one]), "width of register 5 is .pred, expected .b32"),
        (program(add, &[0], &[one, long]), "width of the constant 1 is .b64, expected .b32"),
        (
            program(select, &[0], &[one, one, Operand::Const(Const::Pred(true))]),
            "operand of Lane(Select(B32)) is the constant 1, expected a register",
        ),
    ];
    for (program, wanted) in rows {
        let found = complaint(&program);
        assert!(found.contains(wanted), "{found}\nwithout: {wanted}");
    }
}

#[test]
fn conditions_are_predicates() {
    let at = Location::caller();
    let stmts: [fn(&'static Location<'static>) -> Stmt; 2] = [
        |at| Stmt::If { cond: Reg(0), then: Vec::new(), otherwise: Vec::new(), at },
        |at| Stmt::While { test: Vec::new(), cond: Reg(0), body: Vec::new(), at },
    ];
    for stmt in stmts {
        let mut program = program(Memory::Special(Special::TidX), &[0], &[]);
        program.body = vec![stmt(at)];
        assert!(complaint(&program).contains("width of register 0 is .b32, expected .pred"));
        // What is inside is checked as well.
        program.body = vec![Stmt::If { cond: Reg(5), then: vec![stmt(at)], otherwise: Vec::new(), at }];
        assert!(complaint(&program).contains("width of register 0"));
    }
}

#[test]
fn no_text_is_printed_of_an_invalid_program() {
    let program = program(Lane::Rem(Ty::F32), &[0], &[reg(1), reg(2)]);
    let error = program.ptx(Target::SM_90A).unwrap_err();
    assert_eq!(error.to_string(), complaint(&program));
}
