//! Values of 4 bits with a scale for each group: the arithmetic of core's `Fp4Format` inside a kernel, and how tiles of
//! them lie in memory.

use sage_core::Fp4Format;
use sage_core::oracle::E2M1_MAX;
use sage_ptx::isa::BlockScales;
use sage_ptx::{E2M1, FragmentB, SCALED_DEPTH, Scalar, ScaledB, Val};

/// Lanes of a warp.
const LANES: usize = 32;

/// Words that a lane reads at once, at most.
const VECTOR: usize = 4;

/// Columns of a product's operand B, whose scales four lanes of every quad have.
const COLUMNS: usize = 8;

/// Bits of E8M0's NaN.
const E8M0_NAN: i32 = 255;

/// The scales of a format, as tensor cores take them.
pub(crate) const fn block_scales(format: Fp4Format) -> BlockScales {
    match format {
        Fp4Format::Nv => BlockScales::Ue4m3,
        Fp4Format::Mx => BlockScales::Ue8m0,
    }
}

/// The scale of a group of values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupScale<'k> {
    /// Its bits; those of NaN where the group holds a value that is not finite.
    pub code: Val<'k, u32>,
    /// `1 / scale`, correctly rounded; 0 where the scale is 0 or NaN.
    inverse: Val<'k, f32>,
}

impl<'k> GroupScale<'k> {
    /// The scale of a group whose largest magnitude has these bits.
    #[track_caller]
    pub fn of_group(format: Fp4Format, max_bits: Val<'k, i32>) -> Self {
        let finite = max_bits.lt(f32::INFINITY.to_bits() as i32);
        match format {
            Fp4Format::Nv => {
                let max = max_bits.reinterpret::<f32>();
                // With a correctly rounded reciprocal one correction gives the correctly rounded quotient (Markstein),
                // but of numbers so small that their scale is 0.
                let near = max * (1.0 / E2M1_MAX);
                let quotient = (-near).mul_add(E2M1_MAX, max).mul_add(1.0 / E2M1_MAX, near);
                let zero = quotient.code().constant(0.0);
                let code = Val::pack_e4m3([finite.select(quotient, f32::NAN), zero, zero, zero]);
                let [value, _] = code.e4m3_pair_to_f32();
                // NaN is not above 0.
                GroupScale { code, inverse: value.gt(0.0).select(value.recip(), 0.0) }
            }
            Fp4Format::Mx => {
                // The exponent of a float is that of the largest power of two in it, and E8M0's bias is that of floats.
                let code = finite.select(((max_bits >> 23) - 2).max(0), E8M0_NAN);
                let inverse = ((254 - code) << 23).reinterpret::<f32>();
                GroupScale { code: code.reinterpret(), inverse: finite.select(inverse, 0.0) }
            }
        }
    }

    /// The codes of eight values of the group, the first in the lowest bits; zeros where the scale is 0 or NaN.
    #[track_caller]
    pub fn word(&self, values: [Val<'k, f32>; 8]) -> Val<'k, u32> {
        let word = Val::pack_e2m1(values.map(|x| x * self.inverse));
        self.inverse.eq(0.0).select(0u32, word)
    }
}

/// How a lane makes words of scales of operand A from those of its own groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScalesOfA<'k> {
    format: Fp4Format,
    /// Which bytes its word has.
    selector: Val<'k, u32>,
}

impl<'k> ScalesOfA<'k> {
    /// For a lane of a warp.
    #[track_caller]
    pub fn new(format: Fp4Format, lane: Val<'k, i32>) -> Self {
        let (of_first, of_second) = match format {
            // Low, the neighbours' low, high, the neighbours' high.
            Fp4Format::Nv => (0x5140u32, 0x7362u32),
            Fp4Format::Mx => (0x1010, 0x3232),
        };
        let first = (lane & 1).eq(0);
        ScalesOfA { format, selector: first.select(of_first, of_second) }
    }

