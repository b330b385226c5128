//! What a launch did, counted.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::Location;

use sage_ptx::isa::{BlockScales, Control, Convert, Lane, Matrix, Memory, MmaTy, Op, Space, Warp};

use crate::machine::Launch;
use crate::stats::Stats;

/// A location that sorts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place(&'static Location<'static>);

/// Accesses to shared memory of one place in a kernel's source.
#[derive(Clone, Debug, PartialEq)]
pub struct Conflicts {
    /// The place.
    pub at: &'static Location<'static>,
    /// Kind of instruction, as in [`Report::instructions`].
    pub instruction: String,
    /// Accesses by a warp.
    pub requests: u64,
    /// Turns that the banks took.
    pub wavefronts: u64,
    /// Those of them that another layout would save.
    pub extra: u64,
    /// Largest extra of one access.
    pub worst: u32,
}

/// Accesses to global memory of one place in a kernel's source.
#[derive(Clone, Debug, PartialEq)]
pub struct Sectors {
    /// The place.
    pub at: &'static Location<'static>,
    /// Kind of instruction, as in [`Report::instructions`].
    pub instruction: String,
    /// Accesses by a warp.
    pub requests: u64,
    /// Sectors of 32 bytes touched.
    pub sectors: u64,
    /// Sectors that the bytes would fill.
    pub ideal: u64,
}

/// What a launch did.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Name of the program.
    pub program: String,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Instructions executed by warps, by kind.
    pub instructions: BTreeMap<String, u64>,
    /// Accesses to shared memory, the places with the most conflicts first.
    pub shared: Vec<Conflicts>,
    /// Accesses to global memory, the most wasteful places first.
    pub global: Vec<Sectors>,
    /// Shared memory of a block.
    pub shared_bytes: u32,
    /// Bytes moved by bulk copies.
    pub bulk_bytes: u64,
}

impl Report {
    /// The report of a launch.
    pub(crate) fn new(stats: &Stats, cx: &Launch<'_>) -> Report {
        let code = &cx.code;
        let mut counts = BTreeMap::new();
        let mut shared = BTreeMap::<Place, Conflicts>::new();
        let mut global = BTreeMap::<Place, Sectors>::new();
        for (i, instr) in code.instrs.iter().enumerate() {
            if stats.executed[i] != 0 {
                *counts.entry(class(instr.op)).or_insert(0) += stats.executed[i];
            }
            let at = Place(instr.at);
            let cost = stats.shared[i];
            if cost.requests != 0 {
                let entry = shared.entry(at).or_insert_with(|| Conflicts {
                    at: instr.at,
                    instruction: class(instr.op),
                    requests: 0,
                    wavefronts: 0,
                    extra: 0,
                    worst: 0,
                });
                entry.requests += cost.requests;
                entry.wavefronts += cost.taken;
                entry.extra += cost.taken - cost.ideal;
                entry.worst = entry.worst.max(cost.worst);
            }
            let cost = stats.global[i];
            if cost.requests != 0 {
                let entry = global.entry(at).or_insert_with(|| Sectors {
                    at: instr.at,
                    instruction: class(instr.op),
                    requests: 0,
                    sectors: 0,
                    ideal: 0,
                });
                entry.requests += cost.requests;
                entry.sectors += cost.sectors;
                entry.ideal += cost.ideal;
            }
        }
        let mut shared: Vec<Conflicts> = shared.into_values().collect();
        shared.sort_by_key(|place| std::cmp::Reverse(place.extra));
        let mut global: Vec<Sectors> = global.into_values().collect();
        global.sort_by_key(|place| std::cmp::Reverse(place.sectors - place.ideal));
        Report {
            program: code.program.name.clone(),
            grid: cx.grid,
            block: code.program.block,
            instructions: counts,
            shared,
            global,
            shared_bytes: stats.shared_bytes,
            bulk_bytes: stats.bulk_bytes,
        }
    }

    /// Instructions executed by warps.
    pub fn total(&self) -> u64 {
        self.instructions.values().sum()
    }

    /// Instructions of the kinds whose name begins so: `"mma"`, `"ld.shared"`.
    pub fn count(&self, prefix: &str) -> u64 {
        self.instructions.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
    }

    /// Turns of the banks of shared memory that another layout would save.
    pub fn bank_conflicts(&self) -> u64 {
        self.shared.iter().map(|place| place.extra).sum()
    }

