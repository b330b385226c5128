//! Tensor-core instructions, and which lane holds which element of their operands.

use super::row::{Group, instructions};
use super::types::{MmaTy, Width};
use crate::target::{Needs, Target};

/// `mma.sync.m16n8k*`: `D[16×8] = A[16×k] · B[k×8] + C[16×8]`, with 256 bits of A's row in k.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mma {
    /// Elements of A.
    pub a: MmaTy,
    /// Elements of B.
    pub b: MmaTy,
    /// Elements of C and D: f32, f16 or s32.
    pub acc: MmaTy,
}

impl Mma {
    /// Whether there is such a product.
    const fn exists(self) -> bool {
        use MmaTy::{BF16, E4M3, E5M2, F16, F32, S4, S8, S32, U8};
        matches!(
            (self.a, self.b, self.acc),
            (S8 | U8, S8 | U8, S32)
                | (S4, S4, S32)
                | (F16, F16, F16 | F32)
                | (BF16, BF16, F32)
                | (E4M3 | E5M2, E4M3 | E5M2, F16 | F32)
        )
    }

    const fn needs(self) -> Needs {
        match (self.a, self.acc) {
            (MmaTy::E4M3 | MmaTy::E5M2, MmaTy::F16) => Needs::since(Target::SM_89, 8, 7),
            (MmaTy::E4M3 | MmaTy::E5M2, _) => Needs::since(Target::SM_89, 8, 4),
            _ => Needs::since(Target::SM_80, 7, 0),
        }
    }

    fn opcode(self) -> String {
        let (a, b, acc) = (self.a.ptx(), self.b.ptx(), self.acc.ptx());
        format!("mma.sync.aligned.m16n8k{}.row.col{acc}{a}{b}{acc}", self.k())
    }

    /// Depth of the product: 16, 32 or 64 elements of 16, 8 or 4 bits.
    pub const fn k(self) -> usize {
        256 / self.a.bits()
    }

    /// Elements of A or B in a register.
    const fn per_register(self) -> usize {
        32 / self.a.bits()
    }

    /// Registers of C and of D.
    pub const fn acc_registers(self) -> usize {
        if matches!(self.acc, MmaTy::F16) { 2 } else { 4 }
    }

    /// Row and depth of element `i` of register `r` (0–3) of A in `lane`.
    pub const fn a_element(self, lane: usize, r: usize, i: usize) -> (usize, usize) {
        let per = self.per_register();
        (lane / 4 + 8 * (r % 2), per * (lane % 4) + i + 4 * per * (r / 2))
    }

    /// Depth and column of element `i` of register `r` (0–1) of B in `lane`.
    pub const fn b_element(self, lane: usize, r: usize, i: usize) -> (usize, usize) {
        let per = self.per_register();
        (per * (lane % 4) + i + 4 * per * r, lane / 4)
    }

    /// Row and column of element `i` (0–3) of C and D in `lane`; with f16, two elements share a register.
    pub const fn acc_element(lane: usize, i: usize) -> (usize, usize) {
        (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2)
    }
}

/// The `mma.sync` of Turing: half as deep as [`Mma`], with 128 bits of A's row in k, and of integers half as high,
/// `m8n8k*` instead of `m16n8k*`.
///
/// Its operands are the first registers of an [`Mma`]'s: each element is where [`Mma::a_element`], [`Mma::b_element`]
/// and [`Mma::acc_element`] say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HalfMma {
    /// Elements of A.
    pub a: MmaTy,
    /// Elements of B.
    pub b: MmaTy,
    /// Elements of C and D: f32, f16 or s32.
    pub acc: MmaTy,
}

impl HalfMma {
    /// Whether there is such a product.
    const fn exists(self) -> bool {
        use MmaTy::{F16, F32, S4, S8, S32, U8};
        matches!((self.a, self.b, self.acc), (S8 | U8, S8 | U8, S32) | (S4, S4, S32) | (F16, F16, F16 | F32))
    }

    fn opcode(self) -> String {
        let (a, b, acc) = (self.a.ptx(), self.b.ptx(), self.acc.ptx());
        format!("mma.sync.aligned.m{}n8k{}.row.col{acc}{a}{b}{acc}", self.rows(), self.k())
    }

    /// The product whose first registers its operands are.
    pub const fn whole(self) -> Mma {
        Mma { a: self.a, b: self.b, acc: self.acc }
    }

    /// Rows of A and D: 16, or 8 of integers.
    pub const fn rows(self) -> usize {
        if self.a.is_integer() { 8 } else { 16 }
    }

    /// Depth of the product: 8, 16 or 32 elements of 16, 8 or 4 bits.
    pub const fn k(self) -> usize {
        128 / self.a.bits()
    }

