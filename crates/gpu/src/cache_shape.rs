//! What the passes of a KV cache on a GPU are planned by.

use sage_core::{CacheLayout, CacheSize, Call, DType, Error, MAX_HEADS, Operand, Problem, Result};
use sage_kernels::decode::{AppendCall, AttendCall, PoolBytes, Storage};
use sage_ptx::Target;

/// What would do where a GPU lacks an instruction.
pub const INSTEAD: &str = "store values in another form, such as INT8 or f16";

/// What a cache's passes are planned by, beside the tokens and queries of a call.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    layout: CacheLayout,
    storage: Storage,
    max_pages: usize,
}

impl CacheShape {
    /// The shape of a cache whose [`CacheSize::max_pages`] is set, on a GPU of a target.
    pub fn new(size: &CacheSize, target: Target) -> Result<Self> {
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
        if entries.is_none() || !(1..=most).contains(&sequences) {
            let wanted = format!("1 to {most}, and tables of less than 2³¹ pages");
            return Err(Error::value("sequences", sequences, wanted));
        }
        Ok(CacheShape { layout, storage: Storage::new(&layout, target)?, max_pages })
    }

    /// Pages of the pool, and of a row of the block tables.
    pub fn max_pages(&self) -> usize {
        self.max_pages
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.layout.page_size
    }

    /// Bytes of the parts of the pool.
    pub fn pool(&self) -> PoolBytes {
        self.storage.pool(self.max_pages, self.layout.num_kv_heads)
    }

    /// Appending `tokens` tokens to each of so many neighbouring sequences.
    pub fn append(&self, dtype: DType, sequences: usize, tokens: usize) -> AppendCall {
        AppendCall {
            storage: self.storage,
            dtype,
            num_kv_heads: self.layout.num_kv_heads,
            sequences,
            tokens,
            table_stride: self.max_pages,
        }
    }

    /// Attention to no sequence yet.
    pub fn attend(&self, problem: &Problem, lse: bool) -> Result<AttendCall> {
        Ok(AttendCall {
            storage: self.storage,
            dtype: sixteen_bits("q", problem.dtype)?,
            sequences: 0,
            num_q_heads: problem.num_q_heads,
            num_kv_heads: problem.num_kv_heads,
            q_len: problem.q_len,
            // One pass serves all lengths until a sequence begins a page.
            kv_len: problem.kv_len.next_multiple_of(self.layout.page_size),
            sm_scale: problem.sm_scale,
            band: problem.band,
            logit_softcap: problem.logit_softcap,
            sinks: problem.sinks,
            lse,
            table_stride: self.max_pages,
        })
    }
}

/// Refuses what kernels over caches do not have.
pub fn check_options<T: Operand>(call: &Call<'_, T>) -> Result<()> {
    for (name, given) in [("mask", call.mask.is_some()), ("block_mask", call.block_mask.is_some())] {
        if given {
            let what = format!("{name} over a KV cache on a GPU");
            return Err(Error::unsupported(what, "causal masks and windows are what its kernels have"));
        }
    }
    Ok(())
}

/// Neighbouring sequences, which one pass serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one.
    pub first: usize,
    /// Its place in the tensors' batch.
    pub entry: usize,
    /// How many they are.
    pub count: usize,
}

/// Sequences in the order of a batch, as runs of neighbours.
pub fn runs(sequences: &[usize]) -> impl Iterator<Item = Run> {
    let mut entry = 0;
    sequences.chunk_by(|a, b| a + 1 == *b).map(move |chunk| {
        let run = Run { first: chunk[0], entry, count: chunk.len() };
        entry += chunk.len();
        run
    })
}

/// The element type of a tensor that the kernels read.
pub fn sixteen_bits(name: &'static str, dtype: DType) -> Result<DType> {
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
