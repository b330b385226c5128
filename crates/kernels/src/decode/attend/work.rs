//! Which rows a block computes, over which tokens, and what becomes of a row.

use sage_ptx::{Code, Val, Var};

use super::{CacheAttendConfig, CacheAttendParams};
use crate::decode::{CHUNK, Pool};
use crate::grid::BlockHead;

/// One query row.
pub(super) struct Row<'k> {
    /// Largest score so far, in base 2.
    pub max: Var<'k, f32>,
    /// Sum of probabilities relative to it.
    pub sum: Var<'k, f32>,
    /// This lane's channels of the output.
    pub out: Vec<Var<'k, f32>>,
    /// Tokens that it sees.
    pub start: Val<'k, i32>,
    pub end: Val<'k, i32>,
    /// Index among all rows, and whether it exists.
    pub index: Val<'k, i32>,
    pub exists: Val<'k, bool>,
}

/// Which rows a block computes, over which tokens.
pub(super) struct Work<'k> {
    pub pool: Pool<'k>,
    pub batch: Val<'k, i32>,
    /// The key head.
    pub head: Val<'k, i32>,
    /// Index of the part of the tokens.
    pub split: Val<'k, i32>,
    /// The query and query head of each row.
    pub queries: Vec<(Val<'k, i32>, Val<'k, i32>)>,
    pub rows: Vec<Row<'k>>,
    /// First and one past the last token that some row sees.
    pub first: Val<'k, i32>,
    pub last: Val<'k, i32>,
    /// First page of these tokens in the sequence, and how many they lie in.
    pub first_page: Val<'k, i32>,
    pub pages: Val<'k, i32>,
}

impl<'k> Work<'k> {
    pub(super) fn new(config: &CacheAttendConfig, code: &'k Code, p: &CacheAttendParams<'k>) -> Self {
        let bits = config.storage.page_bits();
        let [split, ..] = code.block_index();
        let row_blocks = (p.q_len * p.group).div_ceil(config.rows);
        let heads_and_blocks = p.kv_heads * row_blocks;
        let number = BlockHead::new(code, heads_and_blocks, heads_and_blocks * p.sequences);
        let batch = number.sequence;
        let (head, block) = (number.head / row_blocks, number.head % row_blocks);
        let len = p.pool.kv_lens.at(batch).load().named("len");
        let pool = Pool { storage: config.storage, kv_heads: p.kv_heads, parts: p.pool };

        code.note("which rows, which tokens");
        let of_head = p.q_len * p.group;
        let heads = p.kv_heads * p.group;
        let places: Vec<_> = (0..config.rows)
            .map(|r| {
                let row = block * config.rows as i32 + r as i32;
                let exists = row.lt(of_head);
                let row = row.min(of_head - 1);
                // Neighbouring rows are heads of one query, which see the same tokens.
                let (i, q_head) = (row / p.group, head * p.group + row % p.group);
                (i, q_head, exists)
            })
            .collect();
        let row = |&(i, q_head, exists)| Row::new(code, p, len, (batch, heads), (i, q_head), exists);
        let rows: Vec<_> = places.iter().map(row).collect();
        let bound = |of: fn(&Row<'k>) -> Val<'k, i32>,
                     pick: fn(Val<'k, i32>, Val<'k, i32>) -> Val<'k, i32>| {
            rows.iter().map(of).reduce(pick).unwrap_or(len)
        };
        let first = (split * p.split).max(bound(|row| row.start, Val::min)).named("first");
        let last = ((split + 1) * p.split).min(bound(|row| row.end, Val::max)).named("last");
        let first_page = first >> bits;
        let pages = last.gt(first).select(((last - 1) >> bits) - first_page + 1, 0).named("pages");
        let queries = places.into_iter().map(|(i, q_head, _)| (i, q_head)).collect();
        Work { pool, batch, head, split, queries, rows, first, last, first_page, pages }
    }
}

impl<'k> Row<'k> {
    /// A query of a query head, of `heads`, in a sequence of `len` tokens.
    pub(super) fn new(
        code: &'k Code,
        p: &CacheAttendParams<'k>,
        len: Val<'k, i32>,
        (batch, heads): (Val<'k, i32>, Val<'k, i32>),
        (i, q_head): (Val<'k, i32>, Val<'k, i32>),
        exists: Val<'k, bool>,
    ) -> Self {
        let diagonal = i + (len - p.q_len);
        Row {
            // Finite, so that differences with it are numbers also before the first visible token.
            max: code.var(f32::MIN).named("max"),
            sum: code.var(0.0).named("sum"),
            out: (0..CHUNK).map(|_| code.var(0.0).named("out")).collect(),
            start: (diagonal - p.left).max(0),
            end: (diagonal + p.right + 1).min(len),
            index: (batch * heads + q_head) * p.q_len + i,
            exists,
        }
    }
}
