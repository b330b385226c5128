//! Hadamard rotation of rows in registers: core's `oracle::hadamard` inside a kernel. The sums are the same and come
//! in the same order, so that rows are the oracle's bits.

use sage_ptx::Val;

/// How the channels of a row lie in the registers of neighbouring lanes: each lane has `per` neighbouring channels,
/// then the next lane, and so on for `lanes` lanes, after which the first has the next `per`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowLayout<'k> {
    /// Neighbouring channels of a lane, a power of two.
    pub per: usize,
    /// Lanes that hold a row, a power of two.
    pub lanes: usize,
    /// The lane's index among them.
    pub lane: Val<'k, i32>,
}

/// Channels of a rotated row.
pub(crate) const fn rotated_dim(head_dim: usize) -> usize {
    head_dim.next_power_of_two()
}

/// Multiplies a row by the orthonormal Hadamard matrix of [`rotated_dim`]: `values` are the lane's channels in order,
/// zeros beyond the head's. All lanes of the row must take part.
#[track_caller]
pub(crate) fn rotate<'k>(values: &mut [Val<'k, f32>], layout: &RowLayout<'k>, head_dim: usize) {
    let size = rotated_dim(head_dim);
    let RowLayout { per, lanes, lane } = *layout;
    let mut stride = 1;
    while stride < size {
        if stride < per {
            butterflies(values, stride);
        } else if stride < per * lanes {
            let bit = (stride / per) as i32;
            // The lane with the upper channel has the difference: the other's minus its own.
            let sign = (lane & bit).ne(0).select(-1.0, 1.0);
            for x in values.iter_mut() {
                *x = x.mul_add(sign, x.shuffle_xor(bit));
            }
        } else {
            butterflies(values, stride / lanes);
        }
        stride *= 2;
    }
    let normalise = 1.0 / (size as f32).sqrt();
    values.iter_mut().for_each(|x| *x = *x * normalise);
}

/// Sums and differences of values that lie `stride` apart.
#[track_caller]
fn butterflies(values: &mut [Val<'_, f32>], stride: usize) {
    for pair in values.chunks_exact_mut(2 * stride) {
        let (low, high) = pair.split_at_mut(stride);
        for (a, b) in low.iter_mut().zip(high) {
            (*a, *b) = (*a + *b, *a - *b);
        }
    }
}
