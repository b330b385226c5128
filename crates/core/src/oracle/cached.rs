//! What a quantised KV cache stores, and attention over it.

use half::{bf16, f16};

use super::exact::attend;
use super::matrix::dot;
use super::{Matrix, Output, Score, absmax, round_e4m3, visible_keys};
use crate::{CacheLayout, Call, ValueFormat};

/// Largest magnitude of an INT8 code.
const INT8_MAX: f32 = 127.0;

/// One head of one cached sequence, as scalars.
///
/// **Keys.** A page has a constant `c` (one a channel) that is chosen when its first token is written and never
/// changes. A token's key is stored as `round((K − c) / s)` with a scale `s = max |K − c| / 127` of its own. So
/// appending never touches what is stored, and a score is recovered exactly: `⟨q, K⟩ = ⟨q, c⟩ + s·⟨q, codes⟩`, at the
/// price of one product `⟨q, c⟩` a page. One constant for the whole sequence would need no such product, but must be
/// chosen before the sequence is known: where the mean of K drifts away from it (by position, by topic), scales grow
/// with the distance, and the error with them. Constants of pages follow the mean. (Where it drifts by 50 standard
/// deviations over 1024 tokens that come one by one, the output's relative L1 error is 0.010 with pages of 64 tokens,
/// 0.067 with one constant, and 0.007 without a mean.)
///
/// `c` is the mean of the [`CacheLayout::page_size`] tokens that end with the last token at hand for the page: of the
/// page's own tokens when a long chunk is appended, and also of those before it while tokens come one by one. Tokens of
/// the same chunk count as given, earlier ones as stored. Rows that are not finite do not count. Any constant would be
/// right; only the quantisation error depends on it.
///
/// **Values** are rounded to 16 bits, or divided by a scale of their own, the row's largest magnitude over 448 or 127,
/// and rounded to E4M3 or INT8.
///
/// A row that is not finite has the scale NaN: it makes whatever sees it NaN, and nothing else.
#[derive(Clone, Debug)]
pub struct CachedHead {
    layout: CacheLayout,
    /// The constant of each page.
    pub constants: Vec<Vec<f32>>,
    /// The codes of each token's key.
    pub key_codes: Vec<Vec<i8>>,
    /// The scale of each token's key.
    pub key_scales: Vec<f32>,
    /// What each token's stored value stands for.
    pub values: Vec<Vec<f64>>,
    /// The scale of each token's value; 1 where the format has no scales.
    pub value_scales: Vec<f32>,
}

impl CachedHead {
    /// An empty head; of `layout` the number of heads does not matter.
    pub fn new(layout: CacheLayout) -> Self {
        CachedHead {
            layout,
            constants: Vec::new(),
            key_codes: Vec::new(),
            key_scales: Vec::new(),
            values: Vec::new(),
            value_scales: Vec::new(),
        }
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.key_codes.len()
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.key_codes.is_empty()
    }

    /// Appends a chunk of tokens.
    pub fn append(&mut self, k: &Matrix<f32>, v: &Matrix<f32>) {
        let first = self.len();
        let stored = self.keys();
        let key = |token: usize, c: usize| match token.checked_sub(first) {
            Some(new) => f64::from(k.row(new)[c]),
            None => stored.row(token)[c],
        };
        for (i, (k_row, v_row)) in k.iter().zip(v.iter()).enumerate() {
            let (token, page_size) = (first + i, self.layout.page_size);
            if token.is_multiple_of(page_size) {
                let end = (token + page_size).min(first + k.rows());
                let window = end.saturating_sub(page_size)..end;
                let is_finite = |token: &usize| (0..k.width()).all(|c| key(*token, c).is_finite());
                let counted: Vec<usize> = window.filter(is_finite).collect();
                let mean = |c| {
                    let sum: f64 = counted.iter().map(|&token| key(token, c)).sum();
                    (sum / counted.len().max(1) as f64) as f32
                };
                self.constants.push((0..k.width()).map(mean).collect());
            }
            let constant = &self.constants[token / page_size];
            let centred: Vec<f32> = k_row.iter().zip(constant).map(|(k, c)| k - c).collect();
            let (codes, scale) = int8_row(&centred);
            self.key_codes.push(codes);
            self.key_scales.push(scale);
            let (values, scale) = value_row(v_row, self.layout.values);
            self.values.push(values);
            self.value_scales.push(scale);
        }
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.constants.truncate(len.div_ceil(self.layout.page_size));
        self.key_codes.truncate(len);
        self.key_scales.truncate(len);
        self.values.truncate(len);
        self.value_scales.truncate(len);
    }

