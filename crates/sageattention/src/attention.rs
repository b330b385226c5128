//! Attention with its options: what users write.

use std::sync::Arc;

use sage_core::sparse::{BlockMap, Predictor, stand_in_values};
use sage_core::{
    Alignment, Backend, BackendPlan, Band, CachedInputs, Call, Choice, Error, Inputs, Layout, Lengths,
    Options, Result, Scheme, SmoothK, SparseBackend, Tensor, TensorView, TensorViewMut,
};

use crate::backend::{self, Device};
use crate::place::{AnyBlockMask, AnyLengths, AnyMask, AnySinks, Place};
use crate::plan::Plan;

/// What attention returns.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Output {
    /// The output, in q's layout, shape and element type.
    pub out: Tensor,
    /// Natural logarithm of each row's sum of exponentials, that of the head's sink included, f32, where
    /// [`Attention::return_lse`] asked for it: `[batch, num_q_heads, q_len]`, or `[num_q_heads, total]` for packed
    /// sequences.
    pub lse: Option<Tensor>,
    /// The blocks that were computed, where [`Attention::sparse`] had them predicted.
    pub map: Option<BlockMap>,
}

/// Attention with its options. One value serves any number of calls, of host tensors and of those in a GPU's memory.
///
/// Without options: dense `[batch, heads, seq, head_dim]` tensors, no mask, scores scaled by `1 / √head_dim`, and the
/// fastest scheme that is accurate. Fewer key heads than query heads is grouped-query attention.
///
/// An option that the backend at hand does not have is an error that names it.
#[derive(Clone, Debug)]
#[must_use = "options compute nothing until `forward` is called"]
pub struct Attention<'a> {
    layout: Layout,
    causal: bool,
    window: Band,
    sm_scale: Option<f32>,
    logit_softcap: Option<f32>,
    mask: Option<AnyMask<'a>>,
    block_mask: Option<AnyBlockMask<'a>>,
    predictor: Option<Predictor>,
    pooled_tail: bool,
    sinks: Option<AnySinks<'a>>,
    lengths: AnyLengths<'a>,
    choice: Choice,
    nearest: bool,
    smooth_k: bool,
    device: Option<Device>,
    return_lse: bool,
}

