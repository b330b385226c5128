//! What an older target lacks, put together from what it has.
//!
//! Kernels are written once, in the instructions of Ampere. Where Turing has none of a kind, several others compute the
//! same bits, but for sums of floats, which are rounded after each half of a product's depth:
//!
//! | instruction | on Turing |
//! | --- | --- |
//! | `mma.m16n8k16` of f16 | two of `m16n8k8` |
//! | `mma.m16n8k32` of 8-bit, `m16n8k64` of 4-bit integers | four of `m8n8k16`, of `m8n8k32` |
//! | `redux.sync` | five shuffles |
//! | `min.NaN`, `max.NaN` of f32 | the plain one, and a NaN where either operand is one |
//! | `min`, `max`, with `.NaN` or not, of f16x2 and bf16x2 | those of f32 of both halves |
//! | `cvt.rn.f16x2.f32` | a conversion of each half |
//! | `cvt.f32.bf16` | zeros below |
//! | `cvt.rn.bf16.f32`, `cvt.rn.bf16x2.f32` | rounding in integers |
//!
//! Everything else that a target lacks stays as it is, and [`Program::missing_on`] says so. Of asynchronous copies a
//! kernel must itself decide what becomes, as what to do meanwhile is its business.

use std::borrow::Cow;
use std::panic::Location;

use crate::isa::{
    Cmp, Convert, HalfMma, Instruction, Lane, Matrix, Mma, Op, Redux, Shuffle, Ty, Warp, Width,
};
use crate::program::{Const, Instr, Operand, Program, Reg, Register, Stmt};
use crate::target::Target;

/// Threads that a lowered program may ask a multiprocessor to hold at once. Turing's hold 1024, half of Ampere's, with as
/// many registers; the eighth that this leaves is what several instructions take in place of one.
const MOST_THREADS: u32 = 896;

/// What conversions and extremes make of a NaN.
const NAN: Operand = Operand::Const(Const::I32(0x7fff_ffff));

impl Program {
    /// The program with what `target` lacks put together from what it has, where that is known; the program itself
    /// where the target lacks nothing.
    pub fn lowered(&self, target: Target) -> Cow<'_, Program> {
        let mut lacks = false;
        self.for_each_instr(|instr| lacks |= !instr.op.needs().met_by(target));
        if !lacks {
            return Cow::Borrowed(self);
        }
        let mut lowering = Lowering { target, registers: self.registers.clone() };
        let body = lowering.block(&self.body);
        let most = (MOST_THREADS / self.threads().max(1)).max(1);
        let min_blocks = self.min_blocks.map(|blocks| blocks.min(most));
        Cow::Owned(Program { registers: lowering.registers, body, min_blocks, ..self.clone() })
    }
}

/// A program while it is made for a target.
struct Lowering {
    target: Target,
    registers: Vec<Register>,
}

impl Lowering {
    fn block(&mut self, stmts: &[Stmt]) -> Vec<Stmt> {
        let mut out = Vec::with_capacity(stmts.len());
        for stmt in stmts {
            match stmt {
                Stmt::Instr(instr) => self.instr(instr, &mut out),
                Stmt::If { cond, then, otherwise, at } => {
                    let (then, otherwise) = (self.block(then), self.block(otherwise));
                    out.push(Stmt::If { cond: *cond, then, otherwise, at });
                }
                Stmt::While { test, cond, body, at } => {
                    let (test, body) = (self.block(test), self.block(body));
                    out.push(Stmt::While { test, cond: *cond, body, at });
                }
                Stmt::Note(text) => out.push(Stmt::Note(text.clone())),
            }
        }
        out
    }

    fn instr(&mut self, instr: &Instr, out: &mut Vec<Stmt>) {
        if !instr.op.needs().met_by(self.target) {
            let mut writer = Writer { lowering: self, out, at: instr.at };
            if writer.replace(instr.op, &instr.dst, &instr.src) {
                return;
            }
        }
        out.push(Stmt::Instr(instr.clone()));
    }
}

