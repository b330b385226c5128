//! Attention of tensors in this process's memory.

use candle_core::{CpuStorage, Result, Storage, WithDType};
use half::{bf16, f16};
use sageattention::{Attention, BlockMask, DType, Element, Error, Geometry, TensorViewMut, ViewMut};

use crate::Options;
use crate::error::wrap;
use crate::options::Lengths;
use crate::view::{self, HostFlags, HostMask};

/// The output, and the log-sum-exp where `lse` asks for it.
pub(crate) fn forward(
    options: &Options,
    [q, k, v]: [(&CpuStorage, &candle_core::Layout); 3],
    lse: bool,
) -> Result<(CpuStorage, Option<CpuStorage>)> {
    let (q_shape, out_shape) = (q.1.dims(), view::out_shape(q.1, v.1));
    let q = view::tensor("q", q.0, q.1).map_err(wrap)?;
    let k = view::tensor("k", k.0, k.1).map_err(wrap)?;
    let v = view::tensor("v", v.0, v.1).map_err(wrap)?;
    let mut lse = lse.then(|| vec![0f32; options.lse_shape(q_shape).iter().product()]);
    let out = with_attention(options, |attention| {
        output(q.dtype(), &out_shape, |out| {
            attention.forward_into(q, k, v, out, lse.as_deref_mut()).map(drop)
        })
    })?;
    Ok((out, lse.map(CpuStorage::F32)))
}

/// Runs `run` with the options as those of the plain crate, the tensors among them included.
pub(crate) fn with_attention<R>(
    options: &Options,
    run: impl FnOnce(&Attention<'_>) -> Result<R>,
) -> Result<R> {
    let mut attention = options.attention();
    let mask_storage = options.mask.as_ref().map(|mask| mask.storage_and_layout());
    let mask = mask_storage.as_ref().map(|(storage, layout)| HostMask::new(storage, layout)).transpose();
    let mask = mask.map_err(wrap)?;
    if let Some(mask) = &mask {
        attention = attention.mask(mask.mask().map_err(wrap)?);
    }
    let blocks = options.blocks.as_ref().map(|blocks| (blocks, blocks.flags.storage_and_layout()));
    let blocks = blocks.as_ref().map(|(blocks, (storage, layout))| {
        HostFlags::new("block_mask", storage, layout).map(|flags| (flags, blocks.block_q, blocks.block_k))
    });
    let blocks = blocks.transpose().map_err(wrap)?;
    if let Some((flags, block_q, block_k)) = &blocks {
        let (block_q, block_k) = (*block_q, *block_k);
        attention = attention.block_mask(BlockMask { blocks: flags.view().map_err(wrap)?, block_q, block_k });
    }
    let sinks = options.sinks.as_ref().map(|sinks| sinks.storage_and_layout());
    if let Some((storage, layout)) = &sinks {
        let Storage::Cpu(storage) = &**storage else {
            let found = format!("{:?}", storage.device().location());
            return Err(wrap(Error::value("sinks device", found, "cpu, where q is")));
        };
        attention = attention.sinks(view::tensor("sinks", storage, layout).map_err(wrap)?);
    }
    let (first, second);
    attention = match &options.lengths {
        Lengths::Dense => attention,
        Lengths::KvLens(kv_lens) => {
            first = view::lengths("kv_lens", kv_lens)?;
            attention.kv_lens(&first)
        }
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k, .. } => {
            first = view::lengths("cu_seqlens_q", cu_seqlens_q)?;
            second = view::lengths("cu_seqlens_k", cu_seqlens_k)?;
            attention.packed(&first, &second)
        }
    };
    run(&attention)
}

/// A new row-major tensor, which `fill` fills.
pub(crate) fn output(
    dtype: DType,
    shape: &[usize],
    fill: impl FnOnce(TensorViewMut<'_>) -> sageattention::Result<()>,
) -> Result<CpuStorage> {
    match dtype {
        DType::F32 => typed_output::<f32>(shape, fill),
        DType::F16 => typed_output::<f16>(shape, fill),
        DType::BF16 => typed_output::<bf16>(shape, fill),
    }
}

fn typed_output<T>(
    shape: &[usize],
    fill: impl FnOnce(TensorViewMut<'_>) -> sageattention::Result<()>,
) -> Result<CpuStorage>
where
    T: Element + WithDType,
    for<'a> ViewMut<'a, T>: Into<TensorViewMut<'a>>,
{
    let geometry = Geometry::contiguous("out", shape).map_err(wrap)?;
    let mut out = vec![T::ZERO; geometry.len()];
    let view = ViewMut::strided("out", &mut out, geometry).map_err(wrap)?;
    fill(view.into()).map_err(wrap)?;
    Ok(T::to_cpu_storage_owned(out))
}
