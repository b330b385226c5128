//! P in 4 bits with a scale for each group of keys, as the operand of the product with V (SageAttention3 §3.2).
//!
//! A group's exponentials are of scores relative to its scale, so that none is multiplied by the scale's inverse; the
//! row's sum takes them back, once for eight.

use sage_core::Fp4Format;
use sage_core::oracle::E2M1_MAX;
use sage_ptx::{FragmentA, ScaledA, Val};

use super::softmax::Probabilities;
use crate::fp4::ScalesOfA;

/// Keys of each half of the operand, of which a lane has eight neighbours.
const HALF: usize = 32;

/// A lane's groups in a strip: row slots 0 and 1, and each one's halves.
const GROUPS: [(usize, usize); 4] = [(0, 0), (0, 1), (1, 0), (1, 1)];

/// Brings what single precision leaves a little below a power of two up to it: a row's largest P is one, and half the
/// scale would cut it short by a quarter.
const UP_TO_POWER: f32 = 1.0001;

/// Scales of a lane's groups, in the order of [`GROUPS`].
struct GroupScales<'k> {
    /// Their bits, a byte each.
    codes: Val<'k, u32>,
    /// What they are; 1 where that is 0, as all of the group is as good as 0 then, but its sum is not.
    values: [Val<'k, f32>; 4],
    /// Base-2 logarithms of these.
    logarithms: [Val<'k, f32>; 4],
}

impl<'k> GroupScales<'k> {
    /// The scales of groups whose largest P are these.
    fn of_largest(format: Fp4Format, largest: [Val<'k, f32>; 4]) -> Self {
        match format {
            Fp4Format::Nv => {
                let codes = Val::pack_e4m3(largest.map(|p| p * (1.0 / E2M1_MAX)));
                let ([a, b], [c, d]) = (codes.e4m3_pair_to_f32(), (codes >> 16).e4m3_pair_to_f32());
                let values = [a, b, c, d].map(|value| value.eq(0.0).select(1.0, value));
                GroupScales { codes, values, logarithms: values.map(Val::log2) }
            }
            Fp4Format::Mx => {
                // Powers of two, by the exponents of floats: those of E8M0 have the same bias.
                let exponents = largest.map(|p| (((p * UP_TO_POWER).reinterpret::<i32>() >> 23) - 2).max(0));
                let [a, b, c, d] = exponents.map(|exponent| exponent.reinterpret::<u32>());
                GroupScales {
                    codes: a | (b << 8) | (c << 16) | (d << 24),
                    values: exponents.map(|exponent| (exponent << 23).reinterpret()),
                    logarithms: exponents.map(|exponent| (exponent - 127).to_f32()),
                }
            }
        }
    }
}

impl<'k> Probabilities<'_, 'k> {
    /// P of 64 keys in octets, for each strip; goes into the sums.
    pub fn scaled_operand(&self, format: Fp4Format) -> Vec<ScaledA<'k>> {
        let of_a = self.softmax.scales_of_p.expect("the kernel multiplies P in 4 bits");
        (0..self.scores.values.slots() / 2).map(|strip| self.scaled_strip(format, &of_a, strip)).collect()
    }

    fn scaled_strip(&self, format: Fp4Format, of_a: &ScalesOfA<'k>, strip: usize) -> ScaledA<'k> {
        let scores = |(slot, half): (usize, usize)| -> [Val<'k, f32>; 8] {
            let column = |i: usize| HALF * half + i / 2 * 8 + i % 2;
            std::array::from_fn(|i| self.scores.values.at(2 * strip + slot, column(i)).get())
        };
        let largest = GROUPS.map(|group| {
            let of_lane = scores(group).into_iter().reduce(Val::max).expect("a group has keys");
            let of_group = of_a.among_sharing(of_lane, Val::max);
            self.exponential(2 * strip + group.0, of_group, None)
        });
        let GroupScales { codes, values, logarithms } = GroupScales::of_largest(format, largest);
        let mut index = 0;
        let [first_low, first_high, second_low, second_high] = GROUPS.map(|group| {
            let (value, logarithm) = (values[index], logarithms[index]);
            index += 1;
            let row = 2 * strip + group.0;
            let p = scores(group).map(|score| self.exponential(row, score, Some(logarithm)));
            if let Some(sums) = &self.softmax.lane_sums {
                let of_p = p.chunks(2).map(|pair| pair[0] + pair[1]).reduce(|a, b| a + b);
                let sum = sums[row].get();
                sums[row].set(of_p.map_or(sum, |of_p| of_p.mul_add(value, sum)));
            }
            Val::pack_e2m1(p)
        });
        let fragment = FragmentA::new([first_low, second_low, first_high, second_high]);
        ScaledA { fragment, scales: of_a.word(codes) }
    }

    /// P of a score, over `2^by`.
    fn exponential(&self, row: usize, score: Val<'k, f32>, by: Option<Val<'k, f32>>) -> Val<'k, f32> {
        let logarithm = match (&self.shift, by) {
            (Some(shift), None) => score.mul_add(self.scores.factor[row], shift[row]),
            (Some(shift), Some(by)) => score.mul_add(self.scores.factor[row], shift[row] - by),
            (None, None) => score,
            (None, Some(by)) => score - by,
        };
        logarithm.exp2()
    }
}
