//! A quantised KV cache in a GPU's memory.

use std::sync::{Arc, Mutex, PoisonError};

use sage_core::{
    BlockTables, CacheLayout, CachedInputs, Call, DType, Error, Layout, MAX_HEADS, Operand, Options, Result,
    Strided,
};
use sage_cuda::{Buffer, Kernel, Stream};
use sage_kernels::decode::{AppendCall, AppendTensors, AttendCall, AttendTensors, PoolTensors, Storage};
use sage_kernels::pass::Pass;

use crate::plan::{self, Launch};
use crate::recent::Recent;
use crate::{Cuda, DeviceLse, DeviceTensor, argument, driver};

/// Passes kept for each kind of call: layers share a cache's, and lengths grow page by page.
const MAX_PASSES: usize = 16;

/// A pass, and its compiled kernels.
#[derive(Debug)]
struct Ready<T> {
    pass: Pass<T>,
    kernels: Vec<Kernel>,
}

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
    appends: Mutex<Recent<AppendCall, Arc<Ready<AppendTensors>>>>,
    attends: Mutex<Recent<AttendCall, Arc<Ready<AttendTensors>>>>,
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
            appends: Mutex::new(Recent::new(MAX_PASSES)),
            attends: Mutex::new(Recent::new(MAX_PASSES)),
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
        let call = AppendCall {
            storage: self.storage,
            dtype,
            num_kv_heads: self.layout.num_kv_heads,
            sequences: count,
            tokens,
            table_stride: self.max_pages,
        };
        let append = self.ready(&self.appends, call, || Ok(call.pass()))?;
        let sequences: Vec<usize> = (first..first + count).collect();
        let before = self.tables.clone();
        self.tables.reserve(&sequences, tokens)?;
        if tokens == 0 {
            return Ok(());
        }
        match self.write(&before, &append, &sequences, (&new_k, &new_v)) {
            Ok(()) => self.tables.advance(&sequences, tokens),
            Err(error) => {
                self.tables = before;
                Err(error)
            }
        }
    }

    /// Puts an append to neighbouring sequences on the stream; the tables have pages for it.
    fn write(
        &mut self,
        before: &BlockTables,
        append: &Ready<AppendTensors>,
        sequences: &[usize],
        (k, v): (&DeviceTensor<'_>, &DeviceTensor<'_>),
    ) -> Result<()> {
        let Some(&first) = sequences.first() else { return Ok(()) };
        if sequences.iter().any(|&sequence| before.table(sequence) != self.tables.table(sequence)) {
            self.copy_tables()?;
        }
        let tensors = AppendTensors { k: argument(k), v: argument(v), pool: self.pool(first) };
        // k and v are as their makers promise and fit the cache's layout; the pool has room for every page that a table
        // names, and the tables have a place for each token.
        self.run(append, &tensors)
    }

    /// Addresses of the pool, with the tables and lengths of the sequences from `first` on.
    fn pool(&self, first: usize) -> PoolTensors {
        PoolTensors {
            tables: self.device_tables.address() + 4 * (first * self.max_pages) as u64,
            kv_lens: self.device_lens.address() + 4 * first as u64,
            keys: self.keys.address(),
            key_scales: self.key_scales.address(),
            constants: self.constants.address(),
            values: self.values.address(),
            value_scales: self.value_scales.address(),
        }
    }

    /// The pass of a call, with its kernels.
    fn ready<K: PartialEq, T>(
        &self,
        recent: &Mutex<Recent<K, Arc<Ready<T>>>>,
        call: K,
        pass: impl FnOnce() -> Result<Pass<T>>,
    ) -> Result<Arc<Ready<T>>> {
        let recent = || recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = recent().get(&call) {
            return Ok(ready);
        }
        let pass = pass()?;
        let instead = "store values in another form, such as INT8 or f16";
        let kernels = self.cuda.kernels.of_pass(&pass, self.cuda.device(), &self.cuda.machine, instead)?;
        let ready = Arc::new(Ready { pass, kernels });
        recent().put(call, ready.clone());
        Ok(ready)
    }

    /// Puts a pass on the cache's stream.
    fn run<T>(&self, ready: &Ready<T>, tensors: &T) -> Result<()> {
        let put = |(_, kernel, grid, args): Launch<'_>| {
            // SAFETY: see `plan::OnStream`; the cache's buffers live as long as it does, and are freed in the order of its
            // stream.
            unsafe { kernel.launch(&self.stream, grid, args) }.map_err(driver)
        };
        plan::run(&ready.pass, &ready.kernels, tensors, &self.stream, put)
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
        let inputs = CachedInputs { q: *q, mask: None, block_mask: None, kv_lens: &lens };
        let checked = Call::check_cached(&inputs, &self.layout, options)?;
        let out = out.with_geometry(checked.check_output(out.dtype(), out.geometry())?);
        let problem = &checked.problem;
        let dtype = sixteen_bits("q", problem.dtype)?;
        let page_size = self.layout.page_size;
        let call = AttendCall {
            storage: self.storage,
            dtype,
            sequences: problem.batch,
            num_q_heads: problem.num_q_heads,
            num_kv_heads: problem.num_kv_heads,
            q_len: problem.q_len,
            // One pass serves all lengths until a sequence begins a page.
            kv_len: problem.kv_len.next_multiple_of(page_size),
            sm_scale: problem.sm_scale,
            band: problem.band,
            logit_softcap: problem.logit_softcap,
            lse: lse.is_some(),
            table_stride: self.max_pages,
        };
        if let Some(lse) = lse {
            lse.check(call.rows())?;
        }
        let attend = self.ready(&self.attends, call, || call.pass(&self.cuda.machine))?;
        let tensors = AttendTensors {
            q: argument(&checked.q),
            out: argument(&out),
            lse: lse.map_or(0, |lse| lse.address()),
            pool: self.pool(0),
        };
        // q, out and the log-sum-exp are as their makers promise, were checked, and have a place for each row.
        self.run(&attend, &tensors)
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
