//! A call after every check.

use std::convert::Infallible;

use crate::lengths::{Rows, Sequences};
use crate::problem::default_sm_scale;
use crate::sparse::{BlockMap, Predictor};
use crate::{
    BlockMask, DType, Error, Geometry, Inputs, Layout, Lengths, List, MAX_HEAD_DIM, MAX_HEADS, MAX_VALUE_DIM,
    Operand, Options, Problem, Result, Sequence, Strided, TensorView,
};

/// A checked call. All tensors are in one order, whatever the caller's layout:
/// Q `[batch, num_q_heads, seq, head_dim]`, K `[batch, num_kv_heads, seq, head_dim]` and V
/// `[batch, num_kv_heads, seq, value_dim]` (packed tensors have a batch dimension of 1; one batch of K or V for many of
/// Q has a batch stride of 0), mask `[batch, num_q_heads, q_len, kv_len]`,
/// block mask `[batch, num_q_heads, blocks, blocks]` with an entry of the batch for each sequence, packed ones too.
///
/// Keys before the first and after the last that the band lets some query see are no part of it: [`Band::seen`] says
/// why nothing else changes. Where there is an explicit mask, whose keys are counted from the tensors' first, they
/// are left; so they are where lengths are given and the band has an offset that would change, and where there is a
/// block mask and keys before the first would have to go.
///
/// [`Band::seen`]: crate::Band::seen
#[derive(Clone, Copy, Debug)]
pub struct Call<'a, T: Operand = TensorView<'a>> {
    /// Shapes and options.
    pub problem: Problem,
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// Explicit mask, broadcast.
    pub mask: Option<T::Mask>,
    /// Block mask, broadcast.
    pub block_mask: Option<BlockMask<T::Blocks>>,
    /// The lengths as they were given.
    pub lengths: Lengths<'a, T::List>,
    /// Attention sinks, f32 `[num_q_heads]` without gaps.
    pub sinks: Option<T>,
    sequences: Sequences<'a>,
    layout: Layout,
    /// Keys of the longest sequence, those that are left out among them.
    given_kv_len: usize,
}

impl<'a, T: Operand> Call<'a, T> {
    /// Checks everything that can be wrong with a call. Allocates nothing unless something is.
    ///
    /// # Errors
    /// Names the first tensor, option or list entry that is wrong, the value found and the value wanted.
    pub fn check(inputs: &Inputs<'a, T>, options: &Options) -> Result<Self> {
        if options.pooled_tail && inputs.block_mask.is_none() {
            let nearest = "give the blocks that are computed, or a predictor of them";
            return Err(Error::unsupported("pooled_tail without a block mask", nearest));
        }
        Self::check_keys(inputs, options, Omitted::of(inputs, inputs.block_mask.is_some()))
    }

    /// [`Call::check`] of a call whose block map `predictor` will predict from its queries and keys.
    ///
    /// # Errors
    /// As [`Call::check`], and where the predictor's options do not fit; also with a block mask.
    pub fn check_sparse(inputs: &Inputs<'a, T>, options: &Options, predictor: &Predictor) -> Result<Self> {
        if inputs.block_mask.is_some() {
            return Err(Error::unsupported("block_mask with a predictor", "give one of them"));
        }
        let call = Self::check_keys(inputs, options, Omitted::of(inputs, true))?;
        predictor.check(&call.problem, call.given_kv_len)?;
        Ok(call)
    }

