//! Outputs that hold, before a call, what no call writes: so that it shows what was written, and what was not.

use sage_core::{Call, DType, Geometry};

use crate::{Memory, for_each_index};

/// The bits of a NaN in single precision that no kernel makes.
pub const F32: u32 = 0x7fd5_5000;

/// The bits of a NaN that no kernel makes.
fn poison(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => F32,
        DType::F16 | DType::BF16 => 0x7fa5,
    }
}

/// Memory for an output, all of it poison. A row-major output ends where its memory does, which the emulator watches;
/// behind others there is more.
pub fn output(dtype: DType, geometry: Geometry) -> Memory {
    let behind = if geometry.is_contiguous() { 0 } else { 8 };
    let len = geometry.span().map_or(0, |(_, last)| last as usize + 1 + behind);
    match dtype {
        DType::F32 => Memory::new(vec![f32::from_bits(F32); len], dtype, geometry),
        _ => {
            let memory = Memory::new(vec![0.0; len], dtype, geometry);
            memory.with_half_bits(&vec![poison(dtype) as u16; len])
        }
    }
}

/// The elements of an output in the oracle's order, widened.
///
/// # Panics
/// When something beside the output was written.
pub fn elements(checked: &Call<'_>, written: &Memory) -> Vec<f32> {
    let geometry = checked.check_output(written.dtype(), written.geometry()).unwrap();
    let (wide, bits) = (written.to_f32_memory(), written.bits());
    let mut beside = vec![true; wide.len()];
    let mut elements = Vec::with_capacity(geometry.len());
    for place in geometry.places() {
        let at = geometry.index(place) as usize;
        beside[at] = false;
        elements.push(wide[at]);
    }
    for (at, &bits) in bits.iter().enumerate() {
        let untouched = !beside[at] || bits == poison(written.dtype());
        assert!(
            untouched,
            "element {at} of memory, which is not the output's, was written: {:?}",
            checked.problem
        );
    }
    elements
}

/// Whether some element of an output was not written.
pub fn is_left(written: &Memory) -> bool {
    let (bits, mut left) = (written.bits(), false);
    for_each_index(written.shape(), |index| {
        left |= bits[written.position(index)] == poison(written.dtype());
    });
    left
}
