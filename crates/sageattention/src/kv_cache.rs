//! A quantised KV cache: decoding without keeping, or reading, keys and values in 16 bits.

use sage_core::{
    BlockTables, CacheLayout, CachedInputs, Call, Error, Layout, Result, Tensor, TensorView, TensorViewMut,
    ValueFormat,
};
use sage_cpu::CachePages;

use crate::attention::{Attention, Output};
use crate::backend;

/// Most sequences of a cache.
const MAX_SEQUENCES: usize = 1 << 24;

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
    /// One sequence, values in half precision, pages of 64 tokens and as many of them as memory holds, and new tokens as
    /// `[batch, heads, seq, head_dim]`.
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

    /// Tokens of a page: a power of two from 16 to 1024. Smaller pages waste less memory at the end of a sequence and of
    /// a shared prefix; every page costs four bytes for each head and channel.
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
        if self.sequences > MAX_SEQUENCES {
            return Err(Error::value("sequences", self.sequences, format!("at most {MAX_SEQUENCES}")));
        }
        Ok(KvCache {
            pages: CachePages::new(self.cache_layout())?,
            tables: BlockTables::new(self.sequences, self.page_size, self.max_pages),
            order: self.layout,
        })
    }

    /// An empty cache in a GPU's memory, whose work is done on `stream`. [`KvCacheOptions::max_pages`] must be set: all
    /// memory is taken now.
    ///
    /// # Errors
    /// Names the option that is outside its range, or what the driver says.
    #[cfg(feature = "cuda")]
    pub fn build_on_gpu(
        self,
        cuda: &std::sync::Arc<sage_gpu::Cuda>,
        stream: &sage_gpu::Stream,
    ) -> Result<sage_gpu::KvCache> {
        let Some(max_pages) = self.max_pages else {
            return Err(Error::value("max_pages", "none", "a number: the pool of a GPU has a fixed size"));
        };
        let size = sage_gpu::PoolSize { sequences: self.sequences, max_pages };
        sage_gpu::KvCache::new(cuda, stream, self.cache_layout(), size, self.layout)
    }

    /// What a page is to hold.
    fn cache_layout(&self) -> CacheLayout {
        CacheLayout {
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            page_size: self.page_size,
            values: self.values,
        }
    }
}

/// Keys and values of past tokens, quantised: INT8 keys, values as [`ValueFormat`] says.
///
/// Tokens are appended in chunks of any size and never quantised again. Attention reads the codes where they lie; no
/// copy in higher precision exists at any time. A cache of 64 channels a head takes 0.55 times the memory of one in half
/// precision with 8-bit values, 0.78 times with 16-bit ones.
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
/// # Accuracy
/// Keys have a scale for each token and head, and a constant for each page that is subtracted before quantising and
/// accounted for exactly, so a bias of K's channels costs nothing even where it drifts along the sequence. Queries are
/// used in 16 bits. What is stored is defined by `sage_core::oracle::CachedHead`.
#[derive(Clone, Debug)]
pub struct KvCache {
    pages: CachePages,
    tables: BlockTables,
    order: Layout,
}

