//! P·V of a consumer: the product of a tile is in flight while the softmax of the next is computed.

use sage_core::Accumulator as Precision;
use sage_ptx::{Code, OperandVars, PanelMatrix, RoundedElement, Rows, Tile, Val, Var, WarpgroupA};

use crate::attention::config::AttentionConfig;
use crate::attention::output::Output;
use crate::operand::Element;

/// Sums of the warpgroup's rows over the keys so far.
pub(super) struct OutputInFlight<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    /// Sums of P·V over all tiles, and beside them those of P where they are products.
    sums: Tile<Var<'k, f32>>,
    /// A tile's own sums, where they are not added to all tiles' at once: those of the last columns of `sums`.
    parts: Tile<Var<'k, f32>>,
}

impl<'k, 'c> OutputInFlight<'k, 'c> {
    pub fn new(code: &'k Code, config: &'c AttentionConfig) -> Self {
        let rows = config.tiling.rows_per_warp();
        let sums = Tile::filled(code, rows, Output::columns(config), 0.0);
        OutputInFlight { code, config, sums, parts: Tile::new(code, rows, 0) }
    }

    /// Puts P's own sums beside those of P·V, where they are products.
    pub fn beside(self, sums_of_p: Option<&Tile<Var<'k, f32>>>) -> Self {
        let outputs = self.sums.columns();
        let sums = match sums_of_p {
            Some(of_p) => self.sums.beside(of_p),
            None => self.sums,
        };
        // E4M3 products lose the low bits of sums as large as P's over many keys.
        let operands = &self.config.operands;
        let parts = match (operands.v.element, operands.sums) {
            (Element::E4M3, Precision::F32ThenF32) => sums.columns(),
            (Element::E4M3, _) => sums.columns() - outputs,
            _ => 0,
        };
        let parts = Tile::new(self.code, sums.rows(), parts);
        OutputInFlight { sums, parts, ..self }
    }

    /// Multiplies each row's sums, which are not in flight.
    pub fn mul_rows(&self, alphas: &Rows<Val<'k, f32>>) {
        self.code.note("output: rescale");
        self.sums.mul_rows(alphas);
    }

    /// Sets a tile's own sums to zero.
    pub fn clear_parts(&self) {
        self.parts.fill(0.0);
    }

    /// The sums that have no part of a tile's own, and those that have.
    fn at_once_and_by_parts(&self) -> [Tile<Var<'k, f32>>; 2] {
        let (all, parts) = (self.sums.columns(), self.parts.columns());
        [0..all - parts, all - parts..all].map(|columns| self.sums.slice(columns))
    }

    /// What P·V of a tile is added to.
    fn sums_of_tile(&self) -> Tile<Var<'k, f32>> {
        let [at_once, _] = self.at_once_and_by_parts();
        at_once.beside(&self.parts)
    }

    /// Starts the product of P with a tile of values.
    pub fn start_product<E: RoundedElement>(&self, p: &OperandVars<'k, E>, values: &PanelMatrix<'k>) {
        let p = p.fragments();
        let sums = self.sums_of_tile();
        // Where all sums are a tile's own, its first product takes the place of what they held.
        let add = self.parts.columns() < sums.columns();
        if add {
            self.clear_parts();
        }
        let a = |step: usize| WarpgroupA::Registers(p[step]);
        match self.config.operands.v.element {
            Element::E4M3 => {
                let b = |step: usize| values.depth_in_columns(0, 32 * step);
                sums.start_product(self.code, p.len(), a, b, false, add);
            }
            _ => {
                let b = |step: usize| values.depth_in_rows(16 * step);
                sums.start_product(self.code, p.len(), a, b, true, add);
            }
        }
    }

    /// Waits for the product in flight, whose own sums go into those of all tiles.
    pub fn drain(&self) {
        self.sums_of_tile().wait_products(self.code, 0);
        let [_, by_parts] = self.at_once_and_by_parts();
        // The order of these additions means nothing; it is the one that the kernels were measured with.
        let pairs = by_parts.registers().iter().zip(self.parts.registers());
        pairs.rev().for_each(|(sum, part)| sum.set(sum.get() + part.get()));
    }

    /// The sums of all tiles, of which none is in flight.
    pub fn finish(&self) -> Output<'k, 'c> {
        Output::of_sums(self.code, self.config, self.sums.slice(0..Output::columns(self.config)))
    }
}
