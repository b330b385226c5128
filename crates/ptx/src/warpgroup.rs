//! Products of a warpgroup, four warps together: `wgmma`, whose B lies in shared memory.

use crate::code::Code;
use crate::fragment::{FragmentA, MmaAccumulator, MmaElement};
use crate::isa::{Matrix, Wgmma};
use crate::pointer::Shared;
use crate::program::Operand;
use crate::tile::Tile;
use crate::value::{Use, Val};
use crate::var::Var;

/// A matrix in shared memory in panels: rows of `row_bytes` (64 or 128), whose 16-byte chunks are exchanged as the
/// tensor copies' swizzle of that span does, one panel after the other.
#[derive(Clone, Copy, Debug)]
pub struct PanelMatrix<'k> {
    /// Address of the first panel, in units of descriptors.
    start: Val<'k, u32>,
    rows: usize,
    row_bytes: usize,
}

/// Where an operand of `wgmma` lies in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct MatrixDescriptor<'k>(Val<'k, u64>);

/// Bytes of an address's unit in descriptors.
const UNIT: usize = 16;

impl<'k> PanelMatrix<'k> {
    /// At `base`, which must be aligned to 1024 bytes; panels have `rows` rows, a multiple of 8.
    ///
    /// # Panics
    /// When rows are none of those: the kernel cannot be written.
    pub fn new(base: Shared<'k, u8>, rows: usize, row_bytes: usize) -> Self {
        assert!(matches!(row_bytes, 64 | 128) && rows.is_multiple_of(8), "{rows} rows of {row_bytes} bytes");
        PanelMatrix { start: base.address() >> UNIT.ilog2() as i32, rows, row_bytes }
    }

    /// The `index`-th of such matrices that lie `bytes`, a multiple of 1024, from each other: of the stages of a ring.
    #[track_caller]
    pub fn at(&self, index: Val<'k, i32>, bytes: usize) -> Self {
        let units = (index * (bytes / UNIT) as i32).reinterpret();
        PanelMatrix { start: self.start + units, ..*self }
    }

    /// The operand whose depth goes along the rows: from `row` (a multiple of 8) and byte `depth` (a multiple of 32).
    #[track_caller]
    pub fn depth_in_columns(&self, row: usize, depth: usize) -> MatrixDescriptor<'k> {
        let (panel, byte) = (depth / self.row_bytes, depth % self.row_bytes);
        let offset = (panel * self.rows + row) * self.row_bytes + byte;
        self.descriptor(offset, UNIT, 8 * self.row_bytes)
    }

    /// The operand of 16-bit elements whose depth goes down the rows, and whose columns are all panels': from `row`, a
    /// multiple of 8.
    #[track_caller]
    pub fn depth_in_rows(&self, row: usize) -> MatrixDescriptor<'k> {
        self.descriptor(row * self.row_bytes, self.rows * self.row_bytes, 8 * self.row_bytes)
    }

    #[track_caller]
    fn descriptor(&self, offset: usize, leading: usize, stride: usize) -> MatrixDescriptor<'k> {
        let swizzle = if self.row_bytes == 128 { 1 } else { 2 };
        let strides = [(leading / UNIT) as u32, (stride / UNIT) as u32 | swizzle << 30];
        // Addresses take 14 bits, so that no offset within shared memory carries into the strides.
        let start = (self.start + (strides[0] << 16)).join(strides[1]);
        MatrixDescriptor(start + (offset / UNIT) as u64)
    }
}

/// The operand A of `wgmma`: 64 rows, 32 bytes deep.
#[derive(Clone, Copy, Debug)]
pub enum WarpgroupA<'k, E> {
    /// Each warp's 16 rows.
    Registers(FragmentA<'k, E>),
    /// In shared memory, its depth along the rows.
    Shared(MatrixDescriptor<'k>),
}

/// `sums (+)= a · b` by a warpgroup: `sums` are the thread's registers of D, four for each 8 columns, as of
/// [`Accumulator`](crate::Accumulator)s side by side. Asynchronous: neither they nor A may be touched before
/// [`Code::wait_products`].
#[track_caller]
pub fn warpgroup_product<'k, E: MmaElement, T: MmaAccumulator>(
    sums: &[Var<'k, T>],
    a: WarpgroupA<'k, E>,
    b: MatrixDescriptor<'k>,
    b_transposed: bool,
    add: impl Use<'k, bool>,
) {
    let code = b.0.code();
    let n = (2 * sums.len()) as u16;
    let (a_in_registers, mut src): (bool, Vec<Operand>) = match a {
        WarpgroupA::Registers(a) => (true, a.words().map(|word| word.in_register_operand()).to_vec()),
        WarpgroupA::Shared(a) => (false, vec![a.0.in_register_operand()]),
    };
    let op = Wgmma { n, a: E::TY, b: E::TY, acc: T::MMA, a_in_registers, b_transposed };
    src.push(b.0.in_register_operand());
    src.push(add.value(code).in_register_operand());
    let dst: Vec<_> = sums.iter().map(|var| var.register()).collect();
    code.emit(Matrix::Wgmma(op), &dst, &src);
}

impl<'k, T: MmaAccumulator> Tile<Var<'k, T>> {
    /// Starts `self (+)= a · b` by a warpgroup, whose product is `steps` of 32 bytes deep; without `add` the first
    /// step's takes the place of what the tile held. Neither the tile nor A may be touched before
    /// [`Tile::wait_products`].
    #[track_caller]
    pub fn start_product<E: MmaElement>(
        &self,
        code: &'k Code,
        steps: usize,
        a: impl Fn(usize) -> WarpgroupA<'k, E>,
        b: impl Fn(usize) -> MatrixDescriptor<'k>,
        b_transposed: bool,
        add: bool,
    ) {
        code.fence_products();
        for step in 0..steps {
            warpgroup_product(self.registers(), a(step), b(step), b_transposed, add || step > 0);
        }
        code.commit_products();
    }

    /// Waits until at most `pending` of the latest products are in flight: not this tile's, which may be touched then.
    #[track_caller]
    pub fn wait_products(&self, code: &'k Code, pending: u32) {
        code.wait_products(pending, self.registers());
    }
}

impl Code {
    /// Orders writes to registers that later `wgmma`s read or add to.
    #[track_caller]
    pub fn fence_products(&self) {
        self.emit(Matrix::WgmmaFence, &[], &[]);
    }

    /// Puts the `wgmma`s since the last commit into a group.
    #[track_caller]
    pub fn commit_products(&self) {
        self.emit(Matrix::WgmmaCommit, &[], &[]);
    }

    /// Waits until at most `pending` of the latest groups are in flight; `sums` may be touched then.
    #[track_caller]
    pub fn wait_products<'k, T: MmaAccumulator>(&'k self, pending: u32, sums: &[Var<'k, T>]) {
        let dst: Vec<_> = sums.iter().map(|var| var.register()).collect();
        self.emit(Matrix::WgmmaWait(pending), &dst, &[]);
    }
}
