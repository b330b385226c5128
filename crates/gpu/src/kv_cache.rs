//! A quantised KV cache in a GPU's memory.

use std::sync::{Arc, Mutex, PoisonError};

use sage_core::{
    BlockTables, CacheLayout, CacheSize, DType, Error, MAX_HEADS, NewTokens, Operand, Recent, Result, Strided,
};
use sage_cuda::{Buffer, Kernel, Stream};
use sage_kernels::TensorArg;
use sage_kernels::decode::{AppendCall, AppendTensors, AttendCall, AttendTensors, PoolTensors, Storage};
use sage_kernels::pass::Pass;

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
    layout: CacheLayout,
    storage: Storage,
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

impl CachePool {
    /// Takes all memory now, for [`CacheSize::max_pages`] pages, which must be set.
    pub(crate) fn new(stream: &Stream, size: &CacheSize) -> Result<Self> {
        let CacheSize { layout, sequences, max_pages } = *size;
        layout.check()?;
        let Some(max_pages) = max_pages else {
            return Err(Error::value("max_pages", "none", "a number: the pool of a GPU has a fixed size"));
        };
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
        Ok(CachePool {
            stream: stream.clone(),
            layout,
            storage,
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

    /// Bytes of the pool.
    pub fn bytes(&self) -> usize {
        self.storage.pool(self.max_pages, self.layout.num_kv_heads).total()
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
        let call = |sequences| AppendCall {
            storage: self.storage,
            dtype,
            num_kv_heads: self.layout.num_kv_heads,
            sequences,
            tokens: count,
            table_stride: self.max_pages,
        };
        let page = self.layout.page_size;
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
        for (name, given) in [("mask", call.mask.is_some()), ("block_mask", call.block_mask.is_some())] {
            if given {
                let what = format!("{name} over a KV cache on a GPU");
                return Err(Error::unsupported(what, "causal masks and windows are what its kernels have"));
            }
        }
        let out = out.with_geometry(call.check_output(out.dtype(), out.geometry())?);
        if let Some(lse) = lse {
            lse.check(call.lse_rows())?;
        }
        let problem = &call.problem;
        let page_size = self.layout.page_size;
        let planned = AttendCall {
            storage: self.storage,
            dtype: sixteen_bits("q", problem.dtype)?,
            sequences: 0,
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
        let rows = problem.num_q_heads * problem.q_len;
        for run in runs(sequences) {
            let planned = AttendCall { sequences: run.count, ..planned };
            let attend = self.ready(cuda, &self.attends, planned, || planned.pass(cuda.machine()))?;
            let row = (run.entry * rows * size_of::<f32>()) as u64;
            let tensors = AttendTensors {
                q: from(argument(&call.q), run.entry),
                out: from(argument(&out), run.entry),
                lse: lse.map_or(0, |lse| lse.address() + row),
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
        let instead = "store values in another form, such as INT8 or f16";
        let kernels = cuda.kernels().of_pass(&pass, cuda, instead)?;
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
        let mut entries = vec![0i32; tables.sequences() * self.max_pages];
        for (sequence, row) in entries.chunks_exact_mut(self.max_pages.max(1)).enumerate() {
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

/// Neighbouring sequences, which one pass serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The first one.
    first: usize,
    /// Its place in the tensors' batch.
    entry: usize,
    count: usize,
}

/// Sequences in the order of a batch, as runs of neighbours.
fn runs(sequences: &[usize]) -> impl Iterator<Item = Run> {
    let mut entry = 0;
    sequences.chunk_by(|a, b| a + 1 == *b).map(move |chunk| {
        let run = Run { first: chunk[0], entry, count: chunk.len() };
        entry += chunk.len();
        run
    })
}

/// A tensor of 16-bit elements from an entry of its batch on.
fn from(tensor: TensorArg, entry: usize) -> TensorArg {
    let bytes = tensor.strides[0] * entry as i64 * 2;
    TensorArg { address: tensor.address.wrapping_add_signed(bytes), ..tensor }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_sequences_are_served_together() {
        let run = |first, entry, count| Run { first, entry, count };
        let of = |sequences: &[usize]| runs(sequences).collect::<Vec<_>>();
        assert_eq!(of(&[0, 1, 2]), [run(0, 0, 3)]);
        assert_eq!(of(&[3, 4, 1, 1, 2]), [run(3, 0, 2), run(1, 2, 1), run(1, 3, 2)]);
        assert_eq!(of(&[]), []);
    }
}
