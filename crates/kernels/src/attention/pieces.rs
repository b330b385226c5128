//! How blocks of warpgroups share out the work: a block stays, and takes one tile of queries of one head after another,
//! so that copies for the next are under way while the last is being written, and long and short pieces even out.
//!
//! The thread that copies takes pieces from a counter and hands them to the threads that compute, two pieces ahead at most.

use sage_ptx::{Code, Mbarriers, Shared, Val};

use super::bulk_ring::Cursor;
use super::config::{AttentionConfig, AttentionParams};
use super::place::Place;

/// Pieces that are handed over before the first is taken.
const SLOTS: usize = 2;

/// The pieces of work of a launch.
pub(super) struct Pieces<'k, 'c, 'p> {
    code: &'k Code,
    config: &'c AttentionConfig,
    params: &'p AttentionParams<'k>,
    /// Index of the piece in each slot.
    slots: Shared<'k, i32>,
    /// Of each slot: whether it is full, then of each whether it is empty.
    barriers: Mbarriers<'k>,
    count: Val<'k, i32>,
    /// The thread's warp and lane.
    pub thread: [Val<'k, i32>; 2],
}

impl<'k, 'c, 'p> Pieces<'k, 'c, 'p> {
    /// Ready for use after the block's next barrier.
    pub fn new(code: &'k Code, config: &'c AttentionConfig, params: &'p AttentionParams<'k>) -> Self {
        let barriers = code.mbarriers("pieces_full_empty", 2 * SLOTS);
        code.when(code.thread().eq(0), || {
            for slot in 0..SLOTS {
                barriers.plus(slot).init(1);
                barriers.plus(SLOTS + slot).init(config.threads());
            }
            code.fence_mbarriers();
        });
        let slots = code.shared::<i32>("pieces", SLOTS);
        let thread = [code.warp_index(), code.lane_index()];
        Pieces { code, config, params, slots, barriers, count: params.q_tiles * params.all_heads, thread }
    }

    /// One thread's part: takes pieces from the counter until there are no more, hands each over and calls `produce`.
    pub fn hand_out(&self, produce: impl FnOnce(&Place<'k>)) {
        let code = self.code;
        let cursor = Cursor::new(code, SLOTS, "handed");
        let [first, ..] = code.block_index();
        let [blocks, ..] = code.grid();
        let piece = code.var(first).named("piece");
        let hand_over = |piece: Val<'k, i32>| {
            let slot = cursor.stage.get();
            self.barriers.from(SLOTS).at(slot).wait(cursor.parity.get() ^ 1);
            self.slots.at(slot).store(piece);
            self.barriers.at(slot).arrive();
            cursor.advance();
        };
        code.while_loop(
            || piece.get().lt(self.count),
            || {
                hand_over(piece.get());
                let place = self.place(piece.get());
                code.when(!place.empty, || produce(&place));
                // Each block has its first piece without asking.
                let taken = self.params.taken.atomic(sage_ptx::isa::AtomicOp::Add, 1u32);
                piece.set(taken.reinterpret::<i32>() + blocks);
            },
        );
        hand_over(self.count);
    }

    /// The part of the threads that compute: calls `compute` for each piece handed over.
    pub fn take(&self, compute: impl FnOnce(Place<'k>)) {
        let code = self.code;
        let cursor = Cursor::new(code, SLOTS, "taken");
        let next = || {
            let slot = cursor.stage.get();
            self.barriers.at(slot).wait(cursor.parity.get());
            let piece = self.slots.at(slot).load();
            self.barriers.from(SLOTS).at(slot).arrive();
            cursor.advance();
            piece
        };
        let piece = code.var(next()).named("piece");
        code.while_loop(
            || piece.get().lt(self.count),
            || {
                let place = self.place(piece.get());
                code.when(!place.empty, || compute(place));
                piece.set(next());
            },
        );
    }

    /// Heads are taken a few at a time, whose keys and values stay in cache; of these the longest rows of a causal mask come
    /// first, so that the last pieces are short.
    fn place(&self, piece: Val<'k, i32>) -> Place<'k> {
        let p = self.params;
        let together = p.heads_together * p.q_tiles;
        let (group, within) = (piece / together, piece % together);
        let (from_last, in_group) = (within / p.heads_together, within % p.heads_together);
        let all_heads = group * p.heads_together + in_group;
        let heads = p.group_size * p.kv_heads;
        let place = [p.q_tiles - 1 - from_last, all_heads % heads, all_heads / heads];
        Place::new(self.config, p, self.thread, place, p.all_heads / heads)
    }
}
