//! A quantised KV cache in device memory: appending to it, and attention over it through block tables.
//!
//! What is stored is defined by [`sage_core::oracle::CachedHead`]. Every part of the pool is an array with a row for
//! each `[page][kv_head][slot]`, or `[page][kv_head]`; rows of codes are padded to whole chunks of 16 channels.

mod advance;
mod append;
mod attend;
mod pass;

use sage_core::{CacheLayout, Error, Result, ValueFormat};
use sage_ptx::{Code, Global, Target, Val};

use crate::integer::magnitude_bits;
use crate::params::kernel_params;

pub use advance::{CacheAdvanceArgs, CacheAdvanceConfig};
pub use append::{CacheAppendArgs, CacheAppendConfig};
pub use attend::{CacheAttendArgs, CacheAttendConfig, MAX_SPLIT_PAGES, ROWS};
pub use pass::{AppendCall, AppendTensors, AttendCall, AttendTensors};

/// Channels of a chunk: what a lane reads at once.
pub(crate) const CHUNK: usize = 16;

/// Threads of a block.
const THREADS: u32 = 128;

/// Warps of a block.
const WARPS: usize = THREADS as usize / 32;

/// How a pool stores tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Storage {
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of a page, a power of two.
    pub page_size: usize,
    /// How values are stored.
    pub values: ValueFormat,
}

/// Bytes of each part of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolBytes {
    /// INT8 codes, `[pages, kv_heads, page_size, pitch]`.
    pub keys: usize,
    /// Singles, `[pages, kv_heads, page_size]`.
    pub key_scales: usize,
    /// Singles, `[pages, kv_heads, pitch]`.
    pub constants: usize,
    /// `[pages, kv_heads, page_size, pitch]`.
    pub values: usize,
    /// Singles, `[pages, kv_heads, page_size]`, or nothing.
    pub value_scales: usize,
}

impl PoolBytes {
    /// All parts together.
    pub fn total(&self) -> usize {
        self.keys + self.key_scales + self.constants + self.values + self.value_scales
    }
}

impl Storage {
    /// For a cache with this layout on a target.
    ///
    /// # Errors
    /// When the target has no instructions for values of that form.
    pub fn new(layout: &CacheLayout, target: Target) -> Result<Self> {
        let CacheLayout { head_dim, page_size, values, .. } = *layout;
        let lacking = match values {
            ValueFormat::Fp8E4M3 if target.sm() < 89 => Some(("sm_89", ValueFormat::Int8)),
            ValueFormat::BF16 if target.sm() < 80 => Some(("sm_80", ValueFormat::F16)),
            _ => None,
        };
        if let Some((from, nearest)) = lacking {
            let what = format!("a KV cache with values in {values} on {target}");
            let instead = format!("they need {from} or later; the nearest that this GPU stores is {nearest}");
            return Err(Error::unsupported(what, instead));
        }
        Ok(Storage { head_dim, page_size, values })
    }

    /// Channels of a stored row.
    pub fn pitch(&self) -> usize {
        self.head_dim.next_multiple_of(CHUNK)
    }

    /// Bytes of a pool of `pages` pages.
    pub fn pool(&self, pages: usize, kv_heads: usize) -> PoolBytes {
        let heads = pages * kv_heads;
        let rows = heads * self.page_size;
        PoolBytes {
            keys: rows * self.pitch(),
            key_scales: 4 * rows,
            constants: 4 * heads * self.pitch(),
            values: rows * self.pitch() * self.values.bytes(),
            value_scales: if self.values.is_scaled() { 4 * rows } else { 0 },
        }
    }

    /// The pages in words.
    fn description(&self) -> String {
        let Storage { head_dim, page_size, values } = self;
        format!("head_dim {head_dim}, values in {values}, pages of {page_size} tokens")
    }

    /// Part of a kernel's name.
    fn suffix(&self) -> String {
        format!("{}_p{}_d{}", self.values.name().replace('-', "_"), self.page_size, self.head_dim)
    }

