//! The blocks of keys of a row of the map: which are seen, which compete, and with what scores.

use sage_ptx::{Code, Global, Val, Var};

use super::tokens::Tokens;
use super::weight::{NO_SCORE, image, score, weight};

/// Lanes of a warp, which has a row.
pub(super) const LANES: i32 = 32;

/// Bits of a word of flags.
const BITS: usize = 32;

/// What there is to know of a row's blocks of keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'k> {
    pub code: &'k Code,
    pub keys: Tokens<'k>,
    /// The first block that some query of the row sees, and one past the last.
    pub seen: [Val<'k, i32>; 2],
    /// Scores of all blocks.
    pub scores: Global<'k, f32>,
    /// Where similarities are asked for.
    pub similar: Option<Similar<'k>>,
    /// Whether tokens of blocks are to be counted: where a block that is seen may have none, or must be whole.
    pub counts: bool,
    /// The first block that every query attends to, and one past the last.
    pub sink: [Val<'k, i32>; 2],
}

/// Which blocks of keys are similar.
#[derive(Clone, Copy, Debug)]
pub(super) struct Similar<'k> {
    /// Similarities of all blocks.
    pub similarities: Global<'k, f32>,
    /// What they must exceed.
    pub threshold: Val<'k, f32>,
    /// Whether a block with fewer tokens than others is not similar (1).
    pub whole_only: Val<'k, i32>,
}

/// A block of keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column<'k> {
    /// The image of its score, or [`NO_SCORE`] where it does not compete.
    pub image: Val<'k, u32>,
    /// Whether it is kept in any case.
    pub kept: Val<'k, bool>,
}

impl<'k> Similar<'k> {
    /// Whether the mean of a block, which is whole or not, stands for its tokens.
    #[track_caller]
    pub fn holds(&self, index: Val<'k, i32>, is_whole: Val<'k, bool>) -> Val<'k, bool> {
        let exceeds = self.similarities.at(index).load().gt(self.threshold);
        exceeds & (self.whole_only.eq(0) | is_whole)
    }
}

impl<'k> Row<'k> {
    /// Block `index`, which need not be there. At least one block is seen.
    #[track_caller]
    pub fn column(&self, index: Val<'k, i32>) -> Column<'k> {
        let [start, end] = self.seen;
        let inside = index.max(start).min(end - 1);
        let count = self.counts.then(|| self.keys.of_block(inside).1);
        let is_true = self.code.constant(true);
        let seen = index.eq(inside) & count.map_or(is_true, |count| count.gt(0));
        let score = self.scores.at(inside).load();
        let [first, last] = self.sink;
        let sink = seen & index.ge(first) & index.lt(last);
        let (competes, kept) = match &self.similar {
            None => (seen, sink),
            Some(similar) => {
                let similar =
                    similar.holds(inside, count.map_or(is_true, |count| self.keys.are_whole(count)));
                (seen & similar, sink | (seen & !similar))
            }
        };
        Column { image: competes.select(image(score), NO_SCORE), kept }
    }
}

/// A lane's blocks of keys, every 32nd of the row's: in registers, or read and computed each time.
#[derive(Debug)]
pub(super) struct Columns<'k> {
    row: Row<'k>,
    /// Blocks of keys of the row.
    number: Val<'k, i32>,
    held: Option<Held<'k>>,
    /// The largest score, where weights are computed each time.
    max: Option<Val<'k, f32>>,
}

#[derive(Debug)]
struct Held<'k> {
    images: Vec<Val<'k, u32>>,
    /// What is kept in any case, a bit for each.
    kept: Vec<Val<'k, u32>>,
    weights: Vec<Val<'k, u32>>,
}

/// One of a lane's blocks, as [`Columns::each`] hands it over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item<'k> {
    /// The block.
    pub index: Val<'k, i32>,
    /// See [`Column::image`].
    pub image: Val<'k, u32>,
    /// Its place in registers, where it is there.
    place: Option<usize>,
}

impl<'k> Columns<'k> {
    /// The `number` blocks of keys of a row, of which registers hold `per_lane` in each lane, or none.
    #[track_caller]
    pub fn new(row: Row<'k>, number: Val<'k, i32>, per_lane: Option<usize>) -> Self {
        let code = row.code;
        let hold = |per_lane: usize| {
            let lane = code.lane_index();
            let columns: Vec<_> = (0..per_lane).map(|i| row.column(lane + (i as i32 * LANES))).collect();
            let word = |columns: &[Column<'k>]| {
                let bits = columns.iter().enumerate().map(|(bit, column)| column.kept.select(1u32 << bit, 0));
                bits.reduce(|a, b| a | b).unwrap_or(code.constant(0))
            };
            Held {
                images: columns.iter().map(|column| column.image).collect(),
                kept: columns.chunks(BITS).map(word).collect(),
                weights: Vec::new(),
            }
        };
        Columns { row, number, held: per_lane.map(hold), max: None }
    }