    /// [`Call::check`], where `omitted` says which of the keys that the band hides from every query are left out.
    pub(crate) fn check_keys(inputs: &Inputs<'a, T>, options: &Options, omitted: Omitted) -> Result<Self> {
        if options.pooled_tail && inputs.mask.is_some() {
            return Err(Error::unsupported(
                "pooled_tail with an explicit mask",
                "the keys of a block would not be one mean; use causal, window and length options",
            ));
        }
        let packed = inputs.lengths.packed();
        let layout = options.layout;
        let q = canonical("q", inputs.q, layout, packed)?;
        let mut k = canonical("k", inputs.k, layout, packed)?;
        let mut v = canonical("v", inputs.v, layout, packed)?;
        check_tensors(inputs, &q, &k, &v)?;
        (k, v) = (shared(k, dimensions(&q)[0]), shared(v, dimensions(&q)[0]));
        let [q_batch, num_q_heads, q_rows, head_dim] = dimensions(&q);
        let [_, num_kv_heads, mut kv_rows, _] = dimensions(&k);
        let sm_scale = check_scores(options, head_dim)?;

        let (band, dense) = (options.band, matches!(inputs.lengths, Lengths::Dense));
        let from_first = dense && band.seen(q_rows, kv_rows).start == 0 || band.left.is_none();
        // Kernels that cut the sequences of a list themselves count keys as the list does.
        let cuts = (dense || band.on_seen() == band)
            && match omitted {
                Omitted::None => false,
                Omitted::After => from_first,
                Omitted::All => true,
            };
        let mut given_kv_len = kv_rows;
        let rows = Rows { batch: q_batch, q: q_rows, kv: kv_rows };
        let sequences = Sequences::check(&inputs.lengths, rows, cuts.then_some(band))?;
        if cuts && dense {
            let seen = band.seen(q_rows, kv_rows);
            let narrowed = |tensor: T| tensor.with_geometry(tensor.geometry().narrowed(2, seen.clone()));
            (k, v, kv_rows) = (narrowed(k), narrowed(v), seen.len());
        }
        let (batch, q_len, kv_len) = match inputs.lengths {
            Lengths::DevicePacked { cu_seqlens_q, max_q_len, max_kv_len, .. } => {
                let batch = cu_seqlens_q.entries() - 1;
                given_kv_len = max_kv_len.min(kv_rows);
                (batch, max_q_len.min(q_rows), given_kv_len)
            }
            Lengths::Packed { .. } => {
                let longest =
                    |len: &dyn Fn(usize) -> usize| (0..sequences.count()).map(len).max().unwrap_or(0);
                given_kv_len = longest(&|index| sequences.given(index).kv_len);
                let q_len = longest(&|index| sequences.get(index).q_len);
                (sequences.count(), q_len, longest(&|index| sequences.get(index).kv_len))
            }
            Lengths::Dense | Lengths::KvLens(_) | Lengths::DeviceKvLens(_) => (q_batch, q_rows, kv_rows),
        };
        let scores = [batch, num_q_heads, q_len, kv_len];
        let mask = check_mask(inputs, scores)?;
        let block_mask = check_block_mask(inputs, scores, given_kv_len)?;
        let sinks = check_sinks(inputs, num_q_heads)?;
        let problem = Problem {
            dtype: q.dtype(),
            batch,
            num_q_heads,
            num_kv_heads,
            q_len,
            kv_len,
            head_dim,
            value_dim: dimensions(&v)[3],
            sm_scale,
            band: if cuts { band.on_seen() } else { band },
            logit_softcap: options.logit_softcap,
            packed,
            masked: mask.is_some(),
            blocks: block_mask.map(|mask| [mask.block_q, mask.block_k]),
            pooled_tail: options.pooled_tail,
            sinks: sinks.is_some(),
        };
        let lengths = inputs.lengths;
        Ok(Call { problem, q, k, v, mask, block_mask, lengths, sinks, sequences, layout, given_kv_len })
    }

    /// Whether the sequences hold only keys that the band lets some query see.
    pub fn leaves_hidden_keys_out(&self) -> bool {
        self.sequences.cuts()
    }

