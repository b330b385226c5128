//! The rows of one head of one sequence.

use half::slice::HalfFloatSliceExt;

use crate::{TensorView, View};

/// Rows of equal width, in row-major order: the queries, keys or values of one head of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix<T> {
    data: Vec<T>,
    width: usize,
    rows: usize,
}

impl<T: Copy> Matrix<T> {
    /// A matrix of `rows × width` whose element in row `i` and column `c` is `element(i, c)`.
    pub fn from_fn(rows: usize, width: usize, mut element: impl FnMut(usize, usize) -> T) -> Self {
        let mut data = Vec::with_capacity(rows * width);
        for i in 0..rows {
            data.extend((0..width).map(|c| element(i, c)));
        }
        Matrix { data, width, rows }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `i`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, i: usize) -> &[T] {
        &self.data[i * self.width..(i + 1) * self.width]
    }

    /// Row `i`, to write to.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.data[i * self.width..(i + 1) * self.width]
    }

    /// All rows, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> {
        (0..self.rows).map(|i| self.row(i))
    }

    /// All elements in row-major order.
    pub fn as_slice(&self) -> &[T] {
        &self.data
    }

    /// The same rows with every element converted.
    pub fn map<U>(&self, convert: impl FnMut(T) -> U) -> Matrix<U> {
        Matrix { data: self.data.iter().copied().map(convert).collect(), width: self.width, rows: self.rows }
    }

    /// Rows as columns.
    pub fn transposed(&self) -> Self {
        Matrix::from_fn(self.width, self.rows, |i, c| self.row(c)[i])
    }

    /// Column `c`, from the first row to the last.
    pub fn column(&self, c: usize) -> impl Iterator<Item = T> {
        self.iter().map(move |row| row[c])
    }
}

impl Matrix<f32> {
    /// Rows `start..start + rows` of one head of a tensor `[batch, heads, seq, head_dim]`.
    ///
    /// # Panics
    /// When the tensor has no such head or rows.
    pub fn of_head(tensor: &TensorView<'_>, batch: usize, head: usize, start: usize, rows: usize) -> Self {
        let first = [batch, head, start];
        match tensor {
            TensorView::F32(view) => Self::widened(view, first, rows, |row, wide| wide.copy_from_slice(row)),
            TensorView::F16(view) => {
                Self::widened(view, first, rows, |row, wide| row.convert_to_f32_slice(wide))
            }
            TensorView::BF16(view) => {
                Self::widened(view, first, rows, |row, wide| row.convert_to_f32_slice(wide))
            }
        }
    }

    /// Rows from `[batch, head, row]` on; `widen` takes a row that lies without gaps.
    fn widened<T: Copy>(
        view: &View<'_, T>,
        [batch, head, start]: [usize; 3],
        rows: usize,
        widen: impl Fn(&[T], &mut [f32]),
    ) -> Self {
        let width = view.geometry().shape().last().copied().unwrap_or(0);
        let mut data = vec![0.0; rows * width];
        let mut gathered = Vec::with_capacity(width);
        for (i, wide) in data.chunks_exact_mut(width.max(1)).enumerate() {
            let at = |c| [batch, head, start + i, c];
            if view.geometry().last_is_contiguous() {
                let first = view.geometry().index(at(0)) as usize;
                widen(&view.data()[first..first + width], wide);
            } else {
                gathered.clear();
                gathered.extend((0..width).map(|c| view.at(at(c))));
                widen(&gathered, wide);
            }
        }
        Matrix { data, width, rows }
    }
}

/// `max |x|`, or NaN when a value is not finite: a group that holds one must not pass for a good group.
///
/// ```
/// use sage_core::oracle::absmax;
///
/// assert_eq!(absmax([1.0, -3.0]), 3.0);
/// assert!(absmax([1.0, f32::NAN]).is_nan() && absmax([f32::INFINITY]).is_nan());
/// assert_eq!(absmax([]), 0.0);
/// ```
pub fn absmax(values: impl IntoIterator<Item = f32>) -> f32 {
    // A comparison with NaN is false, so the order of the two arms keeps it.
    values.into_iter().fold(0.0, |largest: f32, x| match x.abs() {
        x if !x.is_finite() => f32::NAN,
        x if x > largest => x,
        _ => largest,
    })
}

/// `⟨a, b⟩` in double precision.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
