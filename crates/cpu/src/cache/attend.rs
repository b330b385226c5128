//! Attention over cached keys and values: they are read where they lie, split between threads, and the parts are
//! merged by their log-sum-exp.

use std::ops::Range;

use rayon::prelude::*;
use sage_core::{
    BlockTables, CacheLayout, Call, Error, Result, Sequence, TensorView, TensorViewMut, View, ViewMut,
};

use super::{CachePages, Page, Pages, checked_table, typed, width};
use crate::forward::Attention;
use crate::kernels::{Ahead, CachedOutputs, CachedScores, Load, QUERY_MAX, RowState, Softmax, Stored};
use crate::plan::SPLIT_KEYS;
use crate::seen::{Seen, SeenHeads, SeenKeys};
use crate::split::Part;
use crate::tile::TILE_KEYS;
use crate::visibility::{BlockRows, Row, mask_hides, union};
use crate::{Cpu, OutputRows, kernels, threads};

/// Query rows of a unit of work. Every row reads the unit's keys from the first-level cache; few rows keep their scores
/// there too.
const UNIT_ROWS: usize = 24;

/// Units of work beyond which keys are not split. A constant, so that results do not depend on the threads.
const UNITS_ENOUGH: usize = 64;

impl Cpu {
    /// Attention of `call`, which [`Call::check_cached`] checked, over what the tables count for each of `sequences`.
    ///
    /// # Errors
    /// When `out` or `lse` do not fit the call, or the call does not fit the cache.
    pub fn forward_cached(
        &self,
        cache: &CachePages,
        tables: &BlockTables,
        sequences: &[usize],
        call: &Call<'_>,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let geometry = call.check_output(out.dtype(), out.geometry())?;
        call.check_lse(lse.as_deref())?;
        let problem = &call.problem;
        let layout = cache.layout;
        let fits = (problem.num_kv_heads, problem.head_dim) == (layout.num_kv_heads, layout.head_dim)
            && call.sequences().len() == sequences.len();
        if !fits {
            return Err(Error::unsupported(
                "a call of another cache",
                "check the call with this cache's layout",
            ));
        }
        let mut pages = Vec::with_capacity(sequences.len());
        for (&sequence, checked) in sequences.iter().zip(call.sequences()) {
            let table = checked_table(tables, sequence, cache.len())?;
            if table.len() * layout.page_size < checked.kv_len {
                let wanted = format!("at most the {} in its pages", table.len() * layout.page_size);
                return Err(Error::value(format!("kv_lens of sequence {sequence}"), checked.kv_len, wanted));
            }
            pages.push(table);
        }
        let output = (out, geometry);
        typed!(&cache.pages, all => {
            let stored = StoredHeads { layout, pages: all, tables: pages };
            threads::run(|| self.attend_cached(&stored, call, output, lse))?
        })
    }

    fn attend_cached<T: Stored>(
        &self,
        stored: &StoredHeads<'_, T>,
        call: &Call<'_>,
        (out, geometry): (TensorViewMut<'_>, sage_core::Geometry),
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        match (call.q, call.k, call.v, out) {
            (TensorView::F32(q), TensorView::F32(k), TensorView::F32(v), TensorViewMut::F32(out)) => {
                self.run_cached(stored, call, [q, k, v], (out, geometry), lse)
            }
            (TensorView::F16(q), TensorView::F16(k), TensorView::F16(v), TensorViewMut::F16(out)) => {
                self.run_cached(stored, call, [q, k, v], (out, geometry), lse)
            }
            (TensorView::BF16(q), TensorView::BF16(k), TensorView::BF16(v), TensorViewMut::BF16(out)) => {
                self.run_cached(stored, call, [q, k, v], (out, geometry), lse)
            }
            // `Call::check` and `check_output` refuse mixed element types.
            _ => Err(Error::unsupported("q and out of different dtypes", "use one dtype for both")),
        }
    }

    fn run_cached<E: Load, T: Stored>(
        &self,
        stored: &StoredHeads<'_, T>,
        call: &Call<'_>,
        [q, k, v]: [View<'_, E>; 3],
        (mut out, geometry): (ViewMut<'_, E>, sage_core::Geometry),
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let mut lse = lse.map(|lse| crate::lse_view(call, lse)).transpose()?;
        if call.q.geometry().is_empty() {
            return Ok(());
        }
        let attention = Attention {
            kernels: kernels(self.instruction_set),
            call,
            seen: SeenHeads::of(call),
            q,
            k,
            v,
            out: OutputRows::new(&mut out, geometry),
            lse: lse.as_mut().map(|(view, geometry)| OutputRows::new(view, *geometry)),
        };
        attention.cached(stored);
        Ok(())
    }
}

/// The pages of each sequence of a call.
struct StoredHeads<'a, T> {
    layout: CacheLayout,
    pages: &'a [Page<T>],
    tables: Vec<&'a [u32]>,
}

/// Some tokens of one head that lie in one page.
struct Run<'a, T> {
    constant: &'a [f32],
    /// From the first token on.
    k: &'a [i8],
    k_scales: &'a [f32],
    v: &'a [T],
    /// A scale for each token, or nothing.
    v_scales: &'a [f32],
    tokens: usize,
    /// Where its scores begin in a tile.
    offset: usize,
}

impl<T: Stored> StoredHeads<'_, T> {
    /// The first of `tokens` as far as they lie in one page.
    fn run(&self, batch: usize, head: usize, tokens: &Range<usize>) -> Run<'_, T> {
        let CacheLayout { head_dim, page_size, .. } = self.layout;
        let page = &self.pages[self.tables[batch][tokens.start / page_size] as usize];
        let slot = tokens.start % page_size;
        let count = (page_size - slot).min(tokens.len());
        let first = head * page_size + slot;
        let width = width(&self.layout);
        Run {
            constant: &page.constants[head * width..][..width],
            k: &page.k[first * head_dim..],
            k_scales: &page.k_scales[first..][..count],
            v: &page.v[first * head_dim..],
            v_scales: if page.v_scales.is_empty() { &[] } else { &page.v_scales[first..][..count] },
            tokens: count,
            offset: 0,
        }
    }
}