    /// The sequences in order, each with the rows that are its own; none where only the device knows the lengths.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = Sequence> + use<'a, T> {
        let sequences = self.sequences;
        (0..sequences.count()).map(move |index| sequences.get(index))
    }

    /// Where each element of an output given in the caller's layout lies, in this call's order.
    ///
    /// # Errors
    /// When the output's shape, element type or strides do not fit.
    pub fn check_output(&self, dtype: DType, geometry: &Geometry) -> Result<Geometry> {
        let out = canonical_geometry("out", geometry, self.layout, self.problem.packed)?;
        if out.shape() != self.out_dimensions() {
            let as_v =
                if self.problem.value_dim == self.problem.head_dim { "" } else { " with v's channels" };
            return Err(Error::shape("out", geometry.shape(), format!("{:?}, as q{as_v}", self.out_shape())));
        }
        if dtype != self.problem.dtype {
            return Err(Error::DType {
                name: "out".into(),
                found: dtype.to_string(),
                wanted: format!("{}, as q", self.problem.dtype),
            });
        }
        Ok(out)
    }

    /// Shape of the output in this call's order: `[batch, num_q_heads, seq, value_dim]`.
    pub fn out_dimensions(&self) -> [usize; 4] {
        let [batch, heads, rows, _] = dimensions(&self.q);
        [batch, heads, rows, self.problem.value_dim]
    }

    /// Shape of the output in the caller's layout: q's, with v's channels.
    pub fn out_shape(&self) -> Vec<usize> {
        let [batch, heads, rows, channels] = self.out_dimensions();
        match (self.problem.packed, self.layout) {
            (true, _) => vec![rows, heads, channels],
            (false, Layout::Nhd) => vec![batch, rows, heads, channels],
            (false, Layout::Hnd) => vec![batch, heads, rows, channels],
        }
    }

    /// Shape of the log-sum-exp: `[batch, num_q_heads, q_len]`, or `[num_q_heads, total]` when packed.
    pub fn lse_shape(&self) -> Vec<usize> {
        let [batch, heads, rows, _] = dimensions(&self.q);
        if self.problem.packed { vec![heads, rows] } else { vec![batch, heads, rows] }
    }

    /// Rows of the log-sum-exp: the elements of [`Call::lse_shape`].
    pub fn lse_rows(&self) -> usize {
        let [batch, heads, rows, _] = dimensions(&self.q);
        batch * heads * rows
    }

    /// That memory for log-sum-exps has a place for each of [`Call::lse_rows`] and no other.
    ///
    /// # Errors
    /// When it has more or fewer.
    pub fn check_lse(&self, lse: Option<&[f32]>) -> Result<()> {
        match lse {
            Some(lse) if lse.len() != self.lse_rows() => {
                let wanted = format!("[{}], the rows of {:?}", self.lse_rows(), self.lse_shape());
                Err(Error::shape("lse", &[lse.len()], wanted))
            }
            _ => Ok(()),
        }
    }

    /// Index of a row's log-sum-exp in a row-major tensor of [`Call::lse_shape`].
    pub fn lse_index(&self, sequence: &Sequence, head: usize, i: usize) -> usize {
        let rows = dimensions(&self.q)[2];
        (sequence.batch * self.problem.num_q_heads + head) * rows + sequence.q_start + i
    }
}

impl<'a> Call<'a> {
    /// This call over a block map that was predicted for it.
    ///
    /// # Errors
    /// When the map has other blocks than the call.
    pub fn over<'m>(&self, map: &'m BlockMap) -> Result<Call<'m>>
    where
        'a: 'm,
    {
        let Problem { batch, num_q_heads, q_len, kv_len, .. } = self.problem;
        let (block_q, block_k) = (map.block_q(), map.block_k());
        let wanted = [batch, num_q_heads, q_len.div_ceil(block_q), kv_len.div_ceil(block_k)];
        if map.shape() != wanted {
            return Err(Error::shape(
                "block_map",
                &map.shape(),
                format!("{wanted:?}, the blocks of the call"),
            ));
        }
        let problem = Problem { blocks: Some([block_q, block_k]), ..self.problem };
        let Call { q, k, v, mask, lengths, sinks, sequences, layout, given_kv_len, .. } = *self;
        let block_mask = Some(map.mask());
        Ok(Call { problem, q, k, v, mask, block_mask, lengths, sinks, sequences, layout, given_kv_len })
    }

    /// This call without pooled terms for the blocks that its block mask leaves out.
    #[must_use]
    pub fn without_tail(&self) -> Self {
        Call { problem: self.problem.pooled_tail(false), ..*self }
    }

    /// This call without attention sinks.
    #[must_use]
    pub fn without_sinks(&self) -> Self {
        Call { problem: self.problem.sinks(false), sinks: None, ..*self }
    }

    /// The attention sink of a query head; none where the call has none.
    pub fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.map(|sinks| sinks.at([0, 0, 0, head]))
    }
}

impl<'a, T: Operand<List = Infallible>> Call<'a, T> {
    /// This call with its tensors in another memory, where each has the geometry that it has here.
    pub fn moved<U: Operand>(
        &self,
        [q, k, v]: [U; 3],
        mask: Option<U::Mask>,
        blocks: Option<U::Blocks>,
        sinks: Option<U>,
    ) -> Call<'a, U> {
        let Call { problem, sequences, layout, given_kv_len, .. } = *self;
        let moved = |(mask, blocks): (BlockMask<_>, U::Blocks)| BlockMask {
            blocks,
            block_q: mask.block_q,
            block_k: mask.block_k,
        };
        let block_mask = self.block_mask.zip(blocks).map(moved);
        let lengths = self.lengths.beside();
        Call { problem, q, k, v, mask, block_mask, lengths, sinks, sequences, layout, given_kv_len }
    }
}

