//! A quantised KV cache in a GPU's memory.

use std::sync::{Arc, Mutex, PoisonError};

use sage_core::{BlockTables, CacheSize, NewTokens, Operand, Recent, Result, Strided};
use sage_cuda::{Buffer, Kernel, Stream};
use sage_kernels::TensorArg;
use sage_kernels::decode::{AppendCall, AppendTensors, AttendCall, AttendTensors, PoolTensors};
use sage_kernels::pass::Pass;
use sage_ptx::Target;

use crate::backend::sinks;
use crate::cache_shape::{CacheShape, INSTEAD, check_options, runs, sixteen_bits};
use crate::launches::{self, Launch};
use crate::tensor::argument;
use crate::{Cuda, DeviceCall, DeviceLse, DeviceTensor, driver};

/// Passes kept for each kind of call: layers share a cache's, and lengths grow page by page.
const MAX_PASSES: usize = 16;

/// A pass, and its compiled kernels.
#[derive(Debug)]
struct Ready<T> {
    pass: Pass<T>,
    kernels: Vec<Kernel>,
}

/// The memory of a quantised KV cache: a pool of fixed size, with kernels that append to it and attend to it on one
/// stream, the caller's.
///
/// The lengths of sequences, which kernels read, lie on the GPU and are counted there; block tables are copied there
/// when a sequence begins a page. Other calls put work on the stream and do not wait for it.
#[derive(Debug)]
pub struct CachePool {
    stream: Stream,
    shape: CacheShape,
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

impl CachePool {
    /// Takes all memory now, for [`CacheSize::max_pages`] pages, which must be set.
    pub(crate) fn new(stream: &Stream, size: &CacheSize, target: Target) -> Result<Self> {
        let shape = CacheShape::new(size, target)?;
        let (sequences, entries) = (size.sequences, size.sequences * shape.max_pages());
        let bytes = shape.pool();
        let buffer = |bytes| Buffer::new(stream, bytes).map_err(driver);
        let mut device_lens = buffer(4 * sequences)?;
        device_lens.fill(0).map_err(driver)?;
        Ok(CachePool {
            stream: stream.clone(),
            shape,
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

    /// Bytes of the pool.
    pub fn bytes(&self) -> usize {
        self.shape.pool().total()
    }

    pub(crate) fn append(
        &mut self,
        cuda: &Cuda,
        tables: &BlockTables,
        tokens: &NewTokens<'_, DeviceTensor<'_>>,
    ) -> Result<()> {
        let dtype = sixteen_bits("k", tokens.k.dtype())?;
        let count = tokens.k.shape()[2];
        if count == 0 {
            return Ok(());
        }
        let call = |sequences| self.shape.append(dtype, sequences, count);
        let page = self.shape.page_size();
        let mut begins = false;
        for &sequence in tokens.sequences {
            begins |= tables.table(sequence)?.len() > tables.len(sequence)?.div_ceil(page);
        }
        // What may fail for reasons of its own comes before anything is written.
        let ready =
            |sequences| self.ready(cuda, &self.appends, call(sequences), || Ok(call(sequences).pass()));
        let parts: Vec<_> = runs(tokens.sequences)
            .map(|run| ready(run.count).map(|pass| (run, pass)))
            .collect::<Result<_>>()?;
        if begins {
            self.copy_tables(tables)?;
        }
        for (run, pass) in parts {
            let (k, v) = (argument(&tokens.k), argument(&tokens.v));
            let tensors =
                AppendTensors { k: from(k, run.entry), v: from(v, run.entry), pool: self.pool(run.first) };
            // k and v are as their makers promise and fit the cache's layout; the pool has room for every page that a
            // table names, and the tables have a place for each token.
            if let Err(error) = self.run(&pass, &tensors) {
                // Other runs may have been counted already.
                self.copy_lens(tables)?;
                return Err(error);
            }
        }
        Ok(())
    }

    pub(crate) fn attend(
        &self,
        cuda: &Cuda,
        sequences: &[usize],
        call: &DeviceCall<'_>,
        out: DeviceTensor<'_>,
        lse: Option<DeviceLse<'_>>,
    ) -> Result<()> {
        check_options(call)?;
        let out = out.with_geometry(call.check_output(out.dtype(), out.geometry())?);
        if let Some(lse) = lse {
            lse.check(call.lse_rows())?;
        }
        let problem = &call.problem;
        let planned = self.shape.attend(problem, lse.is_some())?;
        let rows = problem.num_q_heads * problem.q_len;
        for run in runs(sequences) {
            let planned = AttendCall { sequences: run.count, ..planned };
            let attend = self.ready(cuda, &self.attends, planned, || planned.pass(cuda.machine()))?;
            let row = (run.entry * rows * size_of::<f32>()) as u64;
            let tensors = AttendTensors {
                q: from(argument(&call.q), run.entry),
                out: from(argument(&out), run.entry),
                lse: lse.map_or(0, |lse| lse.address() + row),
                sinks: sinks(call),
                pool: self.pool(run.first),
            };
            // q, out and the log-sum-exp are as their makers promise, were checked, and have a place for each row.
            self.run(&attend, &tensors)?;
        }
        Ok(())
    }

    /// Addresses of the pool, with the tables and lengths of the sequences from `first` on.
    fn pool(&self, first: usize) -> PoolTensors {
        PoolTensors {
            tables: self.device_tables.address() + 4 * (first * self.shape.max_pages()) as u64,
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
        cuda: &Cuda,
        recent: &Mutex<Recent<K, Arc<Ready<T>>>>,
        call: K,
        pass: impl FnOnce() -> Result<Pass<T>>,
    ) -> Result<Arc<Ready<T>>> {
        let recent = || recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = recent().get(&call) {
            return Ok(ready);
        }
        let pass = pass()?;
        let kernels = cuda.kernels().of_pass(&pass, cuda, INSTEAD)?;
        let ready = Arc::new(Ready { pass, kernels });
        recent().put(call, ready.clone());
        Ok(ready)
    }

    /// Puts a pass on the cache's stream.
    fn run<T>(&self, ready: &Ready<T>, tensors: &T) -> Result<()> {
        let put = |(_, kernel, grid, args): Launch<'_>| {
            // SAFETY: see `launches::OnStream`; the cache's buffers live as long as it does, and are freed in the order
            // of its stream.
            unsafe { kernel.launch(&self.stream, grid, args) }.map_err(driver)
        };
        launches::run(&ready.pass, &ready.kernels, tensors, &self.stream, put)
    }

    /// The host's tables to the GPU.
    fn copy_tables(&mut self, tables: &BlockTables) -> Result<()> {
        let mut entries = vec![0i32; tables.sequences() * self.shape.max_pages()];
        for (sequence, row) in entries.chunks_exact_mut(self.shape.max_pages().max(1)).enumerate() {
            let table = tables.table(sequence)?;
            row.iter_mut().zip(table).for_each(|(to, &page)| *to = page as i32);
        }
        self.device_tables.copy_from_host(&entries).map_err(driver)
    }

    /// The host's lengths to the GPU. Waits for the stream.
    pub(crate) fn copy_lens(&mut self, tables: &BlockTables) -> Result<()> {
        let len = |sequence| tables.len(sequence).map(|len| len as i32);
        let lens: Vec<i32> = (0..tables.sequences()).map(len).collect::<Result<_>>()?;
        self.device_lens.copy_from_host(&lens).map_err(driver)
    }
}

/// A tensor of 16-bit elements from an entry of its batch on.
fn from(tensor: TensorArg, entry: usize) -> TensorArg {
    let bytes = tensor.strides[0] * entry as i64 * 2;
    TensorArg { address: tensor.address.wrapping_add_signed(bytes), ..tensor }
}
