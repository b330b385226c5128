//! Every instruction of the table goes through NVIDIA's assembler once, on the oldest target that its entry names.
//!
//! Needs `ptxas` (see scripts/fetch_ptxas.sh); without it the test says that it is skipped, or with
//! `SAGE_REQUIRE_PTXAS=1` fails.

use std::path::PathBuf;
use std::process::Command;

use crate::code::{Code, kernel};
use crate::isa::*;
use crate::program::{Operand, Reg};
use crate::target::Target;
use crate::value::Val;

/// The assembler: `PTXAS`, or the one that the script fetched.
fn ptxas() -> Option<PathBuf> {
    let fetched = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/ptxas/ptxas"));
    std::env::var_os("PTXAS").map(PathBuf::from).or_else(|| fetched.exists().then_some(fetched))
}

/// Operands of a kind, in registers that were written before.
struct Registers<'k> {
    code: &'k Code,
}

impl<'k> Registers<'k> {
    fn b32(&self) -> Operand {
        self.code.thread().operand()
    }

    fn b64(&self) -> Operand {
        self.code.thread().widen().operand()
    }

    fn b16(&self) -> Operand {
        Val::<f32>::narrow::<half::f16>(self.code.thread().to_f32()).operand()
    }

    fn pred(&self) -> Operand {
        self.code.thread().eq(3).operand()
    }

    fn of(&self, ty: Ty) -> Operand {
        match ty.width() {
            crate::program::Width::Pred => self.pred(),
            crate::program::Width::B16 => self.b16(),
            crate::program::Width::B32 => self.b32(),
            crate::program::Width::B64 => self.b64(),
        }
    }

    fn dst(&self, ty: Ty) -> Reg {
        match ty.width() {
            crate::program::Width::Pred => self.code.register::<bool>(),
            crate::program::Width::B16 => self.code.register::<half::f16>(),
            crate::program::Width::B32 => self.code.register::<u32>(),
            crate::program::Width::B64 => self.code.register::<u64>(),
        }
    }

    fn many(&self, ty: Ty, count: usize) -> Vec<Operand> {
        (0..count).map(|_| self.of(ty)).collect()
    }

    fn dsts(&self, ty: Ty, count: usize) -> Vec<Reg> {
        (0..count).map(|_| self.dst(ty)).collect()
    }

    fn shared(&self) -> Operand {
        self.code.shared::<u64>("memory", 64).address().operand()
    }
}

const INTEGERS: [Ty; 4] = [Ty::S32, Ty::U32, Ty::S64, Ty::U64];
const FLOATS: [Ty; 7] = [Ty::F32, Ty::F64, Ty::F16, Ty::BF16, Ty::F16x2, Ty::BF16x2, Ty::F32];