/// Which of the keys that the band hides from every query a call leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Omitted {
    /// None: an explicit mask counts keys from the tensors' first to their last.
    None,
    /// All, where these only come after those that are seen: blocks of a map begin at the first key.
    After,
    /// All.
    All,
}

impl Omitted {
    fn of<T: Operand>(inputs: &Inputs<'_, T>, blocks: bool) -> Self {
        match (inputs.mask.is_some(), blocks) {
            (true, _) => Omitted::None,
            (false, true) => Omitted::After,
            (false, false) => Omitted::All,
        }
    }
}

/// That element types, sizes and numbers of heads go together.
fn check_tensors<T: Operand>(inputs: &Inputs<'_, T>, q: &T, k: &T, v: &T) -> Result<()> {
    let dtype = q.dtype();
    for (name, tensor) in [("k", k), ("v", v)] {
        if tensor.dtype() != dtype {
            return Err(Error::DType {
                name: name.into(),
                found: tensor.dtype().to_string(),
                wanted: format!("{dtype}, as q"),
            });
        }
    }
    let [q_batch, num_q_heads, _, head_dim] = dimensions(q);
    let [k_batch, num_kv_heads, kv_rows, k_head_dim] = dimensions(k);
    let wrong_k = |wanted: String| Err(Error::shape("k", inputs.k.geometry().shape(), wanted));
    if !(1..=MAX_HEAD_DIM).contains(&head_dim) {
        return Err(Error::value("head_dim", head_dim, format!("1 to {MAX_HEAD_DIM}")));
    }
    if k_head_dim != head_dim {
        return wrong_k(format!("head_dim {head_dim}, as q"));
    }
    let batches =
        || if q_batch == 1 { "batch 1, as q".to_owned() } else { format!("batch {q_batch}, as q, or 1") };
    if k_batch != q_batch && k_batch != 1 {
        return wrong_k(batches());
    }
    if num_kv_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
        return wrong_k(format!("a number of heads that divides q's {num_q_heads}"));
    }
    let [v_batch, v_heads, v_rows, value_dim] = dimensions(v);
    let wrong_v = |wanted: String| Err(Error::shape("v", inputs.v.geometry().shape(), wanted));
    if [v_heads, v_rows] != [num_kv_heads, kv_rows] {
        let shape = inputs.k.geometry().shape();
        let wanted: Vec<String> = shape[..shape.len() - 1].iter().map(usize::to_string).collect();
        return wrong_v(format!("[{}, head_dim], as k", wanted.join(", ")));
    }
    if v_batch != q_batch && v_batch != 1 {
        return wrong_v(batches());
    }
    if !(1..=MAX_VALUE_DIM).contains(&value_dim) {
        return Err(Error::value("head_dim of v", value_dim, format!("1 to {MAX_VALUE_DIM}")));
    }
    // Sizes without a single element, or with strides of 0, may be any: here the work for them is bounded.
    if q_batch.saturating_mul(num_q_heads) > MAX_HEADS || q_batch > MAX_HEADS {
        let wanted = format!("at most {MAX_HEADS} heads, all batch entries together");
        return Err(Error::shape("q", inputs.q.geometry().shape(), wanted));
    }
    Ok(())
}

/// The factor on Q·Kᵀ, where it and the soft cap are numbers that serve.
fn check_scores(options: &Options, head_dim: usize) -> Result<f32> {
    let sm_scale = options.sm_scale.unwrap_or(default_sm_scale(head_dim));
    for (name, value) in [("sm_scale", Some(sm_scale)), ("logit_softcap", options.logit_softcap)] {
        if let Some(value) = value
            && !(value.is_finite() && value > 0.0)
        {
            return Err(Error::value(name, value, "a finite number above 0"));
        }
    }
    Ok(sm_scale)
}

