//! The operations that read a cache's codes, against their meaning.

use half::f16;

use super::{int_lanes, lanes};
use crate::InstructionSet;
use crate::isa::{Isa, Portable};

#[test]
fn bytes_widen_exactly() {
    fn check<I: Isa>() {
        let bytes: Vec<i8> = (-128..=127).collect();
        for bytes in bytes.chunks_exact(2 * I::LANES) {
            // SAFETY: `on_each_isa` names detected sets only, and the chunk is two vectors long.
            let (singles, pairs) = unsafe { (I::load_i8(bytes.as_ptr()), I::load_i8_pairs(bytes.as_ptr())) };
            let expected: Vec<f32> = bytes[..I::LANES].iter().map(|&x| f32::from(x)).collect();
            assert_eq!(lanes::<I>(singles), expected);
            let expected: Vec<i32> = bytes
                .chunks_exact(2)
                .map(|pair| (i32::from(pair[0]) & 0xffff) | i32::from(pair[1]) << 16)
                .collect();
            assert_eq!(int_lanes::<I>(pairs), expected);
        }
    }
    on_each_isa!(check);
}

#[test]
fn e4m3_codes_are_read_as_what_they_stand_for() {
    fn check<I: Isa>() {
        // All but NaN, which the quantiser never writes, in a multiple of every vector's length.
        let codes: Vec<u8> = (0..=255).map(|code: u8| if code & 0x7f == 0x7f { 0 } else { code }).collect();
        for codes in codes.chunks_exact(I::LANES) {
            // SAFETY: `on_each_isa` names detected sets only, and the chunk is a vector long.
            let found = unsafe { lanes::<I>(I::load_e4m3(codes.as_ptr())) };
            for (code, found) in codes.iter().zip(found) {
                let bits = (u16::from(*code) & 0x80) << 8 | (u16::from(*code) & 0x7f) << 7;
                let expected = f16::from_bits(bits).to_f32();
                assert_eq!(found.to_bits(), expected.to_bits(), "{code:#x}");
                assert_eq!(sage_core::oracle::round_e4m3(found * 256.0), found * 256.0, "{code:#x}");
            }
        }
    }
    on_each_isa!(check);
}

#[test]
fn four_sums_are_those_of_one_each() {
    fn check<I: Isa>() {
        let words: Vec<u32> = (0..4 * I::LANES as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        // SAFETY: `on_each_isa` names detected sets only, and each vector lies within the words.
        unsafe {
            let vectors = std::array::from_fn(|i| I::load_int(words[i * I::LANES..].as_ptr()));
            let expected: Vec<i32> = words
                .chunks_exact(I::LANES)
                .map(|words| words.iter().fold(0i32, |sum, &x| sum.wrapping_add(x as i32)))
                .collect();
            assert_eq!(I::reduce_add_ints(vectors).to_vec(), expected);
        }
    }
    on_each_isa!(check);
}
