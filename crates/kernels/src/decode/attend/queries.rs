//! A block's queries: as the operand of the product with codes, and in single precision for that with constants.

use half::f16;
use sage_core::DType;
use sage_ptx::{Code, FragmentA, FragmentB, Half, RoundedElement, Rows, Shared, Stored, Tile, Val, Var};

use super::codes::ABOVE_CODES;
use super::tokens::{CHUNK_WORDS, Place, Tokens, key_chunks};
use super::work::Work;
use super::{CHUNK, CacheAttendConfig, CacheAttendParams, GROUP, MAX_SPLIT_PAGES, ROWS, THREADS, WARPS};
use crate::integer::magnitude_bits;

/// Bits of a single's exponent, and those of twice the largest power of two whose inverse is a normal number.
const EXPONENT: i32 = 0x7f80_0000;
const EXPONENTS: i32 = 254 << 23;

/// The queries of a block's rows.
pub(super) struct Queries<'k> {
    config: CacheAttendConfig,
    /// The operand: for each step of the depth, each lane's four words.
    fragments: Shared<'k, u32>,
    /// Memory that the queries times the scores' factor lie in, `[ROWS, pitch]`, until the constants' products are made.
    pub scratch: Shared<'k, f32>,
    /// Factor of products with codes.
    factor: Val<'k, f32>,
}

