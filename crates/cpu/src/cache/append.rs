//! Writing new tokens into pages.

use rayon::prelude::*;
use sage_core::{BlockTables, CacheLayout, Element, Error, Result, TensorView, View};

use super::{CachePages, Page, Pages, checked_table, typed, width};
use crate::kernels::{Kernels, Load, QuantizeRows, Stored};
use crate::rows::HeadRows;
use crate::{Cpu, kernels, threads};

impl Cpu {
    /// Writes the tokens of `k` and `v`, `[sequences.len(), num_kv_heads, tokens, head_dim]` of any strides, behind
    /// what the tables count for each of `sequences`. Their pages must have been reserved and prepared;
    /// [`BlockTables::advance`] is the caller's to call.
    ///
    /// # Errors
    /// When a tensor does not fit the cache, a page does not exist, or belongs to two sequences.
    pub fn append_cached(
        &self,
        cache: &mut CachePages,
        tables: &BlockTables,
        sequences: &[usize],
        k: TensorView<'_>,
        v: TensorView<'_>,
    ) -> Result<()> {
        let layout = cache.layout;
        if v.geometry().shape() != k.geometry().shape() || k.shape().len() != 4 {
            return Err(Error::unsupported("k and v of different shapes", "append both of the same tokens"));
        }
        let jobs = jobs(&layout, tables, sequences, k.shape()[2], cache.len())?;
        let kernels = kernels(self.instruction_set);
        threads::run(|| {
            typed!(&mut cache.pages, pages => match k {
                TensorView::F32(k) => append(kernels, &layout, pages, jobs, tables, sequences, k, v),
                TensorView::F16(k) => append(kernels, &layout, pages, jobs, tables, sequences, k, v),
                TensorView::BF16(k) => append(kernels, &layout, pages, jobs, tables, sequences, k, v),
            })
        })?
    }
}

/// New tokens of one page.
struct Job {
    /// Place in `sequences`, and so in the batch.
    batch: usize,
    page: usize,
    /// First of the tokens, counted from the start of the sequence.
    token: usize,
    /// The same, counted among the new ones.
    new: usize,
    tokens: usize,
}

fn jobs(
    layout: &CacheLayout,
    tables: &BlockTables,
    sequences: &[usize],
    tokens: usize,
    pages: usize,
) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    for (batch, &sequence) in sequences.iter().enumerate() {
        let (table, len) = (checked_table(tables, sequence, pages)?, tables.len(sequence)?);
        let mut new = 0;
        while new < tokens {
            let token = len + new;
            let count = (layout.page_size - token % layout.page_size).min(tokens - new);
            let page = table.get(token / layout.page_size).ok_or_else(|| {
                Error::value("tokens", tokens, format!("at most the {new} with reserved pages"))
            })?;
            jobs.push(Job { batch, page: *page as usize, token, new, tokens: count });
            new += count;
        }
    }
    // In the order of memory, so that each job can be given its page.
    jobs.sort_by_key(|job| job.page);
    match jobs.windows(2).find(|pair| pair[0].page == pair[1].page) {
        Some(pair) => Err(Error::value("page", pair[0].page, "a page that one sequence writes to")),
        None => Ok(jobs),
    }
}

#[allow(clippy::too_many_arguments)] // one call, with its tensors' type known
fn append<E: Load, T: Stored + Encode>(
    kernels: &Kernels,
    layout: &CacheLayout,
    pages: &mut [Page<T>],
    jobs: Vec<Job>,
    tables: &BlockTables,
    sequences: &[usize],
    k: View<'_, E>,
    v: TensorView<'_>,
) -> Result<()> {
    // Constants first: those of pages that are begun may look at tokens of the pages before.
    let constants: Vec<Option<Vec<f32>>> = jobs
        .par_iter()
        .map(|job| {
            let begins = job.token.is_multiple_of(layout.page_size);
            begins.then(|| tables.table(sequences[job.batch])).transpose().map(|table| {
                table.map(|table| {
                    let heads = 0..layout.num_kv_heads;
                    heads.flat_map(|head| constant(layout, pages, table, job, head, &k)).collect()
                })
            })
        })
        .collect::<Result<_>>()?;
    let mut rest = pages;
    let mut first = 0;
    let mut writes = Vec::with_capacity(jobs.len());
    for (job, constants) in jobs.into_iter().zip(constants) {
        // Jobs lie in the order of their pages, each page once.
        let Some((page, after)) = std::mem::take(&mut rest)
            .split_at_mut_checked(job.page - first)
            .and_then(|(_, from)| from.split_first_mut())
        else {
            return Err(Error::value("page", job.page, "a page of the cache"));
        };
        first = job.page + 1;
        rest = after;
        writes.push((job, constants, page));
    }
    writes.into_par_iter().for_each(|(job, constants, page)| {
        if let Some(constants) = constants {
            page.constants = constants;
        }
        match v {
            TensorView::F32(v) => write(kernels, layout, page, &job, &k, &v),
            TensorView::F16(v) => write(kernels, layout, page, &job, &k, &v),
            TensorView::BF16(v) => write(kernels, layout, page, &job, &k, &v),
        }
    });
    Ok(())
}