    /// Registers of A.
    pub const fn a_registers(self) -> usize {
        self.rows() / 8
    }

    /// Registers of C and of D.
    pub const fn acc_registers(self) -> usize {
        self.whole().acc_registers() * self.rows() / 16
    }
}

/// `mma.sync.m16n8k64` of E2M1 with a scale for every block of elements of k, f32 sums.
///
/// The scales of row `r` of A, bytes in the order of k from the lowest on, come from lane `4(r mod 8) + r / 8` (lanes 0
/// and 1 of a quad); those of column `c` of B from lane `4c + b_lane`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmaBlockScaled {
    /// What the scales are.
    pub scales: BlockScales,
    /// Which lane of a column's quad holds its scales, 0 to 3: a register serves four instructions.
    pub b_lane: u8,
}

/// Scales of a block-scaled product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockScales {
    /// E4M3 without sign for every 16 elements (NVFP4).
    Ue4m3,
    /// A power of two for every 32 elements, its exponent plus 127 (MXFP4); 255 is NaN.
    Ue8m0,
}

impl BlockScales {
    /// Elements of k that share a scale.
    pub const fn block(self) -> usize {
        match self {
            BlockScales::Ue4m3 => 16,
            BlockScales::Ue8m0 => 32,
        }
    }

    const fn opcode(self) -> &'static str {
        match self {
            BlockScales::Ue4m3 => "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
            BlockScales::Ue8m0 => "kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        }
    }
}

impl MmaBlockScaled {
    /// The product without its scales.
    pub const PRODUCT: Mma = Mma { a: MmaTy::E2M1, b: MmaTy::E2M1, acc: MmaTy::F32 };

    /// The lane whose scale register serves row `row` of A.
    pub const fn a_scale_lane(row: usize) -> usize {
        4 * (row % 8) + row / 8
    }

    /// The lane whose scale register serves column `column` of B.
    pub const fn b_scale_lane(self, column: usize) -> usize {
        4 * column + self.b_lane as usize
    }

    fn template(self) -> String {
        let (opcode, lane) = (self.scales.opcode(), self.b_lane);
        format!(
            "mma.sync.aligned.m16n8k64.row.col.{opcode} {{$d}}, {{$0}}, {{$1}}, {{$2}}, $3, {{0, 0}}, $4, {{0, {lane}}}"
        )
    }
}

/// `wgmma.mma_async.m64nNk*`: the 128 threads of a warpgroup compute `D[64×n] = A[64×k] · B[k×n] (+ D)`.
///
/// Warp `w` of the group holds rows `16w..16w + 16` of A and D as `mma.sync` does; register `4j + i` of D is element
/// `i` of columns `8j..8j + 8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wgmma {
    /// Columns of B and D, a multiple of 8 up to 256.
    pub n: u16,
    /// Elements of A.
    pub a: MmaTy,
    /// Elements of B.
    pub b: MmaTy,
    /// Elements of D: f32 or s32.
    pub acc: MmaTy,
    /// Whether A is in registers (four), or in shared memory behind a descriptor.
    pub a_in_registers: bool,
    /// Whether B lies with its columns contiguous (16-bit elements only), instead of its depth.
    pub b_transposed: bool,
}

impl Wgmma {
    /// Whether there is such a product.
    fn exists(self) -> bool {
        let columns = self.n != 0 && self.n.is_multiple_of(8) && self.n <= 256;
        // Sizes that the integer form has: 8, 16, 24, 32, and then multiples of 16.
        let columns = columns && (!self.a.is_integer() || self.n <= 32 || self.n.is_multiple_of(16));
        let types = match self.acc {
            MmaTy::S32 => matches!((self.a, self.b), (MmaTy::S8 | MmaTy::U8, MmaTy::S8 | MmaTy::U8)),
            MmaTy::F32 => match self.a {
                MmaTy::F16 | MmaTy::BF16 => self.b == self.a,
                MmaTy::E4M3 | MmaTy::E5M2 => matches!(self.b, MmaTy::E4M3 | MmaTy::E5M2),
                _ => false,
            },
            _ => false,
        };
        columns && types && (!self.b_transposed || self.a.bits() == 16)
    }

    fn opcode(self) -> String {
        let (a, b, acc) = (self.a.ptx(), self.b.ptx(), self.acc.ptx());
        format!("wgmma.mma_async.sync.aligned.m64n{}k{}{acc}{a}{b}", self.n, self.k())
    }

    fn operand_a(self) -> Group {
        if self.a_in_registers { registers(4) } else { DESCRIPTOR }
    }

