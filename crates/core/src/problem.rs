//! A call to attention: what the caller hands over, and the same after every check.

use crate::{Band, BlockMask, DType, Error, Geometry, Mask, Result, TensorView};

/// A tensor or mask as a check sees it. Where its memory lies is its backend's business.
pub trait Strided: Copy {
    /// Where each element lies.
    fn geometry(&self) -> &Geometry;
    /// The same memory, seen otherwise.
    #[must_use]
    fn with_geometry(&self, geometry: Geometry) -> Self;
}

/// A tensor of one of the element types that attention takes.
pub trait Operand: Strided {
    /// Whether its memory, and that of the lengths beside it, is a device's.
    const ON_DEVICE: bool;
    /// Element type.
    fn dtype(&self) -> DType;
}

impl Strided for TensorView<'_> {
    fn geometry(&self) -> &Geometry {
        TensorView::geometry(self)
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        TensorView::with_geometry(self, geometry)
    }
}

impl Operand for TensorView<'_> {
    const ON_DEVICE: bool = false;

    fn dtype(&self) -> DType {
        TensorView::dtype(self)
    }
}

impl Strided for Mask<'_> {
    fn geometry(&self) -> &Geometry {
        Mask::geometry(self)
    }

    fn with_geometry(&self, geometry: Geometry) -> Self {
        Mask::with_geometry(self, geometry)
    }
}

/// Largest head dimension.
pub const MAX_HEAD_DIM: usize = 256;

/// Most query heads of a call, all batch entries together.
pub const MAX_HEADS: usize = 1 << 24;

/// Order of the dimensions of dense query, key, value and output tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[batch, heads, seq, head_dim]`.
    #[default]
    Hnd,
    /// `[batch, seq, heads, head_dim]`.
    Nhd,
}

impl Layout {
    /// The name used in messages and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::Hnd => "HND",
            Layout::Nhd => "NHD",
        }
    }

    /// The dimensions, for messages.
    pub const fn dimensions(self) -> &'static str {
        match self {
            Layout::Hnd => "[batch, heads, seq, head_dim]",
            Layout::Nhd => "[batch, seq, heads, head_dim]",
        }
    }
}

/// Lengths of the sequences in a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lengths<'a> {
    /// The tensors' sequence dimensions.
    #[default]
    Dense,
    /// As dense, but only the first `kv_lens[b]` keys of batch entry `b` are valid.
    KvLens(&'a [i32]),
    /// Packed tensors `[total, heads, head_dim]`: sequence `b` is rows `cu_seqlens[b]..cu_seqlens[b + 1]`.
    Packed {
        /// Boundaries of the query sequences, batch + 1 values from 0 to the total.
        cu_seqlens_q: &'a [i32],
        /// Boundaries of the key sequences, batch + 1 values from 0 to the total.
        cu_seqlens_k: &'a [i32],
    },
    /// As [`Lengths::KvLens`], at an address of the tensors' device. Nothing checks them but the kernels, which cut what
    /// lies outside the tensors off.
    DeviceKvLens(u64),
    /// As [`Lengths::Packed`], at addresses of the tensors' device, unchecked as [`Lengths::DeviceKvLens`]. Of a sequence
    /// longer than it says here, no result is right, but nothing else is harmed.
    DevicePacked {
        /// Address of the boundaries of the query sequences.
        cu_seqlens_q: u64,
        /// Address of the boundaries of the key sequences.
        cu_seqlens_k: u64,
        /// Number of sequences.
        batch: usize,
        /// Queries of the longest sequence, or more.
        max_q_len: usize,
        /// Keys of the longest sequence, or more.
        max_kv_len: usize,
    },
}

impl Lengths<'_> {
    /// Whether tensors are `[total, heads, head_dim]`.
    pub const fn packed(&self) -> bool {
        matches!(self, Lengths::Packed { .. } | Lengths::DevicePacked { .. })
    }
}

/// Everything a caller hands over, unchecked.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T = TensorView<'a>, M = Mask<'a>> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// Explicit mask.
    pub mask: Option<M>,
    /// Blocks of the score matrix to compute; all when absent.
    pub block_mask: Option<BlockMask<'a>>,
    /// Lengths of the sequences.
    pub lengths: Lengths<'a>,
}

impl<'a> Inputs<'a> {
    /// Dense queries, keys and values in this process's memory, without an explicit mask.
    pub fn new(q: TensorView<'a>, k: TensorView<'a>, v: TensorView<'a>) -> Self {
        Inputs::dense(q, k, v)
    }
}

impl<T, M> Inputs<'_, T, M> {
    /// Dense queries, keys and values without an explicit mask.
    pub fn dense(q: T, k: T, v: T) -> Self {
        Inputs { q, k, v, mask: None, block_mask: None, lengths: Lengths::Dense }
    }
}