/// The explicit mask, broadcast to scores of the shape `[batch, num_q_heads, q_len, kv_len]`.
fn check_mask<T: Operand>(inputs: &Inputs<'_, T>, scores: [usize; 4]) -> Result<Option<T::Mask>> {
    let Some(mask) = inputs.mask else { return Ok(None) };
    if inputs.lengths.packed() {
        return Err(Error::unsupported(
            "mask with cu_seqlens",
            "an explicit mask needs dense tensors, or use causal and window options",
        ));
    }
    broadcast("mask", mask.geometry(), scores).map(|geometry| Some(mask.with_geometry(geometry)))
}

/// The block mask, broadcast to the blocks of such scores. It is given for the `given_kv_len` keys of the longest
/// sequence.
fn check_block_mask<T: Operand>(
    inputs: &Inputs<'_, T>,
    [batch, heads, q_len, kv_len]: [usize; 4],
    given_kv_len: usize,
) -> Result<Option<BlockMask<T::Blocks>>> {
    let Some(BlockMask { blocks, block_q, block_k }) = inputs.block_mask else { return Ok(None) };
    for (name, size) in [("block_mask.block_q", block_q), ("block_mask.block_k", block_k)] {
        if size == 0 {
            return Err(Error::value(name, size, "at least 1"));
        }
    }
    let wanted = [batch, heads, q_len.div_ceil(block_q), given_kv_len.div_ceil(block_k)];
    let geometry =
        broadcast("block_mask", blocks.geometry(), wanted)?.narrowed(3, 0..kv_len.div_ceil(block_k));
    Ok(Some(BlockMask { blocks: blocks.with_geometry(geometry), block_q, block_k }))
}

/// The attention sinks: a number for each query head.
fn check_sinks<T: Operand>(inputs: &Inputs<'_, T>, num_q_heads: usize) -> Result<Option<T>> {
    let Some(sinks) = inputs.sinks else { return Ok(None) };
    let geometry = sinks.geometry();
    if geometry.shape() != [num_q_heads] {
        return Err(Error::shape(
            "sinks",
            geometry.shape(),
            format!("[{num_q_heads}], one for each query head"),
        ));
    }
    if !geometry.is_contiguous() {
        return Err(Error::Strides {
            name: "sinks".into(),
            found: format!("{:?}", geometry.strides()),
            wanted: "1: no gaps".into(),
        });
    }
    match sinks.dtype() {
        DType::F32 => Ok(Some(sinks)),
        found => Err(Error::DType { name: "sinks".into(), found: found.to_string(), wanted: "f32".into() }),
    }
}

/// Keys or values for each entry of a batch: one batch of them is for every one, without a copy.
fn shared<T: Strided>(tensor: T, batch: usize) -> T {
    let [_, heads, rows, channels] = dimensions(&tensor);
    let geometry = tensor.geometry().broadcast([batch, heads, rows, channels]);
    geometry.map_or(tensor, |geometry| tensor.with_geometry(geometry))
}

/// Sizes of a tensor of four dimensions.
fn dimensions(tensor: &impl Strided) -> [usize; 4] {
    let shape = tensor.geometry().shape();
    [shape[0], shape[1], shape[2], shape[3]]
}

/// A caller's tensor as `[batch, heads, seq, head_dim]`.
pub(crate) fn canonical<T: Strided>(
    name: &'static str,
    tensor: T,
    layout: Layout,
    packed: bool,
) -> Result<T> {
    canonical_geometry(name, tensor.geometry(), layout, packed).map(|g| tensor.with_geometry(g))
}

fn canonical_geometry(
    name: &'static str,
    geometry: &Geometry,
    layout: Layout,
    packed: bool,
) -> Result<Geometry> {
    let (rank, dimensions) = if packed { (3, "[total, heads, head_dim]") } else { (4, layout.dimensions()) };
    if geometry.rank() != rank {
        return Err(Error::shape(name, geometry.shape(), dimensions));
    }
    if !geometry.last_is_contiguous() {
        return Err(Error::Strides {
            name: name.into(),
            found: format!("{:?}", geometry.strides()),
            wanted: "1 for the last dimension (head_dim)".into(),
        });
    }
    let geometry = geometry.with_rank(4);
    Ok(if packed || layout == Layout::Nhd { geometry.permuted(&[0, 2, 1, 3]) } else { geometry })
}

fn broadcast(name: &'static str, geometry: &Geometry, shape: [usize; 4]) -> Result<Geometry> {
    geometry
        .broadcast(shape)
        .ok_or_else(|| Error::shape(name, geometry.shape(), format!("broadcastable to {shape:?}")))
}
