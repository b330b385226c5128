//! Tensors that commands compute with: read from files, or made up.

use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sageattention::{DType, Error, Geometry, Layout, Result as CallResult, Tensor, TensorView, View};
use sageattn_files::qkv_file::{self, Qkv, QkvFile};

use crate::failure::{Failure, Result};

/// The shipped example: queries, keys and values of two layers of all-MiniLM-L6-v2 (Apache-2.0) on a licence text.
pub const EXAMPLE: &[u8] = include_bytes!("../data/minilm_qkv.safetensors");

/// A file's bytes.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Failure::io(path, "cannot be read", &error))
}

/// A file's header, checked.
pub fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<QkvFile<'a>> {
    qkv_file::parse(bytes).map_err(|error| Failure::file(path, &error))
}

/// Queries, keys and values behind `prefix`, or behind each prefix that has all three.
pub fn load(path: &Path, file: &QkvFile<'_>, prefix: Option<&str>) -> Result<Vec<Qkv>> {
    let loaded = match prefix {
        Some(prefix) => file.load(prefix).map(|qkv| vec![qkv]),
        None => file.prefixes().and_then(|all| all.iter().map(|prefix| file.load(prefix)).collect()),
    };
    loaded.map_err(|error| Failure::file(path, &error))
}

/// Query heads of a tensor of queries in a layout; 0 where it has another number of dimensions, which the call refuses.
pub fn num_q_heads(q: &Tensor, layout: Layout) -> usize {
    match (q.shape(), layout) {
        (&[_, heads, _, _], Layout::Hnd) | (&[_, _, heads, _], Layout::Nhd) => heads,
        _ => 0,
    }
}

/// Attention sinks as a call takes them.
pub fn sinks(sinks: &[f32]) -> CallResult<TensorView<'_>> {
    View::contiguous("sinks", sinks, &[sinks.len()]).map(TensorView::F32)
}

/// A tensor of normally distributed numbers, the same in every run.
pub fn normal(dtype: DType, shape: &[usize], seed: u64) -> CallResult<Tensor> {
    // The size comes from the command line: it may overflow, or exceed this machine.
    let len = Geometry::contiguous("tensor", shape)?.len();
    let mut values: Vec<f32> = Vec::new();
    values.try_reserve_exact(len).map_err(|_| {
        Error::unsupported(format!("a tensor of shape {shape:?}"), format!("no memory for {len} numbers"))
    })?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    values.extend((0..len).map(|_| -> f32 { StandardNormal.sample(&mut rng) }));
    Ok(Tensor::new(values, shape)?.to_dtype(dtype))
}
