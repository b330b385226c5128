//! Attention with its options: what users write.

use sage_core::{
    Alignment, Band, BlockMask, Call, Choice, Error, Inputs, Layout, Lengths, Mask, Options, Preset, Result,
    Scheme, Tensor, TensorView, TensorViewMut, View,
};

use crate::backend::{self, Device};
use crate::plan::Plan;

/// Relative L1 error of the processor's own choice, INT8 per token: the worst measured on N(0, 1) is 0.0093.
const CPU_ERROR: f32 = 0.01;

/// What attention returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The output, in q's layout, shape and element type.
    pub out: Tensor,
    /// Natural logarithm of each row's sum of exponentials, f32, where [`Attention::return_lse`] asked for it:
    /// `[batch, num_q_heads, q_len]`, or `[num_q_heads, total]` for packed sequences.
    pub lse: Option<Tensor>,
}

/// An explicit mask and a block mask.
pub(crate) type Masks<'a> = (Option<Mask<'a>>, Option<BlockMask<View<'a, bool>>>);

/// Attention with its options. One value serves any number of calls.
///
/// Without options: dense `[batch, heads, seq, head_dim]` tensors, no mask, scores scaled by `1 / √head_dim`, and the
/// fastest scheme that is accurate. Fewer key heads than query heads is grouped-query attention.
#[derive(Clone, Debug, Default)]
#[must_use = "options compute nothing until `forward` is called"]
pub struct Attention<'a> {
    layout: Layout,
    causal: bool,
    window: Band,
    sm_scale: Option<f32>,
    logit_softcap: Option<f32>,
    mask: Option<Mask<'a>>,
    block_mask: Option<BlockMask<View<'a, bool>>>,
    lengths: Lengths<'a>,
    choice: Choice,
    device: Device,
    return_lse: bool,
}

impl<'a> Attention<'a> {
    /// No option set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Order of the dimensions of dense tensors, the output included.
    pub fn layout(self, layout: Layout) -> Self {
        Attention { layout, ..self }
    }

    /// Whether a query sees no later key. Where `q_len != kv_len` the last query sees the last key, unless
    /// [`Attention::causal_alignment`] says otherwise.
    pub fn causal(self, causal: bool) -> Self {
        Attention { causal, ..self }
    }

    /// A causal mask whose diagonal lies as `alignment` says.
    pub fn causal_alignment(self, alignment: Alignment) -> Self {
        Attention { causal: true, window: Band { alignment, ..self.window }, ..self }
    }

    /// A sliding window: keys further than `left` before the diagonal or `right` after it are hidden; `None` is no
    /// limit. With a causal mask, none after the diagonal is visible whatever `right` says.
    pub fn window(self, left: impl Into<Option<usize>>, right: impl Into<Option<usize>>) -> Self {
        Attention { window: Band { left: left.into(), right: right.into(), ..self.window }, ..self }
    }

    /// Factor on Q·Kᵀ, instead of `1 / √head_dim`.
    pub fn sm_scale(self, sm_scale: f32) -> Self {
        Attention { sm_scale: Some(sm_scale), ..self }
    }

    /// Scaled scores `s` become `softcap · tanh(s / softcap)`, before any mask is added.
    pub fn logit_softcap(self, softcap: f32) -> Self {
        Attention { logit_softcap: Some(softcap), ..self }
    }

    /// An explicit mask, broadcastable to `[batch, num_q_heads, q_len, kv_len]`, on top of causal mask and window.
    ///
    /// A key that it hides from every query has no influence at all, whatever K and V hold there: padding and the empty
    /// slots of a static cache cost no accuracy. In softmax only `false` and −∞ hide. A key whose bias is about the least
    /// finite number of the mask's type in every row (how padding is often written) is seen where a row holds nothing
    /// else, but enters no mean and no scale.
    pub fn mask(self, mask: Mask<'a>) -> Self {
        Attention { mask: Some(mask), ..self }
    }

    /// The blocks of the score matrix to compute.
    pub fn block_mask(self, mask: BlockMask<View<'a, bool>>) -> Self {
        Attention { block_mask: Some(mask), ..self }
    }

    /// Only the first `kv_lens[b]` keys of batch entry `b` are valid.
    pub fn kv_lens(self, kv_lens: &'a [i32]) -> Self {
        Attention { lengths: Lengths::KvLens(kv_lens), ..self }
    }

    /// Packed tensors `[total, heads, head_dim]`: sequence `b` is rows `cu_seqlens[b]..cu_seqlens[b + 1]`.
    pub fn packed(self, cu_seqlens_q: &'a [i32], cu_seqlens_k: &'a [i32]) -> Self {
        Attention { lengths: Lengths::Packed { cu_seqlens_q, cu_seqlens_k }, ..self }
    }

    /// A [`Scheme`] or [`Preset`], instead of the backend's own choice.
    pub fn scheme(self, choice: impl Into<Choice>) -> Self {
        Attention { choice: choice.into(), ..self }
    }

    /// The fastest scheme whose relative error is at most this: see [`Choice::Within`].
    pub fn accuracy(self, relative_error: f32) -> Self {
        Attention { choice: Choice::Within(relative_error), ..self }
    }

    /// What computes [`Attention::forward`], instead of this machine's processor. For tensors that lie in a GPU's memory
    /// already see [`crate::cuda::Cuda::forward_into`].
    pub fn device(self, device: Device) -> Self {
        Attention { device, ..self }
    }

    /// Whether [`Attention::forward`] also returns each row's log-sum-exp.
    pub fn return_lse(self, return_lse: bool) -> Self {
        Attention { return_lse, ..self }
    }

