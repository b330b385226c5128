//! Decoding: tokens are appended to a KV cache, and queries attend to them.

use sage_core::DType;
use sage_core::oracle::{CachedHead, Matrix, cached, exact};
use sage_emulator::Buffer;
use sage_kernels::TensorArg;
use sage_kernels::decode::{AppendTensors, AttendTensors, PoolTensors};
use sageattention::TensorView;

use super::{Emulation, Gpu, argument};
use crate::decode_plan::{Append, DecodePlan};
use crate::failure::Result;
use crate::made_up::MadeUp;

/// Runs a plan, and compares what comes out with attention over what the cache must hold, and with exact attention.
pub(super) fn run(
    gpu: &mut Gpu<'_>,
    plan: &DecodePlan,
    made_up: &MadeUp<'_>,
    wants_lse: bool,
) -> Result<Emulation> {
    let tensors = made_up.tensors();
    let call = plan.cached_call(tensors[0])?;
    let without_cache = plan.exact_call(tensors)?;
    let (k, v) = (without_cache.k, without_cache.v);
    let (dtype, layout) = (call.problem.dtype, plan.layout());

    let pool = pool(gpu, plan)?;
    let kv_lens = gpu.emulator.buffer("kv_lens", &vec![0i32; call.problem.batch]);
    let on_gpu = [gpu.upload("k", &k), gpu.upload("v", &v)];
    let kv_heads = layout.num_kv_heads;
    let mut heads = vec![CachedHead::new(*layout); call.problem.batch * kv_heads];
    for append in plan.appends() {
        let [k_new, v_new] = on_gpu.map(|tensor| new_tokens(tensor, append, dtype));
        let of_sequences = of_sequences(pool, kv_lens, append);
        gpu.run(&append.call.pass(), &AppendTensors { k: k_new, v: v_new, pool: of_sequences })?;
        for sequence in append.sequence..append.sequence + append.call.sequences {
            let heads = &mut heads[sequence * kv_heads..][..kv_heads];
            append_scalars(heads, append, sequence, [&k, &v]);
        }
    }

    // The output lies as the queries do.
    let geometry = call.check_output(dtype, tensors[0].geometry())?;
    let out = gpu.uninitialized("out", dtype.bytes() * geometry.len())?;
    let lse = gpu.lse(call.lse_rows(), wants_lse)?;
    let attended = AttendTensors {
        q: gpu.upload("q", &call.q),
        out: argument(out, &geometry, dtype),
        lse: lse.map_or(0, |lse| lse.address()),
        sinks: gpu.sinks(plan.sinks()),
        pool: PoolTensors { kv_lens: kv_lens.address(), ..pool },
    };
    gpu.run(plan.attend(), &attended)?;
    let found = gpu.read(out, &geometry, dtype);
    Ok(gpu.finish(&found, lse, &cached(&call, &heads), &exact(&without_cache)))
}

/// An empty pool, without lengths. Pages fall where tokens rise, and sequences take turns, so that no kernel can do
/// without the block tables.
fn pool(gpu: &mut Gpu<'_>, plan: &DecodePlan) -> Result<PoolTensors> {
    let (layout, stride) = (plan.layout(), plan.table_stride());
    let sequences = plan.problem().batch;
    let pages = sequences * stride;
    let tables: Vec<i32> = (0..sequences)
        .flat_map(|sequence| (0..stride).map(move |page| (pages - 1 - sequences * page - sequence) as i32))
        .collect();
    let bytes = plan.storage().pool(pages, layout.num_kv_heads);
    let mut part = |name: &str, bytes| gpu.uninitialized(name, bytes).map(|buffer| buffer.address());
    Ok(PoolTensors {
        keys: part("keys", bytes.keys)?,
        key_scales: part("key_scales", bytes.key_scales)?,
        constants: part("constants", bytes.constants)?,
        values: part("values", bytes.values)?,
        value_scales: part("value_scales", bytes.value_scales)?,
        tables: gpu.list("tables", &tables),
        kv_lens: 0,
    })
}

/// The pool as the kernels see it that append to some sequences.
fn of_sequences(pool: PoolTensors, kv_lens: Buffer, append: &Append) -> PoolTensors {
    let (first, word) = (append.sequence as u64, size_of::<i32>() as u64);
    PoolTensors {
        tables: pool.tables + word * first * append.call.table_stride as u64,
        kv_lens: kv_lens.address() + word * first,
        ..pool
    }
}

/// The part of K or V that is appended.
fn new_tokens(tensor: TensorArg, append: &Append, dtype: DType) -> TensorArg {
    let [batch, _, row] = tensor.strides;
    let first = append.sequence as i64 * batch + append.token as i64 * row;
    TensorArg { address: tensor.address + first as u64 * dtype.bytes() as u64, ..tensor }
}

/// Appends the same tokens of a sequence to the oracle's heads.
fn append_scalars(heads: &mut [CachedHead], append: &Append, sequence: usize, kv: [&TensorView<'_>; 2]) {
    for (head, cached) in heads.iter_mut().enumerate() {
        let [k, v] =
            kv.map(|tensor| Matrix::of_head(tensor, sequence, head, append.token, append.call.tokens));
        cached.append(&k, &v);
    }
}
