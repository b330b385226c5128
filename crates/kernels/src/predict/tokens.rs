//! Which tokens a block has, and which blocks of keys a block of queries sees.

use sage_core::Problem;
use sage_ptx::{Code, Global, Val};

use crate::attention::Band;
use crate::params::kernel_params;
use crate::preprocess::{Head, InputParams, Source};
use crate::sequence::{LengthParams, Lengths, NO_LIMIT, Sequence, bottom_right, window};
use crate::tensor::TensorParam;

kernel_params! {
    /// How a tensor's sequences are cut into blocks, and which tokens count.
    TokensParams, TokensArgs {
        /// Tokens of the tensor.
        tokens: i32,
        /// Tokens of the longest sequence: what packed ones have beyond it has no blocks.
        longest: i32,
        /// Boundaries of packed sequences, or valid tokens of each batch entry.
        cu_seqlens: [i32],
        /// Tokens of a block.
        block: i32,
        /// How many tokens of each block count, `[blocks]`; 0 where all do.
        sizes: [i32],
        /// For keys: queries of the tensors.
        queries: i32,
        /// For keys: boundaries of packed queries.
        cu_seqlens_q: [i32],
        /// For keys: those visible before the diagonal; 2³⁰ for all.
        window_left: i32,
        /// For keys: those visible after the diagonal; 2³⁰ for all.
        window_right: i32,
        /// For keys: whether the last query sees the last key at the diagonal (1), or the first the first (0).
        bottom_right: i32,
    }
}

/// Addresses of the lengths of sequences, each 0 where kernels read none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LengthLists {
    /// Boundaries of packed queries.
    pub queries: u64,
    /// Boundaries of packed keys, or valid keys of each batch entry.
    pub keys: u64,
}

impl TokensArgs {
    /// Keys of a call, of which those count that some query sees, in blocks of which none is padded; their tensors have the
    /// rows of a sequence.
    pub fn of_keys(problem: &Problem, block: usize, lists: LengthLists) -> Self {
        let [window_left, window_right] = window(&problem.band);
        TokensArgs {
            tokens: problem.kv_len as i32,
            longest: problem.kv_len as i32,
            cu_seqlens: lists.keys,
            block: block as i32,
            sizes: 0,
            queries: problem.q_len as i32,
            cu_seqlens_q: lists.queries,
            window_left,
            window_right,
            bottom_right: bottom_right(&problem.band),
        }
    }

    /// Queries of a call, which all count, as [`TokensArgs::of_keys`].
    pub fn of_queries(problem: &Problem, block: usize, lists: LengthLists) -> Self {
        TokensArgs {
            tokens: problem.q_len as i32,
            longest: problem.q_len as i32,
            cu_seqlens: lists.queries,
            block: block as i32,
            sizes: 0,
            // As if each query saw all others.
            queries: problem.q_len as i32,
            cu_seqlens_q: lists.queries,
            window_left: NO_LIMIT,
            window_right: NO_LIMIT,
            bottom_right: 0,
        }
    }

    /// The same where the tensors have so many rows, of these tokens and of queries: more than a sequence has, where they
    /// are packed.
    pub fn rows(self, tokens: usize, queries: usize) -> Self {
        TokensArgs { tokens: tokens as i32, queries: queries as i32, ..self }
    }

    /// The same where blocks are padded, by the address of how many tokens of each count.
    pub fn sizes(self, sizes: u64) -> Self {
        TokensArgs { sizes, ..self }
    }
}

/// The keys of a sequence, or its queries, cut into blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'k> {
    lengths: LengthParams<'k>,
    sequence: Sequence<'k>,
    block: Val<'k, i32>,
    sizes: Global<'k, i32>,
    /// The first token that counts, and one past the last: of keys, those that the band lets some query see.
    start: Val<'k, i32>,
    end: Val<'k, i32>,
}