/// Emits every lane instruction with every type that it has.
fn lanes(r: &Registers<'_>) {
    use crate::isa::Convert;
    use Lane::{Convert as Cvt, *};
    let emit = |op: Lane, src: &[Operand]| r.code.emit(op, &[r.dst(op.result())], src);
    for ty in INTEGERS.into_iter().chain(FLOATS) {
        let (a, b, c) = (r.of(ty), r.of(ty), r.of(ty));
        for op in [Add(ty), Sub(ty), Mul(ty), Min(ty), Max(ty)] {
            emit(op, &[a, b]);
        }
        emit(Fma(ty), &[a, b, c]);
        if !ty.is_float() || ty == Ty::F32 {
            emit(Div(ty), &[a, b]);
        }
        if !matches!(ty, Ty::U32 | Ty::U64) {
            emit(Neg(ty), &[a]);
            emit(Abs(ty), &[a]);
        }
        if !matches!(ty, Ty::F16x2 | Ty::BF16x2 | Ty::F16 | Ty::BF16) {
            for cmp in [Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le, Cmp::Gt, Cmp::Ge] {
                emit(Set(cmp, ty), &[a, b]);
            }
        }
        emit(Select(ty), &[a, b, r.pred()]);
    }
    for ty in [Ty::F32, Ty::F16x2, Ty::BF16x2] {
        emit(MinNan(ty), &[r.of(ty), r.of(ty)]);
        emit(MaxNan(ty), &[r.of(ty), r.of(ty)]);
    }
    emit(Set(Cmp::NeU, Ty::F32), &[r.b32(), r.b32()]);
    for ty in INTEGERS {
        let (a, b) = (r.of(ty), r.of(ty));
        for op in [MulHigh(ty), Rem(ty), And(ty), Or(ty), Xor(ty)] {
            emit(op, &[a, b]);
        }
        emit(Not(ty), &[a]);
        emit(Shl(ty), &[a, r.b32()]);
        emit(Shr(ty), &[a, r.b32()]);
    }
    for ty in [Ty::S32, Ty::U32] {
        emit(MulWide(ty), &[r.b32(), r.b32()]);
        emit(MadWide(ty), &[r.b32(), r.b32(), r.b64()]);
        emit(BitField(ty), &[r.b32(), r.b32(), r.b32()]);
        for op in [Convert::IntToF32(ty), Convert::F32ToIntNearest(ty), Convert::F32ToIntTruncate(ty)] {
            emit(Cvt(op), &[r.b32()]);
        }
        let (from, to) = (ty, if ty == Ty::S32 { Ty::S64 } else { Ty::U64 });
        emit(Cvt(Convert::Integer { from, to }), &[r.b32()]);
        emit(Cvt(Convert::Integer { from: to, to: from }), &[r.b64()]);
    }
    for ty in [Ty::Pred, Ty::B16, Ty::B32, Ty::B64] {
        emit(Mov(ty), &[r.of(ty)]);
    }
    for op in [And(Ty::Pred), Or(Ty::Pred), Xor(Ty::Pred)] {
        emit(op, &[r.pred(), r.pred()]);
    }
    for op in [Reciprocal, ReciprocalApprox, Sqrt, Exp2, Exp2F16x2, Log2, Tanh, PopCount, LeadingZeros] {
        emit(op, &[r.b32()]);
    }
    for op in [Convert::F16ToF32, Convert::BF16ToF32, Convert::E4M3x2ToF16x2, Convert::E5M2x2ToF16x2] {
        emit(Cvt(op), &[r.b16()]);
    }
    for op in [Convert::F32ToF16, Convert::F32ToBF16] {
        emit(Cvt(op), &[r.b32()]);
    }
    for op in [Convert::F32ToF16x2, Convert::F32ToBF16x2, Convert::F32ToE4M3x2, Convert::F32ToE5M2x2] {
        emit(Cvt(op), &[r.b32(), r.b32()]);
    }
    for op in [Permute, FunnelLeft, Dot4] {
        emit(op, &[r.b32(), r.b32(), r.b32()]);
    }
    emit(Join16, &[r.b16(), r.b16()]);
    emit(Join32, &[r.b32(), r.b32()]);
    emit(Low16, &[r.b32()]);
    emit(High16, &[r.b32()]);
    emit(Low32, &[r.b64()]);
    emit(High32, &[r.b64()]);
}

fn memory(r: &Registers<'_>) {
    let words = [
        (Word::U8, Ty::U32),
        (Word::S8, Ty::S32),
        (Word::U16, Ty::U32),
        (Word::B16, Ty::B16),
        (Word::B32, Ty::B32),
        (Word::B64, Ty::B64),
    ];
    for space in [Space::Global, Space::Shared] {
        let address = || if space == Space::Global { r.b64() } else { r.shared() };
        for (word, ty) in words {
            for count in [1u8, 2, 4] {
                if u32::from(count) * word.bytes() > 16 || (count > 1 && word.bytes() == 1) {
                    continue;
                }
                let offset = 16;
                let load = Memory::Load { space, word, count, offset, access: Access::Plain };
                r.code.emit(load, &r.dsts(ty, count.into()), &[address()]);
                let mut src = vec![address()];
                src.extend(r.many(ty, count.into()));
                r.code.emit(Memory::Store { space, word, count, offset, access: Access::Plain }, &[], &src);
            }
        }
        for op in [AtomicOp::Add, AtomicOp::Min, AtomicOp::Max, AtomicOp::IncrementWrap] {
            let atomic = Memory::Atomic { space, op, ty: Ty::U32, offset: 4 };
            r.code.emit(atomic, &[r.dst(Ty::U32)], &[address(), r.b32()]);
        }
        let exchange = Memory::Atomic { space, op: AtomicOp::Exchange, ty: Ty::B32, offset: 0 };
        r.code.emit(exchange, &[r.dst(Ty::B32)], &[address(), r.b32()]);
    }
    let (space, word, count, offset) = (Space::Global, Word::B32, 1, 0);
    for access in [Access::Streaming, Access::Acquire] {
        r.code.emit(Memory::Load { space, word, count, offset, access }, &[r.dst(Ty::B32)], &[r.b64()]);
    }
    for access in [Access::Streaming, Access::Release] {
        r.code.emit(Memory::Store { space, word, count, offset, access }, &[], &[r.b64(), r.b32()]);
    }
}

