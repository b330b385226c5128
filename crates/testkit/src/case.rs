//! Descriptions of calls, and the data that they stand for.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sage_core::{Band, DType, Geometry, Layout, Options, Scheme, Tensor};

use crate::{Memory, OwnedBlocks, OwnedCall, OwnedMask, for_each_index, normal};

/// A call to make: shapes, layouts, masks, and what the tensors hold. Fields that a test does not speak of are those of
/// [`Case::default`].
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Queries are drawn from this seed, and keys, values and masks from the four that follow.
    pub seed: u64,
    /// Element type of Q, K and V.
    pub dtype: DType,
    /// Order of the dimensions; of packed tensors, whether heads lie outside rows in memory.
    pub layout: Layout,
    /// Batch entries, of tensors that are not packed.
    pub batch: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Queries of a batch entry.
    pub q_len: usize,
    /// Keys of a batch entry.
    pub kv_len: usize,
    /// Channels of a head of queries and keys.
    pub head_dim: usize,
    /// Channels of a head of values and of the output; as many as of keys where there is no number.
    pub value_dim: Option<usize>,
    /// Whether K and V have one batch entry, which all of Q's share.
    pub shared: bool,
    /// Elements between rows beyond the head: above 0, rows are not neighbours.
    pub gap: usize,
    /// Elements in memory before each tensor's first.
    pub offset: usize,
    /// Added to K.
    pub k_bias: Bias,
    /// Added to V.
    pub v_bias: Bias,
    /// Factor of channel 1 of queries and keys, or 0 for none.
    pub outlier: f32,
    /// Causal masks and sliding windows.
    pub band: Band,
    /// Soft cap of the scaled scores.
    pub softcap: Option<f32>,
    /// Factor on Q·Kᵀ.
    pub sm_scale: Option<f32>,
    /// Explicit mask.
    pub mask: Option<CaseMask>,
    /// A block mask.
    pub blocks: Option<CaseBlocks>,
    /// Whether the blocks that it leaves out count with their means.
    pub pooled_tail: bool,
    /// Whether each query head has an attention sink.
    pub sinks: bool,
    /// Lengths of the sequences.
    pub sequences: Sequences,
    /// What K and V hold where no query sees a key.
    pub spoil: Option<f32>,
    /// The scheme, or none for the backend's choice.
    pub scheme: Option<Scheme>,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
}

/// What is added to the N(0, 1) of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    /// Nothing.
    None,
    /// So many times an N(0, 1) of each channel.
    Channels(f32),
    /// This number, in every fourth channel.
    EveryFourth(f32),
}

/// Lengths of the sequences.
#[derive(Clone, Debug, PartialEq)]
pub enum Sequences {
    /// Those of the tensors.
    Dense,
    /// Valid keys differ from batch entry to batch entry; the first has all, the last none where there are three.
    Staggered,
    /// Valid keys of each batch entry.
    KvLens(Vec<i32>),
    /// Boundaries of packed queries and keys.
    Packed(Vec<i32>, Vec<i32>),
}

/// A block mask of random blocks, of every head of every batch entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CaseBlocks {
    /// Queries of a block.
    pub block_q: usize,
    /// Keys of a block.
    pub block_k: usize,
    /// The share of blocks that are computed.
    pub kept: f64,
}

impl CaseBlocks {
    /// Blocks of these sizes, about every third of which is hidden.
    pub const fn new(block_q: usize, block_k: usize) -> Self {
        CaseBlocks { block_q, block_k, kept: 0.67 }
    }

    /// The same, computing this share of blocks.
    #[must_use]
    pub const fn keeping(self, kept: f64) -> Self {
        CaseBlocks { kept, ..self }
    }
}

/// The longest of packed sequences.
fn longest(boundaries: &[i32]) -> usize {
    boundaries.windows(2).map(|ends| (ends[1] - ends[0]) as usize).max().unwrap_or(0)
}

/// An explicit mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CaseMask {
    /// What an element is.
    pub kind: MaskKind,
    /// Which dimensions it has.
    pub extent: Extent,
    /// Which keys it hides.
    pub hidden: Hidden,
}

/// What an element of a mask is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaskKind {
    /// Whether the key is visible.
    Bool,
    /// A bias of this type, −∞ where the key is hidden.
    Bias(DType),
}

/// Dimensions of a mask that are not broadcast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// `[batch, heads, q_len, kv_len]`.
    All,
    /// `[1, 1, q_len, kv_len]`.
    Rows,
    /// `[batch, 1, 1, kv_len]`: padding.
    BatchKeys,
    /// `[1, heads, q_len, 1]`.
    HeadRows,
    /// `[kv_len]`.
    Keys,
    /// `[q_len, kv_len]`.
    Matrix,
}

