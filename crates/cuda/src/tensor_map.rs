//! Tensor maps: how the bulk copy engine finds its way through a tensor.

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use sage_ptx::{Arg, BoxedTensor, TensorMapBytes};

use crate::device::Device;
use crate::driver::{Driver, cu};
use crate::error::{Error, Result};

const MAX_RANK: usize = 5;
const MAX_SIZE: u64 = 1 << 32;
const STRIDE_END: u64 = 1 << 40;
const MAX_TILE: u32 = 256;

/// Type of a tensor's elements, as far as copying goes: 8-bit floats and `i8` are [`U8`](ElementType::U8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ElementType {
    U8,
    U16,
    U32,
    I32,
    U64,
    I64,
    F16,
    BF16,
    F32,
}

impl ElementType {
    /// Size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::U8 => 1,
            ElementType::U16 | ElementType::F16 | ElementType::BF16 => 2,
            ElementType::U32 | ElementType::I32 | ElementType::F32 => 4,
            ElementType::U64 | ElementType::I64 => 8,
        }
    }

    const fn raw(self) -> DataType {
        match self {
            ElementType::U8 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            ElementType::U16 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            ElementType::U32 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            ElementType::I32 => DataType::CU_TENSOR_MAP_DATA_TYPE_INT32,
            ElementType::U64 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT64,
            ElementType::I64 => DataType::CU_TENSOR_MAP_DATA_TYPE_INT64,
            ElementType::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            ElementType::BF16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            ElementType::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        }
    }
}

/// How the 16-byte chunks of a tile's rows are exchanged in shared memory, so that columns are read without conflicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// Not at all.
    #[default]
    None,
    /// Within 32 bytes.
    B32,
    /// Within 64 bytes.
    B64,
    /// Within 128 bytes.
    B128,
}

impl Swizzle {
    /// Bytes within which chunks change places, which is the most a tile's row can have.
    pub const fn span(self) -> Option<usize> {
        match self {
            Swizzle::None => None,
            Swizzle::B32 => Some(32),
            Swizzle::B64 => Some(64),
            Swizzle::B128 => Some(128),
        }
    }
}

/// How much the L2 cache fetches when a copy misses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum L2Promotion {
    /// What is asked for.
    #[default]
    None,
    /// 64 bytes.
    B64,
    /// 128 bytes.
    B128,
    /// 256 bytes.
    B256,
}

/// A tensor in global memory and the tile of it that one bulk copy moves. Dimensions go from the innermost outwards.
///
/// Parts of a tile outside the tensor are read as zeros and not written.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap<'a> {
    /// Tensor, for messages.
    pub name: &'a str,
    /// Type of its elements.
    pub element: ElementType,
    /// Address in global memory.
    pub address: u64,
    /// Elements in each dimension.
    pub shape: &'a [u64],
    /// Bytes from one element to the next in each dimension but the innermost, which has no gaps.
    pub strides: &'a [u64],
    /// Elements of a tile in each dimension.
    pub tile: &'a [u32],
    /// Order of the tile in shared memory.
    pub swizzle: Swizzle,
    /// What the L2 cache fetches.
    pub promotion: L2Promotion,
}

impl<'a> From<&'a BoxedTensor> for TensorMap<'a> {
    fn from(tensor: &'a BoxedTensor) -> TensorMap<'a> {
        TensorMap {
            name: tensor.name,
            element: if tensor.element_bytes == 1 { ElementType::U8 } else { ElementType::U16 },
            address: tensor.address,
            shape: &tensor.shape,
            strides: &tensor.strides,
            tile: &tensor.tile,
            swizzle: match tensor.swizzle {
                32 => Swizzle::B32,
                64 => Swizzle::B64,
                _ => Swizzle::B128,
            },
            promotion: L2Promotion::B256,
        }
    }
}