fn warps(r: &Registers<'_>) {
    for mode in [Shuffle::Xor, Shuffle::Index, Shuffle::Up, Shuffle::Down] {
        r.code.emit(Warp::Shuffle(mode), &[r.dst(Ty::B32)], &[r.b32(), r.b32()]);
    }
    for (vote, ty) in [(Vote::All, Ty::Pred), (Vote::Any, Ty::Pred), (Vote::Ballot, Ty::B32)] {
        r.code.emit(Warp::Vote(vote), &[r.dst(ty)], &[r.pred()]);
    }
    for op in [Redux::Add, Redux::Min, Redux::Max] {
        for ty in [Ty::S32, Ty::U32] {
            r.code.emit(Warp::Redux(op, ty), &[r.dst(ty)], &[r.b32()]);
        }
    }
    r.code.emit(Warp::Sync, &[], &[]);
    for count in [1u8, 2, 4] {
        for transposed in [false, true] {
            let load = Warp::LoadMatrix { count, transposed, offset: 16 };
            r.code.emit(load, &r.dsts(Ty::B32, count.into()), &[r.shared()]);
        }
    }
}

fn matrices(r: &Registers<'_>, fp8: bool) {
    use MmaTy::*;
    let plain = [(F16, F32), (F16, F16), (BF16, F32), (S8, S32), (U8, S32), (S4, S32)];
    let floats = [(E4M3, F32), (E4M3, F16), (E5M2, F32), (E5M2, F16)];
    for (ty, acc) in if fp8 { &floats[..] } else { &plain[..] } {
        let mma = Mma { a: *ty, b: *ty, acc: *acc };
        let count = mma.acc_registers();
        let src = r.many(Ty::B32, 6 + count);
        r.code.emit(Matrix::Mma(mma), &r.dsts(Ty::B32, count), &src);
    }
}

fn copies(r: &Registers<'_>) {
    for bytes in [4, 8, 16] {
        r.code.emit(Control::CopyAsync { bytes }, &[], &[r.shared(), r.b64(), r.b32()]);
    }
    r.code.emit(Control::CopyAsyncCommit, &[], &[]);
    r.code.emit(Control::CopyAsyncWait(1), &[], &[]);
    r.code.emit(Control::MbarrierInit, &[], &[r.shared(), r.b32()]);
    r.code.emit(Control::MbarrierArrive, &[], &[r.shared()]);
    r.code.emit(Control::Barrier { threads: None }, &[], &[r.b32()]);
    r.code.emit(Control::Barrier { threads: Some(64) }, &[], &[r.b32()]);
    r.code.emit(Control::BarrierArrive { threads: 64 }, &[], &[r.b32()]);
    r.code.emit(Control::FenceDevice, &[], &[]);
    r.code.emit(Control::Sleep, &[], &[r.b32()]);
}