    fn template(self) -> String {
        let mut modes = String::new();
        // Floats can be negated, and those of 16 bits be transposed in shared memory.
        if !self.a.is_integer() {
            modes += ", 1, 1";
        }
        if self.a.bits() == 16 {
            if !self.a_in_registers {
                modes += ", 0";
            }
            modes += if self.b_transposed { ", 1" } else { ", 0" };
        }
        let a = if self.a_in_registers { "{$0}" } else { "$0" };
        format!("{} {{$d}}, {a}, $1, $2{modes}", self.opcode())
    }

    /// Depth of the product: 16 or 32 elements of 16 or 8 bits.
    pub const fn k(self) -> usize {
        256 / self.a.bits()
    }

    /// Registers of D.
    pub const fn acc_registers(self) -> usize {
        self.n as usize / 2
    }
}

instructions! {
    /// Matrix instructions.
    Matrix {
        /// `dst` = D; `src` = 4 registers of A, 2 of B, then C.
        Mma(mma: Mma): [registers(mma.acc_registers())] <- [registers(4), registers(2), registers(mma.acc_registers())]
            if mma.exists(), mma.needs(),
            format!("{} {{$d}}, {{$0}}, {{$1}}, {{$2}}", mma.opcode());
        /// `dst` = D; `src` = A's registers, one of B, then C.
        HalfMma(mma: HalfMma):
            [registers(mma.acc_registers())]
            <- [registers(mma.a_registers()), registers(1), registers(mma.acc_registers())]
            if mma.exists(), Needs::since(Target::SM_75, 6, 5),
            format!("{} {{$d}}, {{$0}}, {{$1}}, {{$2}}", mma.opcode());
        /// As [`Matrix::Mma`], then the scales of A and of B.
        MmaBlockScaled(mma: MmaBlockScaled): [registers(4)] <-
            [registers(4), registers(2), registers(4), registers(1), registers(1)]
            if mma.b_lane < 4, Needs::since(Target::SM_120A, 8, 7), mma.template();
        /// `dst` = D, read as well; `src` = 4 registers of A or its descriptor, B's descriptor, and a predicate:
        /// whether D is added to. Asynchronous: D and A must not be touched until waited for.
        Wgmma(wgmma: Wgmma): [registers(wgmma.acc_registers())] <- [wgmma.operand_a(), DESCRIPTOR, PREDICATE]
            if wgmma.exists(), Needs::since(Target::SM_90A, 8, 0), wgmma.template();
        /// Orders registers and earlier `wgmma`s before later ones.
        WgmmaFence: [] <- [], Needs::since(Target::SM_90A, 8, 0), "wgmma.fence.sync.aligned";
        /// Puts the `wgmma`s issued since the last commit into a group.
        WgmmaCommit: [] <- [], Needs::since(Target::SM_90A, 8, 0), "wgmma.commit_group.sync.aligned";
        /// Waits until at most this many of the latest groups are in flight; `dst` = the registers that they wrote, and
        /// that may be read from here on.
        WgmmaWait(pending: u32): [Width::B32.any_number()] <- [], Needs::since(Target::SM_90A, 8, 0),
            format!("wgmma.wait_group.sync.aligned {pending}");
    }
}

/// Where a matrix lies in shared memory.
const DESCRIPTOR: Group = Width::B64.times(1).registers_only();
const PREDICATE: Group = Width::Pred.times(1).registers_only();

/// Registers of a fragment.
const fn registers(count: usize) -> Group {
    Width::B32.times(count).registers_only()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each element of each operand is in exactly one place.
    #[test]
    fn fragments_cover_their_matrices() {
        for (ty, acc) in [(MmaTy::F16, MmaTy::F32), (MmaTy::S8, MmaTy::S32), (MmaTy::S4, MmaTy::S32)] {
            let mma = Mma { a: ty, b: ty, acc };
            let per = mma.per_register();
            let mut a = vec![0; 16 * mma.k()];
            let mut b = vec![0; mma.k() * 8];
            let mut c = [0; 16 * 8];
            for lane in 0..32 {
                for i in 0..per {
                    for r in 0..4 {
                        let (row, k) = mma.a_element(lane, r, i);
                        a[row * mma.k() + k] += 1;
                    }
                    for r in 0..2 {
                        let (k, column) = mma.b_element(lane, r, i);
                        b[k * 8 + column] += 1;
                    }
                }
                for i in 0..4 {
                    let (row, column) = Mma::acc_element(lane, i);
                    c[row * 8 + column] += 1;
                }
            }
            assert!(a.iter().chain(&b).chain(&c).all(|&count| count == 1), "{ty:?}");
        }
    }
}