/// The constant of a head's page that is begun, padded with zeros: see [`sage_core::oracle::CachedHead`].
fn constant<E: Load, T: Stored>(
    layout: &CacheLayout,
    pages: &[Page<T>],
    table: &[u32],
    job: &Job,
    head: usize,
    k: &View<'_, E>,
) -> Vec<f32> {
    let CacheLayout { head_dim, page_size, .. } = *layout;
    let new = HeadRows::new(k, job.batch, head, 0);
    let end = job.token + job.tokens;
    let first_new = job.token - job.new;
    let mut sum = vec![0f64; head_dim];
    let mut row = vec![0f64; head_dim];
    let mut wide = vec![0f32; head_dim];
    let mut counted = 0;
    for token in end.saturating_sub(page_size)..end {
        match token.checked_sub(first_new) {
            Some(i) => {
                E::widen(new.row(i), &mut wide);
                row.iter_mut().zip(&wide).for_each(|(to, &x)| *to = f64::from(x));
            }
            None => {
                let page = &pages[table[token / page_size] as usize];
                let slot = head * page_size + token % page_size;
                let scale = f64::from(page.k_scales[slot]);
                let constants = &page.constants[head * width(layout)..][..head_dim];
                let codes = &page.k[slot * head_dim..][..head_dim];
                for ((to, &constant), &code) in row.iter_mut().zip(constants).zip(codes) {
                    *to = f64::from(constant) + scale * f64::from(code);
                }
            }
        }
        if row.iter().all(|x| x.is_finite()) {
            sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += x);
            counted += 1;
        }
    }
    let mut constant = vec![0f32; width(layout)];
    constant.iter_mut().zip(sum).for_each(|(to, sum)| *to = (sum / f64::from(counted.max(1))) as f32);
    constant
}

/// Quantises the tokens of a job into its page.
fn write<K: Load, V: Load, T: Stored + Encode>(
    kernels: &Kernels,
    layout: &CacheLayout,
    page: &mut Page<T>,
    job: &Job,
    k: &View<'_, K>,
    v: &View<'_, V>,
) {
    let CacheLayout { head_dim, page_size, .. } = *layout;
    let mut rows = vec![0f32; job.tokens * head_dim];
    for head in 0..layout.num_kv_heads {
        let first = head * page_size + job.token % page_size;
        let slots = first..first + job.tokens;
        let elements = slots.start * head_dim..slots.end * head_dim;
        widen(&HeadRows::new(k, job.batch, head, job.new), head_dim, &mut rows);
        kernels.quantize_int8(QuantizeRows {
            rows: &mut rows,
            constant: &page.constants[head * width(layout)..][..head_dim],
            head_dim,
            codes: &mut page.k[elements.clone()],
            scales: &mut page.k_scales[slots.clone()],
        });
        widen(&HeadRows::new(v, job.batch, head, job.new), head_dim, &mut rows);
        let scales = if page.v_scales.is_empty() { &mut [][..] } else { &mut page.v_scales[slots] };
        T::encode(kernels, head_dim, &mut rows, &mut page.v[elements], scales);
    }
}

fn widen<E: Load>(from: &HeadRows<'_, E>, head_dim: usize, to: &mut [f32]) {
    to.chunks_exact_mut(head_dim).enumerate().for_each(|(i, to)| E::widen(from.row(i), to));
}

/// Rows of values as a cache stores them.
trait Encode: Sized {
    fn encode(kernels: &Kernels, head_dim: usize, rows: &mut [f32], codes: &mut [Self], scales: &mut [f32]);
}

impl Encode for half::f16 {
    fn encode(_: &Kernels, _: usize, rows: &mut [f32], codes: &mut [Self], _: &mut [f32]) {
        Self::narrow(rows, codes);
    }
}

impl Encode for half::bf16 {
    fn encode(_: &Kernels, _: usize, rows: &mut [f32], codes: &mut [Self], _: &mut [f32]) {
        Self::narrow(rows, codes);
    }
}

