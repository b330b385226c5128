//! Rows of one head of a tensor.

use std::marker::PhantomData;

use sage_core::{Element, Geometry, View, ViewMut};

/// Rows of one head: `len` rows of `channels` neighbouring elements.
pub(crate) struct HeadRows<'a, E> {
    data: &'a [E],
    first: i64,
    stride: i64,
    channels: usize,
}

impl<'a, E: Element> HeadRows<'a, E> {
    /// Rows from `start` on of a head of a tensor `[batch, heads, seq, channels]`.
    pub fn new(view: &View<'a, E>, batch: usize, head: usize, start: usize) -> Self {
        let geometry = view.geometry();
        let stride = geometry.strides()[2];
        // A packed sequence without rows may start behind the last.
        let of_head = || geometry.index([batch, head, 0, 0]) + start as i64 * stride;
        let first = if geometry.is_empty() { 0 } else { of_head() };
        HeadRows { data: view.data(), first, stride, channels: geometry.shape()[3] }
    }

    /// Elements of a row.
    pub fn row_len(&self) -> usize {
        self.channels
    }

    /// One row.
    pub fn row(&self, i: usize) -> &'a [E] {
        let start = (self.first + i as i64 * self.stride) as usize;
        &self.data[start..start + self.channels]
    }

    /// The memory from row `i` on, and the distance between rows; `None` where rows lie in falling order.
    pub fn from(&self, i: usize) -> Option<(&'a [E], usize)> {
        let stride = usize::try_from(self.stride).ok()?;
        Some((&self.data[(self.first + i as i64 * self.stride) as usize..], stride))
    }
}

/// The output, whose rows several threads write at once.
pub(crate) struct OutputRows<'a, E> {
    data: *mut E,
    len: usize,
    geometry: Geometry,
    lifetime: PhantomData<&'a mut [E]>,
}

// SAFETY: it stands for a `&mut [E]`; `OutputRows::row_mut`'s callers keep threads apart.
unsafe impl<E: Send> Send for OutputRows<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Send> Sync for OutputRows<'_, E> {}

impl<'a, E: Element> OutputRows<'a, E> {
    /// The rows of `view`, addressed by `geometry` `[batch, heads, seq, channels]` over the same elements.
    pub fn new(view: &'a mut ViewMut<'_, E>, geometry: Geometry) -> Self {
        let data = view.data_mut();
        OutputRows { data: data.as_mut_ptr(), len: data.len(), geometry, lifetime: PhantomData }
    }

    /// One row.
    ///
    /// # Safety
    /// No two callers may hold the same row at once. (Different rows never share memory: `ViewMut` refuses
    /// geometries that overlap themselves.)
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_mut(&self, batch: usize, head: usize, i: usize) -> &mut [E] {
        let start = self.geometry.index([batch, head, i, 0]) as usize;
        let channels = self.geometry.shape()[3];
        assert!(start + channels <= self.len);
        // SAFETY: the assertion bounds it; the caller holds the row alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), channels) }
    }
}
