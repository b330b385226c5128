//! A quantised KV cache: decoding without keeping, or reading, keys and values in 16 bits.

use sage_core::{
    BlockTables, CacheBackend, CacheLayout, CacheSize, Call, Error, Layout, NewTokens, Result, Strided,
    Tensor, TensorView, ValueFormat,
};
use sage_cpu::Cpu;

use crate::attention::{Attention, Output};
use crate::backend;
use crate::place::Place;

/// What a [`KvCache`] is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "options make nothing until `build` is called"]
pub struct KvCacheOptions {
    sequences: usize,
    num_kv_heads: usize,
    head_dim: usize,
    values: ValueFormat,
    page_size: usize,
    max_pages: Option<usize>,
    layout: Layout,
}

impl KvCacheOptions {
    /// One sequence, values in half precision, pages of 64 tokens and as many of them as memory holds, and new tokens
    /// as `[batch, heads, seq, head_dim]`.
    pub fn new(num_kv_heads: usize, head_dim: usize) -> Self {
        KvCacheOptions {
            sequences: 1,
            num_kv_heads,
            head_dim,
            values: ValueFormat::default(),
            page_size: 64,
            max_pages: None,
            layout: Layout::default(),
        }
    }

    /// Number of sequences. All begin empty.
    pub fn sequences(self, sequences: usize) -> Self {
        KvCacheOptions { sequences, ..self }
    }

    /// How values are stored.
    pub fn values(self, values: ValueFormat) -> Self {
        KvCacheOptions { values, ..self }
    }

    /// Tokens of a page: a power of two from 16 to 1024. Smaller pages waste less memory at the end of a sequence and
    /// of a shared prefix; every page costs four bytes for each head and channel.
    pub fn page_size(self, page_size: usize) -> Self {
        KvCacheOptions { page_size, ..self }
    }

    /// A pool of at most so many pages, which all sequences share. Without it the cache grows as needed.
    pub fn max_pages(self, max_pages: usize) -> Self {
        KvCacheOptions { max_pages: Some(max_pages), ..self }
    }

    /// Order of the dimensions of the keys and values that are appended.
    pub fn layout(self, layout: Layout) -> Self {
        KvCacheOptions { layout, ..self }
    }

    /// An empty cache in this machine's memory.
    ///
    /// # Errors
    /// Names the option that is outside its range.
    pub fn build(self) -> Result<KvCache> {
        self.build_on(backend::cpu().clone(), &())
    }

    /// An empty cache in a backend's memory. On a GPU its work is put on the stream `queue`, and
    /// [`KvCacheOptions::max_pages`] must be set: all memory is taken now.
    ///
    /// # Errors
    /// Names the option that is outside its range, or says why there is no memory.
    pub fn build_on<B: CacheBackend>(self, backend: B, queue: &B::Queue) -> Result<KvCache<B>> {
        let KvCacheOptions { sequences, num_kv_heads, head_dim, values, page_size, max_pages, .. } = self;
        let layout = CacheLayout { num_kv_heads, head_dim, page_size, values };
        let cache = backend.cache(queue, &CacheSize { layout, sequences, max_pages })?;
        Ok(KvCache {
            backend,
            cache,
            layout,
            tables: BlockTables::new(sequences, layout.page_size, max_pages),
            order: self.layout,
            all: (0..sequences).collect(),
            lens: vec![0; sequences],
        })
    }
}

