//! Lengths of the sequences of a call, and where each sequence lies in its tensors.

use std::convert::Infallible;

use crate::{Band, Error, List, Result};

/// Lengths of the sequences in a call. `L` is a list in the memory of a device that holds the tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lengths<'a, L = Infallible> {
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
    /// As [`Lengths::KvLens`], in the memory of the tensors' device. Nothing checks the values but the kernels, which
    /// cut what lies outside the tensors off.
    DeviceKvLens(L),
    /// As [`Lengths::Packed`], in the memory of the tensors' device, with values unchecked as those of
    /// [`Lengths::DeviceKvLens`]. Of a sequence longer than it says here, no result is right, but nothing else is
    /// harmed.
    DevicePacked {
        /// Boundaries of the query sequences.
        cu_seqlens_q: L,
        /// Boundaries of the key sequences.
        cu_seqlens_k: L,
        /// Queries of the longest sequence, or more.
        max_q_len: usize,
        /// Keys of the longest sequence, or more.
        max_kv_len: usize,
    },
}

impl<L> Lengths<'_, L> {
    /// Whether tensors are `[total, heads, head_dim]`.
    pub const fn packed(&self) -> bool {
        matches!(self, Lengths::Packed { .. } | Lengths::DevicePacked { .. })
    }
}

impl<'a> Lengths<'a> {
    /// The same lengths beside tensors of another memory.
    pub const fn beside<L>(self) -> Lengths<'a, L> {
        match self {
            Lengths::Dense => Lengths::Dense,
            Lengths::KvLens(kv_lens) => Lengths::KvLens(kv_lens),
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => Lengths::Packed { cu_seqlens_q, cu_seqlens_k },
            Lengths::DeviceKvLens(never) | Lengths::DevicePacked { cu_seqlens_q: never, .. } => {
                match never {}
            }
        }
    }
}

/// Rows of one sequence in the tensors of a [`Call`](crate::Call).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Index among the call's sequences, which block masks count.
    pub index: usize,
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

/// The tensors' sizes, as far as lengths are concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub batch: usize,
    pub q: usize,
    pub kv: usize,
}

/// The sequences of a call, each worked out when it is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequences<'a> {
    rows: Rows,
    lists: Lists<'a>,
    /// Leaves keys out that this band hides from every query.
    cut: Option<Band>,
    /// Whether the tensors themselves are without the keys that are left out.
    cut_tensors: bool,
}

/// Lengths that were checked.
#[derive(Clone, Copy, Debug)]
enum Lists<'a> {
    Dense,
    KvLens(&'a [i32]),
    Packed(&'a [i32], &'a [i32]),
    /// The host does not know them.
    OnDevice,
}

impl<'a> Sequences<'a> {
    /// Checks the lengths of a call; `cut` is the band whose hidden keys are left out.
    pub fn check<L: List>(lengths: &Lengths<'a, L>, rows: Rows, cut: Option<Band>) -> Result<Self> {
        let lists = match *lengths {
            Lengths::Dense => Lists::Dense,
            Lengths::KvLens(kv_lens) => {
                check_count("kv_lens", kv_lens.len(), rows.batch)?;
                for (b, &len) in kv_lens.iter().enumerate() {
                    if usize::try_from(len).is_err() || len as usize > rows.kv {
                        let wanted = format!("0 to {}, k's length", rows.kv);
                        return Err(Error::value(format!("kv_lens[{b}]"), len, wanted));
                    }
                }
                Lists::KvLens(kv_lens)
            }
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
                check_boundaries("cu_seqlens_q", cu_seqlens_q, rows.q)?;
                check_boundaries("cu_seqlens_k", cu_seqlens_k, rows.kv)?;
                check_alike(cu_seqlens_q.len(), cu_seqlens_k.len())?;
                Lists::Packed(cu_seqlens_q, cu_seqlens_k)
            }
            Lengths::DeviceKvLens(kv_lens) => {
                check_count("kv_lens", kv_lens.entries(), rows.batch)?;
                Lists::OnDevice
            }
            Lengths::DevicePacked { cu_seqlens_q, cu_seqlens_k, .. } => {
                if cu_seqlens_q.entries() == 0 {
                    return Err(Error::shape("cu_seqlens_q", &[0], "[batch + 1]"));
                }
                check_alike(cu_seqlens_q.entries(), cu_seqlens_k.entries())?;
                Lists::OnDevice
            }
        };
        Ok(Sequences { rows, lists, cut, cut_tensors: matches!(lengths, Lengths::Dense) })
    }

    /// Whether hidden keys are left out.
    pub const fn cuts(&self) -> bool {
        self.cut.is_some()
    }

    /// How many there are; none where only the device knows the lengths.
    pub fn count(&self) -> usize {
        match self.lists {
            Lists::Dense | Lists::KvLens(_) => self.rows.batch,
            Lists::Packed(q, _) => q.len() - 1,
            Lists::OnDevice => 0,
        }
    }

    /// Sequence `index` of [`Sequences::count`].
    pub fn get(&self, index: usize) -> Sequence {
        let given = self.given(index);
        let Some(band) = self.cut else { return given };
        let seen = band.seen(given.q_len, given.kv_len);
        let skipped = if self.cut_tensors { 0 } else { seen.start };
        Sequence { kv_start: given.kv_start + skipped, kv_len: seen.len(), ..given }
    }

    /// The sequence with all keys that the lengths give it. No entry is negative: [`Sequences::check`] has seen them.
    pub fn given(&self, index: usize) -> Sequence {
        let Rows { q, kv, .. } = self.rows;
        let dense = |kv_len| Sequence { index, batch: index, q_start: 0, q_len: q, kv_start: 0, kv_len };
        match self.lists {
            Lists::Dense | Lists::OnDevice => dense(kv),
            Lists::KvLens(kv_lens) => dense(kv_lens[index] as usize),
            Lists::Packed(q, k) => {
                let rows = |list: &[i32]| (list[index] as usize, (list[index + 1] - list[index]) as usize);
                let ((q_start, q_len), (kv_start, kv_len)) = (rows(q), rows(k));
                Sequence { index, batch: 0, q_start, q_len, kv_start, kv_len }
            }
        }
    }
}

fn check_count(name: &'static str, found: usize, batch: usize) -> Result<()> {
    if found == batch {
        return Ok(());
    }
    Err(Error::shape(name, &[found], format!("[{batch}], one for each batch entry")))
}

fn check_alike(q: usize, k: usize) -> Result<()> {
    if k == q { Ok(()) } else { Err(Error::shape("cu_seqlens_k", &[k], format!("[{q}], as cu_seqlens_q"))) }
}

/// Boundaries of packed sequences go from 0 to `total` and never fall.
fn check_boundaries(name: &'static str, cu_seqlens: &[i32], total: usize) -> Result<()> {
    let mut previous = 0;
    for (b, &boundary) in cu_seqlens.iter().enumerate() {
        let wrong = |wanted: String| Err(Error::value(format!("{name}[{b}]"), boundary, wanted));
        let Ok(value) = usize::try_from(boundary) else { return wrong("at least 0".into()) };
        if b == 0 && value != 0 {
            return wrong("0".into());
        }
        if value < previous {
            return wrong(format!("at least {previous}, the entry before"));
        }
        if b + 1 == cu_seqlens.len() && value != total {
            return wrong(format!("{total}, the number of packed rows"));
        }
        previous = value;
    }
    if cu_seqlens.is_empty() {
        return Err(Error::shape(name, &[0], "[batch + 1]"));
    }
    Ok(())
}