impl<'k> TokensParams<'k> {
    /// The tokens of sequence `index`.
    #[track_caller]
    pub fn of_sequence(&self, lengths: Lengths, index: Val<'k, i32>) -> Tokens<'k> {
        let params = LengthParams {
            q_rows: self.queries,
            kv_rows: self.tokens,
            cu_seqlens_q: self.cu_seqlens_q,
            cu_seqlens_k: self.cu_seqlens,
            window_left: self.window_left,
            window_right: self.window_right,
            bottom_right: self.bottom_right,
        };
        // Keys are counted from the tensor's first, as under an explicit mask.
        let mut sequence = Sequence::new(index.code(), lengths, true, &params, index);
        if lengths == Lengths::Packed {
            // Nobody has checked lists in device memory, and a workspace has places for so many blocks.
            sequence.kv_len = sequence.kv_len.min(self.longest);
        }
        let [start, end] = seen(&params, &sequence, index.code().constant(0), sequence.q_len);
        Tokens { lengths: params, sequence, block: self.block, sizes: self.sizes, start, end }
    }
}

/// The first key that the first of some queries sees, and one past the last that the last sees; the same where none is
/// seen.
#[track_caller]
fn seen<'k>(
    lengths: &LengthParams<'k>,
    sequence: &Sequence<'k>,
    first: Val<'k, i32>,
    queries: Val<'k, i32>,
) -> [Val<'k, i32>; 2] {
    let band = Band::new(lengths, sequence);
    let last = (first + (queries - 1)).min(sequence.q_len - 1);
    let start = band.start(first).max(0).min(sequence.kv_len);
    [start, band.end(last).max(start)]
}

impl<'k> Tokens<'k> {
    /// For keys: queries of the sequence; not positive where device memory has boundaries that fall.
    pub fn queries(&self) -> Val<'k, i32> {
        self.sequence.q_len
    }

    /// Blocks up to the last that has a token that counts.
    #[track_caller]
    pub fn blocks(&self) -> Val<'k, i32> {
        (self.end + (self.block - 1)) / self.block
    }

    /// The first token of a block that counts, and how many do: none behind the last that counts.
    #[track_caller]
    pub fn of_block(&self, index: Val<'k, i32>) -> (Val<'k, i32>, Val<'k, i32>) {
        let code = index.code();
        let size = code.var(self.block);
        code.when(self.sizes.address().ne(0u64), || size.set(self.block.min(self.sizes.at(index).load())));
        let first = index * self.block;
        let start = first.max(self.start);
        // Of padding alone, and where device memory holds a negative size, nothing.
        (start, (self.end.min(first + size.get()) - start).max(0))
    }

    /// Whether so many tokens are a whole block.
    #[track_caller]
    pub fn are_whole(&self, count: Val<'k, i32>) -> Val<'k, bool> {
        count.eq(self.block)
    }

    /// The keys that some of `queries` queries from `first` on sees: the first, and one past the last; the same where
    /// none is seen.
    #[track_caller]
    pub fn seen_keys(&self, first: Val<'k, i32>, queries: Val<'k, i32>) -> [Val<'k, i32>; 2] {
        seen(&self.lengths, &self.sequence, first, queries)
    }

    /// Blocks of some tokens: the first, and one past the last.
    #[track_caller]
    pub fn blocks_of(&self, [start, end]: [Val<'k, i32>; 2]) -> [Val<'k, i32>; 2] {
        [start / self.block, (end + (self.block - 1)) / self.block]
    }

    /// The first token of a block, whether it counts or not.
    #[track_caller]
    pub fn first_of(&self, index: Val<'k, i32>) -> Val<'k, i32> {
        index * self.block
    }
}

/// A head whose rows are read by the number that they have in the tensor.
#[track_caller]
pub(super) fn head<'k>(
    code: &'k Code,
    source: &Source,
    x: &TensorParam<'k, 3>,
    tokens: &TokensParams<'k>,
    [index, head]: [Val<'k, i32>; 2],
    heads: Val<'k, i32>,
) -> Head<'k> {
    let (zero, no_limit) = (code.constant(0), code.constant(NO_LIMIT));
    let input = InputParams {
        x: *x,
        rows: tokens.tokens,
        heads,
        sequences: zero,
        cu_seqlens: tokens.cu_seqlens,
        // As if the rows were queries that see all others.
        q_rows: tokens.tokens,
        cu_seqlens_q: tokens.cu_seqlens,
        window_left: no_limit,
        window_right: no_limit,
        bottom_right: zero,
        seen: tokens.cu_seqlens.cast(),
        ranks: tokens.cu_seqlens,
        seen_stride_sequence: zero,
        seen_stride_head: zero,
    };
    Head::at(code, source, &input, [index, head])
}
