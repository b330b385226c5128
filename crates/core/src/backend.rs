//! What a backend is: something that plans and computes attention.

use std::fmt;
use std::sync::Arc;

use crate::sparse::Predictor;
use crate::{BlockTables, CacheLayout, Call, Choice, DType, Operand, PageCopy, Result, Scheme};

/// What computes attention: a processor, a GPU.
///
/// A call is checked once, by whoever takes it from the caller. A backend is handed a checked one, plans it or finds
/// the plan that it made before, and runs that. So what is planned and what is run cannot differ.
pub trait Backend {
    /// A tensor to read, in the backend's memory.
    type Tensor<'a>: Operand;
    /// A tensor to write to.
    type Output<'a>;
    /// Where the log-sum-exp of each row goes, row-major in [`Call::lse_shape`].
    type Lse<'a>;
    /// What work is put on; `()` where it is done when a call returns.
    type Queue: ?Sized;
    /// How a call is carried out.
    type Plan: BackendPlan + 'static;

    /// The name that users give it.
    fn name(&self) -> String;

    /// The scheme that has kernels here for tensors of type `dtype` and is at least as accurate as `scheme`; `scheme`
    /// itself where there is no reason to leave it.
    fn nearest(&self, scheme: Scheme, dtype: DType) -> Scheme;

    /// How [`Backend::run`] carries a call out that also returns the log-sum-exp where `lse` says so, with an output
    /// that lies without gaps. Compiles nothing.
    ///
    /// # Errors
    /// When nothing here computes the scheme, or not with such tensors or options.
    fn plan<'c>(
        &self,
        call: &Call<'c, Self::Tensor<'c>>,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<Self::Plan>>;

    /// Computes a call into `out`, which has q's shape and element type in the caller's layout, and each row's natural
    /// log-sum-exp into `lse`.
    ///
    /// # Errors
    /// As [`Backend::plan`], when `out` or `lse` do not fit the call, and when the backend fails.
    fn run<'c>(
        &self,
        queue: &Self::Queue,
        call: &Call<'c, Self::Tensor<'c>>,
        choice: Choice,
        out: Self::Output<'_>,
        lse: Option<Self::Lse<'_>>,
    ) -> Result<()>;
}

/// A backend that also keeps KV caches.
pub trait CacheBackend: Backend {
    /// The memory of a cache.
    type Cache;

    /// Whether sequences of a cache can share pages.
    const SHARES_PAGES: bool;

    /// An empty cache, whose work will be put on `queue`.
    ///
    /// # Errors
    /// When the backend has no cache of such a size.
    fn cache(&self, queue: &Self::Queue, size: &CacheSize) -> Result<Self::Cache>;

    /// Bytes that a cache takes.
    fn cache_bytes(&self, cache: &Self::Cache) -> usize;

    /// Writes new tokens where `tables` have reserved room for them.
    ///
    /// # Errors
    /// When the backend does not store such tokens, or fails. What the tables count is then as it was.
    fn append(
        &self,
        cache: &mut Self::Cache,
        tables: &BlockTables,
        tokens: &NewTokens<'_, Self::Tensor<'_>>,
    ) -> Result<()>;

    /// Computes a call that [`Call::check_cached`] checked over what `tables` count for each of `sequences`.
    ///
    /// # Errors
    /// When the backend lacks an option over caches, `out` or `lse` do not fit, or the backend fails.
    fn attend<'c>(
        &self,
        cache: &Self::Cache,
        tables: &BlockTables,
        sequences: &[usize],
        call: &Call<'c, Self::Tensor<'c>>,
        out: Self::Output<'_>,
        lse: Option<Self::Lse<'_>>,
    ) -> Result<()>;

    /// Takes notice of sequences that `tables` have made shorter.
    ///
    /// # Errors
    /// When the backend fails.
    fn shorten(&self, cache: &mut Self::Cache, tables: &BlockTables) -> Result<()>;
}

/// A backend that also predicts which blocks of the score matrix are worth computing.
pub trait SparseBackend: Backend {
    /// A map of blocks in the backend's memory.
    type Map;

    /// How [`SparseBackend::run_sparse`] carries a call out, prediction included: as [`Backend::plan`].
    ///
    /// # Errors
    /// As [`Backend::plan`], and when the backend lacks an option of the predictor.
    fn plan_sparse<'c>(
        &self,
        call: &Call<'c, Self::Tensor<'c>>,
        predictor: &Predictor,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<Self::Plan>>;

    /// The map of a call that [`Call::check_sparse`] checked: bit for bit that of [`Predictor::map`].
    ///
    /// # Errors
    /// When the backend lacks an option of the predictor, or fails.
    fn predict<'c>(
        &self,
        queue: &Self::Queue,
        call: &Call<'c, Self::Tensor<'c>>,
        predictor: &Predictor,
    ) -> Result<Self::Map>;

    /// Predicts the map of such a call, computes the call over it as [`Backend::run`] does, and returns the map.
    ///
    /// # Errors
    /// As [`Backend::run`] and [`SparseBackend::predict`].
    fn run_sparse<'c>(
        &self,
        queue: &Self::Queue,
        call: &Call<'c, Self::Tensor<'c>>,
        predictor: &Predictor,
        choice: Choice,
        out: Self::Output<'_>,
        lse: Option<Self::Lse<'_>>,
    ) -> Result<Self::Map>;
}

/// How a backend carries a call out. Prints itself, in rows `name value`.
pub trait BackendPlan: fmt::Display + fmt::Debug + Send + Sync {
    /// The scheme that is computed.
    fn scheme(&self) -> &Scheme;

    /// Bytes of scratch memory.
    fn workspace_bytes(&self) -> usize;
}

/// How large a KV cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    /// What a page holds.
    pub layout: CacheLayout,
    /// Sequences.
    pub sequences: usize,
    /// Most pages of all sequences together, where there is a limit.
    pub max_pages: Option<usize>,
}

/// Tokens to be appended to a KV cache.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a, T> {
    /// The sequences that they are for, each once.
    pub sequences: &'a [usize],
    /// Pages to copy before anything is written.
    pub copies: &'a [PageCopy],
    /// Keys, an entry of the batch for each sequence: `[sequences, num_kv_heads, tokens, head_dim]`.
    pub k: T,
    /// Values, as the keys.
    pub v: T,
}