    /// The keys that the codes stand for.
    pub fn keys(&self) -> Matrix<f64> {
        Matrix::from_fn(self.len(), self.layout.head_dim, |token, c| {
            let code = f64::from(self.key_codes[token][c]);
            f64::from(self.constants[token / self.layout.page_size][c])
                + f64::from(self.key_scales[token]) * code
        })
    }
}

/// Codes and scale of a row: `x ≈ scale · code`.
fn int8_row(row: &[f32]) -> (Vec<i8>, f32) {
    let scale = absmax(row.iter().copied()) / INT8_MAX;
    let code = |x: &f32| {
        if scale > 0.0 { (x / scale).round_ties_even().clamp(-INT8_MAX, INT8_MAX) as i8 } else { 0 }
    };
    (row.iter().map(code).collect(), scale)
}

/// What a stored row of values stands for, and its scale.
fn value_row(row: &[f32], format: ValueFormat) -> (Vec<f64>, f32) {
    match format {
        ValueFormat::F16 => (row.iter().map(|&x| f16::from_f32(x).to_f64()).collect(), 1.0),
        ValueFormat::BF16 => (row.iter().map(|&x| bf16::from_f32(x).to_f64()).collect(), 1.0),
        ValueFormat::Int8 => {
            let (codes, scale) = int8_row(row);
            (codes.iter().map(|&code| f64::from(scale) * f64::from(code)).collect(), scale)
        }
        ValueFormat::Fp8E4M3 => {
            let scale = absmax(row.iter().copied()) / super::E4M3_MAX;
            let code = |x: &f32| if scale > 0.0 { round_e4m3(x / scale) } else { 0.0 };
            (row.iter().map(|x| f64::from(scale) * f64::from(code(x))).collect(), scale)
        }
    }
}

