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

        let max = k.var(f32::NEG_INFINITY).named("max");
        k.range(0, p.splits, |split| {
            let [reference, divisor, ..] = part(split);
            max.set(divisor.eq(0.0).select(max.get(), max.get().max(reference)));
        });
        // A row without a visible key has no part that sums to anything.
        let empty = max.get().eq(f32::NEG_INFINITY);

        let lanes = self.head_dim.div_ceil(32);
        let sums: Vec<_> = (0..lanes).map(|_| k.var(0.0)).collect();
        let (weights, unrounded) = (k.var(0.0).named("weights"), k.var(0.0).named("unrounded"));
        let taken = k.var(0.0).named("taken");
        let channel = |i: usize| k.lane_index() + 32 * i as i32;
        k.range(0, p.splits, |split| {
            let [reference, divisor, sum, of_part] = part(split);
            let rise = divisor.eq(0.0).select(0.0, (reference - max.get()).exp2());
            let w = (divisor * rise).named("weight");
            weights.set(weights.get() + w);
            if self.lse {
                unrounded.set(sum.mul_add(rise, unrounded.get()));
                taken.set(of_part);
            }
            let line = split.mul_wide(p.total_rows) + row.widen();
            let line = p.partial.at(line * self.head_dim as i64);
            for (i, sum) in sums.iter().enumerate() {
                k.when(channel(i).lt(self.head_dim as i32), || {
                    sum.set(line.at(channel(i)).load().mul_add(w, sum.get()));
                });
            }
        });

        let inverse = empty.select(0.0, weights.get().recip());
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
                let lse = (unrounded.get().log2() + max.get()).mul_add(std::f32::consts::LN_2, taken.get());
                let lse = least_lse(max.get(), lse);
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
