//! Products of 4-bit floats whose blocks have scales: operands are E2M1 with a scale for every so many elements of
//! the depth, by which tensor cores multiply as they go.

use crate::code::Code;
use crate::fragment::{Accumulator, E2M1, FragmentA, FragmentB};
use crate::isa::{BlockScales, Convert, Lane, Matrix, MmaBlockScaled};
use crate::program::Operand;
use crate::scalar::F16x2;
use crate::tile::Tile;
use crate::value::Val;
use crate::var::Var;

/// Elements of the depth of a product: what a word of scales is for.
pub const SCALED_DEPTH: usize = 64;

/// A warp's 16 rows of A, [`SCALED_DEPTH`] deep.
#[derive(Clone, Copy, Debug)]
pub struct ScaledA<'k> {
    /// The elements.
    pub fragment: FragmentA<'k, E2M1>,
    /// In lanes 0 and 1 of a quad, the scales of the lane's rows in slots 0 and 1, a byte for each block from the
    /// lowest on. What other lanes have is of no account.
    pub scales: Val<'k, u32>,
}

/// A warp's 8 columns of B, [`SCALED_DEPTH`] deep.
#[derive(Clone, Copy, Debug)]
pub struct ScaledB<'k> {
    /// The elements.
    pub fragment: FragmentB<'k, E2M1>,
    /// In lane `scales_lane` of a quad, the scales of its column, as those of A. What other lanes have is of no account
    /// to this product: it may be scales of others.
    pub scales: Val<'k, u32>,
    /// The lane of a quad that has the scales, 0 to 3.
    pub scales_lane: u8,
}

impl<'k> Tile<Var<'k, f32>> {
    /// `self = a · b` by a warp. The product is `steps` times [`SCALED_DEPTH`] deep; `a` gives a step's operand for each
    /// 16 rows, `b` a step's of the 16 columns from a column on, eight each.
    #[track_caller]
    pub fn set_scaled_product(
        &self,
        scales: BlockScales,
        steps: usize,
        a: impl Fn(usize) -> Vec<ScaledA<'k>>,
        b: impl Fn(usize, usize) -> [ScaledB<'k>; 2],
    ) {
        self.multiply(steps, a, b, |step, sum, a, b| {
            if step == 0 {
                let zero = a.scales.code().constant(0.0f32).in_register_operand();
                multiply(&sum, scales, a, b, &[zero; 4]);
            } else {
                add(&sum, scales, a, b);
            }
        });
    }

    /// `self += a · b` by a warp, as [`Tile::set_scaled_product`].
    #[track_caller]
    pub fn add_scaled_product(
        &self,
        scales: BlockScales,
        steps: usize,
        a: impl Fn(usize) -> Vec<ScaledA<'k>>,
        b: impl Fn(usize, usize) -> [ScaledB<'k>; 2],
    ) {
        self.multiply(steps, a, b, |_, sum, a, b| add(&sum, scales, a, b));
    }
}

#[track_caller]
fn add<'k>(sum: &Accumulator<'k, f32>, scales: BlockScales, a: ScaledA<'k>, b: ScaledB<'k>) {
    let addend: Vec<Operand> = sum.registers().iter().map(|var| Operand::Reg(var.register())).collect();
    multiply(sum, scales, a, b, &addend);
}

#[track_caller]
fn multiply<'k>(
    sum: &Accumulator<'k, f32>,
    scales: BlockScales,
    a: ScaledA<'k>,
    b: ScaledB<'k>,
    addend: &[Operand],
) {
    let words = a.fragment.words().into_iter().chain(b.fragment.words());
    let mut src: Vec<Operand> = words.map(|word| word.in_register_operand()).collect();
    src.extend(addend);
    src.extend([a.scales, b.scales].map(|word| word.in_register_operand()));
    let dst: Vec<_> = sum.registers().iter().map(|var| var.register()).collect();
    let mma = MmaBlockScaled { scales, b_lane: b.scales_lane };
    a.scales.code().emit(Matrix::MmaBlockScaled(mma), &dst, &src);
}

impl<'k> Val<'k, f32> {
    /// Eight singles as E2M1 in a register, the first in the lowest nibble: nearest even, saturating, NaN as 6.
    #[track_caller]
    pub fn pack_e2m1(singles: [Self; 8]) -> Val<'k, u32> {
        let src = singles.map(|x| x.in_register_operand());
        singles[0].code().lane(Lane::Convert(Convert::F32ToE2M1x8), &src)
    }
}

impl<'k> Val<'k, u32> {
    /// The values of the E4M3 codes in the lowest two bytes; exact.
    #[track_caller]
    pub fn e4m3_pair_to_f32(self) -> [Val<'k, f32>; 2] {
        let code: &Code = self.code();
        let pair: Val<'k, half::f16> = code.lane(Lane::Low16, &[self.operand()]);
        let halves: Val<'k, F16x2> = code.lane(Lane::Convert(Convert::E4M3x2ToF16x2), &[pair.operand()]);
        halves.word().split::<half::f16>().map(|half| half.to_f32())
    }
}