/// Calls `each` for the runs of `tokens` that some query sees.
fn for_each_visible(seen: Option<&SeenKeys>, tokens: Range<usize>, mut each: impl FnMut(Range<usize>)) {
    let Some(seen) = seen else { return each(tokens) };
    let mut start = tokens.start;
    for run in seen.range(tokens).chunk_by(|a, b| (*a == Seen::Hidden) == (*b == Seen::Hidden)) {
        let end = start + run.len();
        if run[0] != Seen::Hidden {
            each(start..end);
        }
        start = end;
    }
}

/// Some query rows of one key head.
struct Unit {
    sequence_index: usize,
    sequence: Sequence,
    kv_head: usize,
    rows: Vec<Row>,
}

/// The rows of a unit as the kernels read them.
struct Queries {
    integers: Vec<i16>,
    scales: Vec<f32>,
    wide: Vec<f32>,
}

impl<E: Load> Attention<'_, '_, E> {
    fn cached<T: Stored>(&self, stored: &StoredHeads<'_, T>) {
        let group_size = self.call.problem.group_size();
        let mut units = Vec::new();
        for (sequence_index, sequence) in self.call.sequences().enumerate() {
            for kv_head in 0..self.call.problem.num_kv_heads {
                // Neighbouring queries of all heads of the group: they see nearly the same keys.
                let heads = kv_head * group_size..(kv_head + 1) * group_size;
                let rows: Vec<Row> = (0..sequence.q_len)
                    .flat_map(|i| heads.clone().map(move |head| (head, i)))
                    .map(|(head, i)| Row::new(self.call, &sequence, head, i))
                    .collect();
                units.extend(rows.chunks(UNIT_ROWS).map(|rows| Unit {
                    sequence_index,
                    sequence,
                    kv_head,
                    rows: rows.to_vec(),
                }));
            }
        }
        let split = if units.len() < UNITS_ENOUGH { SPLIT_KEYS } else { usize::MAX };
        let mut parts = Vec::new();
        let mut of_unit = Vec::with_capacity(units.len());
        for (index, unit) in units.iter().enumerate() {
            let visible = union(&unit.rows);
            let first = parts.len();
            let start = visible.start / TILE_KEYS * TILE_KEYS;
            parts.extend(
                (start..visible.end)
                    .step_by(split)
                    .map(|start| (index, start..visible.end.min(start.saturating_add(split)))),
            );
            of_unit.push(first..parts.len());
        }
        let computed: Vec<Part> = parts
            .par_iter()
            .with_max_len(1)
            .map(|(unit, tokens)| self.cached_part(stored, &units[*unit], tokens.clone()))
            .collect();
        units.par_iter().zip(of_unit).for_each(|(unit, parts)| {
            self.merge(&unit.sequence, &unit.rows, &computed[parts]);
        });
    }

