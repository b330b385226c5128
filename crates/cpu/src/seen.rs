//! What the queries of each key head see of its keys, all of them together: the rules of
//! [`sage_core::oracle::SeenKeys`], for tensors of any size.

use std::ops::Range;

use rayon::prelude::*;
use sage_core::{Call, Element, Mask, Sequence, TensorView, View};

use crate::mask_rows::with_row;
use crate::tile::TILE_KEYS;

/// What the queries of a key head see of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Seen {
    /// No query sees it: nothing that K and V hold there may have any influence.
    Hidden,
    /// Some query sees it, but only with a bias that programs write for padding: it enters no mean and no scale.
    Padding,
    /// It counts.
    Counts,
}

/// What the queries of a key head see of each of its keys.
#[derive(Debug)]
pub(crate) struct SeenKeys {
    keys: Vec<Seen>,
    /// The keys that count, in order.
    pub counted: Vec<u32>,
}

impl SeenKeys {
    /// None where every key counts.
    fn new(mut keys: Vec<Seen>) -> Option<Self> {
        if !keys.contains(&Seen::Counts) {
            // Where nothing else is to be seen, padding counts.
            keys.iter_mut().filter(|key| **key == Seen::Padding).for_each(|key| *key = Seen::Counts);
        }
        let counted: Vec<u32> =
            (0u32..).zip(&keys).filter(|(_, key)| **key == Seen::Counts).map(|(j, _)| j).collect();
        (counted.len() < keys.len()).then_some(SeenKeys { keys, counted })
    }

    /// Some of the keys.
    pub fn range(&self, keys: Range<usize>) -> &[Seen] {
        &self.keys[keys]
    }

    /// Whether no query sees any of these keys.
    pub fn all_hidden(&self, keys: Range<usize>) -> bool {
        self.keys[keys].iter().all(|key| *key == Seen::Hidden)
    }
}

/// The seen keys of each key head of a call. Heads whose masks are the same share theirs.
#[derive(Debug, Default)]
pub(crate) struct SeenHeads {
    /// The place in `distinct` of each sequence and key head; empty where every key of all heads counts.
    index: Vec<usize>,
    distinct: Vec<Option<SeenKeys>>,
    num_kv_heads: usize,
}

/// Row runs times chunks of keys below which another thread would cost more than it saves.
const WORTH_A_THREAD: usize = 256;

impl SeenHeads {
    /// Looks at the masks of a call.
    pub fn of(call: &Call<'_>) -> Self {
        let masked = call.mask.is_some();
        if !masked && (call.leaves_hidden_keys_out() || call.problem.band.is_full()) {
            return SeenHeads::default();
        }
        let num_kv_heads = call.problem.num_kv_heads;
        let differs = |dimension: usize| {
            call.mask.as_ref().is_some_and(|mask| mask.geometry().strides()[dimension] != 0)
        };
        let (by_batch, by_head) = (differs(0), differs(1));
        let mut heads: Vec<(usize, Sequence, usize)> = Vec::new();
        let mut index = Vec::with_capacity(call.sequences().len() * num_kv_heads);
        // Lengths are mostly those of the batch entry before.
        let mut last = None;
        for (sequence_index, sequence) in call.sequences().enumerate() {
            let lengths = (sequence.q_len, sequence.kv_len);
            for kv_head in 0..num_kv_heads {
                let same = |&(of, by): &((usize, usize), usize)| {
                    of == lengths && (!by_batch || by == sequence_index)
                };
                if by_head || !last.as_ref().is_some_and(same) {
                    heads.push((sequence_index, sequence, kv_head));
                    last = Some((lengths, sequence_index));
                }
                index.push(heads.len() - 1);
            }
        }
        let scan = Scan { call, shares_heads: !by_head };
        let chunks: Vec<(usize, usize)> = heads
            .iter()
            .enumerate()
            .flat_map(|(at, (_, sequence, _))| {
                (0..sequence.kv_len).step_by(TILE_KEYS).map(move |first| (at, first))
            })
            .collect();
        let worth = (WORTH_A_THREAD / call.problem.q_len.max(1)).max(1);
        let scanned: Vec<[Seen; TILE_KEYS]> = chunks
            .par_iter()
            .with_min_len(worth)
            .map(|&(at, first)| {
                let (index, sequence, kv_head) = &heads[at];
                let last = sequence.kv_len.min(first + TILE_KEYS);
                scan.chunk(*index, sequence, *kv_head, first..last)
            })
            .collect();
        let mut scanned = scanned.into_iter();
        let distinct = heads
            .iter()
            .map(|(_, sequence, _)| {
                let chunks = scanned.by_ref().take(sequence.kv_len.div_ceil(TILE_KEYS));
                let mut keys: Vec<Seen> = chunks.flatten().collect();
                keys.truncate(sequence.kv_len);
                SeenKeys::new(keys)
            })
            .collect();
        SeenHeads { index, distinct, num_kv_heads }
    }

