//! The kernel: attention over means of blocks, merged with what attention over the other blocks has written.

use std::f32::consts::LOG2_E;

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{
    Code, Half, MmaElement, OperandTile, Program, RoundedElement, Rows, Stored, Target, Tile, Val, Var,
    kernel, lane_column,
};

use super::rows::TailRows;
use super::tiles::{TILE, Tiles};
use crate::attention::{capped, dims_description, dims_suffix, padded_dim};
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::Lengths;

/// Rows of a warp.
pub(super) const WARP_ROWS: usize = 16;

/// Warps of a block: few, so that a multiprocessor has several blocks, which do not wait for each other's tiles.
const WARPS: usize = 4;

/// Adds the pooled terms of the blocks that a block mask leaves out to an output and its log-sum-exp, in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PooledTailConfig {
    /// Element type of all tensors: f16 or bf16.
    pub dtype: DType,
    /// Channels of a head of Q and K.
    pub head_dim: usize,
    /// Channels of a head of V and of the output.
    pub value_dim: usize,
    /// Whether all rows start at multiples of 16 bytes and are whole such chunks.
    pub aligned: bool,
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether K was smoothed before it was pooled: its means are small then, and lose less in 16 bits.
    pub smooth_k: bool,
    /// Whether there is a band, which may show a row a part of a block.
    pub band: bool,
    /// Whether the log-sum-exp is wanted as well.
    pub lse: bool,
    /// Where the lengths of sequences come from: not packed.
    pub lengths: Lengths,
}

kernel_params! {
    /// What a launch of [`PooledTailConfig`] passes. Strides are in elements.
    PooledTailParams, PooledTailArgs {
        /// Queries.
        q: (tensor 3),
        /// Keys and values as given: read where there is a band.
        k: (tensor 3),
        /// Values.
        v: (tensor 3),
        /// The output over the blocks that are kept, and then over all.
        out: (tensor 3),
        /// Its log-sum-exp, `[sequences][heads][q_rows]`, likewise.
        lse: [f32],
        /// Means of the blocks of K, in 16 bits, `[sequences][heads / group][k_blocks][padded_dim]`.
        k_means: [u16],
        /// What smoothing subtracted from K, `[sequences][heads / group][padded_dim]`.
        k_mean: [f32],
        /// Means of the blocks of V, likewise, with V's own padded_dim.
        v_means: [u16],
        /// Bytes of the block mask, `[batch, heads, blocks of queries, blocks of keys]`.
        blocks: (tensor 4),
        /// Queries of a block.
        block_q: i32,
        /// Keys of a block.
        block_k: i32,
        /// Blocks of keys.
        k_blocks: i32,
        /// Which rows are a sequence's, and which keys they see.
        lengths: lengths,
        /// Query heads of a sequence.
        heads: i32,
        /// Query heads of all sequences.
        all_heads: i32,
        /// Query heads that share a key head.
        group: i32,
        /// Factor on Q·Kᵀ.
        sm_scale: f32,
        /// Soft cap of the scaled scores, where there is one.
        softcap: f32,
    }
}

/// The running softmax of a warp's rows, and their sums of P·V.
pub(super) struct State<'k> {
    /// What exponentials are relative to, in base 2. Finite, so that differences with it are numbers also before the
    /// first pooled term.
    pub reference: Rows<Var<'k, f32>>,
    /// Sums of exponentials of the lane's columns.
    pub sums: Rows<Var<'k, f32>>,
    pub output: Tile<Var<'k, f32>>,
}

impl<'k> State<'k> {
    fn new(code: &'k Code, columns: usize) -> Self {
        let rows = |first: f32, name: &str| Rows::from_fn(2, |_| code.var(first).named(name));
        State {
            reference: rows(f32::MIN, "row_reference"),
            sums: rows(0.0, "row_sum"),
            output: Tile::filled(code, WARP_ROWS, columns, 0.0),
        }
    }

    /// Raises each row's reference to the largest of its scores in base 2, where it is larger, and rescales the sums.
    pub fn raise(&self, maxima: &Rows<Val<'k, f32>>) {
        let alphas = Rows::from_fn(2, |slot| {
            let old = self.reference[slot].get();
            let new = old.max(maxima[slot]).named("row_reference");
            self.reference[slot].set(new);
            let alpha = (old - new).exp2().named("alpha");
            self.sums[slot].set(self.sums[slot].get() * alpha);
            alpha
        });
        self.output.mul_rows(&alphas);
    }
}

impl PooledTailConfig {
    /// Query rows of a block.
    pub const fn block_q(&self) -> usize {
        WARP_ROWS * WARPS
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, q_len: usize, all_heads: usize) -> [u32; 3] {
        grid(q_len.div_ceil(self.block_q()), all_heads)
    }

    pub(super) const fn threads(&self) -> u32 {
        32 * WARPS as u32
    }

