//! A quantised KV cache in a GPU's memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sage_core::{
    Alignment, BlockTables, CacheLayout, CachedInputs, Call, DType, Error, Layout, MAX_HEADS, Operand,
    Options, Result, Strided,
};
use sage_cuda::{Buffer, Kernel, Stream};
use sage_kernels::cache::{
    CacheAdvanceArgs, CacheAdvanceConfig, CacheAppendArgs, CacheAppendConfig, CacheAttendArgs,
    CacheAttendConfig, Storage, split_tokens,
};
use sage_kernels::combine::{CombineArgs, CombineConfig, PART};
use sage_ptx::Program;

use crate::plan::load;
use crate::{Cuda, DeviceLse, DeviceMask, DeviceTensor, driver};

/// Tokens that a band may reach, so that sums with them fit 32 bits.
const REACH_MAX: usize = 1 << 30;

/// A quantised KV cache in a GPU's memory: a pool of fixed size, with kernels that append to it and attend to it on one
/// stream, the caller's.
///
/// The lengths of sequences, which kernels read, lie on the GPU and are counted there; block tables are copied there when
/// a sequence begins a page. Other calls put work on the stream and do not wait for it.
#[derive(Debug)]
pub struct KvCache {
    cuda: Arc<Cuda>,
    stream: Stream,
    layout: CacheLayout,
    storage: Storage,
    order: Layout,
    tables: BlockTables,
    max_pages: usize,
    keys: Buffer,
    key_scales: Buffer,
    constants: Buffer,
    values: Buffer,
    value_scales: Buffer,
    /// `[sequences, max_pages]`.
    device_tables: Buffer,
    /// `[sequences]`.
    device_lens: Buffer,
    kernels: Mutex<HashMap<String, Kernel>>,
}

/// Sizes of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSize {
    /// Sequences.
    pub sequences: usize,
    /// Pages of all sequences together.
    pub max_pages: usize,
}

impl KvCache {
    /// An empty cache, whose work is done on `stream`; keys and values are appended in `order`. All memory is taken now.
    ///
    /// # Errors
    /// Names the option that is outside its range, or what the driver says.
    pub fn new(
        cuda: &Arc<Cuda>,
        stream: &Stream,
        layout: CacheLayout,
        size: PoolSize,
        order: Layout,
    ) -> Result<KvCache> {
        layout.check()?;
        let PoolSize { sequences, max_pages } = size;
        let rows = max_pages.checked_mul(layout.num_kv_heads).and_then(|n| n.checked_mul(layout.page_size));
        if rows.is_none_or(|rows| i32::try_from(rows).is_err()) {
            let wanted = "pages of less than 2³¹ tokens and heads together";
            return Err(Error::value("max_pages", max_pages, wanted));
        }
        let entries = sequences.checked_mul(max_pages).filter(|&n| i32::try_from(n).is_ok());
        let most = MAX_HEADS / layout.num_kv_heads.max(1);
        let Some(entries) = entries.filter(|_| (1..=most).contains(&sequences)) else {
            let wanted = format!("1 to {most}, and tables of less than 2³¹ pages");
            return Err(Error::value("sequences", sequences, wanted));
        };
        let storage = Storage::new(&layout);
        let bytes = storage.pool(max_pages, layout.num_kv_heads);
        let buffer = |bytes| Buffer::new(stream, bytes).map_err(driver);
        let mut device_lens = buffer(4 * sequences)?;
        device_lens.fill(0).map_err(driver)?;
        Ok(KvCache {
            cuda: cuda.clone(),
            stream: stream.clone(),
            layout,
            storage,
            order,
            tables: BlockTables::new(sequences, layout.page_size, Some(max_pages)),
            max_pages,
            keys: buffer(bytes.keys)?,
            key_scales: buffer(bytes.key_scales)?,
            constants: buffer(bytes.constants)?,
            values: buffer(bytes.values)?,
            value_scales: buffer(bytes.value_scales)?,
            device_tables: buffer(4 * entries)?,
            device_lens,
            kernels: Mutex::default(),
        })
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.tables.sequences()
    }

