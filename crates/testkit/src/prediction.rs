//! Predictions of block maps: cases that every backend predicts as the oracle does, bit for bit.

use sage_core::sparse::{BlockMap, PaddedBlocks, Predictor, Select};
use sage_core::{Alignment, Band, Call, DType, Geometry, Inputs, Layout, Lengths, Options};

use crate::{Memory, Sequences, for_each_index, normal};

/// What tokens hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// Runs of 50 tokens share a direction, from nearly all of a token to nearly nothing of it; keys have a bias in
    /// some channels, which smoothing takes away.
    Runs,
    /// As [`Tokens::Runs`], with a few keys a hundred times the others.
    Outliers,
    /// All alike: every score is the same.
    Alike,
    /// Zeros.
    Zeros,
    /// As [`Tokens::Runs`], with this in a channel of one query and one key.
    Spoiled(Spoil),
}

/// What is no finite number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoil {
    /// NaN.
    Nan,
    /// −∞.
    Infinity,
}

/// A prediction.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// How blocks are predicted.
    pub predictor: Predictor,
    /// What queries see at all.
    pub band: Band,
    /// Element type.
    pub dtype: DType,
    /// Batch entries, of tensors that are not packed.
    pub batch: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Queries, of tensors that are not packed.
    pub q_len: usize,
    /// Keys, of tensors that are not packed.
    pub kv_len: usize,
    /// Channels.
    pub head_dim: usize,
    /// Lengths of the sequences.
    pub sequences: Sequences,
    /// Which dimension of tokens or heads lies outside in memory.
    pub layout: Layout,
    /// Elements between rows.
    pub gap: usize,
    /// What tokens hold.
    pub tokens: Tokens,
}

impl Prediction {
    /// By `predictor`, of two query heads over one key head in f16.
    pub fn of(predictor: Predictor) -> Self {
        Prediction {
            predictor,
            band: Band::FULL,
            dtype: DType::F16,
            batch: 1,
            q_heads: 2,
            kv_heads: 1,
            q_len: 333,
            kv_len: 550,
            head_dim: 64,
            sequences: Sequences::Dense,
            layout: Layout::Hnd,
            gap: 0,
            tokens: Tokens::Runs,
        }
    }

    /// Queries and keys as `[batch, heads, tokens, head_dim]`, or packed as `[tokens, heads, head_dim]`.
    pub fn tensors(&self) -> [Memory; 2] {
        let last = |boundaries: &[i32]| boundaries.last().map_or(0, |&end| end as usize);
        let [batch, q_rows, kv_rows] = match &self.sequences {
            Sequences::Packed(q, k) => [1, last(q), last(k)],
            _ => [self.batch, self.q_len, self.kv_len],
        };
        [(self.q_heads, q_rows, false), (self.kv_heads, kv_rows, true)]
            .map(|(heads, len, keys)| self.tensor([batch, heads, len], keys))
    }

    fn tensor(&self, [batch, heads, len]: [usize; 3], keys: bool) -> Memory {
        let (shape, row) = ([batch, heads, len, self.head_dim], self.head_dim + self.gap);
        let (head, token) = match self.layout {
            Layout::Nhd => (row, heads * row),
            Layout::Hnd => (len * row, row),
        };
        let strides = [heads * len * row, head, token, 1].map(|stride| stride as i64);
        let geometry = match self.sequences {
            Sequences::Packed(..) => {
                let strides = [token, head, 1].map(|stride| stride as i64);
                Geometry::strided("tensor", &[len, heads, self.head_dim], &strides, 0)
            }
            _ => Geometry::strided("tensor", &shape, &strides, 0),
        }
        .unwrap();
        // The same directions in queries and keys, so that some blocks are alike.
        let directions = normal(7, 64 * self.head_dim);
        let noise = normal(if keys { 8 } else { 9 }, shape.iter().product());
        let mut memory = vec![f32::NAN; batch * heads * len * row];
        let mut number = 0;
        for_each_index(&shape, |index| {
            let [_, h, i, c] = [0, 1, 2, 3].map(|at| index[at]);
            let run = i / 50 + 5 * h;
            let bias = if keys && c % 5 == 2 { 6.0 } else { 0.0 };
            let own = noise[number] * (run % 4) as f32 * 0.4;
            let x = directions[run % 64 * self.head_dim + c] + own + bias;
            let spoiled = i == len * 2 / 3 && c == self.head_dim / 2 && h == 0;
            memory[(0..4).map(|at| index[at] * strides[at] as usize).sum::<usize>()] = match self.tokens {
                Tokens::Outliers if keys && i % 97 == 50 => 100.0 * x,
                Tokens::Alike => 0.37 * (c % 7) as f32 - 1.0,
                Tokens::Zeros => 0.0,
                Tokens::Spoiled(Spoil::Nan) if spoiled => f32::NAN,
                Tokens::Spoiled(Spoil::Infinity) if spoiled => f32::NEG_INFINITY,
                _ => x,
            };
            number += 1;
        });
        Memory::new(memory, self.dtype, geometry)
    }