/// Keys and values of past tokens, quantised: INT8 keys, values as [`ValueFormat`] says.
///
/// Tokens are appended in chunks of any size and never quantised again. Attention reads the codes where they lie; no
/// copy in higher precision exists at any time. A cache of 64 channels a head takes 0.55 times the memory of one in
/// half precision with 8-bit values, 0.78 times with 16-bit ones.
///
/// Tokens lie in pages, and each sequence has a block table of its pages. Sequences can share the pages of a common
/// prefix ([`KvCache::fork`]); a page that two share is copied before one writes to it.
///
/// ```
/// use sageattention::{Attention, KvCacheOptions, Tensor};
///
/// let mut cache = KvCacheOptions::new(2, 64).build()?;
/// let prompt = Tensor::new(vec![0.5f32; 2 * 10 * 64], &[1, 2, 10, 64])?; // [batch, num_kv_heads, tokens, head_dim]
/// cache.append(&prompt, &prompt)?;
/// // Decoding: each step appends the new token and attends to all.
/// let token = Tensor::new(vec![0.5f32; 2 * 64], &[1, 2, 1, 64])?;
/// cache.append(&token, &token)?;
/// let q = Tensor::new(vec![0.5f32; 6 * 64], &[1, 6, 1, 64])?; // three query heads for each key head
/// let result = cache.attend(&q, &Attention::new().causal(true))?;
/// assert_eq!((result.out.shape(), cache.len(0)?), (&[1, 6, 1, 64][..], 11));
/// # Ok::<(), sageattention::Error>(())
/// ```
///
/// It lies in the memory of a [`CacheBackend`]: this machine's, or a GPU's ([`KvCacheOptions::build_on`]).
///
/// # Accuracy
/// Keys have a scale for each token and head, and a constant for each page that is subtracted before quantising and
/// accounted for exactly, so a bias of K's channels costs nothing even where it drifts along the sequence. Queries are
/// used in 16 bits. What is stored is defined by `sage_core::oracle::CachedHead`.
#[derive(Clone, Debug)]
pub struct KvCache<B: CacheBackend = Cpu> {
    backend: B,
    cache: B::Cache,
    layout: CacheLayout,
    tables: BlockTables,
    order: Layout,
    /// Every sequence, in order.
    all: Vec<usize>,
    /// Tokens of each sequence.
    lens: Vec<i32>,
}

impl<B: Place + CacheBackend> KvCache<B> {
    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.tables.sequences()
    }

    /// What a page holds.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Tokens of a sequence, those included that a GPU is still to write.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn len(&self, sequence: usize) -> Result<usize> {
        self.tables.len(sequence)
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.lens.iter().all(|&len| len == 0)
    }

    /// Bytes of all pages that were ever needed at once, those that are free again included; on a GPU those of the
    /// pool.
    pub fn bytes(&self) -> usize {
        self.backend.cache_bytes(&self.cache)
    }

    /// Pages that sequences hold now.
    pub fn pages_in_use(&self) -> usize {
        self.tables.pages_in_use()
    }

    /// The pages of a sequence, in the order of its tokens.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn block_table(&self, sequence: usize) -> Result<&[u32]> {
        self.tables.table(sequence)
    }

    /// Appends new tokens to every sequence: `k` and `v` are `[sequences, num_kv_heads, tokens, head_dim]` (or as
    /// [`KvCacheOptions::layout`] says), of any strides, in f32, f16 or bf16; on a GPU in f16 or bf16.
    ///
    /// # Errors
    /// When a tensor does not fit the cache, or the pool has too few pages: the cache is then as it was.
    pub fn append<'t>(&mut self, k: impl Into<B::Tensor<'t>>, v: impl Into<B::Tensor<'t>>) -> Result<()> {
        let all = std::mem::take(&mut self.all);
        let appended = self.append_to(&all, k, v);
        self.all = all;
        appended
    }

    /// Appends new tokens to some sequences: `k` and `v` are as in [`KvCache::append`], with an entry for each of
    /// `sequences`.
    ///
    /// # Errors
    /// As [`KvCache::append`], and when a sequence does not exist or is named twice.
    pub fn append_to<'t>(
        &mut self,
        sequences: &[usize],
        k: impl Into<B::Tensor<'t>>,
        v: impl Into<B::Tensor<'t>>,
    ) -> Result<()> {
        let [k, v] = self.layout.check_tokens(k.into(), v.into(), self.order, sequences.len())?;
        let count = k.geometry().shape()[2];
        let copies = self.tables.reserve(sequences, count)?;
        let tokens = NewTokens { sequences, copies: &copies, k, v };
        if let Err(error) = self.backend.append(&mut self.cache, &self.tables, &tokens) {
            self.tables.unreserve(sequences);
            return Err(error);
        }
        self.tables.advance(sequences, count)?;
        self.count()
    }

    /// Attention of `q` over some sequences into the caller's memory, as [`KvCache::attend`] has it: an entry of q's
    /// batch for each of `sequences`, which may repeat. `out` has q's layout, shape and element type, `lse` is
    /// row-major in the shape that [`Output::lse`] has. On a GPU, neighbouring sequences are served at once.
    ///
    /// # Errors
    /// When q, an option or a sequence does not fit the cache, or the backend lacks an option; `out` and `lse` are then
    /// untouched.
    pub fn attend_into<'t>(
        &self,
        sequences: &[usize],
        q: impl Into<B::Tensor<'t>>,
        attention: &Attention<'_>,
        out: B::Output<'_>,
        lse: Option<B::Lse<'_>>,
    ) -> Result<()> {
        attention.check_lse(lse.is_some())?;
        let some;
        let lens = if sequences == self.all {
            &self.lens
        } else {
            // `BlockTables::reserve` keeps lengths within 31 bits.
            some = sequences
                .iter()
                .map(|&sequence| self.len(sequence).map(|len| len as i32))
                .collect::<Result<Vec<_>>>()?;
            &some
        };
        let inputs = attention.over_cache(&self.backend, B::reborrow(q.into()), lens)?;
        let call = Call::check_cached(&inputs, &self.layout, &attention.options())?;
        self.backend.attend(&self.cache, &self.tables, sequences, &call, out, lse)
    }

    /// Forgets all but the first `len` tokens of a sequence. Its pages are free for others. Waits for a GPU.
    ///
    /// # Errors
    /// When there is no such sequence, or it has fewer tokens.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.tables.truncate(sequence, len)?;
        self.shortened()
    }

    /// Forgets every token of every sequence. The memory is kept for new ones. Waits for a GPU.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn clear(&mut self) -> Result<()> {
        self.tables = BlockTables::new(self.sequences(), self.layout.page_size, self.tables.max_pages());
        self.shortened()
    }

    /// Lets the empty sequence `to` begin with all tokens of `from`. Nothing is copied until one of them appends to a
    /// page that both hold. On a CPU.
    ///
    /// # Errors
    /// When there is no such sequence, `to` has tokens, or the backend's sequences cannot share pages.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        if !B::SHARES_PAGES {
            return Err(Error::unsupported(
                format!("fork of a KV cache on {}", self.backend.name()),
                "append the tokens to each sequence",
            ));
        }
        self.tables.fork(from, to)?;
        self.count()
    }

    fn shortened(&mut self) -> Result<()> {
        self.count()?;
        self.backend.shorten(&mut self.cache, &self.tables)
    }

    /// Notes the lengths that the tables count.
    fn count(&mut self) -> Result<()> {
        for (sequence, len) in self.lens.iter_mut().enumerate() {
            *len = self.tables.len(sequence)? as i32;
        }
        Ok(())
    }
}