    /// Those of one head; none where all of its keys count.
    pub fn head(&self, sequence_index: usize, kv_head: usize) -> Option<&SeenKeys> {
        let at = self.index.get(sequence_index * self.num_kv_heads + kv_head)?;
        self.distinct[*at].as_ref()
    }
}

/// Bits that a chunk's scan collects for each key.
const VISIBLE: u32 = 1;
const COUNTS: u32 = 2;

struct Scan<'a, 'c> {
    call: &'a Call<'c>,
    /// Whether all heads have the same masks.
    shares_heads: bool,
}

impl Scan<'_, '_> {
    /// What the queries see of `keys`, which are at most [`TILE_KEYS`].
    fn chunk(
        &self,
        sequence_index: usize,
        sequence: &Sequence,
        kv_head: usize,
        keys: Range<usize>,
    ) -> [Seen; TILE_KEYS] {
        let call = self.call;
        let group_size = call.problem.group_size();
        let first_head = kv_head * group_size;
        let heads = first_head..first_head + if self.shares_heads { 1 } else { group_size };
        // Neighbouring rows that the masks do not tell apart.
        let run = match &call.mask {
            Some(mask) if mask.geometry().strides()[2] != 0 => 1,
            _ => sequence.q_len.max(1),
        };
        let runs = sequence.q_len.div_ceil(run);
        // Most masks show a key to the row on its diagonal, where the search begins: all of a chunk to the last one's.
        let diagonal = (keys.end + sequence.q_len).saturating_sub(sequence.kv_len + 1);
        let start = (diagonal / run).min(runs);
        let mut found = [0; TILE_KEYS];
        'search: for head in heads {
            for at in (start..runs).chain(0..start) {
                let (first, last) = (at * run, sequence.q_len.min((at + 1) * run) - 1);
                let band = |row: usize| call.problem.band.keys(row, sequence.q_len, sequence.kv_len);
                // From one row to the next both ends of a band move by at most one key.
                let seen = band(first).start.max(keys.start)..band(last).end.min(keys.end);
                if seen.is_empty() {
                    continue;
                }
                self.row([sequence_index, head, first], seen, keys.start, &mut found);
                if found[..keys.len()].iter().fold(COUNTS, |all, key| all & key) == COUNTS {
                    break 'search;
                }
            }
        }
        found.map(|bits| match bits {
            0 => Seen::Hidden,
            VISIBLE => Seen::Padding,
            _ => Seen::Counts,
        })
    }

    /// Adds what one row sees of `keys`, counted from the sequence's first; `found` counts from `origin`.
    fn row(&self, [batch, head, row]: [usize; 3], keys: Range<usize>, origin: usize, found: &mut [u32]) {
        let at = [batch, head, row, keys.start];
        let found = &mut found[keys.start - origin..keys.end - origin];
        match &self.call.mask {
            None => found.fill(VISIBLE | COUNTS),
            Some(Mask::Bool(mask)) => with_row(mask, at, found.len(), |visible| {
                let both = |(found, &visible): (&mut u32, &bool)| *found |= u32::from(visible) * 3;
                found.iter_mut().zip(visible).for_each(both);
            }),
            Some(mask @ Mask::Additive(view)) => {
                let padding = mask.padding_bias();
                match view {
                    TensorView::F32(view) => biases(view, at, padding, found),
                    TensorView::F16(view) => biases(view, at, padding, found),
                    TensorView::BF16(view) => biases(view, at, padding, found),
                }
            }
        }
    }
}