/// Four neighbouring channels of two rows, eight rows apart: a lane's part of a step of the operand.
struct Part<'k> {
    /// Index in the operand, in lanes.
    index: Val<'k, i32>,
    rows: [Val<'k, i32>; 2],
    channel: Val<'k, i32>,
    elements: [[Val<'k, f32>; 4]; 2],
}

/// Words of shared memory that queries take.
pub(super) fn memory(config: &CacheAttendConfig) -> usize {
    4 * 32 * steps(config) + scratch(config)
}

/// Words of [`Queries::scratch`], where results are merged at the end unless there are stages for that.
fn scratch(config: &CacheAttendConfig) -> usize {
    let merging = if config.stages == 0 { super::merge::memory(config) } else { 0 };
    (ROWS * config.storage.pitch()).max(merging)
}

/// Steps of the depth.
fn steps(config: &CacheAttendConfig) -> usize {
    key_chunks(&config.storage) * CHUNK_WORDS
}

impl<'k> Queries<'k> {
    /// Reads them; they can be used after the block's next barrier.
    pub fn load<H: Half + Stored<Value = H>>(
        config: &CacheAttendConfig,
        code: &'k Code,
        p: &CacheAttendParams<'k>,
        work: &Work<'k>,
    ) -> Self {
        code.note("queries");
        let pitch = config.storage.pitch();
        let lanes = steps(config) * 32;
        let scratch = code.shared::<f32>("scratch", scratch(config));
        let fragments = code.shared::<u32>("queries", 4 * lanes);
        // All are asked for before the first is waited for.
        let parts: Vec<_> =
            (0..lanes / THREADS as usize).map(|turn| Part::load::<H>(config, p, work, turn)).collect();
        let [scale, inverse] = match config.dtype {
            DType::BF16 => power_of_two(code, &parts),
            _ => [code.constant(1.0); 2],
        };
        for part in &parts {
            let words = part.elements.map(|x| {
                let x = x.map(|x| x * scale);
                [0, 2].map(|i| x[i].pack::<f16>(x[i + 1]).reinterpret::<u32>())
            });
            let [[a, c], [b, d]] = words;
            fragments.at(part.index * 4).store_vector([a, b, c, d]);
            code.when(part.channel.lt(pitch as i32), || {
                for (row, x) in part.rows.iter().zip(part.elements) {
                    scratch.at(*row * pitch as i32 + part.channel).store_vector(x.map(|x| x * p.scale));
                }
            });
        }
        Queries { config: *config, fragments, scratch, factor: p.scale * inverse }
    }

    /// Products of the pages' constants with the queries, `[MAX_SPLIT_PAGES, ROWS]`, of rows that there are.
    pub fn biases(&self, code: &'k Code, work: &Work<'k>, page_heads: Shared<'k, i32>) -> Shared<'k, f32> {
        code.note("products of the pages' constants with the queries");
        let biases = code.shared::<f32>("biases", MAX_SPLIT_PAGES * ROWS);
        let pitch = self.config.storage.pitch();
        // Neighbouring lanes hold a page together, a chunk of channels each. Those without one multiply the first by zeros.
        let count = (pitch / CHUNK).next_power_of_two();
        let groups = (THREADS as usize / count) as i32;
        let (group, member) = code.thread().split_index(count);
        let active = member.lt((pitch / CHUNK) as i32);
        let channel = active.select(member, 0) * CHUNK as i32;
        code.range_by(0, work.pages, groups, |start| {
            let page = (start + group).min(work.pages - 1);
            let constants = work.pool.constants_of(page_heads.at(page).load()).at(channel);
            let constants: Vec<_> =
                (0..CHUNK as i32 / 4).flat_map(|i| constants.plus(4 * i).load_vector::<4>()).collect();
            code.range(0, work.rows(), |row| {
                let q = self.scratch.at(row * pitch as i32 + channel);
                let q = (0..CHUNK as i32 / 4).flat_map(|i| q.plus(4 * i).load_vector::<4>());
                let zero = code.constant(0.0);
                let sum = q.zip(&constants).fold(zero, |sum, (q, c)| q.mul_add(*c, sum));
                let sum = active.select(sum, 0.0).reduce_lanes(count as i32 - 1, |a, b| a + b);
                code.when(member.eq(0) & (start + group).lt(work.pages), || {
                    biases.at(page * ROWS as i32 + row).store(sum);
                });
            });
        });
        biases
    }

    /// What products of the queries with keys as they are multiplied, which are above codes, start from.
    pub fn below(&self) -> Rows<Val<'k, f32>> {
        let code = self.fragments.code();
        code.note("sums of the queries");
        let sums = Tile::new(code, ROWS, GROUP);
        let ones = code.constant(f16::ONES);
        sums.set_product(
            0.0,
            steps(&self.config),
            |step| self.operand(step),
            |_, _| [FragmentB::new([ones; 2]); 2],
        );
        Rows::from_fn(2, |slot| sums.at(slot, 0).get() * -ABOVE_CODES)
    }

    /// The operand at a step of the depth.
    fn operand(&self, step: usize) -> Vec<FragmentA<'k, f16>> {
        let lane = self.fragments.at(self.fragments.code().lane_index() * 4);
        vec![FragmentA::new(lane.plus(128 * step as i32).load_vector())]
    }

    /// Scores of a tile's tokens, in base 2, from products that start [`below`](Queries::below).
    pub fn scores(
        &self,
        tokens: &Tokens<'k, '_>,
        places: &[Place<'k>],
        (below, biases): (&Rows<Val<'k, f32>>, &Shared<'k, f32>),
        work: &Work<'k>,
    ) -> Tile<Var<'k, f32>> {
        let code = self.fragments.code();
        code.note("scores: queries * codes");
        let scores = Tile::new(code, ROWS, places.len() * GROUP);
        let keys = |step: usize, token: usize| tokens.keys(step, token);
        scores.set_product_from(below, steps(&self.config), |step| self.operand(step), keys);

        let factors = tokens.of_columns(tokens.key_scale() * self.factor);
        let last_row = work.rows() - 1;
        let biases = Rows::from_fn(2, |slot| {
            let row = work.lane_row(slot).min(last_row);
            let bias = |place: &Place<'k>| biases.at(place.page * ROWS as i32 + row).load();
            places.iter().map(bias).collect::<Vec<_>>()
        });
        scores.update(|slot, column, x| {
            x.mul_add(factors[column / 8 * 2 + column % 2], biases[slot][column / GROUP])
        });
        scores
    }
}

impl<'k> Part<'k> {
    fn load<H: Half + Stored<Value = H>>(
        config: &CacheAttendConfig,
        p: &CacheAttendParams<'k>,
        work: &Work<'k>,
        turn: usize,
    ) -> Self {
        let code = p.q.start.code();
        let head_dim = config.storage.head_dim as i32;
        let index = code.thread() + turn as i32 * THREADS as i32;
        let (step, lane) = (index >> 5, index & 31);
        let (chunk, word) = step.split_index(CHUNK_WORDS);
        // A quad's lanes have chunks next to each other.
        let channel = (chunk * 4 + (lane & 3)) * CHUNK as i32 + word * 4;
        let rows = [0, 8].map(|below| (lane >> 2) + below);
        let elements = rows.map(|row| {
            let row = work.row(row);
            let start = p.q.head(work.batch, row.head) + row.query.widen() * p.q.row_stride();
            let start = p.q.start.cast::<H>().at(start);
            std::array::from_fn(|i| {
                let channel = channel + i as i32;
                let x = start.at(channel.min(head_dim - 1)).load().to_f32();
                (row.exists & channel.lt(head_dim)).select(x, 0.0)
            })
        });
        Part { index, rows, channel, elements }
    }
}

/// The power of two that brings the largest finite element of a block's queries to [1, 2), and its inverse: bfloat16 has
/// a range that f16 lacks. What is 2¹⁴ times as small loses bits that scores of the block do not see.
fn power_of_two<'k>(code: &'k Code, parts: &[Part<'k>]) -> [Val<'k, f32>; 2] {
    let finite = |x: &Val<'k, f32>| {
        let bits = magnitude_bits(*x);
        bits.lt(EXPONENT).select(bits, 0)
    };
    let bits = parts.iter().flat_map(|part| part.elements.iter().flatten()).map(finite).reduce(Val::max);
    let maxima = code.shared::<i32>("maxima_of_queries", WARPS);
    let largest = bits.unwrap_or(code.constant(0)).warp_max();
    let of_warp = maxima.at(code.warp_index());
    code.when(code.lane_index().eq(0), || of_warp.store(largest));
    code.barrier();
    let largest = (0..WARPS as i32).map(|warp| maxima.plus(warp).load()).reduce(Val::max).unwrap_or(largest);
    let exponent = (largest & EXPONENT).max(1 << 23).min(EXPONENTS - (1 << 23));
    [(EXPONENTS - exponent).reinterpret::<f32>(), exponent.reinterpret::<f32>()]
}