    /// Query rows as 16-bit integers with a scale each, and as numbers; both scaled and padded with zeros.
    fn cached_queries(&self, unit: &Unit, width: usize) -> Queries {
        let rows = unit.rows.len();
        let head_dim = self.call.problem.head_dim;
        let mut queries = Queries {
            integers: vec![0; rows * width],
            scales: vec![0.0; rows],
            wide: vec![0.0; rows * width],
        };
        for (r, row) in unit.rows.iter().enumerate() {
            let wide = &mut queries.wide[r * width..][..head_dim];
            E::widen(self.queries(&unit.sequence, row.head).row(row.index), wide);
            wide.iter_mut().for_each(|x| *x *= self.score_scale());
            let max = sage_core::oracle::absmax(wide.iter().copied());
            let scale = max / QUERY_MAX;
            // Where it is coarse, rather too large than integers that are.
            let scale =
                if scale * QUERY_MAX < max && scale < f32::MIN_POSITIVE { scale.next_up() } else { scale };
            queries.scales[r] = scale;
            // A scale that is zero or NaN leaves the integers zero.
            if scale > 0.0 {
                let integers = &mut queries.integers[r * width..][..head_dim];
                integers
                    .iter_mut()
                    .zip(&*wide)
                    .for_each(|(to, x)| *to = (x / scale).round_ties_even() as i16);
            }
        }
        queries
    }

    fn cached_part<T: Stored>(&self, stored: &StoredHeads<'_, T>, unit: &Unit, tokens: Range<usize>) -> Part {
        let head_dim = self.call.problem.head_dim;
        let width = width(&stored.layout);
        let rows = unit.rows.len();
        let queries = self.cached_queries(unit, width);
        let mut part = Part { out: vec![0.0; rows * width], state: RowState::default() };
        part.state.reset(rows);
        let mut scores = vec![0f32; rows * TILE_KEYS];
        let ones = vec![1f32; rows];
        let seen = self.seen.head(unit.sequence_index, unit.kv_head);
        let blocks = BlockRows::new(self.call, unit.sequence_index, &unit.rows);
        for first in tokens.clone().step_by(TILE_KEYS) {
            let tile = first..tokens.end.min(first + TILE_KEYS);
            if blocks.hide(&tile) || mask_hides(self.call, unit.sequence_index, &unit.rows, &tile) {
                continue;
            }
            // Tokens that no query sees are left out: what they hold would show even with probabilities of 0.
            let mut runs = Vec::with_capacity(tile.len().div_ceil(stored.layout.page_size) + 1);
            for_each_visible(seen, tile.clone(), |tokens| {
                let mut next = tokens.start;
                while next < tokens.end {
                    let run = stored.run(unit.sequence_index, unit.kv_head, &(next..tokens.end));
                    let offset = next - tile.start;
                    next += run.tokens;
                    runs.push(Run { offset, ..run });
                }
            });
            for run in &runs {
                self.kernels.cached_scores(CachedScores {
                    q: &queries.integers,
                    q_scales: &queries.scales,
                    q_wide: &queries.wide,
                    rows,
                    width,
                    constant: run.constant,
                    k: run.k,
                    k_scales: run.k_scales,
                    head_dim,
                    offset: run.offset,
                    scores: &mut scores,
                    ahead: Ahead::rows(run.v, head_dim),
                });
            }
            let columns = tile.len().next_multiple_of(self.kernels.packing.width);
            let cut = self.call.block_mask.is_some();
            self.finish_scores(
                unit.sequence_index,
                &unit.rows,
                first..first + columns,
                cut,
                None,
                &mut scores,
            );
            let state = &mut part.state;
            self.kernels.softmax_float(Softmax { rows, columns, scores: &mut scores, pairs: &mut [], state });
            let mut following = tile.end;
            for (at, run) in runs.iter().enumerate() {
                // What was summed up to now is rescaled once a tile.
                let alpha = if at == 0 { &part.state.alpha } else { &ones };
                let ahead = if following < tokens.end {
                    let run = stored.run(unit.sequence_index, unit.kv_head, &(following..tokens.end));
                    following += run.tokens;
                    Ahead::rows(run.k, head_dim)
                } else {
                    Ahead::NONE
                };
                T::outputs(
                    self.kernels,
                    CachedOutputs {
                        p: &scores,
                        rows,
                        offset: run.offset,
                        v: run.v,
                        v_scales: run.v_scales,
                        keys: run.tokens,
                        head_dim,
                        width,
                        out: &mut part.out,
                        alpha,
                        beta: &part.state.beta,
                        ahead,
                    },
                );
            }
        }
        part
    }
}
