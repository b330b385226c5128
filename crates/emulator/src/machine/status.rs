//! Why a warp waits, and how it goes on after an instruction.

/// Why a warp does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ready,
    /// Sees the same values of global memory again and again.
    Polling,
    Barrier(u32),
    /// At `try_wait`, which will say `false` once when nothing else can run, and after that no more.
    Mbarrier {
        address: u32,
        parity: u32,
    },
    /// At a `wgmma`, for the other warps of the group.
    Wgmma,
    /// At `setmaxnreg`, for registers that others give back.
    Registers,
    Done,
}

/// How execution goes on after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Next,
    /// The instruction is done; the warp waits behind it.
    Wait(Status),
    /// The instruction will be executed again when the warp runs again.
    Retry(Status),
    /// The warp's turn ends.
    Yield,
}
