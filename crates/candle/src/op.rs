//! The operation that candle's graph knows.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor};

use crate::view::out_shape;
use crate::{Options, cpu};

/// Attention of `q`, `k` and `v`, in Q's element type and shape but V's channels, row-major. Shapes are those of
/// [`Options::layout`] or [`Options::packed`]; fewer key heads than query heads is grouped-query attention, and one batch
/// entry of K and V is every one's. Any strides will do; a tensor is copied only where channels of a head are not
/// neighbours in memory.
///
/// # Errors
/// Names the first tensor or option that is wrong, the value found and the value wanted; or what no kernel here does.
pub fn sage_attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options) -> Result<Tensor> {
    let (q, k, v) = (dense_heads(q)?, dense_heads(k)?, dense_heads(v)?);
    q.apply_op3(&k, &v, SageAttention { options: options.clone(), lse: None })
}

/// As [`sage_attention`], and the natural logarithm of each row's sum of exponentials: f32, `[batch, num_q_heads,
/// q_len]`, or `[num_q_heads, total]` for packed sequences.
///
/// # Errors
/// As [`sage_attention`].
pub fn sage_attention_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
) -> Result<(Tensor, Tensor)> {
    let (q, k, v) = (dense_heads(q)?, dense_heads(k)?, dense_heads(v)?);
    let lse = LseSlot::default();
    let out = q.apply_op3(&k, &v, SageAttention { options: options.clone(), lse: Some(lse.clone()) })?;
    let shape = Shape::from(options.lse_shape(q.dims()));
    // An operation has one result. This one hands out what the first has left.
    let lse = q.apply_op3(&k, &v, LogSumExp { lse, shape })?;
    Ok((out, lse))
}

/// The tensor, or a row-major copy where the channels of a head are not neighbours in memory.
pub(crate) fn dense_heads(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.dims().last(), tensor.stride().last()) {
        (Some(2..), Some(stride)) if *stride != 1 => tensor.contiguous(),
        _ => Ok(tensor.clone()),
    }
}

/// Where the first operation leaves the log-sum-exp for the second.
type LseSlot = Arc<Mutex<Option<Storage>>>;

/// The output of attention.
struct SageAttention {
    options: Options,
    lse: Option<LseSlot>,
}

impl SageAttention {
    fn leave(&self, lse: Option<Storage>) {
        if let Some(slot) = &self.lse {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = lse;
        }
    }
}

impl CustomOp3 for SageAttention {
    fn name(&self) -> &'static str {
        "sage-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let tensors = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (out, lse) = cpu::forward(&self.options, tensors, self.lse.is_some())?;
        self.leave(lse.map(Storage::Cpu));
        Ok((out, Shape::from(out_shape(q_layout, v_layout))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let tensors = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (out, lse) = crate::cuda::forward(&self.options, tensors, self.lse.is_some())?;
        self.leave(lse.map(Storage::Cuda));
        Ok((out, Shape::from(out_shape(q_layout, v_layout))))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        no_backward()
    }
}

/// The log-sum-exp of attention that was computed already.
struct LogSumExp {
    lse: LseSlot,
    shape: Shape,
}

impl LogSumExp {
    fn take(&self) -> Option<Storage> {
        self.lse.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl CustomOp3 for LogSumExp {
    fn name(&self) -> &'static str {
        "sage-attention log-sum-exp"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.take() {
            Some(Storage::Cpu(lse)) => Ok((lse, self.shape.clone())),
            _ => candle_core::bail!("{}: attention left none on the CPU", self.name()),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.take() {
            Some(Storage::Cuda(lse)) => Ok((lse, self.shape.clone())),
            _ => candle_core::bail!("{}: attention left none on the GPU", self.name()),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        no_backward()
    }
}

pub(crate) fn no_backward<T>() -> Result<T> {
    candle_core::bail!(
        "backward through sage_attention is not supported: it is for inference; detach q, k and v, or train with \
         candle's own attention"
    )
}
