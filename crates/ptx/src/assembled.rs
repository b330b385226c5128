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
            Width::Pred => self.pred(),
            Width::B16 => self.b16(),
            Width::B32 => self.b32(),
            Width::B64 => self.b64(),
        }
    }

    fn dst(&self, ty: Ty) -> Reg {
        self.code.register(ty.width())
    }

    fn many(&self, ty: Ty, count: usize) -> Vec<Operand> {
        (0..count).map(|_| self.of(ty)).collect()
    }

    fn dsts(&self, ty: Ty, count: usize) -> Vec<Reg> {
        (0..count).map(|_| self.dst(ty)).collect()
    }

    /// An instruction whose operands may be anything of their widths.
    fn emit(&self, op: Lane) {
        let operands = op.operands().into_iter().flat_map(|group| {
            let each = move || match group.width {
                Width::Pred => self.pred(),
                Width::B16 => self.b16(),
                Width::B32 => self.b32(),
                Width::B64 => self.b64(),
            };
            std::iter::repeat_with(each).take(group.count.unwrap_or(0))
        });
        let operands: Vec<_> = operands.collect();
        self.code.emit(op, &[self.code.register(op.results().width)], &operands);
    }

    fn shared(&self) -> Operand {
        self.code.shared::<u64>("memory", 64).address().operand()
    }
}

const TYPES: [Ty; 13] = [
    Ty::Pred,
    Ty::B16,
    Ty::B32,
    Ty::B64,
    Ty::S32,
    Ty::U32,
    Ty::S64,
    Ty::U64,
    Ty::F16,
    Ty::BF16,
    Ty::F16x2,
    Ty::BF16x2,
    Ty::F32,
];

/// Every lane instruction with every type that its row has.
fn lanes(r: &Registers<'_>) {
    let of_a_type: [fn(Ty) -> Lane; 22] = [
        Lane::Mov,
        Lane::Add,
        Lane::Sub,
        Lane::Mul,
        Lane::MulHigh,
        Lane::MulWide,
        Lane::Div,
        Lane::Rem,
        Lane::Min,
        Lane::Max,
        Lane::MinNan,
        Lane::MaxNan,
        Lane::And,
        Lane::Or,
        Lane::Xor,
        Lane::Not,
        Lane::Shl,
        Lane::Shr,
        Lane::Neg,
        Lane::Abs,
        Lane::Fma,
        Lane::MadWide,
    ];
    let conversions: [fn(Ty) -> Convert; 3] =
        [Convert::IntToF32, Convert::F32ToIntNearest, Convert::F32ToIntTruncate];
    let comparisons = [Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le, Cmp::Gt, Cmp::Ge, Cmp::NeU];
    let mut all = vec![
        Lane::Reciprocal,
        Lane::ReciprocalApprox,
        Lane::SquareRoot,
        Lane::Exp2,
        Lane::Log2,
        Lane::Tanh,
        Lane::Permute,
        Lane::PopCount,
        Lane::LeadingZeros,
        Lane::ReverseBits,
        Lane::Join16,
        Lane::Low16,
        Lane::High16,
        Lane::Join32,
        Lane::Dot4,
        Lane::Convert(Convert::F16ToF32),
        Lane::Convert(Convert::BF16ToF32),
        Lane::Convert(Convert::F32ToF16),
        Lane::Convert(Convert::F32ToBF16),
        Lane::Convert(Convert::F32ToF16x2),
        Lane::Convert(Convert::F32ToBF16x2),
        Lane::Convert(Convert::F32ToE4M3x2),
        Lane::Convert(Convert::E4M3x2ToF16x2),
    ];
    for ty in TYPES {
        all.extend(of_a_type.map(|op| op(ty)));
        all.extend(comparisons.map(|cmp| Lane::Set(cmp, ty)));
        all.extend(conversions.map(|convert| Lane::Convert(convert(ty))));
        all.extend(TYPES.map(|from| Lane::Convert(Convert::Integer { from, to: ty })));
        all.push(Lane::Select(ty));
    }
    for op in all.into_iter().filter(Lane::exists) {
        r.emit(op);
    }
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
                let load = Memory::Load { space, word, count, offset, mode: LoadMode::Plain };
                r.code.emit(load, &r.dsts(ty, count.into()), &[address()]);
                let mut src = vec![address()];
                src.extend(r.many(ty, count.into()));
                r.code.emit(Memory::Store { space, word, count, offset, mode: StoreMode::Plain }, &[], &src);
            }
        }
        for op in [AtomicOp::Add, AtomicOp::Min, AtomicOp::Max, AtomicOp::Or] {
            for ty in TYPES {
                let atomic = Memory::Atomic { space, op, ty, offset: 4 };
                if atomic.exists() {
                    r.code.emit(atomic, &[r.dst(ty)], &[address(), r.of(ty)]);
                }
            }
        }
    }
    let (space, word, count, offset) = (Space::Global, Word::B32, 1, 0);
    for mode in [LoadMode::Streaming, LoadMode::Acquire] {
        r.code.emit(Memory::Load { space, word, count, offset, mode }, &[r.dst(Ty::B32)], &[r.b64()]);
    }
    let mode = StoreMode::Release;
    r.code.emit(Memory::Store { space, word, count, offset, mode }, &[], &[r.b64(), r.b32()]);
}