/// Writes what takes an instruction's place.
struct Writer<'l> {
    lowering: &'l mut Lowering,
    out: &'l mut Vec<Stmt>,
    at: &'static Location<'static>,
}

impl Writer<'_> {
    /// Writes what computes `dst` of `src` as `op` would; nothing, and false, where that is not known. No result is
    /// written before the last operand was read, as both may be in the same registers.
    fn replace(&mut self, op: Op, dst: &[Reg], src: &[Operand]) -> bool {
        match op {
            Op::Matrix(Matrix::Mma(mma)) => return self.halves_of_mma(mma, dst, src),
            Op::Warp(Warp::Redux(redux, ty)) => self.redux(redux, ty, dst[0], src[0]),
            Op::Lane(Lane::MinNan(Ty::F32)) => self.extreme_or_nan(Lane::Min(Ty::F32), dst[0], src),
            Op::Lane(Lane::MaxNan(Ty::F32)) => self.extreme_or_nan(Lane::Max(Ty::F32), dst[0], src),
            Op::Lane(extreme @ (Lane::Min(ty) | Lane::Max(ty) | Lane::MinNan(ty) | Lane::MaxNan(ty)))
                if matches!(ty, Ty::F16x2 | Ty::BF16x2) =>
            {
                self.extreme_of_pair(extreme, ty, dst[0], src)
            }
            Op::Lane(Lane::Convert(Convert::F32ToF16x2)) => {
                let [high, low] = [src[0], src[1]].map(|x| self.value(Convert::F32ToF16, &[x]));
                self.write(Lane::Join16, &[dst[0]], &[low, high]);
            }
            Op::Lane(Lane::Convert(Convert::BF16ToF32)) => {
                self.write(Lane::Join16, &[dst[0]], &[Operand::Const(Const::B16(0)), src[0]]);
            }
            Op::Lane(Lane::Convert(Convert::F32ToBF16)) => {
                let rounded = self.rounded_to_bf16(src[0]);
                self.write(Lane::High16, &[dst[0]], &[rounded]);
            }
            Op::Lane(Lane::Convert(Convert::F32ToBF16x2)) => {
                let [high, low] = [src[0], src[1]].map(|x| self.rounded_to_bf16(x));
                self.join_upper_halves(dst[0], [low, high]);
            }
            _ => return false,
        }
        true
    }

    /// Writes an instruction, lowered as well where it must be.
    fn write(&mut self, op: impl Into<Op>, dst: &[Reg], src: &[Operand]) {
        let instr = Instr { op: op.into(), dst: dst.to_vec(), src: src.to_vec(), at: self.at };
        self.lowering.instr(&instr, self.out);
    }

    fn register(&mut self, width: Width) -> Reg {
        let registers = &mut self.lowering.registers;
        registers.push(Register { width, name: None });
        Reg(registers.len() as u32 - 1)
    }

    /// The result of a lane instruction, in a new register.
    fn value(&mut self, op: impl Into<LaneOp>, src: &[Operand]) -> Operand {
        let LaneOp(op) = op.into();
        let reg = self.register(op.results().width);
        self.write(op, &[reg], src);
        Operand::Reg(reg)
    }

    /// The low half of the depth, and then the high half added to it.
    fn halves_of_mma(&mut self, mma: Mma, dst: &[Reg], src: &[Operand]) -> bool {
        let half = HalfMma { a: mma.a, b: mma.b, acc: mma.acc };
        if !Matrix::HalfMma(half).exists() {
            return false;
        }
        let (a, rest) = src.split_at(4);
        let (b, c) = rest.split_at(2);
        // A's registers are those of rows 0–7 and 8–15 at low depth, then the same at high depth.
        let (rows, sums) = (half.a_registers(), half.acc_registers());
        let parts = || (0..2 / rows).map(|part| (part * rows, part * sums));
        let low: Vec<Reg> = (0..dst.len()).map(|_| self.register(Width::B32)).collect();
        for (row, sum) in parts() {
            let src = [&a[row..row + rows], &b[..1], &c[sum..sum + sums]].concat();
            self.write(Matrix::HalfMma(half), &low[sum..sum + sums], &src);
        }
        let low: Vec<Operand> = low.into_iter().map(Operand::Reg).collect();
        // Results that are operands of a later part as well are written when all are computed.
        let shared = dst.iter().any(|reg| src[..6].contains(&Operand::Reg(*reg)));
        let high = match shared {
            true => (0..dst.len()).map(|_| self.register(Width::B32)).collect(),
            false => dst.to_vec(),
        };
        for (row, sum) in parts() {
            let src = [&a[2 + row..2 + row + rows], &b[1..], &low[sum..sum + sums]].concat();
            self.write(Matrix::HalfMma(half), &high[sum..sum + sums], &src);
        }
        if shared {
            for (&to, from) in dst.iter().zip(high) {
                self.write(Lane::Mov(Ty::B32), &[to], &[Operand::Reg(from)]);
            }
        }
        true
    }

    /// Every lane's value and that of the lane whose index differs in a bit, for one bit after the other.
    fn redux(&mut self, redux: Redux, ty: Ty, dst: Reg, src: Operand) {
        let combine = match redux {
            Redux::Add => Lane::Add(ty),
            Redux::Min => Lane::Min(ty),
            Redux::Max => Lane::Max(ty),
        };
        let mut value = src;
        for bit in [16, 8, 4, 2, 1] {
            let other = self.register(Width::B32);
            self.write(Warp::Shuffle(Shuffle::Xor), &[other], &[value, Operand::Const(Const::I32(bit))]);
            let both = [value, Operand::Reg(other)];
            if bit == 1 {
                self.write(combine, &[dst], &both);
            } else {
                value = self.value(combine, &both);
            }
        }
    }

    /// Whether a single is a NaN.
    fn is_nan(&mut self, x: Operand) -> Operand {
        self.value(Lane::Set(Cmp::NeU, Ty::F32), &[x, x])
    }

    fn extreme_or_nan(&mut self, extreme: Lane, dst: Reg, src: &[Operand]) {
        let [a, b] = [src[0], src[1]].map(|x| self.is_nan(x));
        let number = self.value(extreme, src);
        let but_for_b = self.value(Lane::Select(Ty::B32), &[NAN, number, b]);
        self.write(Lane::Select(Ty::B32), &[dst], &[NAN, but_for_b, a]);
    }

    /// By the instruction of singles, which hold the halves exactly.
    fn extreme_of_pair(&mut self, extreme: Lane, ty: Ty, dst: Reg, src: &[Operand]) {
        let of_single = match extreme {
            Lane::Min(_) => Lane::Min(Ty::F32),
            Lane::Max(_) => Lane::Max(Ty::F32),
            Lane::MinNan(_) => Lane::MinNan(Ty::F32),
            _ => Lane::MaxNan(Ty::F32),
        };
        let halves: [Operand; 2] = std::array::from_fn(|half| {
            let singles = [src[0], src[1]].map(|pair| self.single(ty, pair, half == 1));
            self.value(of_single, &singles)
        });
        if ty == Ty::BF16x2 {
            return self.join_upper_halves(dst, halves);
        }
        let halves = halves.map(|single| self.value(Convert::F32ToF16, &[single]));
        self.write(Lane::Join16, &[dst], &halves);
    }

    /// Half of a pair in single precision.
    fn single(&mut self, ty: Ty, pair: Operand, high: bool) -> Operand {
        let constant = |bits: u32| Operand::Const(Const::I32(bits as i32));
        match (ty, high) {
            (Ty::BF16x2, false) => self.value(Lane::Shl(Ty::B32), &[pair, constant(16)]),
            (Ty::BF16x2, true) => self.value(Lane::And(Ty::B32), &[pair, constant(0xffff_0000)]),
            (_, high) => {
                let half = self.value(if high { Lane::High16 } else { Lane::Low16 }, &[pair]);
                self.value(Convert::F16ToF32, &[half])
            }
        }
    }

    /// A single whose upper half is the bfloat16 nearest to `x`, ties to even.
    fn rounded_to_bf16(&mut self, x: Operand) -> Operand {
        let constant = |bits: i32| Operand::Const(Const::I32(bits));
        let upper = self.value(Lane::Shr(Ty::U32), &[x, constant(16)]);
        let odd = self.value(Lane::And(Ty::B32), &[upper, constant(1)]);
        let up = self.value(Lane::Add(Ty::U32), &[odd, constant(0x7fff)]);
        // A mantissa that overflows carries into the exponent, and the largest become infinite.
        let rounded = self.value(Lane::Add(Ty::U32), &[x, up]);
        let is_nan = self.is_nan(x);
        self.value(Lane::Select(Ty::B32), &[NAN, rounded, is_nan])
    }

    /// The upper halves of two registers in one, the first in the low half.
    fn join_upper_halves(&mut self, dst: Reg, [low, high]: [Operand; 2]) {
        self.write(Lane::Permute, &[dst], &[low, high, Operand::Const(Const::I32(0x7632))]);
    }
}