    /// What a page holds.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Tokens of a sequence, those included that are still to be written on the stream.
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

    /// Bytes of the pool.
    pub fn bytes(&self) -> usize {
        self.storage.pool(self.max_pages, self.layout.num_kv_heads).total()
    }

    /// Pages that sequences hold now.
    pub fn pages_in_use(&self) -> usize {
        self.tables.pages_in_use()
    }

    /// Appends new tokens to every sequence: `k` and `v` are `[sequences, num_kv_heads, tokens, head_dim]` in f16 or bf16
    /// (or as [`KvCache::new`] says).
    ///
    /// # Errors
    /// When a tensor does not fit the cache, the pool has too few pages, or what the driver says.
    pub fn append(&mut self, k: &DeviceTensor<'_>, v: &DeviceTensor<'_>) -> Result<()> {
        self.append_range(0, self.sequences(), k, v)
    }

    /// Appends new tokens to one sequence: `k` and `v` are as in [`KvCache::append`], with a batch of 1.
    ///
    /// # Errors
    /// As [`KvCache::append`], and when there is no such sequence.
    pub fn append_to(&mut self, sequence: usize, k: &DeviceTensor<'_>, v: &DeviceTensor<'_>) -> Result<()> {
        self.append_range(sequence, 1, k, v)
    }