    /// Makes weights known, in a row whose largest score is `max`.
    #[track_caller]
    pub fn weigh(&mut self, max: Val<'k, f32>) {
        match &mut self.held {
            Some(held) => held.weights = held.images.iter().map(|&image| weight_of(image, max)).collect(),
            None => self.max = Some(max),
        }
    }

    /// Calls `body` for each of the lane's blocks, in order, and for some that are not there: they do not compete. All
    /// lanes call it together.
    #[track_caller]
    pub fn each(&self, mut body: impl FnMut(Item<'k>)) {
        let (code, lane) = (self.row.code, self.row.code.lane_index());
        match &self.held {
            Some(held) => held.images.iter().enumerate().for_each(|(place, &image)| {
                body(Item { index: lane + (place as i32 * LANES), image, place: Some(place) });
            }),
            None => code.range_by(0, self.number, LANES, |first| {
                let index = first + lane;
                body(Item { index, image: self.row.column(index).image, place: None });
            }),
        }
    }

    /// What a block weighs, after [`Columns::weigh`]; nothing where it does not compete.
    #[track_caller]
    pub fn weight(&self, item: &Item<'k>) -> Val<'k, u32> {
        match (&self.held, item.place, self.max) {
            (Some(held), Some(place), _) => held.weights[place],
            (_, _, Some(max)) => weight_of(item.image, max),
            _ => self.row.code.constant(0),
        }
    }

    /// Whether a block is kept in any case.
    #[track_caller]
    pub fn is_kept(&self, item: &Item<'k>) -> Val<'k, bool> {
        match (&self.held, item.place) {
            (Some(held), Some(place)) => (held.kept[place / BITS] & (1u32 << (place % BITS))).ne(0u32),
            _ => self.row.column(item.index).kept,
        }
    }

    /// How many blocks compete, the largest image among them, and whether all of their scores are finite.
    #[track_caller]
    pub fn survey(&self) -> (Val<'k, i32>, Val<'k, u32>, Val<'k, bool>) {
        let code = self.row.code;
        let [count, odd] = [(); 2].map(|()| code.var(0i32));
        let max = code.var(NO_SCORE);
        self.each(|Item { image, .. }| {
            let competes = image.ne(NO_SCORE);
            let magnitude = score(image).abs().reinterpret::<i32>();
            let is_odd = competes & magnitude.ge(f32::INFINITY.to_bits() as i32);
            count.set(count.get() + competes.select(1, 0));
            odd.set(odd.get() | is_odd.select(1, 0));
            max.set(max.get().max(image));
        });
        (count.get().warp_sum(), max.get().warp_max(), !code.any(odd.get().ne(0)))
    }

    /// How many blocks have images of at least `least`, and with `weighed` what they weigh together, else 0.
    #[track_caller]
    pub fn at_least(&self, least: Val<'k, u32>, weighed: bool) -> (Val<'k, i32>, Val<'k, u64>) {
        let code = self.row.code;
        let count = code.var(0i32);
        let weight = weighed.then(|| WeightSum::new(code));
        self.each(|item| {
            let counts = item.image.ge(least);
            count.set(count.get() + counts.select(1, 0));
            if let Some(weight) = &weight {
                weight.add(counts.select(self.weight(&item), 0u32));
            }
        });
        (count.get().warp_sum(), weight.map_or(code.constant(0u64), |weight| weight.of_warp()))
    }
}

/// A sum of weights in 64 bits.
struct WeightSum<'k>(Var<'k, u64>);

impl<'k> WeightSum<'k> {
    fn new(code: &'k Code) -> Self {
        WeightSum(code.var(0u64))
    }

    #[track_caller]
    fn add(&self, weight: Val<'k, u32>) {
        self.0.set(self.0.get() + weight.widen());
    }

    /// The sum of all lanes, each of which has less than 2⁵⁴: fewer than 2²⁴ weights of at most 2³⁰.
    #[track_caller]
    fn of_warp(&self) -> Val<'k, u64> {
        // 32 parts of 27 bits fit 32 bits.
        const BITS: i32 = 27;
        let sum = self.0.get();
        let low = (sum.narrow() & ((1 << BITS) - 1)).warp_sum();
        let high = (sum >> BITS).narrow().warp_sum();
        low.widen() + (high.widen() << BITS)
    }
}

/// What a score weighs by its image; nothing where there is none.
#[track_caller]
fn weight_of<'k>(image: Val<'k, u32>, max: Val<'k, f32>) -> Val<'k, u32> {
    image.ne(NO_SCORE).select(weight(score(image), max), 0)
}
