//! What a warp has started and not waited for: asynchronous copies and products.

/// A copy on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AsyncCopy {
    pub lane: u8,
    pub bytes: u8,
    pub offset: u32,
    pub at: u32,
    pub data: u128,
}

/// Copies of a warp that have not landed.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    pub uncommitted: Vec<AsyncCopy>,
    /// Lanes that committed each group, the latest last, and its copies.
    pub groups: Vec<(u32, Vec<AsyncCopy>)>,
}

/// A bulk load on its way.
#[derive(Debug)]
pub(crate) struct BulkLoad {
    /// The turn in which it arrives.
    pub lands_at: u64,
    pub mbarrier: u32,
    pub bytes: i64,
    pub warp: usize,
    pub at: u32,
    /// Offsets in shared memory and data.
    pub chunks: Vec<(u32, u128)>,
}

/// Groups of `wgmma`s of a warp that were not waited for.
#[derive(Debug, Default)]
pub(crate) struct Products {
    /// Number of the group that the next `wgmma` belongs to.
    pub open: u32,
    /// Clock count of the open group's last shared-memory reads.
    pub open_count: u32,
    /// Groups committed, the latest last, and their counts.
    pub groups: Vec<(u32, u32)>,
}