impl Encode for i8 {
    fn encode(kernels: &Kernels, head_dim: usize, rows: &mut [f32], codes: &mut [Self], scales: &mut [f32]) {
        kernels.quantize_int8(QuantizeRows { rows, constant: &[], head_dim, codes, scales });
    }
}

impl Encode for u8 {
    fn encode(kernels: &Kernels, head_dim: usize, rows: &mut [f32], codes: &mut [Self], scales: &mut [f32]) {
        kernels.quantize_e4m3(QuantizeRows { rows, constant: &[], head_dim, codes, scales });
    }
}

#[cfg(test)]
mod tests {
    use sage_core::oracle::{CachedHead, Matrix};
    use sage_core::{DType, Tensor, ValueFormat};
    use sage_testkit::normal_tensor;

    use super::*;
    use crate::InstructionSet;

    fn tensor(seed: u64, layout: &CacheLayout, tokens: usize) -> Tensor {
        normal_tensor(seed, &[1, layout.num_kv_heads, tokens, layout.head_dim], DType::F32)
    }

    /// What is stored of a head's token: constant, key codes and scale, what values stand for and their scale.
    type Row = (Vec<f32>, Vec<i8>, f32, Vec<f64>, f32);

    fn stored(pages: &CachePages, tables: &BlockTables, head: usize, token: usize) -> Row {
        let CacheLayout { head_dim, page_size, .. } = pages.layout;
        let page = tables.table(0).unwrap()[token / page_size] as usize;
        let slot = head * page_size + token % page_size;
        let row = slot * head_dim..(slot + 1) * head_dim;
        let constant = head * width(&pages.layout);
        let (constant, codes, key_scale, scale) = typed!(&pages.pages, all => {
            let page = &all[page];
            let constant = page.constants[constant..][..head_dim].to_vec();
            let scale = page.v_scales.get(slot).copied().unwrap_or(1.0);
            (constant, page.k[row.clone()].to_vec(), page.k_scales[slot], scale)
        });
        let e4m3 = |code: &u8| {
            let bits = (u16::from(*code) & 0x80) << 8 | (u16::from(*code) & 0x7f) << 7;
            half::f16::from_bits(bits).to_f64() * 256.0 * f64::from(scale)
        };
        let values = match &pages.pages {
            Pages::F16(all) => all[page].v[row].iter().map(|x| x.to_f64()).collect(),
            Pages::BF16(all) => all[page].v[row].iter().map(|x| x.to_f64()).collect(),
            Pages::Fp8E4M3(all) => all[page].v[row].iter().map(e4m3).collect(),
            Pages::Int8(all) => all[page].v[row].iter().map(|&x| f64::from(scale) * f64::from(x)).collect(),
        };
        (constant, codes, key_scale, values, scale)
    }

    #[test]
    fn what_is_stored_is_the_oracles_bit_for_bit() {
        for set in InstructionSet::detected() {
            let cpu = Cpu::detect().with_instruction_set(set).unwrap();
            for values in ValueFormat::ALL {
                for head_dim in [64, 33] {
                    let layout = CacheLayout { num_kv_heads: 2, head_dim, page_size: 16, values };
                    let mut pages = CachePages::new(layout).unwrap();
                    let mut tables = BlockTables::new(1, layout.page_size, None);
                    let mut heads = [CachedHead::new(layout), CachedHead::new(layout)];
                    for (i, tokens) in [5, 40, 1, 1, 1, 30].into_iter().enumerate() {
                        let (k, v) = (
                            tensor(2 * i as u64, &layout, tokens),
                            tensor(2 * i as u64 + 1, &layout, tokens),
                        );
                        let copies = tables.reserve(&[0], tokens).unwrap();
                        pages.prepare(tables.pages(), &copies).unwrap();
                        cpu.append_cached(&mut pages, &tables, &[0], k.view(), v.view()).unwrap();
                        tables.advance(&[0], tokens).unwrap();
                        for (head, expected) in heads.iter_mut().enumerate() {
                            let rows = |x: &Tensor| Matrix::of_head(&x.view(), 0, head, 0, tokens);
                            expected.append(&rows(&k), &rows(&v));
                        }
                    }
                    for (head, expected) in heads.iter().enumerate() {
                        for token in 0..expected.len() {
                            let wanted = (
                                expected.constants[token / 16].clone(),
                                expected.key_codes[token].clone(),
                                expected.key_scales[token],
                                expected.values[token].clone(),
                                expected.value_scales[token],
                            );
                            assert_eq!(
                                stored(&pages, &tables, head, token),
                                wanted,
                                "{set} {values} d{head_dim} head {head} token {token}"
                            );
                        }
                    }
                }
            }
        }
    }
}
