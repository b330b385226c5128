//! The work queue of persistent blocks: a block stays, and takes one tile of queries of one head after another, so that
//! copies for the next are under way while the last is being written, and long and short pieces of work even out.
//!
//! The producer takes pieces from a counter and hands them to the consumers, two pieces ahead at most.

use sage_ptx::isa::AtomicOp;
use sage_ptx::{Code, Shared, Val};

use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::key_tiles::TileListParams;
use crate::attention::pipeline::{Cursor, Pipeline};
use crate::attention::place::{Piece, Place};

/// Pieces that are handed over before the first is taken.
const SLOTS: usize = 2;

/// Stands for the index of a piece when there are no more.
const NO_PIECE: i32 = -1;

/// The pieces of work of a launch.
pub(super) struct WorkQueue<'k, 'a> {
    code: &'k Code,
    config: &'a AttentionConfig,
    params: &'a AttentionParams<'k>,
    lists: Option<&'a TileListParams<'k>>,
    /// The piece in each slot: see [`WorkQueue::indices`].
    slots: Shared<'k, i32>,
    pipeline: Pipeline<'k>,
    count: Val<'k, i32>,
    /// The thread's warp and lane.
    pub thread: [Val<'k, i32>; 2],
}

impl<'k, 'a> WorkQueue<'k, 'a> {
    /// Ready for use after the block's next barrier.
    pub fn new(
        code: &'k Code,
        config: &'a AttentionConfig,
        params: &'a AttentionParams<'k>,
        lists: Option<&'a TileListParams<'k>>,
    ) -> Self {
        let barriers = code.mbarriers("pieces_full_empty", Pipeline::barriers(SLOTS));
        let pipeline = Pipeline::new(barriers, SLOTS);
        code.when(code.thread().eq(0), || {
            pipeline.init(config.threads());
            code.fence_mbarriers();
        });
        let slots = code.shared::<i32>("pieces", SLOTS * 4);
        let thread = [code.warp_index(), code.lane_index()];
        WorkQueue {
            code,
            config,
            params,
            lists,
            slots,
            pipeline,
            count: params.q_tiles * params.all_heads,
            thread,
        }
    }

    /// The producer's part: takes pieces from the counter until there are no more, hands each over and calls `produce`.
    pub fn hand_out(&self, produce: impl FnOnce(&Place<'k>)) {
        let code = self.code;
        let cursor = Cursor::new(code, SLOTS, "handed");
        let [first, ..] = code.block_index();
        let [blocks, ..] = code.grid();
        let piece = code.var(first).named("piece");
        let hand_over = |indices: [Val<'k, i32>; 4]| {
            let slot = self.pipeline.wait_empty(&cursor);
            self.slots.at(slot * 4).store_vector(indices);
            self.pipeline.full(slot).arrive();
            cursor.advance();
        };
        code.while_loop(
            || piece.get().lt(self.count),
            || {
                let indices = self.indices(piece.get());
                hand_over(indices);
                let place = self.place(indices);
                code.when(!place.empty, || produce(&place));
                // Each block has its first piece without asking, and where all are alike every other.
                let counter = self.params.taken;
                let take = || {
                    let taken = counter.atomic(AtomicOp::Add, 1u32);
                    piece.set(taken.reinterpret::<i32>() + blocks);
                };
                code.if_else(counter.address().ne(0u64), take, || piece.set(piece.get() + blocks));
            },
        );
        hand_over([code.constant(NO_PIECE); 4]);
    }

    /// The consumers' part: calls `compute` for each piece handed over.
    pub fn take(&self, compute: impl FnOnce(Place<'k>)) {
        let code = self.code;
        let cursor = Cursor::new(code, SLOTS, "taken");
        let next = || {
            let slot = self.pipeline.wait_full(&cursor);
            let indices = self.slots.at(slot * 4).load_vector::<4>();
            self.pipeline.release(slot);
            cursor.advance();
            indices
        };
        let indices = next().map(|index| code.var(index).named("piece"));
        code.while_loop(
            || indices[0].get().ge(0),
            || {
                let place = self.place(indices.map(|index| index.get()));
                code.when(!place.empty, || compute(place));
                indices.iter().zip(next()).for_each(|(index, next)| index.set(next));
            },
        );
    }

    /// Which tile of queries, head, sequence and key head a piece is: found once, by the producer. Heads are taken a
    /// few at a time, whose keys and values stay in cache; of these the longest rows of a causal mask come first, so
    /// that the last pieces are short.
    fn indices(&self, piece: Val<'k, i32>) -> [Val<'k, i32>; 4] {
        let p = self.params;
        let together = p.heads_together * p.q_tiles;
        let (group, within) = (piece / together, piece % together);
        let (from_last, in_group) = (within / p.heads_together, within % p.heads_together);
        let all_heads = group * p.heads_together + in_group;
        let heads = self.config.heads(p);
        let head = all_heads % heads;
        [p.q_tiles - 1 - from_last, head, all_heads / heads, self.config.kv_head(p, head)]
    }

    fn place(&self, [q_tile, head, sequence, kv_head]: [Val<'k, i32>; 4]) -> Place<'k> {
        let p = self.params;
        let sequences = || p.all_heads / self.config.heads(p);
        let piece = Piece { q_tile, head, sequence, kv_head };
        Place::new(self.config, p, self.lists, self.thread, piece, sequences)
    }
}
