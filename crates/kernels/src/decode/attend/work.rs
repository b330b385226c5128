//! Which rows a block computes, over which tokens.

use sage_ptx::{Code, Rows, SLOT_ROWS, Tile, Val, Var, lane_column, lane_row};

use super::{CacheAttendConfig, CacheAttendParams, ROWS};
use crate::decode::Pool;
use crate::grid::BlockHead;

/// A query row.
#[derive(Clone, Copy)]
pub(super) struct Row<'k> {
    /// The query, and the query head among those of the sequence.
    pub query: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub exists: Val<'k, bool>,
    /// Tokens that it sees.
    start: Val<'k, i32>,
    end: Val<'k, i32>,
}

/// Which rows a block computes, over which tokens. Rows are counted in the key head: neighbouring ones are heads of one
/// query, which see the same tokens, and later queries see later tokens.
pub(super) struct Work<'k> {
    code: &'k Code,
    pub pool: Pool<'k>,
    pub batch: Val<'k, i32>,
    /// The key head.
    pub head: Val<'k, i32>,
    /// Index of the part of the tokens.
    pub split: Val<'k, i32>,
    /// The block's first row.
    first_row: Val<'k, i32>,
    /// Rows of the key head, query heads that share it, and queries.
    of_head: Val<'k, i32>,
    group: Val<'k, i32>,
    q_len: Val<'k, i32>,
    /// Tokens visible before and after the diagonal, that of query 0, and tokens of the sequence.
    window: [Val<'k, i32>; 2],
    diagonal: Val<'k, i32>,
    len: Val<'k, i32>,
    /// First and one past the last token that some row sees.
    pub first: Val<'k, i32>,
    pub last: Val<'k, i32>,
    /// First and one past the last token that every row sees.
    seen_by_all: [Val<'k, i32>; 2],
    /// First page of the tokens in the sequence, and how many they lie in.
    pub first_page: Val<'k, i32>,
    pub pages: Val<'k, i32>,
}

impl<'k> Work<'k> {
    pub(super) fn new(config: &CacheAttendConfig, code: &'k Code, p: &CacheAttendParams<'k>) -> Self {
        let bits = config.storage.page_bits();
        let [split, ..] = code.block_index();
        let of_head = p.q_len * p.group;
        let row_blocks = (of_head + (ROWS as i32 - 1)) >> ROWS.ilog2() as i32;
        let heads_and_blocks = p.kv_heads * row_blocks;
        let number = BlockHead::new(code, heads_and_blocks, heads_and_blocks * p.sequences);
        let batch = number.sequence;
        let (head, block) = (number.head / row_blocks, number.head % row_blocks);
        let len = p.pool.kv_lens.at(batch).load().named("len");

        code.note("which rows, which tokens");
        let first_row = block * ROWS as i32;
        let mut work = Work {
            code,
            pool: Pool { storage: config.storage, kv_heads: p.kv_heads, parts: p.pool },
            batch,
            head,
            split,
            first_row,
            of_head,
            group: p.group,
            q_len: p.q_len,
            window: [p.left, p.right],
            diagonal: len - p.q_len,
            len,
            first: len,
            last: len,
            seen_by_all: [len; 2],
            first_page: len,
            pages: len,
        };
        let [(start, end), (last_start, last_end)] = [0, ROWS as i32 - 1].map(|row| {
            let row = (first_row + row).min(of_head - 1);
            work.seen(row / p.group)
        });
        work.seen_by_all = [last_start, end];
        let (from, to) = if config.split {
            // Parts are counted from the page of the first token that some row sees.
            let part = (start & !(config.storage.page_size as i32 - 1)) + split * p.split;
            (start.max(part), last_end.min(part + p.split))
        } else {
            (start, last_end)
        };
        (work.first, work.last) = (from.named("first"), to.named("last"));
        work.first_page = work.first >> bits;
        let pages = ((work.last - 1) >> bits) - work.first_page + 1;
        work.pages = work.last.gt(work.first).select(pages, 0).named("pages");
        work
    }

    /// First and one past the last token that a query sees.
    fn seen(&self, query: Val<'k, i32>) -> (Val<'k, i32>, Val<'k, i32>) {
        let [left, right] = self.window;
        let diagonal = query + self.diagonal;
        ((diagonal - left).max(0), (diagonal + right + 1).min(self.len))
    }

    /// How many rows the block has.
    pub fn rows(&self) -> Val<'k, i32> {
        (self.of_head - self.first_row).min(ROWS as i32)
    }

    /// A row of the block; the last one stands in for rows that the head does not have.
    pub fn row(&self, row: Val<'k, i32>) -> Row<'k> {
        let row = self.first_row + row;
        let exists = row.lt(self.of_head);
        let row = row.min(self.of_head - 1);
        let (query, head) = (row / self.group, self.head * self.group + row % self.group);
        let (start, end) = self.seen(query);
        Row { query, head, exists, start, end }
    }

    /// The block's row that the lane holds in a slot.
    pub fn lane_row(&self, slot: usize) -> Val<'k, i32> {
        lane_row(self.code.lane_index()) + (SLOT_ROWS * slot) as i32
    }

    /// Index of a row among all heads and sequences.
    pub fn index(&self, p: &CacheAttendParams<'k>, row: &Row<'k>) -> Val<'k, i32> {
        (self.batch * (p.kv_heads * self.group) + row.head) * self.q_len + row.query
    }

    /// First token of the first tile, where tiles start at multiples of `run`.
    pub fn first_tile(&self, run: usize) -> Val<'k, i32> {
        self.first & !(run as i32 - 1)
    }

    /// Whether some row does not see some token of the tile of `tokens` from `start` on.
    pub fn is_cut(&self, start: Val<'k, i32>, tokens: usize) -> Val<'k, bool> {
        let [first, end] = self.seen_by_all;
        !(start.ge(first.max(self.first)) & (start + tokens as i32).le(end.min(self.last)))
    }

    /// Hides the scores of tokens that their row does not see, of a tile from `start` on.
    pub fn hide(&self, scores: &Tile<Var<'k, f32>>, start: Val<'k, i32>) {
        self.code.note("scores: causal mask, window, end of the tokens");
        let token = start + lane_column(self.code.lane_index());
        let visible = Rows::from_fn(scores.slots(), |slot| {
            let row = self.row(self.lane_row(slot));
            row.start.max(self.first) - token..row.end.min(self.last) - token
        });
        scores.fill_outside(&visible, |column| column, f32::NEG_INFINITY);
    }
}