impl KvCache {
    /// Attention of `q` over everything cached: `[sequences, num_q_heads, q_len, head_dim]` in `attention`'s layout.
    /// The last query is that of the last cached token, so append first; [`Attention::causal`] matters when `q_len`
    /// is above 1. A sequence without tokens gives zeros.
    ///
    /// Everything of `attention` holds but what speaks of K and V: lengths are the cache's, and so is the scheme.
    ///
    /// # Errors
    /// When q or an option does not fit the cache.
    pub fn attend<'t>(&self, q: impl Into<TensorView<'t>>, attention: &Attention<'_>) -> Result<Output> {
        self.attend_to(&self.all, q, attention)
    }

    /// Attention of `q` over some sequences: an entry of q's batch for each of `sequences`, which may repeat.
    ///
    /// # Errors
    /// As [`KvCache::attend`], and when a sequence does not exist.
    pub fn attend_to<'t>(
        &self,
        sequences: &[usize],
        q: impl Into<TensorView<'t>>,
        attention: &Attention<'_>,
    ) -> Result<Output> {
        let q = q.into();
        let mut out = Tensor::zeros(q.dtype(), q.shape())?;
        // [batch, heads, seq] in either layout, where q has four dimensions; the call is checked below.
        let mut shape = q.shape().get(..3).unwrap_or_default().to_vec();
        if attention.options().layout == Layout::Nhd {
            shape.reverse();
            shape.rotate_right(1);
        }
        let mut lse = attention.returns_lse().then(|| vec![0f32; shape.iter().product()]);
        self.attend_into(sequences, q, attention, out.view_mut(), lse.as_deref_mut())?;
        let lse = lse.map(|lse| Tensor::new(lse, &shape)).transpose()?;
        Ok(Output { out, lse, map: None })
    }
}