fn biases<E: Element>(mask: &View<'_, E>, at: [usize; 4], padding: f32, found: &mut [u32]) {
    let mut wide = [0f32; TILE_KEYS];
    let wide = &mut wide[..found.len()];
    with_row(mask, at, found.len(), |bias| E::widen(bias, wide));
    for (found, bias) in found.iter_mut().zip(wide) {
        // A bias of NaN is no padding: it is to be seen.
        let (visible, padding) = (*bias != f32::NEG_INFINITY, *bias <= padding);
        *found |= u32::from(visible) | u32::from(!padding) << 1;
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use sage_core::{Alignment, Band, BlockMask, DType, Inputs, Lengths, Options, Tensor, oracle};

    use super::*;

    const SIZES: [usize; 4] = [2, 4, 70, 300];

    /// What masks hold: bias of each kind.
    const BIASES: [f32; 5] = [0.0, -1.0, f32::NEG_INFINITY, f32::MIN, f32::NAN];

    fn check(call: &Call<'_>, what: &str) {
        let heads = SeenHeads::of(call);
        for (at, sequence) in call.sequences().enumerate() {
            for kv_head in 0..call.problem.num_kv_heads {
                let expected = oracle::SeenKeys::of(call, &sequence, kv_head);
                let found = heads.head(at, kv_head);
                assert_eq!(found.is_none(), expected.counted().len() == expected.len(), "{what}");
                for j in 0..expected.len() {
                    let seen = found.map_or(Seen::Counts, |found| found.range(j..j + 1)[0]);
                    let wanted = match (expected.counts(j), expected.is_visible(j)) {
                        (true, _) => Seen::Counts,
                        (false, true) => Seen::Padding,
                        (false, false) => Seen::Hidden,
                    };
                    assert_eq!(seen, wanted, "{what}: key {j} of sequence {at}, head {kv_head}");
                }
                if let Some(found) = found {
                    let counted: Vec<u32> = expected.counted().iter().map(|&j| j as u32).collect();
                    assert_eq!(found.counted, counted, "{what}");
                }
            }
        }
    }

    #[test]
    fn they_are_the_oracles_for_every_mask() {
        let [batch, heads, q_len, kv_len] = SIZES;
        let zeros =
            |heads, rows| Tensor::new(vec![0.0; batch * heads * rows], &[batch, heads, rows, 1]).unwrap();
        let (q, k) = (zeros(heads, q_len), zeros(2, kv_len));
        let bands = [
            Band::FULL,
            Band::causal(Alignment::BottomRight),
            Band { left: Some(40), right: Some(3), alignment: Alignment::TopLeft },
        ];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (case, band) in (0..160).zip(bands.into_iter().cycle()) {
            // Every set of dimensions that are not broadcast, with few and many hidden keys.
            let shape: Vec<usize> = (0..4).map(|d| if case >> d & 1 == 0 { 1 } else { SIZES[d] }).collect();
            let rare = [0.02, 0.5, 0.999][case % 3];
            let mut draw = |n: usize, p: f64| (0..n).map(|_| rng.random_bool(p)).collect::<Vec<bool>>();
            let visible = draw(shape.iter().product(), rare);
            let padding = draw(visible.len(), 0.5);
            let bias = |(&visible, &padding): (&bool, &bool)| match (visible, padding) {
                (true, _) => BIASES[case % 2],
                (false, true) => f32::MIN,
                (false, false) => BIASES[2 + case % 3],
            };
            let dtype = DType::ALL[case % 3];
            let lowest = Tensor::new(vec![f32::MIN], &[1]).unwrap().to_dtype(dtype).to_f32_vec()[0];
            // To f16 and bf16 the lowest single is −∞, so what they have for padding is their own.
            let lowest =
                if lowest.is_finite() { lowest } else { -sage_core::padding_bias(dtype).abs() * 1.5 };
            let bias: Vec<f32> = visible
                .iter()
                .zip(&padding)
                .map(bias)
                .map(|x| if x == f32::MIN { lowest } else { x })
                .collect();
            let bias = Tensor::new(bias, &shape).unwrap().to_dtype(dtype);
            let mask = match case / 16 % 3 {
                0 => None,
                1 => Some(Mask::Bool(View::contiguous("mask", &visible, &shape).unwrap())),
                _ => Some(Mask::Additive(bias.view())),
            };
            let (block_q, block_k) = [(16, 64), (70, 9), (1, 300), (33, 128)][case % 4];
            let block_shape = [
                [1, batch][case % 2],
                [1, heads][case / 2 % 2],
                [1, q_len.div_ceil(block_q)][case / 4 % 2],
                kv_len.div_ceil(block_k),
            ];
            let blocks = draw(block_shape.iter().product(), 0.4);
            let blocks = View::contiguous("block_mask", &blocks, &block_shape).unwrap();
            let block_mask = (case % 5 < 2).then_some(BlockMask { blocks, block_q, block_k });
            let kv_lens = [300, [300, 170][case / 3 % 2]];
            let inputs = Inputs::new(q.view(), k.view(), k.view())
                .mask(mask)
                .block_mask(block_mask)
                .lengths(if case % 7 < 4 { Lengths::Dense } else { Lengths::KvLens(&kv_lens) });
            let call = Call::check(&inputs, &Options::default().band(band)).unwrap();
            check(&call, &format!("case {case}: {shape:?} {dtype} {band:?}"));
        }
    }
}