/// A lane instruction, or a conversion, which is one.
struct LaneOp(Lane);

impl From<Lane> for LaneOp {
    fn from(op: Lane) -> LaneOp {
        LaneOp(op)
    }
}

impl From<Convert> for LaneOp {
    fn from(convert: Convert) -> LaneOp {
        LaneOp(Lane::Convert(convert))
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::code::{Code, kernel};
    use crate::scalar::{BF16x2, F16x2};
    use crate::{Accumulator, FragmentA, FragmentB, MmaElement};

    fn product<E: MmaElement>(code: &Code) {
        let word = code.constant(0u32);
        let sum = Accumulator::<i32>::filled(code, 0);
        sum.add_product(FragmentA::<E>::new([word; 4]), FragmentB::new([word; 2]));
    }

    #[test]
    fn what_turing_lacks_is_put_together() {
        type Written<'w> = (&'w str, &'w dyn Fn(&Code));
        let write: [Written<'_>; 5] = [
            ("mma.sync.aligned.m8n8k16", &|code| product::<i8>(code)),
            ("mma.sync.aligned.m8n8k32", &|code| product::<crate::S4>(code)),
            ("shfl.sync.bfly", &|code| _ = code.thread().warp_max()),
            ("max.f32", &|code| {
                let pair = code.thread().reinterpret::<BF16x2>();
                _ = pair.max_nan(pair);
                let pair = code.thread().reinterpret::<F16x2>();
                _ = pair.min_nan(pair);
            }),
            ("prmt.b32", &|code| {
                let x = code.thread().to_f32();
                _ = (x.pack::<bf16>(x), x.pack::<f16>(x), x.narrow::<bf16>().to_f32());
            }),
        ];
        for (part, write) in write {
            // An instruction is lowered wherever it stands.
            let nested = kernel("nested", 32, |code| {
                let turn = || code.while_loop(|| code.thread().eq(1), || write(code));
                code.if_else(code.thread().eq(0), || code.barrier(), turn);
            });
            for program in [kernel("flat", 32, |code| write(code)), nested] {
                assert_eq!(program.missing_on(Target::SM_75), None);
                let ptx = program.ptx(Target::SM_75).unwrap();
                assert!(ptx.contains(part), "{ptx}");
                let same = matches!(program.lowered(Target::SM_80), Cow::Borrowed(_));
                assert!(same && !program.ptx(Target::SM_80).unwrap().contains("m8n8k"));
            }
        }
    }

    #[test]
    fn what_cannot_be_put_together_is_missing() {
        let copies = kernel("copies", 32, |code| code.commit_copies());
        let missing = copies.missing_on(Target::SM_75).unwrap().to_string();
        assert_eq!(missing, "copies: target is sm_75, expected sm_80 for `cp.async.commit_group`");
        let product = kernel("product", 32, |code| {
            let word = code.constant(0u32);
            let sum = Accumulator::<f32>::filled(code, 0.0);
            sum.add_product(FragmentA::<bf16>::new([word; 4]), FragmentB::new([word; 2]));
        });
        assert!(
            product.missing_on(Target::SM_75).is_some_and(|missing| missing.needs.target == Target::SM_80)
        );
    }
}