impl TensorMap<'_> {
    /// Checks the rules of the hardware, which the driver would answer with a bare `CUDA_ERROR_INVALID_VALUE`.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: &str, found: String, wanted: String| {
            Err(Error::value(format!("tensor map of `{}`: {what}", self.name), found, wanted))
        };
        let rank = self.shape.len();
        if !(1..=MAX_RANK).contains(&rank) {
            return wrong("number of dimensions", rank.to_string(), format!("1 to {MAX_RANK}"));
        }
        if self.strides.len() != rank - 1 {
            let wanted = format!("{}, one less than dimensions", rank - 1);
            return wrong("number of strides", self.strides.len().to_string(), wanted);
        }
        if self.tile.len() != rank {
            let wanted = format!("{rank}, as many as the tensor");
            return wrong("number of the tile's dimensions", self.tile.len().to_string(), wanted);
        }
        if self.address == 0 || !self.address.is_multiple_of(16) {
            return wrong("address", format!("{:#x}", self.address), "a multiple of 16 that is not 0".into());
        }
        for (axis, &size) in self.shape.iter().enumerate() {
            if !(1..=MAX_SIZE).contains(&size) {
                return wrong(
                    &format!("size of dimension {axis}"),
                    size.to_string(),
                    format!("1 to {MAX_SIZE}"),
                );
            }
        }
        for (axis, &stride) in self.strides.iter().enumerate() {
            if !stride.is_multiple_of(16) || stride >= STRIDE_END {
                let what = format!("stride of dimension {} in bytes", axis + 1);
                return wrong(&what, stride.to_string(), format!("a multiple of 16 below {STRIDE_END}"));
            }
        }
        for (axis, &size) in self.tile.iter().enumerate() {
            if !(1..=MAX_TILE).contains(&size) {
                let what = format!("size of the tile's dimension {axis}");
                return wrong(&what, size.to_string(), format!("1 to {MAX_TILE}"));
            }
        }
        let row = self.tile[0] as usize * self.element.bytes();
        if !row.is_multiple_of(16) {
            return wrong("size of the tile's row in bytes", row.to_string(), "a multiple of 16".into());
        }
        if let Some(span) = self.swizzle.span().filter(|&span| row > span) {
            let wanted = format!("at most the swizzle's {span}");
            return wrong("size of the tile's row in bytes", row.to_string(), wanted);
        }
        Ok(())
    }

    /// The map as a kernel's argument. It holds the address, so a tensor that moves needs a new one.
    pub fn encode(&self, device: &Device) -> Result<Arg> {
        self.check()?;
        Driver::get()?.require_tensor_maps()?;
        let swizzle = match self.swizzle {
            Swizzle::None => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let promotion = match self.promotion {
            L2Promotion::None => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            L2Promotion::B64 => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
            L2Promotion::B128 => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            L2Promotion::B256 => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        };
        let mut map = CUtensorMap { opaque: [0; 16] };
        let _entered = device.enter()?;
        // SAFETY: `check` found the lists to have the lengths that go with the rank; the pointers are to locals and to
        // borrowed slices; the address is only written down.
        unsafe {
            cu!(cuTensorMapEncodeTiled(
                &mut map,
                self.element.raw(),
                self.shape.len() as u32,
                std::ptr::without_provenance_mut(self.address as usize),
                self.shape.as_ptr(),
                self.strides.as_ptr(),
                self.tile.as_ptr(),
                [1; MAX_RANK].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                promotion,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ))
        }?;
        Ok(Arg::TensorMap(TensorMapBytes(map.opaque)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: TensorMap<'_> = TensorMap {
        name: "k",
        element: ElementType::F16,
        address: 0x7f00_0000_0100,
        shape: &[128, 1000, 8],
        strides: &[2048, 2_048_000],
        tile: &[64, 128, 1],
        swizzle: Swizzle::B128,
        promotion: L2Promotion::B256,
    };

    fn message(map: TensorMap<'_>) -> String {
        map.check().unwrap_err().to_string()
    }

    #[test]
    fn maps_within_the_rules_pass() {
        GOOD.check().unwrap();
        let wide =
            TensorMap { swizzle: Swizzle::None, tile: &[256, 256, 1], element: ElementType::F32, ..GOOD };
        wide.check().unwrap();
        TensorMap { shape: &[64], strides: &[], tile: &[64], ..GOOD }.check().unwrap();
        TensorMap { shape: &[1 << 32, 1, 1], strides: &[(1 << 40) - 16, 16], ..GOOD }.check().unwrap();
    }

    #[test]
    fn every_rule_that_is_broken_is_named() {
        let cases: [(TensorMap<'_>, &str); 14] = [
            (TensorMap { shape: &[], ..GOOD }, "number of dimensions: value is 0, expected 1 to 5"),
            (TensorMap { shape: &[1; 6], ..GOOD }, "number of dimensions: value is 6, expected 1 to 5"),
            (
                TensorMap { strides: &[16], ..GOOD },
                "number of strides: value is 1, expected 2, one less than dimensions",
            ),
            (
                TensorMap { tile: &[64, 1], ..GOOD },
                "number of the tile's dimensions: value is 2, expected 3, as many as the tensor",
            ),
            (
                TensorMap { address: 0, ..GOOD },
                "address: value is 0x0, expected a multiple of 16 that is not 0",
            ),
            (
                TensorMap { address: 0x108, ..GOOD },
                "address: value is 0x108, expected a multiple of 16 that is not 0",
            ),
            (
                TensorMap { shape: &[128, 0, 8], ..GOOD },
                "size of dimension 1: value is 0, expected 1 to 4294967296",
            ),
            (
                TensorMap { shape: &[(1 << 32) + 1, 1, 1], ..GOOD },
                "size of dimension 0: value is 4294967297, expected 1 to 4294967296",
            ),
            (
                TensorMap { strides: &[2048, 2056], ..GOOD },
                "stride of dimension 2 in bytes: value is 2056, expected a multiple of 16 below 1099511627776",
            ),
            (
                TensorMap { strides: &[1 << 40, 16], ..GOOD },
                "stride of dimension 1 in bytes: value is 1099511627776, expected a multiple of 16 below 1099511627776",
            ),
            (
                TensorMap { tile: &[64, 257, 1], ..GOOD },
                "size of the tile's dimension 1: value is 257, expected 1 to 256",
            ),
            (
                TensorMap { tile: &[64, 128, 0], ..GOOD },
                "size of the tile's dimension 2: value is 0, expected 1 to 256",
            ),
            (
                TensorMap { tile: &[12, 1, 1], ..GOOD },
                "size of the tile's row in bytes: value is 24, expected a multiple of 16",
            ),
            (
                TensorMap { tile: &[72, 1, 1], ..GOOD },
                "size of the tile's row in bytes: value is 144, expected at most the swizzle's 128",
            ),
        ];
        for (map, wanted) in cases {
            assert_eq!(message(map), format!("tensor map of `k`: {wanted}"));
        }
    }
}