    fn append_range(
        &mut self,
        first: usize,
        count: usize,
        k: &DeviceTensor<'_>,
        v: &DeviceTensor<'_>,
    ) -> Result<()> {
        let new_k = self.layout.check_new("k", *k, self.order, count)?;
        let new_v = self.layout.check_new("v", *v, self.order, count)?;
        let dtype = sixteen_bits("k", k.dtype())?;
        if v.dtype() != dtype {
            return Err(Error::DType {
                name: "v".into(),
                found: v.dtype().to_string(),
                wanted: format!("{dtype}, as k"),
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
        // What may fail for reasons of its own comes before the tables change.
        let config = CacheAppendConfig { storage: self.storage, dtype };
        let append = self.kernel(&config.name(), || config.program())?;
        let advance = self.kernel(&CacheAdvanceConfig.name(), || CacheAdvanceConfig.program())?;
        let grid = config.grid(tokens, self.layout.num_kv_heads, count);
        let sequences: Vec<usize> = (first..first + count).collect();
        let before = self.tables.clone();
        self.tables.reserve(&sequences, tokens)?;
        if tokens == 0 {
            return Ok(());
        }
        let written =
            self.write(&before, [&append, &advance], grid, (first, count), (&new_k, &new_v), tokens);
        match written {
            Ok(()) => self.tables.advance(&sequences, tokens),
            Err(error) => {
                self.tables = before;
                Err(error)
            }
        }
    }

    /// Puts the kernels of an append on the stream; the tables have pages for it.
    fn write(
        &mut self,
        before: &BlockTables,
        [append, advance]: [&Kernel; 2],
        grid: [u32; 3],
        (first, count): (usize, usize),
        (k, v): (&DeviceTensor<'_>, &DeviceTensor<'_>),
        tokens: usize,
    ) -> Result<()> {
        let begun =
            (first..first + count).any(|sequence| before.table(sequence) != self.tables.table(sequence));
        if begun {
            self.copy_tables()?;
        }
        let (k_strides, v_strides) = (k.strides(), v.strides());
        let kv_lens = self.device_lens.address() + 4 * first as u64;
        let args = CacheAppendArgs {
            k: k.first_element(),
            k_stride_batch: k_strides[0],
            k_stride_head: k_strides[1],
            k_stride_row: k_strides[2],
            v: v.first_element(),
            v_stride_batch: v_strides[0],
            v_stride_head: v_strides[1],
            v_stride_row: v_strides[2],
            tables: self.device_tables.address() + 4 * (first * self.max_pages) as u64,
            kv_lens,
            keys: self.keys.address(),
            key_scales: self.key_scales.address(),
            constants: self.constants.address(),
            values: self.values.address(),
            value_scales: self.value_scales.address(),
            table_stride: self.max_pages as i32,
            tokens: tokens as i32,
            kv_heads: self.layout.num_kv_heads as i32,
            sequences: count as i32,
        };
        // SAFETY: k and v are as their makers promise and fit the cache's layout; the pool's buffers have room for every
        // page that a table names, and the tables a place for each token; all of them live as long as the cache and are
        // freed in the order of its stream.
        unsafe { append.launch(&self.stream, grid, &args.args()) }.map_err(driver)?;
        let args = CacheAdvanceArgs { kv_lens, sequences: count as i32, tokens: tokens as i32 };
        let grid = CacheAdvanceConfig.grid(count);
        // SAFETY: the kernel counts `count` lengths on, from the first on, which there are.
        unsafe { advance.launch(&self.stream, grid, &args.args()) }.map_err(driver)
    }

    /// Attention of `q` over everything cached, `[sequences, num_q_heads, q_len, head_dim]` in f16 or bf16 and the
    /// options' layout, into `out` of the same shape and element type; the log-sum-exp of each row, f32 and row-major
    /// `[sequences, num_q_heads, q_len]`, to `lse` where it is given. The last query is that of the last
    /// cached token. Returns when the work is on the stream.
    ///
    /// # Errors
    /// When q, out or an option does not fit the cache, or what the driver says.
    pub fn attend(
        &self,
        q: &DeviceTensor<'_>,
        options: &Options,
        out: &DeviceTensor<'_>,
        lse: Option<DeviceLse<'_>>,
    ) -> Result<()> {
        let lens: Vec<i32> = (0..self.sequences())
            .map(|sequence| self.len(sequence).map(|len| len as i32))
            .collect::<Result<_>>()?;
        let inputs = CachedInputs { q: *q, mask: None::<DeviceMask<'_>>, block_mask: None, kv_lens: &lens };
        let call = Call::check_cached(&inputs, &self.layout, options)?;
        let out = out.with_geometry(call.check_output(out.dtype(), out.geometry())?);
        let problem = &call.problem;
        let dtype = sixteen_bits("q", problem.dtype)?;
        let (group, q_len, heads) = (problem.group_size(), problem.q_len, problem.num_kv_heads);
        if options.band.alignment != Alignment::BottomRight && !options.band.is_full() {
            return Err(Error::unsupported(
                "a mask aligned top-left over a KV cache on a GPU",
                "align it bottom-right: the last query is that of the last cached token",
            ));
        }
        let total_rows = problem.batch * problem.num_q_heads * q_len;
        if let Some(lse) = lse {
            lse.check(total_rows)?;
        }
        if total_rows == 0 {
            return Ok(());
        }
        if i32::try_from(total_rows).is_err() {
            return Err(Error::value("q_len", q_len, "less than 2³¹ rows of all heads together"));
        }
        let config = CacheAttendConfig {
            storage: self.storage,
            dtype,
            rows: CacheAttendConfig::rows_for(q_len, group),
            softcap: problem.logit_softcap.is_some(),
        };
        let blocks = heads * config.row_blocks(q_len, group);
        let split = split_tokens(
            &self.storage,
            problem.kv_len,
            blocks * problem.batch,
            self.cuda.gpu.multiprocessors,
        );
        let splits = problem.kv_len.div_ceil(split).max(1);
        let grid = config.grid(splits, heads, q_len, group, problem.batch);
        let combine = CombineConfig { dtype, head_dim: problem.head_dim, lse: lse.is_some() };
        let attend = self.kernel(&config.name(), || config.program())?;
        let merge = self.kernel(&combine.name(), || combine.program())?;

        let partial =
            Buffer::new(&self.stream, 4 * splits * total_rows * problem.head_dim).map_err(driver)?;
        let partial_sums = Buffer::new(&self.stream, 4 * PART * splits * total_rows).map_err(driver)?;
        let log2e = std::f32::consts::LOG2_E;
        let reach = |side: Option<usize>| side.map_or(REACH_MAX, |n| n.min(REACH_MAX)) as i32;
        let strides = call.q.strides();
        let args = CacheAttendArgs {
            q: call.q.first_element(),
            q_stride_batch: strides[0],
            q_stride_head: strides[1],
            q_stride_row: strides[2],
            tables: self.device_tables.address(),
            kv_lens: self.device_lens.address(),
            keys: self.keys.address(),
            key_scales: self.key_scales.address(),
            constants: self.constants.address(),
            values: self.values.address(),
            value_scales: self.value_scales.address(),
            partial: partial.address(),
            partial_sums: partial_sums.address(),
            table_stride: self.max_pages as i32,
            kv_heads: heads as i32,
            group: group as i32,
            q_len: q_len as i32,
            sequences: problem.batch as i32,
            split: split as i32,
            scale: problem.sm_scale * log2e,
            cap: problem.logit_softcap.map_or(0.0, |cap| (cap * log2e).min(f32::MAX)),
            left: reach(problem.band.left),
            right: reach(problem.band.right),
        };
        // SAFETY: q is as its maker promises and was checked; the cache's buffers are as in `write`, and the partial
        // results have a place for each split of each row and are freed in the stream's order, after both kernels.
        unsafe { attend.launch(&self.stream, grid, &args.args()) }.map_err(driver)?;
        let strides = out.strides();
        let args = CombineArgs {
            partial: partial.address(),
            partial_sums: partial_sums.address(),
            out: out.first_element(),
            lse: lse.map_or(0, |lse| lse.address()),
            out_stride_batch: strides[0],
            out_stride_head: strides[1],
            out_stride_row: strides[2],
            total_rows: total_rows as i32,
            q_rows: q_len as i32,
            q_heads: problem.num_q_heads as i32,
            splits: splits as i32,
        };
        // SAFETY: as above; `out` and `lse` are as their makers promise, and have a place for each row.
        unsafe { merge.launch(&self.stream, combine.grid(total_rows), &args.args()) }.map_err(driver)
    }

    /// Forgets all but the first `len` tokens of a sequence; its pages are free for others. Waits for the stream.
    ///
    /// # Errors
    /// When there is no such sequence, it has fewer tokens, or what the driver says.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        let before = self.tables.clone();
        self.tables.truncate(sequence, len)?;
        let copied = self.copy_lens();
        if copied.is_err() {
            self.tables = before;
        }
        copied
    }

    /// The host's tables to the GPU.
    fn copy_tables(&mut self) -> Result<()> {
        let mut entries = vec![0i32; self.sequences() * self.max_pages];
        for (sequence, row) in entries.chunks_exact_mut(self.max_pages.max(1)).enumerate() {
            let table = self.tables.table(sequence)?;
            row.iter_mut().zip(table).for_each(|(to, &page)| *to = page as i32);
        }
        self.device_tables.copy_from_host(&entries).map_err(driver)
    }

    /// The host's lengths to the GPU.
    fn copy_lens(&mut self) -> Result<()> {
        let lens: Vec<i32> = (0..self.sequences())
            .map(|sequence| self.len(sequence).map(|len| len as i32))
            .collect::<Result<_>>()?;
        self.device_lens.copy_from_host(&lens).map_err(driver)
    }

    /// A kernel, compiled at its first use.
    fn kernel(&self, name: &str, program: impl FnOnce() -> Program) -> Result<Kernel> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(name) {
            return Ok(kernel.clone());
        }
        let instead = "store values in another form, such as INT8 or f16";
        let kernel = load(self.cuda.device(), self.cuda.gpu.target, &program(), instead)?;
        kernels.insert(name.to_owned(), kernel.clone());
        Ok(kernel)
    }
}

/// The element type of a tensor that the kernels read.
fn sixteen_bits(name: &'static str, dtype: DType) -> Result<DType> {
    match dtype {
        DType::F16 | DType::BF16 => Ok(dtype),
        DType::F32 => Err(Error::DType {
            name: name.into(),
            found: dtype.to_string(),
            wanted: "f16 or bf16, of which the GPU's kernels are".into(),
        }),
    }
}
