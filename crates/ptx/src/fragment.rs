//! Tensor-core operands and accumulators in registers, and swizzled tiles of shared memory that they come from.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::code::Code;
use crate::isa::{Matrix, Mma, MmaTy, Warp, Width};
use crate::pointer::{Pointer, Shared, Stored};
use crate::program::Operand;
use crate::scalar::{BF16x2, F16x2, Phantom, Scalar};
use crate::value::{Use, Val};
use crate::var::Var;

/// Element types of A and B.
pub trait MmaElement: Copy + 'static {
    /// Name in the instruction.
    const TY: MmaTy;
}

/// Signed integers of 4 bits.
#[derive(Clone, Copy, Debug)]
pub struct S4;
/// Floats of 8 bits with 3 bits of mantissa.
#[derive(Clone, Copy, Debug)]
pub struct E4M3;
/// Floats of 8 bits with 2 bits of mantissa.
#[derive(Clone, Copy, Debug)]
pub struct E5M2;

/// Floats of 4 bits with 1 bit of mantissa.
#[derive(Clone, Copy, Debug)]
pub struct E2M1;

macro_rules! mma_element {
    ($($ty:ty => $name:ident;)*) => {$(
        impl MmaElement for $ty {
            const TY: MmaTy = MmaTy::$name;
        }
    )*};
}

mma_element! { f16 => F16; bf16 => BF16; i8 => S8; u8 => U8; S4 => S4; E4M3 => E4M3; E5M2 => E5M2; E2M1 => E2M1; }

/// Accumulator types: what a register holds, and how many registers an `m16n8` tile takes.
pub trait MmaAccumulator: Scalar {
    /// Name in the instruction.
    const MMA: MmaTy;
    /// Registers of a tile in a lane.
    const REGISTERS: usize;
    /// All elements of a register zero.
    const ZERO: Self;
}

impl MmaAccumulator for f32 {
    const MMA: MmaTy = MmaTy::F32;
    const REGISTERS: usize = 4;
    const ZERO: f32 = 0.0;
}
impl MmaAccumulator for i32 {
    const MMA: MmaTy = MmaTy::S32;
    const REGISTERS: usize = 4;
    const ZERO: i32 = 0;
}
impl MmaAccumulator for F16x2 {
    const MMA: MmaTy = MmaTy::F16;
    const REGISTERS: usize = 2;
    const ZERO: F16x2 = F16x2([f16::ZERO; 2]);
}

/// A warp's 16 rows of A, 32 bytes deep: lane `l` holds rows `l / 4` and `l / 4 + 8`.
#[derive(Debug)]
pub struct FragmentA<'k, E> {
    words: [Val<'k, u32>; 4],
    ty: Phantom<E>,
}

/// A warp's 8 columns of B, 32 bytes deep: lane `l` holds column `l / 4`.
#[derive(Debug)]
pub struct FragmentB<'k, E> {
    words: [Val<'k, u32>; 2],
    ty: Phantom<E>,
}

impl<E> Clone for FragmentA<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for FragmentA<'_, E> {}
impl<E> Clone for FragmentB<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for FragmentB<'_, E> {}

impl<'k, E: MmaElement> FragmentA<'k, E> {
    /// From registers in the order of [`Mma::a_element`]: low depth of row `l / 4`, of row `l / 4 + 8`, then the high
    /// depth.
    pub fn new(words: [Val<'k, u32>; 4]) -> Self {
        FragmentA { words, ty: PhantomData }
    }

    /// The kernel that the fragment belongs to.
    pub fn code(&self) -> &'k Code {
        self.words[0].code()
    }

    /// The registers, in the order of [`FragmentA::new`].
    pub fn words(&self) -> [Val<'k, u32>; 4] {
        self.words
    }
}

impl<'k, E: MmaElement> FragmentB<'k, E> {
    /// From registers in the order of [`Mma::b_element`]: low depth, then high.
    pub fn new(words: [Val<'k, u32>; 2]) -> Self {
        FragmentB { words, ty: PhantomData }
    }

    /// The registers, in the order of [`FragmentB::new`].
    pub fn words(&self) -> [Val<'k, u32>; 2] {
        self.words
    }
}

/// A 16×8 tile of accumulators: lane `l` holds rows `l / 4` and `l / 4 + 8`, columns `2(l mod 4)` and the next.
#[derive(Debug)]
pub struct Accumulator<'k, T> {
    registers: Vec<Var<'k, T>>,
}