    pub(super) fn padded_dim(&self) -> usize {
        padded_dim(self.head_dim)
    }

    pub(super) fn padded_value_dim(&self) -> usize {
        padded_dim(self.value_dim)
    }

    /// Steps of 16 channels, in which operands are read.
    pub(super) fn steps(&self) -> usize {
        self.head_dim.div_ceil(16)
    }

    fn write<H: Half + MmaElement + RoundedElement + Stored<Value = H>>(&self, code: &Code) {
        let p = PooledTailParams::declare(code);
        let rows = TailRows::of_warp(self, code, &p);
        let words = rows.words::<H>(self, &p);
        let queries = OperandTile::of_rows(&words, |_, word| *word);
        // What smoothing took from each row's products.
        let taken = if self.smooth_k {
            rows.products::<H>(self, &words, &p)
        } else {
            words.map(|_| code.constant(0.0))
        };
        let tiles = Tiles::new(self, code);
        let state = State::new(code, self.value_dim.next_multiple_of(16));

        let means = tiles.means(&p, &rows);
        let number = p.k_blocks.div_ceil(TILE);
        means.copy(code.constant(0), code.constant(0));
        code.range(0, number, |tile| {
            // Flags of the map are on their way while the tile still is.
            let scores = Tile::new(code, WARP_ROWS, TILE);
            let first = tile * TILE as i32 + lane_column(rows.lane);
            let biases = Rows::from_fn(2, |slot| {
                let columns = scores.row(slot).map(|(column, _)| column);
                columns.map(|column| (column, rows.bias(slot, first + column as i32, &p))).collect::<Vec<_>>()
            });
            // The tile has landed, and all warps have done with the one before it.
            code.wait_copies(0);
            code.barrier();
            let stage = tile & 1;
            code.when((tile + 1).lt(number), || means.copy(tile + 1, stage ^ 1));
            let (keys, values) = tiles.stage(stage);

            code.note("scores of means of blocks");
            scores.set_product(
                0.0,
                self.steps(),
                |step| queries.fragments::<H>(step),
                |step, column| keys.b_pair::<H>(column, 32 * step),
            );
            scores.update(|slot, column, product| {
                let bias = biases[slot].iter().find(|(of, _)| *of == column).expect("a column of the lane").1;
                let product = if self.smooth_k { product + taken[slot] } else { product };
                self.score(product, &p) + bias
            });
            state.raise(&Rows::from_fn(2, |slot| scores.row_max(slot).reduce_quad(Val::max)));
            let p = scores.map_at(|slot, _, score| (score.get() - state.reference[slot].get()).exp2());
            for slot in 0..2 {
                state.sums[slot].set(state.sums[slot].get() + p.row_sum(slot));
            }
            state.output.add_product(
                TILE / H::DEPTH,
                |step| p.operand::<H>(step),
                |step, channel| values.b_pair::<H>(channel, 32 * step),
            );
        });
        if self.band {
            self.add_cut_blocks::<H>(code, &p, &rows, &tiles, &queries, &state);
        }
        self.merge::<H>(code, &p, &rows, &state);
    }

    /// The score of a product, scaled and capped, in base 2.
    pub(super) fn score<'k>(&self, product: Val<'k, f32>, p: &PooledTailParams<'k>) -> Val<'k, f32> {
        let score = product * (p.sm_scale * LOG2_E);
        if self.softcap { capped(score, [p.softcap * LOG2_E, 2.0 / p.softcap]) } else { score }
    }
}

impl Kernel for PooledTailConfig {
    fn name(&self) -> String {
        let parts = [
            (self.smooth_k, "_sk"),
            (self.band, "_band"),
            (self.softcap, "_softcap"),
            (self.lse, "_lse"),
            (!self.aligned, "_unaligned"),
        ];
        let parts: String = parts.iter().filter(|(there, _)| *there).map(|(_, name)| *name).collect();
        let dims = dims_suffix(self.head_dim, self.value_dim);
        format!("pooled_tail_{}_{dims}{parts}{}", self.dtype, self.lengths.suffix())
    }

    fn description(&self) -> String {
        let parts = [
            (self.smooth_k, ", smoothed K"),
            (self.band, ", band"),
            (self.softcap, ", soft cap"),
            (self.lse, ", with LSE"),
            (!self.aligned, ", unaligned"),
        ];
        let parts: String = parts.iter().filter(|(there, _)| *there).map(|(_, name)| *name).collect();
        format!(
            "adds the means of the blocks left out; {}, {}{parts}{}",
            self.dtype,
            dims_description(self.head_dim, self.value_dim),
            self.lengths.description()
        )
    }

    fn oldest_target(&self) -> Target {
        Target::SM_80
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.head_dim.max(self.value_dim))
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| match self.dtype {
            DType::BF16 => self.write::<bf16>(code),
            _ => self.write::<f16>(code),
        })
    }
}