/// Which keys a mask hides.
#[derive(Clone, Copy, Debug)]
pub enum Hidden {
    /// This share, by chance. Biases of the others are N(0, 1).
    Share(f64),
    /// Those whose bias is −∞, at `[batch, head, query, key]`; a dimension that is broadcast has index 0 alone.
    Pattern(fn([usize; 4]) -> f32),
}

impl PartialEq for Hidden {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Hidden::Share(a), Hidden::Share(b)) => a == b,
            (Hidden::Pattern(a), Hidden::Pattern(b)) => std::ptr::fn_addr_eq(*a, *b),
            _ => false,
        }
    }
}

impl CaseMask {
    /// A boolean mask that hides about every third key.
    pub const fn bool(extent: Extent) -> Self {
        CaseMask { kind: MaskKind::Bool, extent, hidden: Hidden::Share(0.33) }
    }

    /// An additive mask of N(0, 1), but −∞ for about every fifth key.
    pub const fn bias(dtype: DType, extent: Extent) -> Self {
        CaseMask { kind: MaskKind::Bias(dtype), extent, hidden: Hidden::Share(0.2) }
    }

    /// The same, hiding this share of keys.
    #[must_use]
    pub const fn hiding(self, share: f64) -> Self {
        CaseMask { hidden: Hidden::Share(share), ..self }
    }

    /// The same with the biases of a pattern.
    #[must_use]
    pub const fn pattern(self, bias: fn([usize; 4]) -> f32) -> Self {
        CaseMask { hidden: Hidden::Pattern(bias), ..self }
    }
}

impl Default for Case {
    fn default() -> Self {
        Case {
            seed: 1,
            dtype: DType::F16,
            layout: Layout::Hnd,
            batch: 1,
            q_heads: 1,
            kv_heads: 1,
            q_len: 100,
            kv_len: 100,
            head_dim: 64,
            value_dim: None,
            shared: false,
            gap: 0,
            offset: 0,
            k_bias: Bias::None,
            v_bias: Bias::None,
            outlier: 0.0,
            band: Band::FULL,
            softcap: None,
            sm_scale: None,
            mask: None,
            blocks: None,
            pooled_tail: false,
            sinks: false,
            sequences: Sequences::Dense,
            spoil: None,
            scheme: None,
            lse: true,
        }
    }
}

impl Case {
    /// As [`Case::default`], with tensors in f32, and 64 queries and keys.
    pub fn f32() -> Self {
        Case { dtype: DType::F32, q_len: 64, kv_len: 64, ..Case::default() }
    }

