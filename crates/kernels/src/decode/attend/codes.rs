//! Stored codes as operands in 16 bits, by a byte or two of each word at a time.

use half::f16;
use sage_core::ValueFormat;
use sage_ptx::{F16x2, Val};

/// What the numbers of [`e4m3_pair`] must be multiplied by.
pub(super) const E4M3_UNIT: f32 = 256.0;

/// By how much the numbers of [`int8_quad`] are above codes.
pub(super) const ABOVE_CODES: f32 = 1152.0;

/// Four INT8 codes plus [`ABOVE_CODES`] as f16, the first two in one register, the others in the next.
#[track_caller]
pub(super) fn int8_quad(word: Val<'_, u32>) -> [Val<'_, u32>; 2] {
    let unsigned = word ^ 0x8080_8080;
    [0x4140, 0x4342].map(|bytes| int8_pair_above(unsigned, bytes))
}

/// Two neighbouring channels of two tokens, each channel's values in a register: of 8 bits, those of `half` of the
/// words.
#[track_caller]
pub(super) fn channels<'k>(
    format: ValueFormat,
    [first, second]: [Val<'k, u32>; 2],
    half: usize,
) -> [Val<'k, u32>; 2] {
    // The channels' bytes, token by token.
    let of_half = [0x5140, 0x7362][half];
    match format {
        ValueFormat::F16 | ValueFormat::BF16 => {
            [0x5410, 0x7632].map(|bytes| first.permute_bytes(second, bytes))
        }
        ValueFormat::Int8 => {
            let [first, second] = [first, second].map(|word| word ^ 0x8080_8080);
            let bytes = first.permute_bytes(second, of_half);
            [0x4140, 0x4342].map(|of_channel| int8_pair(bytes, of_channel))
        }
        ValueFormat::Fp8E4M3 => {
            let bytes = first.permute_bytes(second, of_half);
            [0x1404, 0x3424].map(|of_channel| e4m3_pair(bytes, of_channel))
        }
    }
}

/// Two INT8 codes plus 128, which are bytes of `codes`, as f16 above 1024, where a byte needs no conversion.
#[track_caller]
fn int8_pair_above(codes: Val<'_, u32>, bytes: u32) -> Val<'_, u32> {
    codes.permute_bytes(0x6464_6464, bytes)
}

/// The same codes themselves.
#[track_caller]
fn int8_pair(codes: Val<'_, u32>, bytes: u32) -> Val<'_, u32> {
    // Instructions on pairs take no constants.
    let above = codes.code().var(F16x2([f16::from_f32_const(ABOVE_CODES); 2]));
    (int8_pair_above(codes, bytes).reinterpret::<F16x2>() - above.get()).word()
}

/// Two E4M3 codes, which are bytes of `codes`, as f16 times 2⁻⁸: their bits are those of halves, moved. (Targets before
/// sm_89 have no conversion.)
#[track_caller]
fn e4m3_pair(codes: Val<'_, u32>, bytes: u32) -> Val<'_, u32> {
    // Each code in the upper byte of a half.
    let high = codes.permute_bytes(0, bytes);
    (high & 0x8000_8000) | ((high & 0x7f00_7f00) >> 1)
}
