//! Queries and tokens as lanes hold them, and their scores.

use std::ops::Add;

use sage_ptx::{Code, Scalar, Shared, Val};

use super::work::{Row, Work};
use super::{CacheAttendConfig, IN_FLIGHT, WORDS, cap};
use crate::decode::{CHUNK, THREADS};

/// What the block's rows look like in shared memory.
#[derive(Clone, Copy)]
pub(super) struct Queries<'k> {
    pub pitch: usize,
    pub wide: Shared<'k, f32>,
    pub upper: Shared<'k, u32>,
    pub lower: Shared<'k, u32>,
    pub scales: Shared<'k, f32>,
}

impl<'k> Queries<'k> {
    pub(super) fn new(config: &CacheAttendConfig, code: &'k Code) -> Self {
        let (rows, pitch) = (config.rows, config.storage.pitch());
        Queries {
            pitch,
            wide: code.shared("q_wide", rows * pitch),
            upper: code.shared("q_upper", rows * pitch / 4),
            lower: code.shared("q_lower", rows * pitch / 4),
            scales: code.shared("q_scales", rows),
        }
    }

    /// The lane's channels of a row, and its scale.
    pub(super) fn integers(&self, r: usize, lanes: &Lanes<'k>) -> Integers<'k> {
        let words = |of: Shared<'k, u32>| {
            let row = (r * self.pitch / 4) as i32;
            let words = of.at(lanes.chunk * WORDS as i32).plus(row).load_vector::<4>();
            words.map(|word| lanes.active.select(word, 0))
        };
        Integers {
            upper: words(self.upper),
            lower: words(self.lower),
            scale: self.scales.plus(r as i32).load(),
        }
    }
}

/// A query's integers in two bytes: `256 · upper + lower`, times the scale.
pub(super) struct Integers<'k> {
    pub upper: [Val<'k, u32>; WORDS],
    pub lower: [Val<'k, u32>; WORDS],
    pub scale: Val<'k, f32>,
}

/// How lanes share a token.
pub(super) struct Lanes<'k> {
    /// Lanes that hold a token together.
    pub count: usize,
    /// Such groups of lanes in a block, and the lane's.
    pub groups: i32,
    pub group: Val<'k, i32>,
    /// The lane's index in its group.
    pub member: Val<'k, i32>,
    /// Whether it has channels. Lanes without read those of the first, and multiply them by queries of zeros.
    pub active: Val<'k, bool>,
    /// The chunk of channels that it reads.
    pub chunk: Val<'k, i32>,
}

impl<'k> Lanes<'k> {
    pub(super) fn new(config: &CacheAttendConfig, code: &'k Code) -> Self {
        let count = config.lanes();
        let group = code.thread() >> count.ilog2() as i32;
        let member = code.thread() & (count as i32 - 1);
        let active = member.lt((config.storage.pitch() / CHUNK) as i32);
        let chunk = active.select(member, 0).named("chunk");
        Lanes { count, groups: (THREADS as usize / count) as i32, group, member, active, chunk }
    }

    /// The sum over the lanes of a group.
    pub(super) fn sum<T: Scalar>(&self, x: Val<'k, T>) -> Val<'k, T>
    where
        Val<'k, T>: Add<Output = Val<'k, T>>,
    {
        x.reduce_lanes(self.count as i32 - 1, |a, b| a + b)
    }
}

/// The lane's chunk of a token's values, and their scale where they have one.
pub(super) type Values<'k> = (Vec<Val<'k, f32>>, Option<Val<'k, f32>>);

/// Tokens that a group of lanes has in flight.
pub(super) struct Tokens<'k> {
    pub tokens: Vec<Token<'k>>,
    pub values: Vec<Values<'k>>,
    pub key_scales: Vec<Val<'k, f32>>,
}

pub(super) struct Token<'k> {
    pub index: Val<'k, i32>,
    pub exists: Val<'k, bool>,
    /// Page of the part.
    pub page: Val<'k, i32>,
    /// The lane's chunk of its key.
    pub key: [Val<'k, u32>; WORDS],
}

impl<'k> Tokens<'k> {
    pub(super) fn load(
        config: &CacheAttendConfig,
        work: &Work<'k>,
        lanes: &Lanes<'k>,
        page_heads: Shared<'k, i32>,
        start: Val<'k, i32>,
    ) -> Self {
        let bits = config.storage.page_bits();
        let (tokens, rows): (Vec<_>, Vec<_>) = (0..IN_FLIGHT as i32)
            .map(|u| {
                let index = start + lanes.group + u * lanes.groups;
                let exists = index.lt(work.last);
                let read = index.min(work.last - 1);
                let page = (read >> bits) - work.first_page;
                let row = work.pool.row(page_heads.at(page).load(), read);
                let key = work.pool.keys_of(row).at(lanes.chunk * WORDS as i32).load_vector::<4>();
                (Token { index, exists, page, key }, row)
            })
            .unzip();
        let values = rows.iter().map(|&row| config.values(&work.pool, row, lanes.chunk)).collect();
        let key_scales = rows.iter().map(|&row| work.pool.parts.key_scales.at(row).load()).collect();
        Tokens { tokens, values, key_scales }
    }

    /// A row's scores, −∞ where it does not see the token, and whether it does.
    pub(super) fn scores(
        &self,
        row: &Row<'k>,
        q: &Integers<'k>,
        biases: Shared<'k, f32>,
        lanes: &Lanes<'k>,
        softcap: Option<Val<'k, f32>>,
    ) -> Vec<(Val<'k, f32>, Val<'k, bool>)> {
        let scores = self.tokens.iter().zip(&self.key_scales).map(|(token, k_scale)| {
            let dot = |q: &[Val<'k, u32>; WORDS]| {
                let zero = q[0].code().constant(0i32);
                q.iter().zip(&token.key).fold(zero, |sum, (q, k)| q.dot_bytes(*k, sum))
            };
            let sum = lanes.sum((dot(&q.upper) << 8) + dot(&q.lower));
            let bias = biases.at(token.page).load();
            let score = sum.to_f32().mul_add(q.scale * *k_scale, bias);
            let score = softcap.map_or(score, |softcap| cap(score, softcap));
            let visible = token.exists & token.index.ge(row.start) & token.index.lt(row.end);
            (visible.select(score, f32::NEG_INFINITY), visible)
        });
        scores.collect()
    }

    /// Adds the tokens to a row, of whose scores these are (online softmax).
    pub(super) fn add_to(&self, row: &Row<'k>, scores: &[(Val<'k, f32>, Val<'k, bool>)]) {
        let max = scores.iter().fold(row.max.get(), |max, (score, _)| max.max(*score));
        let rescale = (row.max.get() - max).exp2();
        row.max.set(max);
        let p: Vec<_> = scores.iter().map(|(score, _)| (*score - max).exp2()).collect();
        let sum = p.iter().fold(row.sum.get() * rescale, |sum, p| sum + *p);
        row.sum.set(sum);
        row.out.iter().for_each(|out| out.set(out.get() * rescale));
        for ((p, (_, visible)), (v, scale)) in p.iter().zip(scores).zip(&self.values) {
            // A hidden row's scale may be NaN.
            let weight = scale.map_or(*p, |scale| visible.select(*p * scale, 0.0));
            for (out, v) in row.out.iter().zip(v) {
                out.set(v.mul_add(weight, out.get()));
            }
        }
    }
}
