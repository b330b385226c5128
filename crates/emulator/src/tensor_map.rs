//! What a bulk tensor copy knows of its tensor.

use std::array;

use sage_ptx::{Arg, BoxedTensor, TensorMapBytes};

use crate::fault::{FaultKind, Outcome, Trouble};

/// How a box lies in shared memory: its chunks of 16 bytes XORed with the number of their row of 128 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// One row after the other.
    #[default]
    None,
    /// Within 32 bytes.
    Bytes32,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Chunks of 16 bytes that change places among each other.
    pub(crate) const fn chunks(self) -> u32 {
        match self {
            Swizzle::None => 1,
            Swizzle::Bytes32 => 2,
            Swizzle::Bytes64 => 4,
            Swizzle::Bytes128 => 8,
        }
    }
}

/// A tensor in global memory and the box that one copy moves: the emulator's `CUtensorMap`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element_bytes: u32,
    /// Elements along each of 1 to 5 dimensions, the innermost first.
    pub shape: Vec<u64>,
    /// Bytes from one element to the next along each dimension but the innermost; multiples of 16.
    pub strides: Vec<u64>,
    /// Elements of the box along each dimension, up to 256.
    pub box_shape: Vec<u32>,
    /// The box in shared memory.
    pub swizzle: Swizzle,
}

/// No shared memory holds more.
const MAX_BOX_BYTES: u64 = 227 * 1024;

impl From<&BoxedTensor> for TensorMap {
    fn from(tensor: &BoxedTensor) -> TensorMap {
        TensorMap {
            address: tensor.address,
            element_bytes: tensor.element_bytes as u32,
            shape: tensor.shape.to_vec(),
            strides: tensor.strides.to_vec(),
            box_shape: tensor.tile.to_vec(),
            swizzle: match tensor.swizzle {
                32 => Swizzle::Bytes32,
                64 => Swizzle::Bytes64,
                _ => Swizzle::Bytes128,
            },
        }
    }
}

const MAGIC: u64 = 0x5a9e_0000_0000_0000;

impl TensorMap {
    /// As a kernel argument.
    ///
    /// The 128 bytes are the emulator's own encoding, which no GPU understands. A map that the hardware would refuse is
    /// reported when a kernel uses it.
    pub fn arg(&self) -> Arg {
        let rank = self.shape.len().min(5);
        let get = |values: &[u64], i: usize| values.get(i).copied().unwrap_or(0);
        let narrow: [u64; 5] = array::from_fn(|i| u64::from(self.box_shape.get(i).copied().unwrap_or(0)));
        let mut words = [0; 16];
        words[0] = self.address;
        words[1] = MAGIC
            | rank as u64
            | u64::from(self.element_bytes & 0xff) << 8
            | u64::from(self.swizzle.chunks()) << 16
            | (self.strides.len().min(0xff) as u64) << 24
            | (self.box_shape.len().min(0xff) as u64) << 32;
        for i in 0..5 {
            words[2 + i] = get(&self.shape, i);
        }
        for i in 0..4 {
            words[7 + i] = get(&self.strides, i);
        }
        words[11..].copy_from_slice(&narrow);
        Arg::TensorMap(TensorMapBytes(words))
    }

    /// Reads an argument back, and refuses what the hardware would.
    pub(crate) fn decode(bytes: &TensorMapBytes) -> Outcome<TensorMap> {
        let words = &bytes.0;
        let wrong = |detail: String| Err(Trouble::new(FaultKind::TensorMap, format!("tensor map: {detail}")));
        if words[1] & 0xffff_0000_0000_0000 != MAGIC {
            return wrong("not made by the emulator".into());
        }
        let rank = (words[1] & 0xff) as usize;
        if !(1..=5).contains(&rank) {
            return wrong(format!("{rank} dimensions, expected 1 to 5"));
        }
        let map = TensorMap {
            address: words[0],
            element_bytes: (words[1] >> 8 & 0xff) as u32,
            shape: words[2..2 + rank].to_vec(),
            strides: words[7..7 + rank - 1].to_vec(),
            box_shape: words[11..11 + rank].iter().map(|&n| n as u32).collect(),
            swizzle: match words[1] >> 16 & 0xff {
                8 => Swizzle::Bytes128,
                4 => Swizzle::Bytes64,
                2 => Swizzle::Bytes32,
                _ => Swizzle::None,
            },
        };
        let (strides, boxes) = ((words[1] >> 24 & 0xff) as usize, (words[1] >> 32 & 0xff) as usize);
        if strides != rank - 1 || boxes != rank {
            return wrong(format!(
                "{strides} strides and {boxes} sizes of the box, expected {} and {rank}",
                rank - 1
            ));
        }
        if !matches!(map.element_bytes, 1 | 2 | 4 | 8) {
            return wrong(format!("elements of {} bytes, expected 1, 2, 4 or 8", map.element_bytes));
        }
        if !map.address.is_multiple_of(16) {
            return wrong(format!("address {:#x}, expected a multiple of 16", map.address));
        }
        if let Some(stride) =
            map.strides.iter().find(|&&stride| !stride.is_multiple_of(16) || stride >= 1 << 40)
        {
            return wrong(format!("stride {stride}, expected a multiple of 16 below 2^40"));
        }
        if let Some(size) = map.shape.iter().find(|&&size| size == 0 || size > 1 << 32) {
            return wrong(format!("size {size}, expected 1 to 2^32"));
        }
        if let Some(size) = map.box_shape.iter().find(|&&size| size == 0 || size > 256) {
            return wrong(format!("box of {size} elements, expected 1 to 256"));
        }
        let row = map.row_bytes();
        if !row.is_multiple_of(16) {
            return wrong(format!("rows of the box have {row} bytes, expected a multiple of 16"));
        }
        let bytes = map.box_shape.iter().fold(u64::from(map.element_bytes), |bytes, &n| bytes * u64::from(n));
        if bytes > MAX_BOX_BYTES {
            return wrong(format!("box of {bytes} bytes, expected at most {MAX_BOX_BYTES}"));
        }
        let span = 16 * map.swizzle.chunks();
        if map.swizzle != Swizzle::None && row > span {
            return wrong(format!("rows of the box have {row} bytes, expected at most the swizzle's {span}"));
        }
        Ok(map)
    }

    /// Bytes of a row of the box.
    pub(crate) fn row_bytes(&self) -> u32 {
        self.box_shape.first().map_or(0, |&n| n * self.element_bytes)
    }

    /// Rows of the box.
    pub(crate) fn rows(&self) -> u32 {
        self.box_shape.iter().skip(1).product()
    }

    /// Address of a row of the box at `corner` and the elements of it inside of the tensor, or `None` where the row
    /// lies outside.
    pub(crate) fn row(&self, corner: &[i32], row: u32) -> Option<(u64, std::ops::Range<i64>)> {
        let mut address = self.address;
        let mut rest = row;
        let outer = corner.iter().zip(&self.shape).zip(&self.box_shape).skip(1).zip(&self.strides);
        for (((&first, &shape), &size), &stride) in outer {
            let at = i64::from(first) + i64::from(rest % size);
            rest /= size;
            if at < 0 || at as u64 >= shape {
                return None;
            }
            address = address.wrapping_add((at as u64).wrapping_mul(stride));
        }
        let (first, count) = (i64::from(corner[0]), i64::from(self.box_shape[0]));
        let inside = (-first).clamp(0, count)..(self.shape[0] as i64 - first).clamp(0, count);
        address = address.wrapping_add((first * i64::from(self.element_bytes)) as u64);
        Some((address, inside))
    }
}
