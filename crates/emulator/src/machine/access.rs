//! An access to shared memory, and what is said of one that should not have been.

use super::clocks::Clocks;
use super::layout::Layout;
use crate::fault::{FaultKind, Trouble};

/// Who accesses shared memory, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// The warp on whose behalf it happens.
    pub warp: usize,
    /// The component that is remembered: the warp itself, or an asynchronous reader or writer.
    pub component: usize,
    /// That component's count.
    pub count: u32,
    /// The instruction.
    pub at: u32,
    pub kind: AccessKind,
    /// Whether it goes through the asynchronous proxy, which sees fenced stores only.
    pub proxy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AccessKind {
    Read,
    Write,
    /// Reads and writes, in no order with others of its kind.
    Atomic,
    /// A write that is checked now, and lands later.
    Announce,
    /// Use of an `mbarrier`, in no order with others but after its initialisation.
    Mbarrier,
    /// Initialisation of an `mbarrier`.
    MbarrierInit,
}

impl Access {
    pub fn of_warp(warp: usize, clocks: &Clocks, at: u32, kind: AccessKind) -> Access {
        Access { warp, component: warp, count: clocks.own(warp), at, kind, proxy: false }
    }

    pub const fn reads(self) -> bool {
        matches!(self.kind, AccessKind::Read | AccessKind::Atomic)
    }

    pub const fn writes(self) -> bool {
        matches!(
            self.kind,
            AccessKind::Write | AccessKind::Atomic | AccessKind::Announce | AccessKind::MbarrierInit
        )
    }
}

#[cold]
pub(crate) fn race(
    layout: &Layout<'_>,
    clocks: &Clocks,
    who: &Access,
    address: u32,
    (component, _, at): (u16, u32, u32),
    did: &str,
) -> Box<Trouble> {
    let (place, name) = layout.place(address);
    let does = match who.kind {
        AccessKind::Read => "reads",
        AccessKind::Mbarrier => "uses the mbarrier at",
        AccessKind::MbarrierInit => "initialises an mbarrier at",
        AccessKind::Announce => "copies to",
        AccessKind::Atomic => "updates",
        AccessKind::Write => "writes",
    };
    let component = usize::from(component);
    let (kind, earlier) = if component < clocks.warps {
        (FaultKind::Race, format!("warp {component} {did}, with no barrier between"))
    } else if component < clocks.readers() {
        let group = component - clocks.warps;
        (FaultKind::WgmmaInFlight, format!("a wgmma of warpgroup {group} reads, without waiting for it"))
    } else {
        (FaultKind::MissingWait, "a bulk copy wrote, without waiting at its mbarrier".to_owned())
    };
    let detail = format!("warp {} {does} {place}, which {earlier}", who.warp);
    Trouble::new(kind, detail).object(name).other(at)
}

#[cold]
pub(crate) fn unfenced(
    layout: &Layout<'_>,
    who: &Access,
    address: u32,
    write: (u16, u32, u32),
) -> Box<Trouble> {
    let (place, name) = layout.place(address);
    let detail = format!(
        "the asynchronous proxy accesses {place} for warp {}; warp {} wrote it with no fence.proxy.async between its \
         write and the barrier",
        who.warp, write.0
    );
    Trouble::new(FaultKind::MissingProxyFence, detail).object(name).other(write.2)
}