    /// The call with its tensors. Keys that no query sees are like the others: see [`OwnedCall::with_hidden_rows`].
    ///
    /// What lies between rows is NaN, which shows where it is read.
    pub fn build(&self) -> OwnedCall {
        let last = |boundaries: &[i32]| boundaries.last().map_or(0, |&end| end as usize);
        let (q_rows, kv_rows) = match &self.sequences {
            Sequences::Packed(q, k) => (last(q), last(k)),
            _ => (self.q_len, self.kv_len),
        };
        let packed = matches!(self.sequences, Sequences::Packed(..));
        let batch = if packed { 1 } else { self.batch };
        let kv_batch = if self.shared { 1 } else { batch };
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        let [q_shape, out_shape] = [self.head_dim, value_dim].map(|dim| [batch, self.q_heads, q_rows, dim]);
        let [k_shape, v_shape] =
            [self.head_dim, value_dim].map(|dim| [kv_batch, self.kv_heads, kv_rows, dim]);
        let q = self.tensor(0, q_shape, Bias::None, self.outlier);
        let k = self.tensor(1, k_shape, self.k_bias, self.outlier);
        let v = self.tensor(2, v_shape, self.v_bias, 0.0);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed + 3);
        let mask = self.mask.map(|mask| self.explicit(&mask, &mut rng));
        let blocks = self.blocks.map(|CaseBlocks { block_q, block_k, kept }| {
            let [batch, q_len, kv_len] = match &self.sequences {
                Sequences::Packed(q, k) => [q.len() - 1, longest(q), longest(k)],
                _ => [self.batch, self.q_len, self.kv_len],
            };
            let shape = [batch, self.q_heads, q_len.div_ceil(block_q), kv_len.div_ceil(block_k)];
            let visible = (0..shape.iter().product()).map(|_| rng.random_bool(kept)).collect();
            OwnedBlocks::new(visible, &shape, [block_q, block_k])
        });
        OwnedCall {
            out: self.geometry(out_shape),
            q,
            k,
            v,
            options: Options::default()
                .layout(self.layout)
                .sm_scale(self.sm_scale)
                .band(self.band)
                .logit_softcap(self.softcap)
                .pooled_tail(self.pooled_tail),
            mask,
            blocks,
            kv_lens: match &self.sequences {
                Sequences::Staggered => Some(self.staggered()),
                Sequences::KvLens(lens) => Some(lens.clone()),
                _ => None,
            },
            cu_seqlens: match &self.sequences {
                Sequences::Packed(q, k) => Some((q.clone(), k.clone())),
                _ => None,
            },
            sinks: self.sinks.then(|| self.sinks_of_heads()),
            lse: self.lse,
        }
    }

    /// Sinks from far below the log-sum-exps of N(0, 1) scores to far above them, and none for the fourth head.
    fn sinks_of_heads(&self) -> Vec<f32> {
        let sink = |head: usize| match head % 4 {
            3 => f32::NEG_INFINITY,
            part => -2.0 + 4.0 * part as f32 + 0.5 * (head / 4) as f32,
        };
        (0..self.q_heads).map(sink).collect()
    }

    fn staggered(&self) -> Vec<i32> {
        let missing =
            |b: usize| if b == 2 { self.kv_len } else { (b * (self.kv_len / 3 + 1)).min(self.kv_len) };
        (0..self.batch).map(|b| (self.kv_len - missing(b)) as i32).collect()
    }

    /// A tensor `[batch, heads, rows, channels]` in the case's layout, from the seed so many after the case's.
    fn tensor(&self, part: u64, shape: [usize; 4], bias: Bias, outlier: f32) -> Memory {
        let [batch, heads, rows, dim] = shape;
        let (seed, pitch) = (self.seed + part, dim + self.gap);
        let shift: Vec<f32> = match bias {
            Bias::None => vec![0.0; dim],
            Bias::Channels(factor) => normal(seed + 1000, dim).into_iter().map(|x| factor * x).collect(),
            Bias::EveryFourth(x) => (0..dim).map(|c| if c % 4 == 0 { x } else { 0.0 }).collect(),
        };
        let elements = normal(seed, batch * heads * rows * dim);
        let mut memory = vec![f32::NAN; self.offset + batch * heads * rows * pitch];
        for (to, from) in memory[self.offset..].chunks_mut(pitch).zip(elements.chunks(dim)) {
            for (c, (to, &x)) in to.iter_mut().zip(from).enumerate() {
                *to = if outlier != 0.0 && c == 1 { outlier * x } else { x } + shift[c];
            }
        }
        Memory::new(memory, self.dtype, self.geometry(shape))
    }

    fn geometry(&self, [batch, heads, rows, dim]: [usize; 4]) -> Geometry {
        let pitch = (dim + self.gap) as i64;
        let (head, row) = match self.layout {
            Layout::Hnd => (rows as i64 * pitch, pitch),
            Layout::Nhd => (pitch, heads as i64 * pitch),
        };
        let item = (heads * rows) as i64 * pitch;
        let (shape, strides) = match (&self.sequences, self.layout) {
            (Sequences::Packed(..), _) => (vec![rows, heads, dim], vec![row, head, 1]),
            (_, Layout::Hnd) => (vec![batch, heads, rows, dim], vec![item, head, row, 1]),
            (_, Layout::Nhd) => (vec![batch, rows, heads, dim], vec![item, row, head, 1]),
        };
        Geometry::strided("tensor", &shape, &strides, self.offset as i64).unwrap()
    }

    fn explicit(&self, mask: &CaseMask, rng: &mut ChaCha8Rng) -> OwnedMask {
        let (q_len, kv_len) = (self.q_len, self.kv_len);
        let shape = match mask.extent {
            Extent::All => vec![self.batch, self.q_heads, q_len, kv_len],
            Extent::Rows => vec![1, 1, q_len, kv_len],
            Extent::BatchKeys => vec![self.batch, 1, 1, kv_len],
            Extent::HeadRows => vec![1, self.q_heads, q_len, 1],
            Extent::Keys => vec![kv_len],
            Extent::Matrix => vec![q_len, kv_len],
        };
        let len = shape.iter().product();
        let biases: Vec<f32> = match mask.hidden {
            Hidden::Pattern(pattern) => {
                let mut biases = Vec::with_capacity(len);
                for_each_index(&shape, |index| {
                    let mut at = [0; 4];
                    at[4 - index.len()..].copy_from_slice(index);
                    biases.push(pattern(at));
                });
                biases
            }
            Hidden::Share(share) => {
                let others = match mask.kind {
                    MaskKind::Bool => vec![0.0; len],
                    MaskKind::Bias(_) => normal(self.seed + 4, len),
                };
                let hidden = |x: f32| if rng.random_bool(share) { f32::NEG_INFINITY } else { x };
                others.into_iter().map(hidden).collect()
            }
        };
        match mask.kind {
            MaskKind::Bool => {
                OwnedMask::bools(biases.into_iter().map(|x| x > f32::NEG_INFINITY).collect(), &shape)
            }
            MaskKind::Bias(dtype) => OwnedMask::biases(Tensor::new(biases, &shape).unwrap().to_dtype(dtype)),
        }
    }
}