    /// The call of these tensors, in which the keys stand for values as well: they have no part in a prediction.
    pub fn call<'a>(&'a self, [q, k]: &'a [Memory; 2]) -> Call<'a> {
        let inputs = Inputs::new(q.view(), k.view(), k.view()).lengths(self.lengths());
        Call::check_sparse(&inputs, &Options::default().band(self.band), &self.predictor).unwrap()
    }

    /// The lengths as a call takes them.
    pub fn lengths(&self) -> Lengths<'_> {
        match &self.sequences {
            Sequences::Dense | Sequences::Staggered => Lengths::Dense,
            Sequences::KvLens(kv_lens) => Lengths::KvLens(kv_lens),
            Sequences::Packed(q, k) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
        }
    }

    /// The map that the oracle predicts.
    pub fn expected(&self) -> BlockMap {
        let tensors = self.tensors();
        self.predictor.map(&self.call(&tensors)).unwrap()
    }

    /// Compares a map's bytes with the oracle's.
    #[track_caller]
    pub fn compare(&self, by: &str, bytes: &[u8]) {
        let expected = self.expected();
        let flags: Vec<u8> = expected.flags().iter().map(|&kept| u8::from(kept)).collect();
        assert_eq!(bytes.len(), flags.len(), "{by}: {self:?}");
        let columns = expected.shape()[3].max(1);
        let differing =
            bytes.chunks(columns).zip(flags.chunks(columns)).position(|(found, flags)| found != flags);
        if let Some(row) = differing {
            let drawn = |row: &[u8]| row.iter().map(|byte| char::from(b'0' + byte)).collect::<String>();
            let at = row * columns..(row + 1) * columns;
            panic!(
                "{by}: row {row} is {}, expected {}: {self:?}",
                drawn(&bytes[at.clone()]),
                drawn(&flags[at])
            );
        }
    }
}

/// Every kind of selection.
fn selects() -> [Select; 5] {
    [
        Select::TopK(0.3.into()),
        Select::Count(3),
        Select::Cdf(0.8.into()),
        Select::TopKTopP { k: 0.1.into(), p: 0.6.into() },
        Select::Sigmas(0.5.into()),
    ]
}