impl Default for Attention<'_> {
    fn default() -> Self {
        Attention {
            layout: Layout::default(),
            causal: false,
            window: Band::FULL,
            sm_scale: None,
            logit_softcap: None,
            mask: None,
            block_mask: None,
            predictor: None,
            pooled_tail: false,
            sinks: None,
            lengths: Lengths::Dense,
            choice: Choice::Automatic,
            nearest: false,
            smooth_k: true,
            device: None,
            return_lse: false,
        }
    }
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

    /// An explicit mask, broadcastable to `[batch, num_q_heads, q_len, kv_len]`, on top of causal mask and window. It
    /// lies where q does: [`Mask`](crate::Mask) or, in a GPU's memory, [`DeviceMask`](crate::cuda::DeviceMask).
    ///
    /// A key that it hides from every query has no influence at all, whatever K and V hold there: padding and the
    /// empty slots of a static cache cost no accuracy. In softmax only `false` and −∞ hide. A key whose bias is about
    /// the least finite number of the mask's type in every row (how padding is often written) is seen where a row
    /// holds nothing else, but enters no mean and no scale.
    pub fn mask(self, mask: impl Into<AnyMask<'a>>) -> Self {
        Attention { mask: Some(mask.into()), ..self }
    }

    /// The blocks of the score matrix to compute. It lies where q does.
    ///
    /// Keys of the other blocks still count for what K and V are quantised by, so that they must be numbers.
    pub fn block_mask(self, mask: impl Into<AnyBlockMask<'a>>) -> Self {
        Attention { block_mask: Some(mask.into()), ..self }
    }

    /// Computes only the blocks of the score matrix that `predictor` finds worth it; [`Output::map`] has them. Packed
    /// sequences are predicted each by itself, and are entries of the map's batch.
    ///
    /// ```
    /// use sageattention::sparse::Predictor;
    /// use sageattention::{Attention, Tensor};
    ///
    /// let x = Tensor::new(vec![0.5f32; 4 * 256 * 64], &[1, 4, 256, 64])?;
    /// let sla = Attention::new().sparse(Predictor::sla(0.25)).forward(&x, &x, &x)?;
    /// assert_eq!(sla.map.expect("predicted").kept(), 4 * 4); // One of four blocks of keys for each of 4 × 4.
    /// # Ok::<(), sageattention::Error>(())
    /// ```
    pub fn sparse(self, predictor: Predictor) -> Self {
        Attention { predictor: Some(predictor), ..self }
    }

    /// Whether each block that a block mask or a predictor leaves out counts as one key, with the means of its keys and
    /// values and the weight of all of them: Sol-Attn's pooled terms (arXiv 2607.24027, §3.2), by
    /// [`sparse::pooled_tail`](crate::sparse::pooled_tail()). They are not quantised. Not with an explicit mask.
    ///
    /// ```
    /// use sageattention::sparse::Predictor;
    /// use sageattention::{Attention, Tensor};
    ///
    /// let x = Tensor::new(vec![0.5f32; 4 * 256 * 64], &[1, 4, 256, 64])?;
    /// let sol = Attention::new().sparse(Predictor::sol_attn(1.0)).pooled_tail(true).return_lse(true);
    /// // All keys are alike, and so none is missed: the sum is over all 256.
    /// let lse = sol.forward(&x, &x, &x)?.lse.expect("asked for").to_f32_vec();
    /// assert!((lse[0] - (2.0 + 256f32.ln())).abs() < 1e-2);
    /// # Ok::<(), sageattention::Error>(())
    /// ```
    pub fn pooled_tail(self, pooled_tail: bool) -> Self {
        Attention { pooled_tail, ..self }
    }

    /// Attention sinks, a logit for each query head (of GPT-OSS: learned; `s_aux` in Hugging Face transformers): one
    /// more score of each of the head's rows, which has no value. So `O = Σ exp(s_j)·V_j / (Σ exp(s_j) + exp(sink))`.
    /// They are in natural units; neither `sm_scale` nor a soft cap touches them, and −∞ is none. A `&[f32]`, or in a
    /// GPU's memory an f32 [`DeviceTensor`](crate::cuda::DeviceTensor) of `[num_q_heads]`, which is read when the work
    /// runs.
    ///
    /// The log-sum-exp has them in it, as that of flash-attention's kernels with sinks (`flash_attn.cute`): parts of a
    /// call merge by their log-sum-exps when exactly one of them has the sinks. A row that sees no key is zero, and its
    /// log-sum-exp the sink.
    ///
    /// ```
    /// use sageattention::{Attention, Tensor};
    ///
    /// let q = Tensor::new(vec![0.0f32; 2 * 64], &[1, 2, 1, 64])?;
    /// let v = Tensor::new(vec![1.0f32; 2 * 3 * 64], &[1, 2, 3, 64])?;
    /// // Three keys of score 0 beside a sink of 0, which has a quarter of the weight; the other head has none.
    /// let out = Attention::new().sinks(&[0.0, f32::NEG_INFINITY][..]).forward(&q, &v, &v)?.out.to_f32_vec();
    /// assert!((out[0] - 0.75).abs() < 1e-6 && (out[64] - 1.0).abs() < 1e-6);
    /// # Ok::<(), sageattention::Error>(())
    /// ```
    pub fn sinks(self, sinks: impl Into<AnySinks<'a>>) -> Self {
        Attention { sinks: Some(sinks.into()), ..self }
    }

    /// Only the first `kv_lens[b]` keys of batch entry `b` are valid.
    pub fn kv_lens(self, kv_lens: &'a [i32]) -> Self {
        Attention { lengths: Lengths::KvLens(kv_lens), ..self }
    }

    /// Packed tensors `[total, heads, head_dim]`: sequence `b` is rows `cu_seqlens[b]..cu_seqlens[b + 1]`.
    pub fn packed(self, cu_seqlens_q: &'a [i32], cu_seqlens_k: &'a [i32]) -> Self {
        Attention { lengths: Lengths::Packed { cu_seqlens_q, cu_seqlens_k }, ..self }
    }

    /// Lengths of any kind, also such that lie in a GPU's memory beside the tensors.
    pub fn lengths(self, lengths: AnyLengths<'a>) -> Self {
        Attention { lengths, ..self }
    }

    /// A [`Scheme`](crate::Scheme) or [`Preset`](crate::Preset), instead of the backend's own choice.
    pub fn scheme(self, choice: impl Into<Choice>) -> Self {
        Attention { choice: choice.into(), ..self }
    }

    /// The fastest scheme whose relative error is at most this: see [`Choice::Within`].
    pub fn accuracy(self, relative_error: f32) -> Self {
        Attention { choice: Choice::Within(relative_error), ..self }
    }

    /// Whether a backend that lacks the kernels of the scheme asked for computes the nearest that it has, as
    /// [`nearest_scheme`](crate::nearest_scheme) says, instead of an error that names it.
    pub fn nearest(self, nearest: bool) -> Self {
        Attention { nearest, ..self }
    }

    /// Whether K is smoothed where the scheme does so, which it is without this option.
    pub fn smooth_k(self, smooth_k: bool) -> Self {
        Attention { smooth_k, ..self }
    }

    /// What computes. Without it, host tensors are computed by this machine's processor; with a GPU they are copied
    /// there and back. Tensors in a GPU's memory are computed there: another device is an error.
    pub fn device(self, device: Device) -> Self {
        Attention { device: Some(device), ..self }
    }

    /// Whether each row's log-sum-exp is returned too. Where the caller brings the memory for results, giving some
    /// for the log-sum-exp is enough, and giving none an error.
    pub fn return_lse(self, return_lse: bool) -> Self {
        Attention { return_lse, ..self }
    }

    /// Computes attention of host tensors.
    ///
    /// # Errors
    /// Names the first tensor or option that is wrong, or what no backend here can do.
    pub fn forward<'t>(
        &self,
        q: impl Into<TensorView<'t>>,
        k: impl Into<TensorView<'t>>,
        v: impl Into<TensorView<'t>>,
    ) -> Result<Output> {
        let tensors = [q.into(), k.into(), v.into()];
        match self.device.unwrap_or_default() {
            Device::Cpu => self.output(backend::cpu(), tensors),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => self.output(&backend::copying(ordinal)?, tensors),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(ordinal) => Err(backend::no_cuda(ordinal)),
        }
    }

    /// Computes attention of host tensors into the caller's memory: `out` in q's layout, shape and element type, `lse`
    /// row-major in the shape that [`Output::lse`] has. Returns the map that [`Attention::sparse`] had predicted.
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
    ) -> Result<Option<BlockMap>> {
        let tensors = [q.into(), k.into(), v.into()];
        match self.device.unwrap_or_default() {
            Device::Cpu => self.forward_on(backend::cpu(), &(), tensors, out, lse),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => self.forward_on(&backend::copying(ordinal)?, &(), tensors, out, lse),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(ordinal) => Err(backend::no_cuda(ordinal)),
        }
    }

    /// Computes attention of `[q, k, v]` in a backend's memory, as that backend says: on a GPU
    /// ([`Cuda`](crate::cuda::Cuda)), the work is put on the stream `queue`. Returns the map that
    /// [`Attention::sparse`] had predicted.
    ///
    /// # Errors
    /// Names the first tensor or option that is wrong, or what the backend cannot do; `out` and `lse` are then
    /// untouched.
    pub fn forward_on<B: Place>(
        &self,
        backend: &B,
        queue: &B::Queue,
        tensors: [B::Tensor<'_>; 3],
        out: B::Output<'_>,
        lse: Option<B::Lse<'_>>,
    ) -> Result<Option<B::Map>> {
        self.check_lse(lse.is_some())?;
        let call = self.call(backend, tensors.map(|tensor| B::reborrow(tensor)))?;
        self.run(backend, queue, &call, out, lse)
    }

    /// The blocks that the predictor of [`Attention::sparse`] keeps of host tensors, without attention over them.
    ///
    /// # Errors
    /// As [`Attention::forward`]; also without a predictor.
    pub fn predict<'t>(
        &self,
        q: impl Into<TensorView<'t>>,
        k: impl Into<TensorView<'t>>,
    ) -> Result<BlockMap> {
        let tensors = [q.into(), k.into()];
        match self.device.unwrap_or_default() {
            Device::Cpu => self.predict_on(backend::cpu(), &(), tensors),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => self.predict_on(&backend::copying(ordinal)?, &(), tensors),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(ordinal) => Err(backend::no_cuda(ordinal)),
        }
    }

    /// The blocks that the predictor of [`Attention::sparse`] keeps of `[q, k]` in a backend's memory.
    ///
    /// # Errors
    /// As [`Attention::forward_on`]; also without a predictor.
    pub fn predict_on<B: Place>(
        &self,
        backend: &B,
        queue: &B::Queue,
        [q, k]: [B::Tensor<'_>; 2],
    ) -> Result<B::Map> {
        let Some(predictor) = &self.predictor else {
            return Err(Error::unsupported("a prediction without a predictor", "choose one by `sparse`"));
        };
        let call = self.call(backend, [q, k, stand_in_values(k)].map(|tensor| B::reborrow(tensor)))?;
        backend.predict(queue, &call, predictor)
    }

    /// What [`Attention::forward`] would do with such host tensors, and why.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn plan<'t>(
        &self,
        q: impl Into<TensorView<'t>>,
        k: impl Into<TensorView<'t>>,
        v: impl Into<TensorView<'t>>,
    ) -> Result<Plan> {
        let tensors = [q.into(), k.into(), v.into()];
        match self.device.unwrap_or_default() {
            Device::Cpu => self.plan_on(backend::cpu(), tensors),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => self.plan_on(&backend::copying(ordinal)?, tensors),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(ordinal) => Err(backend::no_cuda(ordinal)),
        }
    }

    /// What [`Attention::forward_on`] would do with such tensors, and why.
    ///
    /// # Errors
    /// As [`Attention::forward_on`].
    pub fn plan_on<B: Place>(&self, backend: &B, tensors: [B::Tensor<'_>; 3]) -> Result<Plan> {
        let call = self.call(backend, tensors.map(|tensor| B::reborrow(tensor)))?;
        let choice = self.choice_on(backend, &call)?;
        let plan = self.backend_plan(backend, &call, choice, self.return_lse)?;
        let predicted = self.predictor.as_ref().map(|predictor| [predictor.block_q, predictor.block_k]);
        Ok(Plan::new(call.problem.blocks(predicted.or(call.problem.blocks)), plan))
    }

    /// The options that a check of a call takes, in core's words.
    pub fn options(&self) -> Options {
        let right = if self.causal { Some(0) } else { self.window.right };
        Options::default()
            .layout(self.layout)
            .sm_scale(self.sm_scale)
            .band(Band { right, ..self.window })
            .logit_softcap(self.logit_softcap)
            .pooled_tail(self.pooled_tail)
    }

    /// Computes into new memory of this machine.
    fn output<B>(&self, backend: &B, tensors: [TensorView<'_>; 3]) -> Result<Output>
    where
        B: for<'x> Backend<
                Tensor<'x> = TensorView<'x>,
                Output<'x> = TensorViewMut<'x>,
                Lse<'x> = &'x mut [f32],
                Queue = (),
            > + SparseBackend<Map = BlockMap>
            + Place,
    {
        let call = self.call(backend, tensors)?;
        let mut out = Tensor::zeros(tensors[0].dtype(), &call.out_shape())?;
        let mut lse = self.return_lse.then(|| vec![0f32; call.lse_rows()]);
        let map = self.run(backend, &(), &call, out.view_mut(), lse.as_deref_mut())?;
        let lse = lse.map(|lse| Tensor::new(lse, &call.lse_shape())).transpose()?;
        Ok(Output { out, lse, map })
    }

    /// Computes a call, over predicted blocks where these were asked for.
    fn run<'t, B: Place>(
        &self,
        backend: &B,
        queue: &B::Queue,
        call: &Call<'t, B::Tensor<'t>>,
        out: B::Output<'_>,
        lse: Option<B::Lse<'_>>,
    ) -> Result<Option<B::Map>> {
        let choice = self.choice_on(backend, call)?;
        match &self.predictor {
            Some(predictor) => backend.run_sparse(queue, call, predictor, choice, out, lse).map(Some),
            None => backend.run(queue, call, choice, out, lse).map(|()| None),
        }
    }

    /// How a backend carries a call out.
    fn backend_plan<'t, B: Place>(
        &self,
        backend: &B,
        call: &Call<'t, B::Tensor<'t>>,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<B::Plan>> {
        match &self.predictor {
            Some(predictor) => backend.plan_sparse(call, predictor, choice, lse),
            None => backend.plan(call, choice, lse),
        }
    }

    /// The call, checked.
    fn call<'t, B: Place>(
        &'t self,
        backend: &B,
        [q, k, v]: [B::Tensor<'t>; 3],
    ) -> Result<Call<'t, B::Tensor<'t>>> {
        self.check_device(backend)?;
        let inputs = Inputs::new(q, k, v)
            .mask(self.mask.map(|mask| B::mask(mask)).transpose()?)
            .block_mask(self.block_mask.map(|mask| B::block_mask(mask)).transpose()?)
            .lengths(B::lengths(self.lengths)?)
            .sinks(self.sinks.map(|sinks| B::sinks(sinks)).transpose()?);
        match &self.predictor {
            Some(predictor) => Call::check_sparse(&inputs, &self.options(), predictor),
            None => Call::check(&inputs, &self.options()),
        }
    }

    /// The choice, with what other options change about it.
    fn choice_on<'t, B: Place>(&self, backend: &B, call: &Call<'t, B::Tensor<'t>>) -> Result<Choice> {
        let choice = match self.choice.scheme(call.problem.head_dim) {
            Some(scheme) if self.nearest => Choice::Scheme(backend.nearest(scheme, call.problem.dtype)),
            _ => self.choice,
        };
        if self.smooth_k {
            return Ok(choice);
        }
        let mut scheme: Scheme = match choice.scheme(call.problem.head_dim) {
            Some(scheme) => scheme,
            None => *self.backend_plan(backend, call, choice, false)?.scheme(),
        };
        scheme.smooth.k = SmoothK::Off;
        Ok(Choice::Scheme(scheme))
    }

    /// Queries over a KV cache of `kv_lens` tokens, and the options for them.
    pub(crate) fn over_cache<'t, B: Place>(
        &'t self,
        backend: &B,
        q: B::Tensor<'t>,
        kv_lens: &'t [i32],
    ) -> Result<CachedInputs<'t, B::Tensor<'t>>> {
        self.check_device(backend)?;
        if !matches!(self.lengths, Lengths::Dense) {
            return Err(Error::unsupported(
                "kv_lens or cu_seqlens over a KV cache",
                "it has lengths of its own",
            ));
        }
        if self.predictor.is_some() {
            return Err(Error::unsupported("a predictor over a KV cache", "give a block_mask"));
        }
        if self.choice != Choice::Automatic || self.nearest || !self.smooth_k {
            return Err(Error::unsupported(
                "a scheme over a KV cache",
                "its scheme is that of what it stores",
            ));
        }
        let mask = self.mask.map(|mask| B::mask(mask)).transpose()?;
        let block_mask = self.block_mask.map(|mask| B::block_mask(mask)).transpose()?;
        let sinks = self.sinks.map(|sinks| B::sinks(sinks)).transpose()?;
        Ok(CachedInputs { q, mask, block_mask, kv_lens, sinks })
    }

    /// What [`Attention::device`] asked for.
    #[cfg(feature = "cuda")]
    pub(crate) fn chosen_device(&self) -> Option<Device> {
        self.device
    }

    /// Whether [`Attention::return_lse`] was asked for.
    pub(crate) fn returns_lse(&self) -> bool {
        self.return_lse
    }

    /// That a log-sum-exp which was asked for has a place.
    pub(crate) fn check_lse(&self, given: bool) -> Result<()> {
        if self.return_lse && !given {
            return Err(Error::unsupported(
                "return_lse without memory for the log-sum-exp",
                "give some, or leave the option out",
            ));
        }
        Ok(())
    }

    /// That a device which was asked for is the backend's.
    fn check_device<B: Backend>(&self, backend: &B) -> Result<()> {
        match self.device {
            Some(device) if device.to_string() != backend.name() => {
                Err(Error::value("device", device, format!("{}, where the memory is", backend.name())))
            }
            _ => Ok(()),
        }
    }
}