impl<'k, T: MmaAccumulator> Accumulator<'k, T> {
    /// All elements `first`.
    #[track_caller]
    pub fn filled(code: &'k Code, first: T) -> Self {
        Accumulator { registers: (0..T::REGISTERS).map(|_| code.var(first)).collect() }
    }

    /// Without values as yet.
    pub fn new(code: &'k Code) -> Self {
        Accumulator { registers: (0..T::REGISTERS).map(|_| Var::new(code)).collect() }
    }

    /// In registers that exist, in the order of [`Accumulator::register`].
    pub fn of_registers(registers: impl Into<Vec<Var<'k, T>>>) -> Self {
        Accumulator { registers: registers.into() }
    }

    /// Register `i`: the elements of row `l / 4`, then those of row `l / 4 + 8`.
    pub fn register(&self, i: usize) -> Var<'k, T> {
        self.registers[i]
    }

    /// All registers, in the order of [`Accumulator::register`].
    pub fn registers(&self) -> &[Var<'k, T>] {
        &self.registers
    }

    /// `self += a · b`.
    #[track_caller]
    pub fn add_product<E: MmaElement>(&self, a: FragmentA<'k, E>, b: FragmentB<'k, E>) {
        let addend: Vec<Operand> = self.registers.iter().map(|var| Operand::Reg(var.register())).collect();
        self.multiply(a, b, &addend);
    }

    /// `self = a · b + addend`, the same addend for every element.
    #[track_caller]
    pub fn set_product<E: MmaElement>(
        &self,
        a: FragmentA<'k, E>,
        b: FragmentB<'k, E>,
        addend: impl Use<'k, T>,
    ) {
        let code = a.words[0].code();
        let addend = addend.value(code).in_register_operand();
        self.multiply(a, b, &vec![addend; T::REGISTERS]);
    }

    /// `self = a · b + addends`, an addend for each register.
    #[track_caller]
    pub fn set_product_from<E: MmaElement>(
        &self,
        a: FragmentA<'k, E>,
        b: FragmentB<'k, E>,
        addends: &[Val<'k, T>],
    ) {
        assert_eq!(addends.len(), T::REGISTERS, "an addend for each register");
        let addends: Vec<_> = addends.iter().map(|addend| addend.in_register_operand()).collect();
        self.multiply(a, b, &addends);
    }

    #[track_caller]
    fn multiply<E: MmaElement>(&self, a: FragmentA<'k, E>, b: FragmentB<'k, E>, addend: &[Operand]) {
        let mma = Mma { a: E::TY, b: E::TY, acc: T::MMA };
        let words = a.words.iter().chain(&b.words);
        let mut src: Vec<Operand> = words.map(|word| word.in_register_operand()).collect();
        src.extend(addend);
        let dst: Vec<_> = self.registers.iter().map(|var| var.register()).collect();
        a.words[0].code().emit(Matrix::Mma(mma), &dst, &src);
    }
}

/// A tile of shared memory whose rows are `row_bytes` long, a multiple of 32.
///
/// The 16-byte chunks of a row change places with the row, so that the same chunk of 8 neighbouring rows lies in 8
/// different groups of banks: neither `ldmatrix` nor copies of whole rows conflict. They do so within spans, of the largest power of
/// two that rows are made of, up to all banks.
#[derive(Clone, Copy, Debug)]
pub struct SharedTile<'k> {
    base: Shared<'k, u8>,
    row_bytes: usize,
}

/// Bytes of a chunk: a row of an 8×8 matrix of `ldmatrix`, and what one thread copies at once.
pub const CHUNK_BYTES: usize = 16;

/// Bytes of all banks.
const BANKS_BYTES: usize = 128;

/// Bytes within which the chunks of a row change places: the largest power of two that rows are made of, but no more
/// than all banks.
const fn span(row_bytes: usize) -> usize {
    let power = 1 << row_bytes.trailing_zeros();
    if power < BANKS_BYTES { power } else { BANKS_BYTES }
}