/// Predictions that differ in everything that a backend can do differently.
pub fn predictions() -> Vec<Prediction> {
    let causal = Band::causal(Alignment::TopLeft);
    let late = Band::causal(Alignment::BottomRight);
    let window = Band { left: Some(200), right: Some(30), alignment: Alignment::BottomRight };
    let ahead = Band { left: Some(100), right: Some(0), alignment: Alignment::Offset(70) };
    let mut all = every_selection(&[Band::FULL, causal, late, window]);
    let sparge = |cdf: f32| Predictor::sparge_attn(Select::Cdf(cdf.into()), 0.28);
    let of = Prediction::of;

    // Sizes of heads, blocks and batches.
    for (head_dim, gap, dtype) in [
        (128, 0, DType::BF16),
        (72, 0, DType::F16),
        (256, 0, DType::BF16),
        (8, 0, DType::F16),
        (64, 3, DType::BF16),
        (33, 0, DType::F16),
        (1, 0, DType::BF16),
    ] {
        for layout in [Layout::Hnd, Layout::Nhd] {
            let case =
                Prediction { head_dim, gap, dtype, layout, q_len: 130, kv_len: 200, ..of(sparge(0.7)) };
            all.push(Prediction { batch: 2, q_heads: 4, kv_heads: 2, ..case });
        }
    }
    for blocks in [(1, 1), (7, 3), (200, 300), (1000, 9)] {
        let predictor = Predictor::new(Select::TopK(0.2.into())).smooth_k(true);
        let predictor = predictor.blocks(blocks.0, blocks.1).similarity(0.2);
        all.push(Prediction { q_len: 70, kv_len: 700, band: late, ..of(predictor) });
    }
    // More blocks than registers hold, and more than a fold of one turn.
    for select in selects() {
        let predictor = Predictor::new(select).blocks(64, 1).smooth_k(true);
        all.push(Prediction { q_len: 70, kv_len: 2100, head_dim: 8, ..of(predictor) });
    }
    all.extend(rules(&[sparge(0.6), Predictor::sol_attn(0.3), Predictor::sparge_attn2(0.2, 0.5)], causal));

    // Lengths, with every band.
    for band in [Band::FULL, causal, late, window, ahead] {
        let sequences = Sequences::KvLens(vec![550, 0, 301, 64]);
        for predictor in [sparge(0.7), Predictor::sla(0.3), Predictor::sol_attn(0.5)] {
            all.push(Prediction { batch: 4, sequences: sequences.clone(), band, ..of(predictor) });
        }
    }
    all.extend(packed(&[Band::FULL, causal, late, window, ahead]));
    // Data.
    let spoiled = [Spoil::Nan, Spoil::Infinity].map(Tokens::Spoiled);
    for tokens in [Tokens::Outliers, Tokens::Alike, Tokens::Zeros].into_iter().chain(spoiled) {
        for select in selects() {
            for similarity in [None, Some(0.4)] {
                // One token that is no number makes all smoothed keys so.
                let mut predictor = Predictor::new(select.clone()).smooth_k(similarity.is_none());
                predictor.similarity = similarity.map(Into::into);
                all.push(Prediction { tokens, q_len: 130, kv_len: 330, ..of(predictor) });
            }
        }
        all.push(Prediction { tokens, dtype: DType::BF16, band: causal, ..of(sparge(0.5)) });
    }
    // Few tokens, or none.
    for (q_len, kv_len) in [(1, 1), (1, 300), (300, 1), (5, 0), (0, 5)] {
        all.push(Prediction { q_len, kv_len, ..of(sparge(0.9)) });
        all.push(Prediction { q_len, kv_len, ..of(Predictor::sol_attn(1.0)) });
    }
    all
}

/// Every selection and size of blocks with every element type and, one after the other, each of the bands.
fn every_selection(bands: &[Band]) -> Vec<Prediction> {
    let mut all = Vec::new();
    for (number, (block_q, block_k)) in
        [(64, 64), (128, 64), (64, 128), (128, 128), (48, 80)].into_iter().enumerate()
    {
        for (of_select, select) in selects().into_iter().enumerate() {
            for dtype in [DType::F16, DType::BF16] {
                let mut predictor = Predictor::new(select.clone()).blocks(block_q, block_k);
                predictor.smooth_k = (number + of_select) % 2 == 0;
                predictor.similarity = ((number + of_select) % 3 != 0).then(|| 0.25.into());
                let band = bands[(number + of_select) % bands.len()];
                all.push(Prediction { dtype, band, ..Prediction::of(predictor) });
            }
        }
    }
    all
}