    /// The word of a strip for [`SCALED_DEPTH`] of its rows' elements. Of each 32 the lane has eight; `groups` are the
    /// scales of its two rows' groups, a byte each: of the first row's lower and upper 32, then of the second's.
    #[track_caller]
    pub fn word(&self, groups: Val<'k, u32>) -> Val<'k, u32> {
        match self.format {
            // Two lanes of a quad have the first 16 of every 32, and the others the second.
            Fp4Format::Nv => groups.permute_bytes(groups.shuffle_xor(2), self.selector),
            Fp4Format::Mx => groups.permute_bytes(groups, self.selector),
        }
    }

    /// Combines the values of the lanes that share a group.
    #[track_caller]
    pub fn among_sharing<T: Scalar>(
        &self,
        x: Val<'k, T>,
        combine: impl FnMut(Val<'k, T>, Val<'k, T>) -> Val<'k, T>,
    ) -> Val<'k, T> {
        x.reduce_lanes((self.format.group() / 8 - 1) as i32, combine)
    }
}

/// Where the scales of a tile of 4-bit rows lie: behind the rows' codes, as the operand B of a product reads them. A
/// word has the scales of a row for one [`SCALED_DEPTH`] of its elements, a byte for each group from the lowest on.
///
/// With `n` words of a lane, they lie as `[⌈n / 4⌉][lanes][4 or n]`. Word `w` of lane `4q + t` is of row `32i + 8t + q`,
/// where `i` and the step of the row's depth are `w mod m` and `w / m`, and `m` is a 32nd of the rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScaleWords {
    rows: usize,
    /// Words of a row.
    steps: usize,
}

impl ScaleWords {
    /// For a tile of so many rows, a multiple of 32, of so many elements, a multiple of [`SCALED_DEPTH`].
    pub const fn new(rows: usize, elements: usize) -> Self {
        ScaleWords { rows, steps: elements / SCALED_DEPTH }
    }

    /// Words of a lane.
    pub const fn of_lane(&self) -> usize {
        self.rows / LANES * self.steps
    }

    /// Bytes of all words.
    pub const fn bytes(&self) -> usize {
        4 * LANES * self.of_lane()
    }

    /// Words that a lane reads at once.
    pub const fn vector(&self) -> usize {
        if self.of_lane() < VECTOR { self.of_lane() } else { VECTOR }
    }

    /// The word of step `step` for row `32 · group + 8 · quad_lane + column`.
    #[track_caller]
    pub fn index<'k>(
        &self,
        group: Val<'k, i32>,
        quad_lane: Val<'k, i32>,
        column: Val<'k, i32>,
        step: Val<'k, i32>,
    ) -> Val<'k, i32> {
        let word = step * (self.rows / LANES) as i32 + group;
        let (vector, within) = word.split_index(self.vector());
        (vector * LANES as i32 + column * 4 + quad_lane) * self.vector() as i32 + within
    }

    /// Two fragments of operand B, of the eight rows from `row` on and of the next eight, with their scales among the
    /// lane's words.
    pub fn operands<'k>(
        &self,
        fragments: [FragmentB<'k, E2M1>; 2],
        words: &[Val<'k, u32>],
        row: usize,
        step: usize,
    ) -> [ScaledB<'k>; 2] {
        let [low, high] = fragments;
        [(low, row), (high, row + COLUMNS)].map(|(fragment, row)| {
            let (word, scales_lane) = self.place(row, step);
            ScaledB { fragment, scales: words[word], scales_lane }
        })
    }

    /// Which of a lane's words has the scales of the eight rows from `row` on for a step, and in which lane of a quad.
    const fn place(&self, row: usize, step: usize) -> (usize, u8) {
        let block = row / COLUMNS;
        (step * (self.rows / LANES) + block / 4, (block % 4) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_take_an_eighth_of_the_bytes_of_their_rows() {
        for padded in [64, 128, 256] {
            let (keys, values) = (ScaleWords::new(64, padded), ScaleWords::new(padded, 64));
            assert_eq!((keys.bytes(), values.bytes()), (64 * padded / 2 / 8, padded * 32 / 8));
            let mut taken = vec![0; 4 * keys.of_lane()];
            for (row, step) in (0..64).step_by(8).flat_map(|row| (0..padded / 64).map(move |s| (row, s))) {
                let (word, lane) = keys.place(row, step);
                taken[4 * word + usize::from(lane)] += 1;
            }
            assert!(taken.iter().all(|&count| count == 1), "{taken:?}");
        }
    }
}