impl<'k> SharedTile<'k> {
    /// A tile at `base`, which must be aligned to its rows, or where their length is no power of two to their span.
    ///
    /// # Panics
    /// When the length of rows is none of those above: the kernel cannot be written.
    pub fn new<T: Stored>(base: Shared<'k, T>, row_bytes: usize) -> Self {
        assert!(row_bytes > 0 && row_bytes.is_multiple_of(32), "rows of {row_bytes} bytes");
        SharedTile { base: base.cast(), row_bytes }
    }

    /// The kernel that the tile belongs to.
    pub fn code(&self) -> &'k Code {
        self.base.code()
    }

    /// Length of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The tile `bytes`, a multiple of its rows, further: another stage of a ring.
    #[track_caller]
    pub fn at_byte(&self, bytes: Val<'k, i32>) -> Self {
        SharedTile { base: self.base.at(bytes), ..*self }
    }

    /// Where a chunk of a row lies.
    #[track_caller]
    pub fn chunk(&self, row: Val<'k, i32>, chunk: impl Use<'k, i32>) -> ChunkAddress<'k> {
        let chunk = chunk.value(self.base.code());
        let span = span(self.row_bytes);
        // As many rows as fill all banks once, or as many spans of as many rows, share a swizzle.
        let rows_per_line = BANKS_BYTES / span;
        let key = (row >> rows_per_line.ilog2() as i32) & (span / CHUNK_BYTES - 1) as i32;
        let swizzled = (chunk ^ key) << CHUNK_BYTES.ilog2() as i32;
        let address = self.base.at(row * (self.row_bytes as i32) + swizzled).address();
        ChunkAddress { address, row_bytes: self.row_bytes }
    }

    /// Addresses for A's fragments: 16 rows from `row` on.
    #[track_caller]
    pub fn rows_of_a(&self, row: impl Use<'k, i32>) -> FragmentSource<'k> {
        let lane = self.base.code().lane_index();
        FragmentSource {
            address: self.chunk((lane & 15) + row.value(self.base.code()), lane >> 4),
            transposed: false,
        }
    }

    /// Addresses for B's fragments where a tile's rows are B's columns: 16 columns from `row` on.
    #[track_caller]
    pub fn columns_of_b(&self, row: impl Use<'k, i32>) -> FragmentSource<'k> {
        let lane = self.base.code().lane_index();
        let row = (lane & 7) + ((lane >> 4) << 3) + row.value(self.base.code());
        FragmentSource { address: self.chunk(row, (lane >> 3) & 1), transposed: false }
    }

    /// Addresses for B's fragments where a tile's rows are B's depth (16-bit elements): 16 rows from `row` on.
    #[track_caller]
    pub fn rows_of_b(&self, row: impl Use<'k, i32>) -> FragmentSource<'k> {
        let lane = self.base.code().lane_index();
        FragmentSource {
            address: self.chunk((lane & 15) + row.value(self.base.code()), lane >> 4),
            transposed: true,
        }
    }
}

/// Where a chunk of a row lies in a [`SharedTile`].
#[derive(Clone, Copy, Debug)]
pub struct ChunkAddress<'k> {
    address: Val<'k, u32>,
    row_bytes: usize,
}

impl<'k> ChunkAddress<'k> {
    /// The chunk `chunks` further in the same row, and `rows` (a multiple of 8) further down. The chunk that the
    /// address is of must have none of the bits of `chunks`: then the swizzle makes of a sum an exclusive or, and rows
    /// being aligned to their length, of the address as well. Where that is no power of two, spans are aligned, and
    /// whole ones are added.
    #[track_caller]
    pub fn step(&self, rows: usize, chunks: usize) -> Shared<'k, u8> {
        let bytes = chunks * CHUNK_BYTES;
        let exchanged = if self.row_bytes.is_power_of_two() { bytes } else { bytes % span(self.row_bytes) };
        Pointer::at_address(self.address ^ exchanged as u32)
            .plus((rows * self.row_bytes + bytes - exchanged) as i32)
    }
}

/// Lanes' addresses for `ldmatrix`: fragments at fixed distances from them.
#[derive(Clone, Copy, Debug)]
pub struct FragmentSource<'k> {
    address: ChunkAddress<'k>,
    transposed: bool,
}