/// Packed sequences, some without queries or keys, with every selection, each of the bands, and rows in either order.
fn packed(bands: &[Band]) -> Vec<Prediction> {
    let [q, k] = [[0, 70, 70, 71, 330, 460], [0, 90, 300, 300, 301, 850]].map(Vec::from);
    let mut all = Vec::new();
    for (number, select) in selects().into_iter().enumerate() {
        for (of_band, &band) in bands.iter().enumerate() {
            let mut predictor = Predictor::new(select.clone()).blocks([64, 48][number % 2], 64);
            predictor.smooth_k = (number + of_band) % 2 == 0;
            predictor.similarity = ((number + of_band) % 3 != 0).then(|| 0.25.into());
            let layout = [Layout::Nhd, Layout::Hnd][of_band % 2];
            let sequences = Sequences::Packed(q.clone(), k.clone());
            all.push(Prediction { sequences, band, layout, ..Prediction::of(predictor) });
        }
    }
    let sparge = Predictor::sparge_attn(Select::TopK(vec![0.2, 0.5].into()), vec![0.1, 0.4]);
    let of_heads = Prediction { q_heads: 4, kv_heads: 2, ..Prediction::of(Predictor::sla(0.3)) };
    for (head_dim, gap, dtype) in
        [(128, 0, DType::BF16), (72, 0, DType::F16), (33, 0, DType::BF16), (64, 3, DType::F16)]
    {
        let sequences = Sequences::Packed(vec![0, 130, 200], vec![0, 190, 200]);
        all.push(Prediction { sequences, head_dim, gap, dtype, ..of_heads.clone() });
    }
    let sinks = sparge.clone().sink_k(0..1).sink_q(1..2).original_tails(true);
    let padded = |sizes: &[i32], block: usize| PaddedBlocks::new(sizes, block).unwrap();
    let padded = sparge.clone().q_padding(padded(&[40, 0, 17], 128)).k_padding(padded(&[3, 64, 0, 10], 64));
    all.push(Prediction { sequences: Sequences::Packed(q.clone(), k.clone()), ..Prediction::of(sinks) });
    let sequences = Sequences::Packed(vec![0, 384, 414], vec![0, 130, 386]);
    all.push(Prediction { sequences, ..Prediction::of(padded) });
    // None at all, and none with a query.
    let without = |q: &[i32], k: &[i32]| Sequences::Packed(q.to_vec(), k.to_vec());
    for sequences in
        [without(&[0], &[0]), without(&[0, 0, 0], &[0, 90, 100]), without(&[0, 9, 80], &[0, 0, 0])]
    {
        all.push(Prediction { sequences, ..Prediction::of(sparge.clone()) });
    }
    all
}

/// Each of these predictors with every rule beside the selection.
fn rules(predictors: &[Predictor], causal: Band) -> Vec<Prediction> {
    let mut all = Vec::new();
    for predictor in predictors {
        let [block_q, block_k] = [predictor.block_q, predictor.block_k];
        let with = |predictor: Predictor| Prediction { band: causal, ..Prediction::of(predictor) };
        all.push(with(predictor.clone().sink_k(0..1).sink_q(1..2)));
        all.push(with(predictor.clone().sink_k(2..90).sink_q(7..9)));
        all.push(with(predictor.clone().similarity(0.3).original_tails(true)));
        all.push(with(predictor.clone().similarity(vec![0.1, 0.6])));
        let (q_sizes, k_sizes) = ([40, 0, 17, 64], [3, 64, 0, 10, 0, 33, 64, 1]);
        let padded = |sizes: &[i32], block: usize| PaddedBlocks::new(sizes, block).unwrap();
        let predictor = predictor
            .clone()
            .q_padding(padded(&q_sizes, block_q))
            .k_padding(padded(&k_sizes, block_k))
            .smooth_k(true);
        let padded = Prediction { q_len: 4 * block_q, kv_len: 8 * block_k, ..Prediction::of(predictor) };
        let kv_lens = vec![8 * block_k as i32, 5 * block_k as i32 + 7, 2 * block_k as i32 + 1];
        all.push(Prediction { band: causal, ..padded.clone() });
        all.push(Prediction { batch: 3, sequences: Sequences::KvLens(kv_lens), ..padded });
    }
    for select in [
        Select::TopK(vec![0.1, 0.7].into()),
        Select::Cdf(vec![0.9, 0.2].into()),
        Select::TopKTopP { k: vec![0.5, 0.0].into(), p: 0.4.into() },
        Select::TopKTopP { k: 0.1.into(), p: vec![0.0, 1.0].into() },
        Select::Sigmas(vec![2.0, -0.5].into()),
        Select::Cdf(1.0.into()),
        Select::TopK(1.0.into()),
        Select::Cdf(0.0.into()),
    ] {
        all.push(Prediction::of(Predictor::new(select)));
    }
    all
}