fn hopper(r: &Registers<'_>) {
    let map = r.code.tensor_map("map").operand();
    for dims in 1..=5u8 {
        let mut load = vec![r.shared(), map, r.shared()];
        load.extend(r.many(Ty::S32, dims.into()));
        r.code.emit(Control::BulkTensorLoad { dims }, &[], &load);
        let mut store = vec![map, r.shared()];
        store.extend(r.many(Ty::S32, dims.into()));
        r.code.emit(Control::BulkTensorStore { dims }, &[], &store);
    }
    r.code.emit(Control::BulkCommit, &[], &[]);
    r.code.emit(Control::BulkWaitRead(0), &[], &[]);
    r.code.emit(Control::FenceAsyncProxy, &[], &[]);
    r.code.emit(Control::FenceMbarrierInit, &[], &[]);
    r.code.emit(Control::MbarrierArriveExpect, &[], &[r.shared(), r.b32()]);
    r.code.emit(Control::MbarrierTryWait, &[r.dst(Ty::Pred)], &[r.shared(), r.b32()]);
    r.code.emit(Warp::Elect, &[r.dst(Ty::Pred)], &[]);
    for count in [1u8, 2, 4] {
        let mut src = vec![r.shared()];
        src.extend(r.many(Ty::B32, count.into()));
        r.code.emit(Warp::StoreMatrix { count, transposed: true, offset: 0 }, &[], &src);
    }
}

fn warpgroups(r: &Registers<'_>) {
    use MmaTy::*;
    r.code.emit(Control::RegistersDecrease(40), &[], &[]);
    r.code.emit(Control::RegistersIncrease(200), &[], &[]);
    for (ty, acc) in [(F16, F32), (BF16, F32), (S8, S32), (U8, S32), (E4M3, F32), (E5M2, F32)] {
        for a_in_registers in [false, true] {
            for b_transposed in [false, true] {
                if b_transposed && ty.bits() == 8 {
                    continue;
                }
                let wgmma = Wgmma { n: 64, a: ty, b: ty, acc, a_in_registers, b_transposed };
                let registers = r.dsts(Ty::B32, wgmma.acc_registers());
                for &reg in &registers {
                    r.code.emit(Lane::Mov(Ty::B32), &[reg], &[r.b32()]);
                }
                r.code.emit(Matrix::WgmmaFence, &[], &[]);
                let mut src = if a_in_registers { r.many(Ty::B32, 4) } else { vec![r.b64()] };
                src.extend([r.b64(), r.pred()]);
                r.code.emit(Matrix::Wgmma(wgmma), &registers, &src);
                r.code.emit(Matrix::WgmmaCommit, &[], &[]);
                r.code.emit(Matrix::WgmmaWait(0), &[], &[]);
            }
        }
    }
}

fn blackwell(r: &Registers<'_>) {
    r.code.emit(Matrix::MmaBlockScaled, &r.dsts(Ty::B32, 4), &r.many(Ty::B32, 12));
    r.code.emit(Lane::Convert(Convert::F32ToE2M1x2), &[r.dst(Ty::B16)], &[r.b32(), r.b32()]);
}

#[test]
fn every_instruction_assembles() {
    let Some(ptxas) = ptxas() else {
        let required = std::env::var_os("SAGE_REQUIRE_PTXAS").is_some_and(|value| value == "1");
        assert!(!required, "SAGE_REQUIRE_PTXAS=1, but there is no ptxas; scripts/fetch_ptxas.sh fetches it");
        eprintln!(
            "every_instruction_assembles: skipped: there is no ptxas; scripts/fetch_ptxas.sh fetches it"
        );
        return;
    };
    type Part = (&'static str, Target, fn(&Registers<'_>));
    let parts: [Part; 9] = [
        ("lanes", Target::SM_90, lanes),
        ("memory", Target::SM_75, memory),
        ("warps", Target::SM_80, warps),
        ("matrices", Target::SM_80, |r| matrices(r, false)),
        ("fp8", Target::SM_89, |r| matrices(r, true)),
        ("copies", Target::SM_80, copies),
        ("hopper", Target::SM_90, hopper),
        ("warpgroups", Target::SM_90A, warpgroups),
        ("blackwell", Target::SM_120A, blackwell),
    ];
    for (name, target, write) in parts {
        let program = kernel(name, 256, |code| write(&Registers { code }));
        let ptx = program.ptx(target).unwrap_or_else(|missing| panic!("{missing}"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernel.ptx");
        std::fs::write(&file, &ptx).unwrap();
        let output = Command::new(&ptxas)
            .arg(format!("-arch={target}"))
            .arg(&file)
            .arg("-o")
            .arg(folder.path().join("kernel.cubin"))
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name} for {target}, PTX {}: {log}", program.version(target));
    }
}
