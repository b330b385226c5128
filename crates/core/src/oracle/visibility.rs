//! Which keys a query sees and what is added to their scores, and which keys any query of a head sees at all.

use crate::{Call, Mask, Sequence};

/// The keys that query `i` of `head` in `sequence` sees, in order, each with the bias that its score gets.
///
/// Keys and queries are counted from the start of their sequence. A key is visible when the band, the block mask
/// and the explicit mask all let it be seen; an additive mask hides a key by −∞.
pub fn visible_keys<'c>(
    call: &'c Call<'_>,
    sequence: &'c Sequence,
    head: usize,
    i: usize,
) -> impl Iterator<Item = (usize, f64)> + 'c {
    let sequence_index = sequence.index;
    let in_block = move |j: usize| {
        call.block_mask
            .is_none_or(|mask| mask.blocks.at([sequence_index, head, i / mask.block_q, j / mask.block_k]))
    };
    unhidden_keys(call, sequence, head, i).filter(move |&(j, _)| in_block(j))
}

/// The same without the block mask, which says what is computed.
fn unhidden_keys<'c>(
    call: &'c Call<'_>,
    sequence: &'c Sequence,
    head: usize,
    i: usize,
) -> impl Iterator<Item = (usize, f64)> + 'c {
    let batch = sequence.batch;
    let bias = move |j: usize| match &call.mask {
        None => Some(0.0),
        Some(Mask::Bool(mask)) => mask.at([batch, head, i, j]).then_some(0.0),
        Some(Mask::Additive(mask)) => {
            Some(f64::from(mask.at([batch, head, i, j]))).filter(|&b| b != f64::NEG_INFINITY)
        }
    };
    call.problem
        .band
        .keys(i, sequence.q_len, sequence.kv_len)
        .filter_map(move |j| bias(j).map(|bias| (j, bias)))
}

/// What the queries of a key head see of each of its keys, all of them together.
///
/// What no query sees has no influence on any result, whatever K and V hold there. So quantisation must not look at it
/// either: one stray value would be enough to spoil a mean or a scale.
///
/// - A key is **visible** when some query row of some head that reads it sees it: the band and the explicit mask both
///   let it be seen, an additive mask by any bias above −∞. Other keys count as zeros after smoothing. A
///   [`BlockMask`](crate::BlockMask) hides no key from all of this: it says what is computed.
/// - A key **counts** when moreover some of these rows gives it a bias above [`Mask::padding_bias`]: at and below that
///   bias lies what programs write for padding, which softmax sees only in rows that hold nothing else. Where no key of
///   the head counts, all visible ones do.
///
/// Means are those of keys that count. A scale is that of the keys of its group that count, or where none does, of
/// those that are visible; what exceeds it saturates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenKeys {
    visible: Vec<bool>,
    counts: Vec<bool>,
}

impl SeenKeys {
    /// `len` keys that all count.
    pub fn all(len: usize) -> Self {
        SeenKeys { visible: vec![true; len], counts: vec![true; len] }
    }

    /// The keys of key head `kv_head` in `sequence`.
    pub fn of(call: &Call<'_>, sequence: &Sequence, kv_head: usize) -> Self {
        let padding = call.mask.as_ref().map_or(f64::NEG_INFINITY, |mask| f64::from(mask.padding_bias()));
        let (mut visible, mut counts) = (vec![false; sequence.kv_len], vec![false; sequence.kv_len]);
        let group_size = call.problem.group_size();
        for head in kv_head * group_size..(kv_head + 1) * group_size {
            for i in 0..sequence.q_len {
                for (key, bias) in unhidden_keys(call, sequence, head, i) {
                    visible[key] = true;
                    // A bias of NaN is no padding: it is to be seen.
                    counts[key] |= bias > padding || bias.is_nan();
                }
            }
        }
        if !counts.contains(&true) {
            counts.clone_from(&visible);
        }
        SeenKeys { visible, counts }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.visible.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.visible.is_empty()
    }

    /// Whether some query sees key `j`.
    pub fn is_visible(&self, j: usize) -> bool {
        self.visible[j]
    }

    /// Whether key `j` enters means and scales.
    pub fn counts(&self, j: usize) -> bool {
        self.counts[j]
    }

    /// The keys that count, in order.
    pub fn counted(&self) -> Vec<usize> {
        (0..self.len()).filter(|&j| self.counts[j]).collect()
    }

    /// Which keys of a group with a scale of its own that scale is taken from.
    pub fn measured(&self, group: impl Iterator<Item = usize> + Clone) -> Vec<usize> {
        let counted: Vec<usize> = group.clone().filter(|&j| self.counts[j]).collect();
        if counted.is_empty() { group.filter(|&j| self.visible[j]).collect() } else { counted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{Sample, Sizes};
    use crate::{Inputs, Lengths, Options, Tensor, View};

    fn seen(inputs: &Inputs<'_>) -> SeenKeys {
        let call = Call::check(inputs, &Options::default()).unwrap();
        SeenKeys::of(&call, &call.sequences().next().unwrap(), 0)
    }

    #[test]
    fn a_key_is_visible_when_some_row_of_some_head_of_its_group_sees_it() {
        let sizes = Sizes { batch: 1, num_q_heads: 2, num_kv_heads: 1, q_len: 2, kv_len: 4, head_dim: 1 };
        let sample = Sample::normal(1, sizes);
        // Head 0: both rows see key 0. Head 1: its second row sees key 2.
        let mut mask = [false; 16];
        (mask[0], mask[4], mask[14]) = (true, true, true);
        let mask = View::contiguous("mask", &mask, &[2, 2, 4]).unwrap();
        let inputs = Inputs { mask: Some(Mask::Bool(mask)), ..sample.inputs() };
        assert_eq!(seen(&inputs).visible, [true, false, true, false]);
        assert_eq!(seen(&Inputs { lengths: Lengths::KvLens(&[2]), ..inputs }).visible, [true, false]);
    }

    #[test]
    fn biases_of_padding_are_visible_but_do_not_count() {
        let sample = Sample::normal(2, Sizes::one_head(2, 5, 1));
        let with =
            |mask: &Tensor| seen(&Inputs { mask: Some(Mask::Additive(mask.view())), ..sample.inputs() });
        let hidden = f32::NEG_INFINITY;
        for dtype in crate::DType::ALL {
            let lowest = match dtype {
                crate::DType::F16 => half::f16::MIN.to_f32(),
                crate::DType::BF16 => half::bf16::MIN.to_f32(),
                crate::DType::F32 => f32::MIN,
            };
            let rows = [[0.0, lowest, hidden, lowest, lowest], [-1e4, lowest, hidden, -1.0, hidden]];
            let keys = with(&Tensor::new(rows.concat(), &[2, 5]).unwrap().to_dtype(dtype));
            assert_eq!(keys.visible, [true, true, false, true, true], "{dtype}");
            assert_eq!(keys.counted(), [0, 3], "{dtype}");
            assert_eq!((keys.measured(1..3), keys.measured(1..4)), (vec![1], vec![3]));
        }
        let padding = with(&Tensor::new(vec![f32::MIN; 5], &[5]).unwrap());
        assert_eq!(padding, SeenKeys::all(5), "nothing but padding counts");
    }
}