    /// Sectors of global memory touched, and sectors that the bytes would fill.
    pub fn sectors(&self) -> (u64, u64) {
        self.global.iter().fold((0, 0), |sum, place| (sum.0 + place.sectors, sum.1 + place.ideal))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        let [bx, by, bz] = self.block;
        writeln!(f, "{}: grid {x}×{y}×{z}, blocks of {bx}×{by}×{bz} threads", self.program)?;
        writeln!(f, "  shared memory {} bytes a block", self.shared_bytes)?;
        if self.bulk_bytes != 0 {
            writeln!(f, "  bulk copies {} bytes", self.bulk_bytes)?;
        }
        writeln!(f, "  {:<28} {:>12}", "instructions of warps", self.total())?;
        let mut counts: Vec<_> = self.instructions.iter().collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (name, count) in counts {
            writeln!(f, "    {name:<26} {count:>12}")?;
        }
        if !self.shared.is_empty() {
            writeln!(f, "  {:<28} {:>12}", "bank conflicts", self.bank_conflicts())?;
            for place in self.shared.iter().filter(|place| place.extra != 0).take(8) {
                writeln!(
                    f,
                    "    {:<26} {:>12}  of {} wavefronts, at worst {} a request, {}",
                    place.instruction, place.extra, place.wavefronts, place.worst, place.at
                )?;
            }
        }
        if !self.global.is_empty() {
            let (sectors, ideal) = self.sectors();
            writeln!(f, "  {:<28} {sectors:>12}  ideal {ideal}", "sectors of global memory")?;
            for place in self.global.iter().filter(|place| place.sectors != place.ideal).take(8) {
                writeln!(
                    f,
                    "    {:<26} {:>12}  ideal {}, {}",
                    place.instruction, place.sectors, place.ideal, place.at
                )?;
            }
        }
        Ok(())
    }
}

/// The kind that an instruction is counted as.
fn class(op: Op) -> String {
    let ty = |ty: MmaTy| ty.ptx().trim_start_matches('.').to_owned();
    let space = |space| if space == Space::Global { "global" } else { "shared" };
    match op {
        Op::Lane(op) => match op {
            Lane::Mov(_) | Lane::Join16 | Lane::Join32 | Lane::Low16 | Lane::High16 => "mov",
            Lane::Convert(Convert::Integer { .. }) => "cvt integer",
            Lane::Convert(_) => "cvt",
            Lane::Exp2 => "ex2",
            Lane::Log2 => "lg2",
            Lane::Tanh => "tanh",
            Lane::Reciprocal | Lane::ReciprocalApprox => "rcp",
            Lane::Set(..) => "setp",
            Lane::Select(_) => "selp",
            Lane::Div(_) | Lane::Rem(_) => "div",
            Lane::Permute => "prmt",
            Lane::Dot4 => "dp4a",
            Lane::Fma(_) | Lane::MadWide(_) => "fma",
            Lane::Mul(_) | Lane::MulHigh(_) | Lane::MulWide(_) => "mul",
            Lane::Add(_) | Lane::Sub(_) => "add",
            Lane::Min(_) | Lane::Max(_) => "min/max",
            _ => "logic",
        }
        .to_owned(),
        Op::Memory(op) => match op {
            Memory::Load { space: at, word, count, .. } => {
                format!("ld.{}.{}", space(at), 8 * word.bytes() * u32::from(count))
            }
            Memory::Store { space: at, word, count, .. } => {
                format!("st.{}.{}", space(at), 8 * word.bytes() * u32::from(count))
            }
            Memory::Atomic { space: at, .. } => format!("atom.{}", space(at)),
            _ => "mov".to_owned(),
        },
        Op::Warp(op) => match op {
            Warp::Shuffle(_) => "shfl".to_owned(),
            Warp::Vote(_) => "vote".to_owned(),
            Warp::Redux(..) => "redux".to_owned(),
            Warp::Sync => "bar.warp".to_owned(),
            Warp::LoadMatrix { count, .. } => format!("ldmatrix.x{count}"),
        },
        Op::Matrix(op) => match op {
            Matrix::Mma(mma) => format!("mma.m16n8k{}.{}.{}", mma.k(), ty(mma.acc), ty(mma.a)),
            Matrix::HalfMma(mma) => {
                format!("mma.m{}n8k{}.{}.{}", mma.rows(), mma.k(), ty(mma.acc), ty(mma.a))
            }
            Matrix::MmaBlockScaled(mma) => {
                let scales = match mma.scales {
                    BlockScales::Ue4m3 => "ue4m3",
                    BlockScales::Ue8m0 => "ue8m0",
                };
                format!("mma.m16n8k64.f32.e2m1.{scales}")
            }
            Matrix::Wgmma(op) => format!("wgmma.m64n{}k{}.{}.{}", op.n, op.k(), ty(op.acc), ty(op.a)),
            Matrix::WgmmaFence | Matrix::WgmmaCommit | Matrix::WgmmaWait(_) => {
                "wgmma fence/commit/wait".to_owned()
            }
        },
        Op::Control(op) => match op {
            Control::Barrier { .. } => "bar.sync",
            Control::BarrierArrive { .. } => "bar.arrive",
            Control::FenceAsyncProxy | Control::FenceMbarrierInit => "fence",
            Control::MbarrierInit
            | Control::MbarrierArrive
            | Control::MbarrierArriveExpect
            | Control::MbarrierTryWait => "mbarrier",
            Control::CopyAsync { .. } => "cp.async",
            Control::CopyAsyncCommit | Control::CopyAsyncWait(_) => "cp.async commit/wait",
            Control::BulkTensorLoad { .. } | Control::BulkLoad => "cp.async.bulk load",
            Control::RegistersIncrease(_) | Control::RegistersDecrease(_) => "setmaxnreg",
            Control::Sleep => "nanosleep",
            Control::Exit => "exit",
        }
        .to_owned(),
    }
}