    /// Computes attention.
    ///
    /// # Errors
    /// Names the first tensor or option that is wrong, or what no backend here can do.
    pub fn forward<'t>(
        &self,
        q: impl Into<TensorView<'t>>,
        k: impl Into<TensorView<'t>>,
        v: impl Into<TensorView<'t>>,
    ) -> Result<Output> {
        let (q, k, v) = (q.into(), k.into(), v.into());
        let inputs = self.inputs(q, k, v);
        let call = Call::check(&inputs, &self.options())?;
        let lse_shape = call.lse_shape();
        if let Device::Cuda(ordinal) = self.device {
            return self.forward_on_gpu(ordinal, &inputs, lse_shape.iter().product());
        }
        let mut out = Tensor::zeros(q.dtype(), q.shape())?;
        let mut lse = self.return_lse.then(|| vec![0f32; lse_shape.iter().product()]);
        self.execute(&call, out.view_mut(), lse.as_deref_mut())?;
        let lse = lse.map(|lse| Tensor::new(lse, &lse_shape)).transpose()?;
        Ok(Output { out, lse })
    }

    #[cfg(feature = "cuda")]
    fn forward_on_gpu(&self, ordinal: u32, inputs: &Inputs<'_>, lse_rows: usize) -> Result<Output> {
        let lse_rows = self.return_lse.then_some(lse_rows);
        let gpu = sage_gpu::Cuda::shared(ordinal)?;
        let (out, lse) = gpu.forward_host(inputs, &self.options(), self.choice, lse_rows)?;
        Ok(Output { out, lse })
    }

    #[cfg(not(feature = "cuda"))]
    fn forward_on_gpu(&self, ordinal: u32, _: &Inputs<'_>, _: usize) -> Result<Output> {
        Err(backend::no_cuda(ordinal))
    }

    /// Computes attention into the caller's memory, on this machine's processor: `out` in q's layout, shape and element type, `lse` row-major in
    /// the shape that [`Output::lse`] has. [`Attention::return_lse`] plays no part here.
    ///
    /// # Errors
    /// Names the first tensor or option that is wrong, or what no backend here can do; `out` and `lse` are then
    /// untouched.
    pub fn forward_into<'t>(
        &self,
        q: impl Into<TensorView<'t>>,
        k: impl Into<TensorView<'t>>,
        v: impl Into<TensorView<'t>>,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let inputs = self.inputs(q.into(), k.into(), v.into());
        let call = Call::check(&inputs, &self.options())?;
        self.execute(&call, out, lse)
    }

    /// What [`Attention::forward`] would do with such tensors, and why.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn plan<'t>(
        &self,
        q: impl Into<TensorView<'t>>,
        k: impl Into<TensorView<'t>>,
        v: impl Into<TensorView<'t>>,
    ) -> Result<Plan> {
        let inputs = self.inputs(q.into(), k.into(), v.into());
        let call = Call::check(&inputs, &self.options())?;
        Plan::on(self.device, &call.problem, self.choice)
    }

    fn execute(&self, call: &Call<'_>, out: TensorViewMut<'_>, lse: Option<&mut [f32]>) -> Result<()> {
        call.check_output(out.dtype(), out.geometry())?;
        if let Some(lse) = &lse {
            let shape = call.lse_shape();
            let rows: usize = shape.iter().product();
            if lse.len() != rows {
                return Err(Error::Shape {
                    name: "lse".into(),
                    found: format!("[{}]", lse.len()),
                    wanted: format!("[{rows}], the rows of {shape:?}"),
                });
            }
        }
        let cpu = backend::cpu();
        let plan = cpu.plan(&call.problem, scheme_on_cpu(self.choice, call.problem.head_dim)?)?;
        cpu.forward(&plan, call, out, lse)
    }

    /// Options and tensors in core's words. The lifetime of the tensors is narrowed to what both share.
    fn inputs<'s>(&'s self, q: TensorView<'s>, k: TensorView<'s>, v: TensorView<'s>) -> Inputs<'s> {
        Inputs { q, k, v, mask: self.mask, block_mask: self.block_mask, lengths: self.lengths }
    }

    /// Whether [`Attention::return_lse`] was asked for.
    pub(crate) fn returns_lse(&self) -> bool {
        self.return_lse
    }

    /// The masks, where every option set is one that a KV cache on this machine's processor can serve.
    pub(crate) fn cached_masks(&self) -> Result<Masks<'_>> {
        if self.lengths != Lengths::Dense {
            return Err(Error::unsupported(
                "kv_lens or cu_seqlens over a KV cache",
                "it has lengths of its own",
            ));
        }
        if self.choice != Choice::Automatic {
            return Err(Error::unsupported(
                "a scheme over a KV cache",
                "its scheme is that of what it stores",
            ));
        }
        if self.device != Device::Cpu {
            return Err(Error::unsupported(
                format!("device {} over a KV cache in this machine's memory", self.device),
                "leave the device out",
            ));
        }
        Ok((self.mask, self.block_mask))
    }

    /// The options that a check of a call takes, in core's words.
    pub fn options(&self) -> Options {
        let right = if self.causal { Some(0) } else { self.window.right };
        Options {
            layout: self.layout,
            sm_scale: self.sm_scale,
            band: Band { right, ..self.window },
            logit_softcap: self.logit_softcap,
        }
    }
}

/// The scheme of a choice on the processor, whose own choice has the error [`CPU_ERROR`].
pub(crate) fn scheme_on_cpu(choice: Choice, head_dim: usize) -> Result<Option<Scheme>> {
    match choice.accuracy() {
        Some(error) if error.is_nan() || error <= 0.0 => {
            Err(Error::value("accuracy", error, "a relative error above 0"))
        }
        Some(error) if error < CPU_ERROR => Ok(Some(Preset::FULL.scheme(head_dim))),
        _ => Ok(choice.scheme(head_dim)),
    }
}