/// What a caller asks for beside the tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    /// Order of the dimensions of dense tensors.
    pub layout: Layout,
    /// Factor on Q·Kᵀ; `1 / √head_dim` when absent.
    pub sm_scale: Option<f32>,
    /// Causal masks and sliding windows.
    pub band: Band,
    /// Scaled scores `s` become `softcap · tanh(s / softcap)`, before any mask is added.
    pub logit_softcap: Option<f32>,
}

/// The shape of a checked call: what a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    /// Element type of Q, K, V and the output.
    pub dtype: DType,
    /// Number of sequences.
    pub batch: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads; query head `h` reads head `h / (num_q_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    /// Queries of the longest sequence.
    pub q_len: usize,
    /// Keys of the longest sequence; of those that some query may see, see [`Call`].
    pub kv_len: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor on Q·Kᵀ.
    pub sm_scale: f32,
    /// Causal masks and sliding windows.
    pub band: Band,
    /// Soft cap of the scaled scores.
    pub logit_softcap: Option<f32>,
    /// Whether sequences are packed.
    pub packed: bool,
    /// Whether there is an explicit mask.
    pub masked: bool,
    /// Whether there is a block mask.
    pub block_masked: bool,
}

impl Problem {
    /// Query heads that share a key head.
    pub fn group_size(&self) -> usize {
        self.num_q_heads.checked_div(self.num_kv_heads).unwrap_or(0)
    }
}

/// Rows of one sequence in a [`Call`]'s tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Index in the tensors' batch dimension.
    pub batch: usize,
    /// First query row.
    pub q_start: usize,
    /// Query rows.
    pub q_len: usize,
    /// First key row.
    pub kv_start: usize,
    /// Key rows.
    pub kv_len: usize,
}

/// A checked call. All tensors are in one order, whatever the caller's layout:
/// Q `[batch, num_q_heads, seq, head_dim]`, K and V `[batch, num_kv_heads, seq, head_dim]` (packed tensors have a
/// batch dimension of 1), mask `[batch, num_q_heads, q_len, kv_len]`,
/// block mask `[batch, num_q_heads, blocks, blocks]`.
///
/// Keys before the first and after the last that the band lets some query see are no part of it: [`Band::seen`] says why
/// nothing else changes. Where there is an explicit mask, whose keys are counted from the tensors' first, they are left.
#[derive(Clone, Debug)]
pub struct Call<'a, T = TensorView<'a>, M = Mask<'a>> {
    /// Shapes and options.
    pub problem: Problem,
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// Explicit mask, broadcast.
    pub mask: Option<M>,
    /// Block mask, broadcast.
    pub block_mask: Option<BlockMask<'a>>,
    /// Where each sequence lies; none where only the device knows the lengths.
    pub sequences: Vec<Sequence>,
    /// The lengths as they were given.
    pub lengths: Lengths<'a>,
    layout: Layout,
}

impl<'a, T: Operand, M: Strided> Call<'a, T, M> {
    /// Checks everything that can be wrong with a call.
    ///
    /// # Errors
    /// Names the first tensor, option or list entry that is wrong, the value found and the value wanted.
    pub fn check(inputs: &Inputs<'a, T, M>, options: &Options) -> Result<Self> {
        // Explicit masks count keys from the tensors' first one.
        Self::check_keys(inputs, options, inputs.mask.is_none() && inputs.block_mask.is_none())
    }

    /// [`Call::check`], where `narrows` says whether keys that the band hides from every query are left out.
    pub(crate) fn check_keys(inputs: &Inputs<'a, T, M>, options: &Options, narrows: bool) -> Result<Self> {
        let packed = inputs.lengths.packed();
        let layout = options.layout;
        let q = canonical("q", inputs.q, layout, packed)?;
        let k = canonical("k", inputs.k, layout, packed)?;
        let v = canonical("v", inputs.v, layout, packed)?;

        let dtype = q.dtype();
        for (name, tensor) in [("k", &k), ("v", &v)] {
            if tensor.dtype() != dtype {
                return Err(Error::DType {
                    name: name.into(),
                    found: tensor.dtype().to_string(),
                    wanted: format!("{dtype}, as q"),
                });
            }
        }
        let [q_batch, num_q_heads, q_rows, head_dim] = dimensions(&q);
        let [k_batch, num_kv_heads, kv_rows, k_head_dim] = dimensions(&k);
        if !(1..=MAX_HEAD_DIM).contains(&head_dim) {
            return Err(Error::value("head_dim", head_dim, format!("1 to {MAX_HEAD_DIM}")));
        }
        if k_head_dim != head_dim {
            return Err(Error::shape("k", inputs.k.geometry().shape(), format!("head_dim {head_dim}, as q")));
        }
        if k_batch != q_batch {
            return Err(Error::shape("k", inputs.k.geometry().shape(), format!("batch {q_batch}, as q")));
        }
        if num_kv_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::shape(
                "k",
                inputs.k.geometry().shape(),
                format!("a number of heads that divides q's {num_q_heads}"),
            ));
        }
        if v.geometry().shape() != k.geometry().shape() {
            return Err(Error::shape(
                "v",
                inputs.v.geometry().shape(),
                format!("{:?}, as k", inputs.k.geometry().shape()),
            ));
        }

        // Sizes without a single element, or with strides of 0, may be any: here the work for them is bounded.
        if q_batch.saturating_mul(num_q_heads) > MAX_HEADS || q_batch > MAX_HEADS {
            let wanted = format!("at most {MAX_HEADS} heads, all batch entries together");
            return Err(Error::shape("q", inputs.q.geometry().shape(), wanted));
        }

        let sm_scale = options.sm_scale.unwrap_or(1.0 / (head_dim as f32).sqrt());
        if !(sm_scale.is_finite() && sm_scale > 0.0) {
            return Err(Error::value("sm_scale", sm_scale, "a finite number above 0"));
        }
        if let Some(cap) = options.logit_softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::value("logit_softcap", cap, "a finite number above 0"));
        }

        let mut sequences = sequences(&inputs.lengths, q_batch, q_rows, kv_rows)?;
        let (mut k, mut v, mut kv_rows) = (k, v, kv_rows);
        if narrows {
            for sequence in &mut sequences {
                let seen = options.band.seen(sequence.q_len, sequence.kv_len);
                (sequence.kv_start, sequence.kv_len) = (sequence.kv_start + seen.start, seen.len());
            }
            if matches!(inputs.lengths, Lengths::Dense) {
                let seen = options.band.seen(q_rows, kv_rows);
                let narrowed = |tensor: T| tensor.with_geometry(tensor.geometry().narrowed(2, seen.clone()));
                (k, v, kv_rows) = (narrowed(k), narrowed(v), seen.len());
                sequences.iter_mut().for_each(|sequence| sequence.kv_start = 0);
            }
        }
        let longest = |len: fn(&Sequence) -> usize| sequences.iter().map(len).max().unwrap_or(0);
        let (batch, q_len, kv_len) = match inputs.lengths {
            Lengths::DeviceKvLens(_) | Lengths::DevicePacked { .. } if !T::ON_DEVICE => {
                return Err(Error::unsupported("lengths on a device", "the tensors are not"));
            }
            Lengths::DevicePacked { batch, max_q_len, max_kv_len, .. } => {
                (batch, max_q_len.min(q_rows), max_kv_len.min(kv_rows))
            }
            Lengths::Packed { .. } => (sequences.len(), longest(|s| s.q_len), longest(|s| s.kv_len)),
            Lengths::Dense | Lengths::KvLens(_) | Lengths::DeviceKvLens(_) => (q_batch, q_rows, kv_rows),
        };

        if packed && inputs.mask.is_some() {
            return Err(Error::unsupported(
                "mask with cu_seqlens",
                "an explicit mask needs dense tensors, or use causal and window options",
            ));
        }
        if packed && inputs.block_mask.is_some() {
            return Err(Error::unsupported("block_mask with cu_seqlens", "a block mask needs dense tensors"));
        }
        let mask = inputs
            .mask
            .map(|mask| {
                broadcast("mask", mask.geometry(), [batch, num_q_heads, q_len, kv_len])
                    .map(|geometry| mask.with_geometry(geometry))
            })
            .transpose()?;
        let block_mask = inputs
            .block_mask
            .map(|mask| {
                for (name, size) in
                    [("block_mask.block_q", mask.block_q), ("block_mask.block_k", mask.block_k)]
                {
                    if size == 0 {
                        return Err(Error::value(name, size, "at least 1"));
                    }
                }
                let wanted =
                    [batch, num_q_heads, q_len.div_ceil(mask.block_q), kv_len.div_ceil(mask.block_k)];
                let geometry = broadcast("block_mask", mask.blocks.geometry(), wanted)?;
                Ok(BlockMask { blocks: mask.blocks.with_geometry(geometry), ..mask })
            })
            .transpose()?;

        let problem = Problem {
            dtype,
            batch,
            num_q_heads,
            num_kv_heads,
            q_len,
            kv_len,
            head_dim,
            sm_scale,
            band: options.band,
            logit_softcap: options.logit_softcap,
            packed,
            masked: mask.is_some(),
            block_masked: block_mask.is_some(),
        };
        Ok(Call { problem, q, k, v, mask, block_mask, sequences, lengths: inputs.lengths, layout })
    }

    /// Where each element of an output given in the caller's layout lies, in this call's order.
    ///
    /// # Errors
    /// When the output's shape, element type or strides do not fit.
    pub fn check_output(&self, dtype: DType, geometry: &Geometry) -> Result<Geometry> {
        let out = canonical_geometry("out", geometry, self.layout, self.problem.packed)?;
        if out.shape() != self.q.geometry().shape() {
            let wanted = match (self.problem.packed, self.layout) {
                (true, _) => self.q.geometry().permuted(&[0, 2, 1, 3]).shape()[1..].to_vec(),
                (false, Layout::Nhd) => self.q.geometry().permuted(&[0, 2, 1, 3]).shape().to_vec(),
                (false, Layout::Hnd) => self.q.geometry().shape().to_vec(),
            };
            return Err(Error::shape("out", geometry.shape(), format!("{wanted:?}, as q")));
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

    /// Shape of the log-sum-exp: `[batch, num_q_heads, q_len]`, or `[num_q_heads, total]` when packed.
    pub fn lse_shape(&self) -> Vec<usize> {
        let [batch, heads, rows, _] = dimensions(&self.q);
        if self.problem.packed { vec![heads, rows] } else { vec![batch, heads, rows] }
    }

    /// Index of a row's log-sum-exp in a row-major tensor of [`Call::lse_shape`].
    pub fn lse_index(&self, sequence: &Sequence, head: usize, i: usize) -> usize {
        let rows = dimensions(&self.q)[2];
        (sequence.batch * self.problem.num_q_heads + head) * rows + sequence.q_start + i
    }
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

fn sequences(lengths: &Lengths<'_>, batch: usize, q_rows: usize, kv_rows: usize) -> Result<Vec<Sequence>> {
    let dense = |b, kv_len| Sequence { batch: b, q_start: 0, q_len: q_rows, kv_start: 0, kv_len };
    match *lengths {
        Lengths::DeviceKvLens(_) | Lengths::DevicePacked { .. } => Ok(Vec::new()),
        Lengths::Dense => Ok((0..batch).map(|b| dense(b, kv_rows)).collect()),
        Lengths::KvLens(kv_lens) => {
            if kv_lens.len() != batch {
                return Err(Error::shape(
                    "kv_lens",
                    &[kv_lens.len()],
                    format!("[{batch}], one for each batch entry"),
                ));
            }
            let entry = |(b, &len): (usize, &i32)| match usize::try_from(len) {
                Ok(len) if len <= kv_rows => Ok(dense(b, len)),
                _ => Err(Error::value(format!("kv_lens[{b}]"), len, format!("0 to {kv_rows}, k's length"))),
            };
            kv_lens.iter().enumerate().map(entry).collect()
        }
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
            let q = boundaries("cu_seqlens_q", cu_seqlens_q, q_rows)?;
            let k = boundaries("cu_seqlens_k", cu_seqlens_k, kv_rows)?;
            if k.len() != q.len() {
                return Err(Error::shape(
                    "cu_seqlens_k",
                    &[k.len()],
                    format!("[{}], as cu_seqlens_q", q.len()),
                ));
            }
            let entry = |(q, k): (&[usize], &[usize])| Sequence {
                batch: 0,
                q_start: q[0],
                q_len: q[1] - q[0],
                kv_start: k[0],
                kv_len: k[1] - k[0],
            };
            Ok(q.windows(2).zip(k.windows(2)).map(entry).collect())
        }
    }
}

/// Boundaries of packed sequences: from 0 to `total`, never falling.
fn boundaries(name: &'static str, cu_seqlens: &[i32], total: usize) -> Result<Vec<usize>> {
    let mut previous = 0;
    let mut out = Vec::with_capacity(cu_seqlens.len());
    for (b, &boundary) in cu_seqlens.iter().enumerate() {
        let wrong = |wanted: String| Error::value(format!("{name}[{b}]"), boundary, wanted);
        let value = usize::try_from(boundary).map_err(|_| wrong("at least 0".into()))?;
        if b == 0 && value != 0 {
            return Err(wrong("0".into()));
        }
        if value < previous {
            return Err(wrong(format!("at least {previous}, the entry before")));
        }
        if b + 1 == cu_seqlens.len() && value != total {
            return Err(wrong(format!("{total}, the number of packed rows")));
        }
        out.push(value);
        previous = value;
    }
    if out.is_empty() {
        return Err(Error::shape(name, &[0], "[batch + 1]"));
    }
    Ok(out)
}
