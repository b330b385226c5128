//! Rows of a mask as slices.

use sage_core::View;

use crate::tile::TILE_KEYS;

/// Hands over `len` elements of a mask, up to [`TILE_KEYS`], from the one at `at` on along the last dimension.
pub(crate) fn with_row<T: Copy, R>(
    mask: &View<'_, T>,
    at: [usize; 4],
    len: usize,
    work: impl FnOnce(&[T]) -> R,
) -> R {
    let (data, geometry) = (mask.data(), mask.geometry());
    let start = geometry.index(at);
    let stride = geometry.strides()[3];
    if stride == 1 || len <= 1 {
        return work(&data[start as usize..][..len]);
    }
    let mut copy = [data[start as usize]; TILE_KEYS];
    if stride != 0 {
        for (copy, j) in copy[..len].iter_mut().zip(0i64..) {
            *copy = data[(start + j * stride) as usize];
        }
    }
    work(&copy[..len])
}