impl KvCache {
    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.tables.sequences()
    }

    /// What a page holds.
    pub fn layout(&self) -> &CacheLayout {
        self.pages.layout()
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn len(&self, sequence: usize) -> Result<usize> {
        self.tables.len(sequence)
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        (0..self.sequences()).all(|sequence| self.tables.len(sequence) == Ok(0))
    }

    /// Bytes of all pages that were ever needed at once, those that are free again included.
    pub fn bytes(&self) -> usize {
        self.pages.bytes()
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
    /// [`KvCacheOptions::layout`] says), of any strides, in f32, f16 or bf16.
    ///
    /// # Errors
    /// When a tensor does not fit the cache, or the pool has too few pages: the cache is then as it was.
    pub fn append<'t>(&mut self, k: impl Into<TensorView<'t>>, v: impl Into<TensorView<'t>>) -> Result<()> {
        let all: Vec<usize> = (0..self.sequences()).collect();
        self.append_to(&all, k, v)
    }

    /// Appends new tokens to some sequences: `k` and `v` are as in [`KvCache::append`], with an entry for each of
    /// `sequences`.
    ///
    /// # Errors
    /// As [`KvCache::append`], and when a sequence does not exist or is named twice.
    pub fn append_to<'t>(
        &mut self,
        sequences: &[usize],
        k: impl Into<TensorView<'t>>,
        v: impl Into<TensorView<'t>>,
    ) -> Result<()> {
        let (k, v) = (k.into(), v.into());
        let layout = *self.layout();
        let new_k = layout.check_new("k", k, self.order, sequences.len())?;
        let new_v = layout.check_new("v", v, self.order, sequences.len())?;
        if v.dtype() != k.dtype() {
            return Err(Error::DType {
                name: "v".into(),
                found: v.dtype().to_string(),
                wanted: format!("{}, as k", k.dtype()),
            });
        }
        if new_v.shape() != new_k.shape() {
            return Err(Error::Shape {
                name: "v".into(),
                found: format!("{:?}", v.shape()),
                wanted: format!("{:?}, as k", k.shape()),
            });
        }
        let tokens = new_k.shape()[2];
        let copies = self.tables.reserve(sequences, tokens)?;
        self.pages.prepare(self.tables.pages(), &copies)?;
        backend::cpu().append_cached(&mut self.pages, &self.tables, sequences, new_k, new_v)?;
        self.tables.advance(sequences, tokens)
    }

    /// Attention of `q` over everything cached: `[sequences, num_q_heads, q_len, head_dim]` in `attention`'s layout. The
    /// last query is that of the last cached token, so append first; [`Attention::causal`] matters when `q_len` is above
    /// 1. A sequence without tokens gives zeros.
    ///
    /// Of `attention` everything holds but what speaks of K and V: lengths are the cache's, and so is the scheme.
    ///
    /// # Errors
    /// When q or an option does not fit the cache.
    pub fn attend<'t>(&self, q: impl Into<TensorView<'t>>, attention: &Attention<'_>) -> Result<Output> {
        let all: Vec<usize> = (0..self.sequences()).collect();
        self.attend_to(&all, q, attention)
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
        let lens = self.lens(sequences)?;
        let call = self.check(q, &lens, attention)?;
        let mut out = Tensor::zeros(q.dtype(), q.shape())?;
        let shape = call.lse_shape();
        let mut lse = attention.returns_lse().then(|| vec![0f32; shape.iter().product()]);
        backend::cpu().forward_cached(
            &self.pages,
            &self.tables,
            sequences,
            &call,
            out.view_mut(),
            lse.as_deref_mut(),
        )?;
        let lse = lse.map(|lse| Tensor::new(lse, &shape)).transpose()?;
        Ok(Output { out, lse })
    }

    /// [`KvCache::attend_to`] into the caller's memory: `out` in q's layout, shape and element type, `lse` row-major in
    /// the shape that [`Output::lse`] has.
    ///
    /// # Errors
    /// As [`KvCache::attend_to`]; `out` and `lse` are then untouched.
    pub fn attend_into<'t>(
        &self,
        sequences: &[usize],
        q: impl Into<TensorView<'t>>,
        attention: &Attention<'_>,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let lens = self.lens(sequences)?;
        let call = self.check(q.into(), &lens, attention)?;
        backend::cpu().forward_cached(&self.pages, &self.tables, sequences, &call, out, lse)
    }

    /// Forgets all but the first `len` tokens of a sequence. Its pages are free for others.
    ///
    /// # Errors
    /// When there is no such sequence, or it has fewer tokens.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.tables.truncate(sequence, len)
    }

    /// Forgets every token of every sequence. The memory is kept for new ones.
    pub fn clear(&mut self) {
        self.tables = BlockTables::new(self.sequences(), self.layout().page_size, self.tables.max_pages());
    }

    /// Lets the empty sequence `to` begin with all tokens of `from`. Nothing is copied until one of them appends to a
    /// page that both hold.
    ///
    /// # Errors
    /// When there is no such sequence, or `to` has tokens.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.tables.fork(from, to)
    }

    fn lens(&self, sequences: &[usize]) -> Result<Vec<i32>> {
        // `BlockTables::reserve` keeps lengths within 31 bits.
        sequences.iter().map(|&sequence| self.len(sequence).map(|len| len as i32)).collect()
    }

    fn check<'s>(
        &self,
        q: TensorView<'s>,
        kv_lens: &'s [i32],
        attention: &'s Attention<'_>,
    ) -> Result<Call<'s>> {
        let (mask, block_mask) = attention.cached_masks()?;
        let inputs = CachedInputs { q, mask, block_mask, kv_lens };
        Call::check_cached(&inputs, self.layout(), &attention.options())
    }
}