    fn page_bits(&self) -> i32 {
        self.page_size.ilog2() as i32
    }
}

kernel_params! {
    /// Addresses of a pool's parts, and of what says which pages are whose.
    PoolParams, PoolTensors {
        /// Pages of each sequence, i32 `[sequences, table_stride]`.
        tables: [i32],
        /// Tokens of each sequence, i32.
        kv_lens: [i32],
        /// Keys, [`PoolBytes::keys`].
        keys: [u32],
        /// Scales of keys.
        key_scales: [f32],
        /// Constants of pages.
        constants: [f32],
        /// Values.
        values: [u32],
        /// Scales of values.
        value_scales: [f32],
    }
}

/// A pool, inside a kernel: a row's codes, scales and constants.
#[derive(Clone, Copy)]
struct Pool<'k> {
    storage: Storage,
    kv_heads: Val<'k, i32>,
    parts: PoolParams<'k>,
}

impl<'k> Pool<'k> {
    /// Index of a page's head among all.
    #[track_caller]
    fn head(&self, page: Val<'k, i32>, head: Val<'k, i32>) -> Val<'k, i32> {
        page * self.kv_heads + head
    }

    /// Index of the row of a head's token.
    #[track_caller]
    fn row(&self, head: Val<'k, i32>, token: Val<'k, i32>) -> Val<'k, i32> {
        (head << self.storage.page_bits()) + (token & (self.storage.page_size as i32 - 1))
    }

    /// A head's constants.
    #[track_caller]
    fn constants_of(&self, head: Val<'k, i32>) -> Global<'k, f32> {
        self.parts.constants.at(head.mul_wide(self.storage.pitch() as i32))
    }

    /// A row's keys, four in a word.
    #[track_caller]
    fn keys_of(&self, row: Val<'k, i32>) -> Global<'k, u32> {
        self.parts.keys.at(row.mul_wide((self.storage.pitch() / 4) as i32))
    }

    /// A row's values, four or two in a word.
    #[track_caller]
    fn values_of(&self, row: Val<'k, i32>) -> Global<'k, u32> {
        self.parts.values.at(row.mul_wide((self.storage.pitch() * self.storage.values.bytes() / 4) as i32))
    }
}

/// A lane's channels of a row that a warp holds: for each 128 channels, four neighbouring ones.
struct Quads {
    count: usize,
    pitch: usize,
}

impl Quads {
    fn new(pitch: usize) -> Self {
        Quads { count: pitch.div_ceil(4 * 32), pitch }
    }

    /// Index of quad `i`, and whether the row has it.
    #[track_caller]
    fn quad<'k>(&self, lane: Val<'k, i32>, i: usize) -> (Val<'k, i32>, Val<'k, bool>) {
        let quad = lane + 32 * i as i32;
        (quad, quad.lt((self.pitch / 4) as i32))
    }
}

/// Four small integers as bytes of a word, the first lowest.
#[track_caller]
fn pack_bytes<'k>(integers: [Val<'k, i32>; 4]) -> Val<'k, u32> {
    let [a, b, c, d] = integers;
    ((a & 0xff) | ((b & 0xff) << 8) | ((c & 0xff) << 16) | (d << 24)).reinterpret()
}

/// Bits of the largest magnitude that the warp's lanes hold.
#[track_caller]
fn warp_magnitude<'k>(code: &'k Code, row: &[[Val<'k, f32>; 4]]) -> Val<'k, i32> {
    let zero = code.constant(0i32);
    row.iter().flatten().fold(zero, |max, x| max.max(magnitude_bits(*x))).warp_max()
}

/// The scale that maps a row's largest magnitude to `levels`: NaN where that is not finite.
#[track_caller]
fn scale_of<'k>(max_bits: Val<'k, i32>, levels: f32) -> Val<'k, f32> {
    let finite = max_bits.lt(f32::INFINITY.to_bits() as i32);
    finite.select(max_bits.reinterpret::<f32>() / levels, f32::NAN)
}
