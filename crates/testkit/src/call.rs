//! A call whose tensors, masks and lengths are its own.

use std::fmt;

use sage_core::oracle::SeenKeys;
use sage_core::{BlockMask, Call, Geometry, Inputs, Lengths, List, Mask, Options, Tensor, TensorView, View};

use crate::Memory;

/// Everything that a caller hands over, owned.
#[derive(Clone, Debug)]
pub struct OwnedCall {
    /// Queries.
    pub q: Memory,
    /// Keys.
    pub k: Memory,
    /// Values.
    pub v: Memory,
    /// Where the output's elements go, in the order of the caller's dimensions.
    pub out: Geometry,
    /// What is asked for beside the tensors.
    pub options: Options,
    /// Explicit mask.
    pub mask: Option<OwnedMask>,
    /// Blocks of the score matrix to compute.
    pub blocks: Option<OwnedBlocks>,
    /// Valid keys of each batch entry.
    pub kv_lens: Option<Vec<i32>>,
    /// Boundaries of packed queries and keys.
    pub cu_seqlens: Option<(Vec<i32>, Vec<i32>)>,
    /// An attention sink for each query head.
    pub sinks: Option<Vec<f32>>,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
}

/// An explicit mask, broadcastable to `[batch, num_q_heads, q_len, kv_len]`.
#[derive(Clone)]
pub enum OwnedMask {
    /// `true`: the key is visible.
    Bool(Vec<bool>, Geometry),
    /// Added to the scaled scores.
    Additive(Memory),
}

/// A block mask, broadcastable to `[batch, num_q_heads, blocks of queries, blocks of keys]`.
#[derive(Clone, Debug)]
pub struct OwnedBlocks {
    /// `true`: the block is computed.
    pub visible: Vec<bool>,
    /// Sizes of the mask's dimensions.
    pub shape: Vec<usize>,
    /// Queries of a block.
    pub block_q: usize,
    /// Keys of a block.
    pub block_k: usize,
}

impl OwnedCall {
    /// Queries, keys and values without masks, in the order of [`Options::default`]; the output is row-major.
    pub fn dense(q: impl Into<Memory>, k: impl Into<Memory>, v: impl Into<Memory>) -> Self {
        let (q, v) = (q.into(), v.into());
        let rows = q.shape().iter().take(q.shape().len().saturating_sub(1));
        let out: Vec<usize> = rows.chain(v.shape().last()).copied().collect();
        OwnedCall {
            out: Geometry::contiguous("out", &out).unwrap(),
            q,
            k: k.into(),
            v,
            options: Options::default(),
            mask: None,
            blocks: None,
            kv_lens: None,
            cu_seqlens: None,
            sinks: None,
            lse: true,
        }
    }

    /// As a backend on this machine takes it.
    pub fn inputs(&self) -> Inputs<'_> {
        let block_mask = self.blocks.as_ref().map(|blocks| BlockMask {
            blocks: View::contiguous("block_mask", &blocks.visible, &blocks.shape).unwrap(),
            block_q: blocks.block_q,
            block_k: blocks.block_k,
        });
        Inputs::new(self.q.view(), self.k.view(), self.v.view())
            .mask(self.mask.as_ref().map(OwnedMask::view))
            .block_mask(block_mask)
            .lengths(self.lengths())
            .sinks(
                self.sinks
                    .as_ref()
                    .map(|sinks| TensorView::F32(View::contiguous("sinks", sinks, &[sinks.len()]).unwrap())),
            )
    }

    /// Lengths of the sequences.
    pub fn lengths<L: List>(&self) -> Lengths<'_, L> {
        match (&self.kv_lens, &self.cu_seqlens) {
            (Some(kv_lens), _) => Lengths::KvLens(kv_lens),
            (_, Some((q, k))) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
            _ => Lengths::Dense,
        }
    }

    /// The checked call.
    ///
    /// # Panics
    /// When something is wrong with it.
    pub fn call(&self) -> Call<'_> {
        Call::check(&self.inputs(), &self.options).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The same with `value` in the rows of K and V of keys that no query sees, beside sequences too.
    pub fn with_hidden_rows(&self, value: f32) -> Self {
        self.with_rows_but(value, SeenKeys::is_visible)
    }

    /// The same with `value` in all rows of K and V but those of keys of which `keeps` says so.
    pub fn with_rows_but(&self, value: f32, keeps: impl Fn(&SeenKeys, usize) -> bool) -> Self {
        let call = self.call();
        // Each kept key's place in a call's K and V.
        let mut kept = Vec::new();
        for sequence in call.sequences() {
            for head in 0..call.problem.num_kv_heads {
                let seen = SeenKeys::of(&call, &sequence, head);
                let keys = (0..seen.len()).filter(|&key| keeps(&seen, key));
                kept.extend(keys.map(|key| [sequence.batch, head, sequence.kv_start + key, 0]));
            }
        }
        let spoilt = |memory: &Memory, geometry: &Geometry| {
            let mut places = vec![false; memory.len()];
            kept.iter().for_each(|&at| places[geometry.index(at) as usize] = true);
            memory.with_rows(value, |row| !places[memory.position(&[row, &[0]].concat())])
        };
        let k = spoilt(&self.k, call.k.geometry());
        let v = spoilt(&self.v, call.v.geometry());
        OwnedCall { k, v, ..self.clone() }
    }
}

impl OwnedMask {
    /// A row-major boolean mask.
    pub fn bools(visible: Vec<bool>, shape: &[usize]) -> Self {
        OwnedMask::Bool(visible, Geometry::contiguous("mask", shape).unwrap())
    }

    /// An additive mask.
    pub fn biases(biases: Tensor) -> Self {
        OwnedMask::Additive(biases.into())
    }

    /// The mask, borrowed.
    pub fn view(&self) -> Mask<'_> {
        match self {
            OwnedMask::Bool(visible, geometry) => {
                Mask::Bool(View::strided("mask", visible, *geometry).unwrap())
            }
            OwnedMask::Additive(memory) => Mask::Additive(memory.view()),
        }
    }
}

/// Everything but the elements.
impl fmt::Debug for OwnedMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OwnedMask::Bool(_, geometry) => write!(f, "bool {geometry:?}"),
            OwnedMask::Additive(memory) => write!(f, "{memory:?}"),
        }
    }
}

impl OwnedBlocks {
    /// A row-major block mask.
    pub fn new(visible: Vec<bool>, shape: &[usize], [block_q, block_k]: [usize; 2]) -> Self {
        OwnedBlocks { visible, shape: shape.to_vec(), block_q, block_k }
    }
}