/// Exact attention, in double precision, over what the heads of a cache store: `heads[b · num_kv_heads + h]`. The rules
/// of [`super::exact()`] for hidden keys and rows without keys hold here too.
///
/// # Panics
/// When there are fewer heads or tokens than the call has.
pub fn cached(call: &Call<'_>, heads: &[CachedHead]) -> Output {
    if call.sinks.is_some() {
        return cached(&call.without_sinks(), heads).with_sinks(call);
    }
    let problem = &call.problem;
    let mut output = Output::without_keys(call);
    for sequence in call.sequences() {
        for kv_head in 0..problem.num_kv_heads {
            let stored = &heads[sequence.batch * problem.num_kv_heads + kv_head];
            let k = stored.keys();
            let v = Matrix::from_fn(stored.len(), problem.head_dim, |token, c| stored.values[token][c]);
            for head in kv_head * problem.group_size()..(kv_head + 1) * problem.group_size() {
                let q = Matrix::of_head(&call.q, sequence.batch, head, sequence.q_start, sequence.q_len);
                for (i, q) in q.map(f64::from).iter().enumerate() {
                    let scores: Vec<Score> = visible_keys(call, &sequence, head, i)
                        .map(|(key, bias)| {
                            let score = f64::from(problem.sm_scale) * dot(q, k.row(key));
                            Score { key, value: super::exact::softcap(score, problem.logit_softcap) + bias }
                        })
                        .collect();
                    let (out, lse) = attend(&scores, &v);
                    output.set(call.lse_index(&sequence, head, i), &out, lse);
                }
            }
        }
    }
    output
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{matrix, normal, normal_matrix};

    fn layout(page_size: usize, values: ValueFormat) -> CacheLayout {
        CacheLayout { num_kv_heads: 1, head_dim: 2, page_size, values }
    }

    #[test]
    fn numbers_worked_out_by_hand() {
        let mut head = CachedHead::new(layout(16, ValueFormat::Int8));
        // Means 3 and 0; the differences ±127 have the scale 1.
        head.append(&matrix(2, &[130.0, 0.5, -124.0, -0.5]), &matrix(2, &[254.0, 1.0, 0.0, 0.0]));
        assert_eq!(head.constants, [[3.0, 0.0]]);
        assert_eq!(
            (&head.key_codes, &head.key_scales[..]),
            (&vec![vec![127, 0], vec![-127, 0]], &[1.0, 1.0][..])
        );
        assert_eq!(head.keys().as_slice(), [130.0, 0.0, -124.0, 0.0]);
        // Scale 2: 1 is half a step, and goes to the even 0.
        assert_eq!((head.values[0].as_slice(), head.value_scales[0]), (&[254.0, 0.0][..], 2.0));
        assert_eq!((head.values[1].as_slice(), head.value_scales[1]), (&[0.0, 0.0][..], 0.0));
        // The constant stays while its page fills.
        head.append(&matrix(2, &[3.0, 254.0]), &matrix(2, &[0.0, 0.0]));
        assert_eq!(
            (head.constants.len(), &head.key_codes[2][..], head.key_scales[2]),
            (1, &[0, 127][..], 2.0)
        );
    }

    #[test]
    fn a_new_pages_constant_reaches_back_where_its_own_tokens_are_few() {
        let keys = normal_matrix(1, 21, 2);
        let rows = |range: std::ops::Range<usize>| {
            Matrix::from_fn(range.len(), 2, |i, c| keys.row(range.start + i)[c])
        };
        let mean =
            |rows: &[Vec<f64>], c: usize| rows.iter().map(|row| row[c]).sum::<f64>() / rows.len() as f64;
        let wide = |range: std::ops::Range<usize>| -> Vec<Vec<f64>> {
            range.map(|i| keys.row(i).iter().map(|&x| f64::from(x)).collect()).collect()
        };
        // In one chunk: as given.
        let mut head = CachedHead::new(layout(16, ValueFormat::F16));
        head.append(&keys, &keys);
        assert_eq!(head.constants[0][1], mean(&wide(0..16), 1) as f32);
        assert_eq!(head.constants[1][1], mean(&wide(5..21), 1) as f32);
        // In two: as stored.
        let mut head = CachedHead::new(layout(16, ValueFormat::F16));
        head.append(&rows(0..16), &rows(0..16));
        let stored = head.keys();
        head.append(&rows(16..18), &rows(16..18));
        let mut window: Vec<Vec<f64>> = (2..16).map(|i| stored.row(i).to_vec()).collect();
        window.extend(wide(16..18));
        assert_eq!(head.constants[1][0], mean(&window, 0) as f32);
    }

    #[test]
    fn a_row_that_is_not_finite_spoils_no_other() {
        let mut head = CachedHead::new(layout(16, ValueFormat::Fp8E4M3));
        head.append(
            &matrix(2, &[1.0, 2.0, f32::NAN, 1.0, 3.0, 4.0]),
            &matrix(2, &[1.0, 1.0, 1.0, 1.0, f32::INFINITY, 1.0]),
        );
        assert_eq!(head.constants, [[2.0, 3.0]]);
        let nan: Vec<bool> = head.key_scales.iter().map(|x| x.is_nan()).collect();
        assert_eq!(nan, [false, true, false]);
        let nan: Vec<bool> = head.value_scales.iter().map(|x| x.is_nan()).collect();
        assert_eq!(nan, [false, false, true]);
    }

    #[test]
    fn the_error_of_a_key_is_half_a_step_of_its_own_row() {
        let keys = normal_matrix(3, 100, 2);
        for chunk in [1, 7, 100] {
            let mut head = CachedHead::new(layout(32, ValueFormat::F16));
            for start in (0..100).step_by(chunk) {
                let rows = Matrix::from_fn(chunk.min(100 - start), 2, |i, c| keys.row(start + i)[c]);
                head.append(&rows, &rows);
            }
            for (i, (row, stored)) in keys.iter().zip(head.keys().iter()).enumerate() {
                // The difference to the constant rounds too, by 2⁻²⁴ of about 5.
                let bound = f64::from(head.key_scales[i]) * 0.5001 + 5e-7;
                assert!(row.iter().zip(stored).all(|(x, y)| (f64::from(*x) - y).abs() <= bound));
            }
        }
    }

    #[test]
    fn constants_of_pages_follow_a_mean_that_drifts() {
        // The mean moves by 40 standard deviations over 2048 tokens.
        let noise = normal(5, 2048 * 2);
        let keys = Matrix::from_fn(2048, 2, |i, c| noise[2 * i + c] + 40.0 * i as f32 / 2048.0);
        let mut head = CachedHead::new(layout(64, ValueFormat::F16));
        for i in 0..2048 {
            let row = Matrix::from_fn(1, 2, |_, c| keys.row(i)[c]);
            head.append(&row, &row);
        }
        // 64 tokens drift by 1.25, and the constant is that of up to 64 tokens before: no scale knows of the 40.
        let largest = absmax(head.key_scales.iter().copied()) * INT8_MAX;
        assert!(largest < 4.5 + 2.5, "{largest}");
    }
}