impl<'k> FragmentSource<'k> {
    /// The same place `bytes`, a multiple of the tile's rows, further: in another stage of a ring.
    #[track_caller]
    pub fn at_byte(&self, bytes: Val<'k, i32>) -> Self {
        let address =
            ChunkAddress { address: self.address.address + bytes.reinterpret::<u32>(), ..self.address };
        FragmentSource { address, ..*self }
    }

    /// Four 8×8 matrices, `rows` (a multiple of 8) down and `chunks` (even) to the right.
    #[track_caller]
    fn load(&self, rows: usize, chunks: usize) -> [Val<'k, u32>; 4] {
        let pointer = self.address.step(rows, chunks);
        let code = pointer.code();
        let registers = [(); 4].map(|()| code.register(Width::B32));
        let (address, offset) = pointer.parts();
        let op = Warp::LoadMatrix { count: 4, transposed: self.transposed, offset };
        code.emit(op, &registers, &[address]);
        registers.map(|reg| Val::of_register(code, reg))
    }

    /// 16 rows of A, 32 bytes deep.
    #[track_caller]
    pub fn a<E: MmaElement>(&self, rows: usize, depth_bytes: usize) -> FragmentA<'k, E> {
        FragmentA::new(self.load(rows, depth_bytes / CHUNK_BYTES))
    }

    /// Two fragments of B, of 8 columns each and 32 bytes deep: `columns` and `depth_bytes` from the source's start.
    #[track_caller]
    pub fn b_pair<E: MmaElement>(&self, columns: usize, depth_bytes: usize) -> [FragmentB<'k, E>; 2] {
        let [a, b, c, d] = if self.transposed {
            // A row of the tile is one step of depth, 16 of them are 32 bytes deep; columns lie along it.
            self.load(depth_bytes / 2, columns * 2 / CHUNK_BYTES)
        } else {
            self.load(columns, depth_bytes / CHUNK_BYTES)
        };
        [FragmentB::new([a, b]), FragmentB::new([c, d])]
    }
}

/// Element types that sums are rounded to, to be an operand of the next product.
pub trait RoundedElement: MmaElement {
    /// Columns of sums that become a fragment, which is 32 bytes deep.
    const DEPTH: usize;
    /// A register of ones.
    const ONES: u32;

    /// A's fragment of a strip's sums, given by the lane's row slot, 0 or 1, and column. The lanes' elements are where
    /// A's are, but for an order of the depth that B must be stored in.
    fn round<'k>(sum: impl Fn(usize, usize) -> Val<'k, f32>) -> FragmentA<'k, Self>;
}

macro_rules! rounded_half {
    ($($half:ty: $one:literal;)*) => {$(
        impl RoundedElement for $half {
            const DEPTH: usize = 16;
            const ONES: u32 = $one << 16 | $one;

            #[track_caller]
            fn round<'k>(sum: impl Fn(usize, usize) -> Val<'k, f32>) -> FragmentA<'k, Self> {
                let pack = |slot: usize, column: usize| {
                    sum(slot, column).pack::<$half>(sum(slot, column + 1)).reinterpret::<u32>()
                };
                FragmentA::new([pack(0, 0), pack(1, 0), pack(0, 8), pack(1, 8)])
            }
        }
    )*};
}

rounded_half! { f16: 0x3c00; bf16: 0x3f80; }

/// Depth `4t..4t + 4` of each 16 is columns `2t, 2t + 1, 2t + 8, 2t + 9`: B's rows must be stored in that order.
impl RoundedElement for E4M3 {
    const DEPTH: usize = 32;
    const ONES: u32 = 0x3838_3838;

    #[track_caller]
    fn round<'k>(sum: impl Fn(usize, usize) -> Val<'k, f32>) -> FragmentA<'k, Self> {
        let pack = |slot: usize, column: usize| {
            Val::pack_e4m3([0, 1, 8, 9].map(|within| sum(slot, column + within)))
        };
        FragmentA::new([pack(0, 0), pack(1, 0), pack(0, 16), pack(1, 16)])
    }
}

impl<'k> Val<'k, BF16x2> {
    /// The register's bits.
    pub fn word(self) -> Val<'k, u32> {
        self.reinterpret()
    }
}

impl<'k> Val<'k, F16x2> {
    /// The register's bits.
    pub fn word(self) -> Val<'k, u32> {
        self.reinterpret()
    }
}
