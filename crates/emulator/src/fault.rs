//! What a kernel can do wrong, and how it is told.

use std::error::Error;
use std::fmt;
use std::panic::Location;

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// Arguments do not fit the program's parameters, or the grid is impossible.
    Arguments,
    /// The program is not [valid](sage_ptx::Program::validate), or copies more bytes than it says.
    InvalidProgram,
    /// An address that lies in no buffer, or an access that leaves the array it began in.
    OutOfBounds,
    /// An address that is no multiple of what the access needs.
    Misaligned,
    /// A register that the lane never wrote.
    UninitializedRegister,
    /// Bytes of memory that nobody wrote.
    UninitializedMemory,
    /// Two accesses of different warps to one byte of shared memory, at least one a write, with no barrier between.
    Race,
    /// Two lanes of one instruction store different values to one byte.
    WriteConflict,
    /// Shared memory touched while an asynchronous copy to it is in flight.
    MissingWait,
    /// Shared memory written by ordinary stores and read by the asynchronous proxy without `fence.proxy.async`.
    MissingProxyFence,
    /// A register written and then used by `wgmma` without `wgmma.fence`.
    MissingWgmmaFence,
    /// A register or shared memory touched while a `wgmma` that uses it is in flight.
    WgmmaInFlight,
    /// Lanes missing where the warp, or all of the block, must act together.
    Divergent,
    /// Everything waits, and nothing is left that could end the waiting.
    Deadlock,
    /// More steps than the limit.
    Runaway,
    /// A wrong use of a barrier: counts that differ, or that are no multiple of 32.
    Barrier,
    /// A wrong use of an `mbarrier`: not initialised, too many arrivals, accessed as data.
    Mbarrier,
    /// `setmaxnreg` out of its range or beyond the registers of the multiprocessor.
    RegisterBudget,
    /// A shared-memory descriptor of `wgmma` that the hardware would not take.
    Descriptor,
    /// A tensor map, or a bulk copy by one, that the hardware would not take.
    TensorMap,
}

impl FaultKind {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            FaultKind::Arguments => "wrong arguments",
            FaultKind::InvalidProgram => "invalid program",
            FaultKind::OutOfBounds => "out of bounds",
            FaultKind::Misaligned => "misaligned access",
            FaultKind::UninitializedRegister => "uninitialised register",
            FaultKind::UninitializedMemory => "uninitialised memory",
            FaultKind::Race => "race",
            FaultKind::WriteConflict => "conflicting stores",
            FaultKind::MissingWait => "missing wait",
            FaultKind::MissingProxyFence => "missing fence.proxy.async",
            FaultKind::MissingWgmmaFence => "missing wgmma.fence",
            FaultKind::WgmmaInFlight => "wgmma in flight",
            FaultKind::Divergent => "divergent warp",
            FaultKind::Deadlock => "deadlock",
            FaultKind::Runaway => "runaway loop",
            FaultKind::Barrier => "wrong barrier",
            FaultKind::Mbarrier => "wrong mbarrier",
            FaultKind::RegisterBudget => "register budget",
            FaultKind::Descriptor => "wrong descriptor",
            FaultKind::TensorMap => "wrong tensor map",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One thing that a kernel did wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What sort.
    pub kind: FaultKind,
    /// Block, by its index along x, y and z.
    pub block: [u32; 3],
    /// Warp within the block.
    pub warp: u32,
    /// Lanes concerned, a bit each.
    pub lanes: u32,
    /// Where the kernel's source has the instruction.
    pub at: Option<&'static Location<'static>>,
    /// The instruction.
    pub instruction: String,
    /// The buffer, shared array, register or parameter concerned.
    pub object: Option<String>,
    /// Where the kernel's source has the other instruction concerned: of a race, the access that came first.
    pub other: Option<&'static Location<'static>>,
    /// A sentence with the addresses, sizes and values.
    pub detail: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "{}: {}", self.kind, self.detail)?;
        write!(f, "\n    block ({x}, {y}, {z}), warp {}, {}", self.warp, LaneList(self.lanes))?;
        if let Some(at) = self.at {
            write!(f, "\n    at {at}: {}", self.instruction)?;
        }
        if let Some(other) = self.other {
            write!(f, "\n    see {other}")?;
        }
        Ok(())
    }
}

/// `lanes 0-3, 7`.
struct LaneList(u32);

impl fmt::Display for LaneList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 || self.0 == u32::MAX {
            return f.write_str("all lanes");
        }
        f.write_str(if self.0.is_power_of_two() { "lane" } else { "lanes" })?;
        let mut lane = 0;
        let mut first = true;
        while lane < 32 {
            let run = (self.0 >> lane).trailing_ones();
            if run == 0 {
                lane += 1;
                continue;
            }
            f.write_str(if first { " " } else { ", " })?;
            first = false;
            match run {
                1 => write!(f, "{lane}")?,
                _ => write!(f, "{lane}-{}", lane + run - 1)?,
            }
            lane += run;
        }
        Ok(())
    }
}

/// Why a launch failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Name of the program.
    pub program: String,
    /// What went wrong, by block; as many as [`EmulatorOptions::max_faults`](crate::EmulatorOptions::max_faults).
    pub faults: Vec<Fault>,
}

impl Failure {
    /// The first fault, of the lowest block.
    pub fn first(&self) -> Option<&Fault> {
        self.faults.first()
    }

    /// The first fault's kind.
    pub fn kind(&self) -> Option<FaultKind> {
        self.first().map(|fault| fault.kind)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel `{}`:", self.program)?;
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl Error for Failure {}

/// A fault on its way up, before block, warp and instruction are known.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub kind: FaultKind,
    /// Lanes concerned; none stands for all active ones.
    pub lanes: u32,
    pub object: Option<String>,
    /// Index of the other instruction.
    pub other: Option<u32>,
    /// The statement, where it is no instruction.
    pub statement: Option<&'static Location<'static>>,
    pub detail: String,
}

impl Trouble {
    pub fn new(kind: FaultKind, detail: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble {
            kind,
            lanes: 0,
            object: None,
            other: None,
            statement: None,
            detail: detail.into(),
        })
    }

    pub fn lane(mut self: Box<Self>, lane: usize) -> Box<Trouble> {
        self.lanes = 1 << lane;
        self
    }

    pub fn lanes(mut self: Box<Self>, lanes: u32) -> Box<Trouble> {
        self.lanes = lanes;
        self
    }

    pub fn object(mut self: Box<Self>, name: impl Into<String>) -> Box<Trouble> {
        self.object = Some(name.into());
        self
    }

    pub fn other(mut self: Box<Self>, instr: u32) -> Box<Trouble> {
        self.other = Some(instr);
        self
    }

    pub fn statement(mut self: Box<Self>, at: &'static Location<'static>) -> Box<Trouble> {
        self.statement = Some(at);
        self
    }
}

/// Result of whatever a kernel does.
pub(crate) type Outcome<T> = Result<T, Box<Trouble>>;
