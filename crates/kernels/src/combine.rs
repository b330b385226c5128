//! Merges the outputs of parts of the keys (flash decoding): `O = Σ wₛ Oₛ / Σ wₛ` with `wₛ = ℓₛ · 2^(mₛ − max m)`,
//! where a part's exponentials are relative to `2^mₛ` and sum to `ℓₛ`.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Half, Program, Stored, Val, kernel};

use crate::kernel::Kernel;
use crate::least_bias::least_lse;
use crate::params::kernel_params;

/// Floats that a part of the keys hands over for each row, beside its output.
pub const PART: usize = 4;

/// Rows of a block: one for each warp.
const ROWS: u32 = 4;

/// Lanes of a warp.
const LANES: i32 = 32;

/// Parts whose lines are on their way from memory at once.
const TOGETHER: i32 = 8;

/// Merges the parts of split keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CombineConfig {
    /// Element type of the output: f16 or bf16.
    pub dtype: DType,
    /// Channels of a head.
    pub head_dim: usize,
    /// Whether the log-sum-exp is written.
    pub lse: bool,
}

kernel_params! {
    /// What a launch of [`CombineConfig`] passes. Strides are in elements.
    CombineParams, CombineArgs {
        /// Outputs of the parts, `[splits, rows, head_dim]`.
        partial: [f32],
        /// For each part and row, `[splits, rows, `[`PART`]`]`: the base-2 score that exponentials are relative to;
        /// their sum as they were multiplied with V, 0 where the row sees no key of the part; where the log-sum-exp is
        /// wanted their sum before they were rounded, and what smoothing K took from the row's scores in natural units.
        partial_sums: [f32],
        /// Output.
        out: (tensor 3),
        /// Log-sum-exp, `[rows]`.
        lse: [f32],
        /// Rows of all heads and batch entries.
        total_rows: i32,
        /// Rows of a head.
        q_rows: i32,
        /// Query heads.
        q_heads: i32,
        /// Parts of the keys.
        splits: i32,
    }
}

impl CombineConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, total_rows: usize) -> [u32; 3] {
        [total_rows.div_ceil(ROWS as usize) as u32, 1, 1]
    }

    fn write<'k, H: Half + Stored<Value = H>>(&self, k: &'k Code) {
        let p = CombineParams::declare(k);
        let row = k.block_index()[0] * ROWS as i32 + k.warp_index();
        k.exit_when(row.ge(p.total_rows));
        let part = |split: Val<'k, i32>| {
            let at = split.mul_wide(p.total_rows) + row.widen();
            p.partial_sums.at(at * PART as i64).load_vector::<PART>()
        };

        // Parts are many and rows few where keys are split, so that what counts is how long one row takes: each lane
        // looks at parts of its own, and lines are added with several on their way.
        let lane = k.lane_index();
        let max = k.var(f32::NEG_INFINITY).named("max");
        k.range_by(lane, p.splits, LANES, |split| {
            let [reference, divisor, ..] = part(split);
            max.set(divisor.eq(0.0).select(max.get(), max.get().max(reference)));
        });
        let max = max.get().reduce_lanes(LANES - 1, |a, b| a.max(b));
        // A row without a visible key has no part that sums to anything.
        let empty = max.eq(f32::NEG_INFINITY);

        let channels = self.head_dim.div_ceil(LANES as usize);
        let sums: Vec<_> = (0..channels).map(|_| k.var(0.0)).collect();
        let (weights, unrounded) = (k.var(0.0).named("weights"), k.var(0.0).named("unrounded"));
        let taken = k.var(0.0).named("taken");
        let channel = |i: usize| lane + LANES * i as i32;
        k.range_by(0, p.splits, LANES, |first| {
            let weight = k.var(0.0).named("weight");
            k.when((first + lane).lt(p.splits), || {
                let [reference, divisor, sum, of_part] = part(first + lane);
                let rise = divisor.eq(0.0).select(0.0, (reference - max).exp2());
                weight.set(divisor * rise);
                if self.lse {
                    unrounded.set(sum.mul_add(rise, unrounded.get()));
                    taken.set(of_part);
                }
            });
            let weight = weight.get();
            weights.set(weights.get() + weight);
            k.range_by(0, (p.splits - first).min(LANES), TOGETHER, |next| {
                // Parts beyond the last have weight 0, and the last one's line stands in for theirs.
                let lines: Vec<_> = (0..TOGETHER)
                    .map(|i| (first + next + i).min(p.splits - 1))
                    .map(|split| split.mul_wide(p.total_rows) + row.widen())
                    .map(|line| p.partial.at(line * self.head_dim as i64))
                    .collect();
                let of_lines: Vec<_> = (0..TOGETHER).map(|i| weight.shuffle(next + i)).collect();
                for (i, sum) in sums.iter().enumerate() {
                    k.when(channel(i).lt(self.head_dim as i32), || {
                        let loaded: Vec<_> = lines.iter().map(|line| line.at(channel(i)).load()).collect();
                        for (value, &weight) in loaded.into_iter().zip(&of_lines) {
                            sum.set(value.mul_add(weight, sum.get()));
                        }
                    });
                }
            });
        });
        let [weights, unrounded] =
            [weights, unrounded].map(|sum| sum.get().reduce_lanes(LANES - 1, |a, b| a + b));
        // All parts have taken the same from a row.
        let taken = taken.get().shuffle((p.splits - 1) & (LANES - 1));

        let inverse = empty.select(0.0, weights.recip());
        let (head, row_of_head) = (row / p.q_rows, row % p.q_rows);
        let line = (head / p.q_heads).widen() * p.out.batch_stride()
            + (head % p.q_heads).widen() * p.out.head_stride()
            + row_of_head.widen() * p.out.row_stride();
        for (i, sum) in sums.iter().enumerate() {
            k.when(channel(i).lt(self.head_dim as i32), || {
                let target = p.out.start.cast::<H>().at(line).at(channel(i));
                target.store((sum.get() * inverse).narrow::<H>());
            });
        }
        if self.lse {
            k.when(k.lane_index().eq(0), || {
                let lse = (unrounded.log2() + max).mul_add(std::f32::consts::LN_2, taken);
                let lse = least_lse(max, lse);
                p.lse.at(row).store(empty.select(f32::NEG_INFINITY, lse));
            });
        }
    }
}

impl Kernel for CombineConfig {
    fn name(&self) -> String {
        format!("combine_{}_d{}{}", self.dtype, self.head_dim, if self.lse { "_lse" } else { "" })
    }

    fn description(&self) -> String {
        let lse = if self.lse { ", with LSE" } else { "" };
        format!("merges parts of split keys; {}, head_dim {}{lse}", self.dtype, self.head_dim)
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), 32 * ROWS, |k| match self.dtype {
            DType::BF16 => self.write::<bf16>(k),
            _ => self.write::<f16>(k),
        })
    }
}