fn warps(r: &Registers<'_>) {
    for mode in [Shuffle::Xor, Shuffle::Index] {
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

/// What Turing has of its own, and what is put together from it.
fn turing(r: &Registers<'_>) {
    use MmaTy::*;
    for (ty, acc) in [(F16, F32), (F16, F16), (S8, S32), (U8, S32), (S4, S32)] {
        let mma = HalfMma { a: ty, b: ty, acc };
        let count = mma.acc_registers();
        let src = r.many(Ty::B32, mma.a_registers() + 1 + count);
        r.code.emit(Matrix::HalfMma(mma), &r.dsts(Ty::B32, count), &src);
        let whole = mma.whole();
        let count = whole.acc_registers();
        r.code.emit(Matrix::Mma(whole), &r.dsts(Ty::B32, count), &r.many(Ty::B32, 6 + count));
    }
    for ty in [Ty::S32, Ty::U32] {
        r.code.emit(Warp::Redux(Redux::Max, ty), &[r.dst(ty)], &[r.b32()]);
    }
    for ty in [Ty::F32, Ty::F16x2, Ty::BF16x2] {
        for op in [Lane::MinNan(ty), Lane::MaxNan(ty), Lane::Min(ty), Lane::Max(ty)] {
            r.code.emit(op, &[r.dst(ty)], &r.many(ty, 2));
        }
    }
    for (convert, ty) in [(Convert::F32ToF16x2, Ty::F16x2), (Convert::F32ToBF16x2, Ty::BF16x2)] {
        r.code.emit(Lane::Convert(convert), &[r.dst(ty)], &r.many(Ty::F32, 2));
    }
    r.code.emit(Lane::Convert(Convert::F32ToBF16), &[r.dst(Ty::BF16)], &[r.b32()]);
    r.code.emit(Lane::Convert(Convert::BF16ToF32), &[r.dst(Ty::F32)], &[r.b16()]);
    r.code.emit(Lane::Tanh, &[r.dst(Ty::F32)], &[r.b32()]);
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
    r.code.emit(Control::Sleep, &[], &[r.b32()]);
}

fn hopper(r: &Registers<'_>) {
    let map = r.code.tensor_map("map").operand();
    for dims in 1..=5u8 {
        let mut load = vec![r.shared(), map, r.shared()];
        load.extend(r.many(Ty::S32, dims.into()));
        for window in [SharedWindow::Block, SharedWindow::Cluster] {
            r.code.emit(Control::BulkTensorLoad { dims, window }, &[], &load);
        }
    }
    r.code.emit(Control::BulkLoad, &[], &[r.shared(), r.b64(), r.b32(), r.shared()]);
    r.code.emit(Control::FenceAsyncProxy, &[], &[]);
    r.code.emit(Control::FenceMbarrierInit, &[], &[]);
    r.code.emit(Control::MbarrierArriveExpect, &[], &[r.shared(), r.b32()]);
    r.code.emit(Control::MbarrierTryWait, &[r.dst(Ty::Pred)], &[r.shared(), r.b32()]);
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
    for scales in [BlockScales::Ue4m3, BlockScales::Ue8m0] {
        for b_lane in 0..4 {
            let mma = MmaBlockScaled { scales, b_lane };
            r.code.emit(Matrix::MmaBlockScaled(mma), &r.dsts(Ty::B32, 4), &r.many(Ty::B32, 12));
        }
    }
    r.emit(Lane::Convert(Convert::F32ToE2M1x8));
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
    let parts: [Part; 11] = [
        ("lanes", Target::SM_90, lanes),
        ("memory", Target::SM_75, memory),
        ("turing", Target::SM_75, turing),
        ("warps", Target::SM_80, warps),
        ("matrices", Target::SM_80, |r| matrices(r, false)),
        ("fp8", Target::SM_89, |r| matrices(r, true)),
        ("copies", Target::SM_80, copies),
        ("hopper", Target::SM_90, hopper),
        ("warpgroups", Target::SM_90A, warpgroups),
        ("blackwell", Target::SM_120A, blackwell),
        ("spark", Target::SM_121A, blackwell),
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
