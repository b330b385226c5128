//! A quantised KV cache in this machine's memory: pages of keys and values, appending to them, attention over them.

mod append;
mod attend;

use aligned_vec::AVec;
use half::{bf16, f16};
use sage_core::{BlockTables, CacheLayout, Error, PageCopy, Result, ValueFormat};

use crate::kernels::{CHANNELS, Stored};

/// The pages of a quantised KV cache.
///
/// What they hold is defined by [`sage_core::oracle::CachedHead`]; which page holds what is [`BlockTables`]' business.
#[derive(Clone, Debug)]
pub struct CachePages {
    layout: CacheLayout,
    pages: Pages,
}

#[derive(Clone, Debug)]
enum Pages {
    F16(Vec<Page<f16>>),
    BF16(Vec<Page<bf16>>),
    Fp8E4M3(Vec<Page<u8>>),
    Int8(Vec<Page<i8>>),
}

/// Runs one expression with the typed pages.
macro_rules! typed {
    ($pages:expr, $name:ident => $body:expr) => {
        match $pages {
            Pages::F16($name) => $body,
            Pages::BF16($name) => $body,
            Pages::Fp8E4M3($name) => $body,
            Pages::Int8($name) => $body,
        }
    };
}
use typed;

/// Tokens of every head, head by head. Rows of codes lie without gaps; behind the last there is room to read on.
#[derive(Clone, Debug)]
struct Page<T> {
    /// `[num_kv_heads, width]`, zero beyond `head_dim`.
    constants: Vec<f32>,
    /// `[num_kv_heads, page_size, head_dim]`.
    k: AVec<i8>,
    /// `[num_kv_heads, page_size]`.
    k_scales: Vec<f32>,
    /// `[num_kv_heads, page_size, head_dim]`.
    v: AVec<T>,
    /// `[num_kv_heads, page_size]`, or nothing.
    v_scales: Vec<f32>,
}

impl<T: Stored> Page<T> {
    fn new(layout: &CacheLayout) -> Self {
        let rows = layout.num_kv_heads * layout.page_size;
        let codes = rows * layout.head_dim + CHANNELS;
        Page {
            constants: vec![0.0; layout.num_kv_heads * width(layout)],
            k: AVec::from_iter(64, std::iter::repeat_n(0, codes)),
            k_scales: vec![0.0; rows],
            v: AVec::from_iter(64, std::iter::repeat_n(T::ZERO, codes)),
            v_scales: vec![0.0; if layout.values.is_scaled() { rows } else { 0 }],
        }
    }

    fn bytes(&self) -> usize {
        let singles = self.constants.len() + self.k_scales.len() + self.v_scales.len();
        4 * singles + self.k.len() + self.v.len() * size_of::<T>()
    }
}

/// Channels of a row, padded to whole vectors.
fn width(layout: &CacheLayout) -> usize {
    layout.head_dim.next_multiple_of(CHANNELS)
}

impl CachePages {
    /// No page yet.
    ///
    /// # Errors
    /// When the layout is none.
    pub fn new(layout: CacheLayout) -> Result<Self> {
        layout.check()?;
        let pages = match layout.values {
            ValueFormat::F16 => Pages::F16(Vec::new()),
            ValueFormat::BF16 => Pages::BF16(Vec::new()),
            ValueFormat::Fp8E4M3 => Pages::Fp8E4M3(Vec::new()),
            ValueFormat::Int8 => Pages::Int8(Vec::new()),
        };
        Ok(CachePages { layout, pages })
    }

    /// What a page holds.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Pages there are, in use or not.
    pub fn len(&self) -> usize {
        typed!(&self.pages, pages => pages.len())
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all pages, in use or not.
    pub fn bytes(&self) -> usize {
        typed!(&self.pages, pages => pages.iter().map(Page::bytes).sum())
    }

    /// Makes pages until there are `pages`, and copies shared ones, as [`BlockTables::reserve`] asks for.
    ///
    /// # Errors
    /// When a copy names a page that does not exist.
    pub fn prepare(&mut self, pages: usize, copies: &[PageCopy]) -> Result<()> {
        let CachePages { layout, pages: typed } = self;
        typed!(typed, all => {
            while all.len() < pages {
                all.push(Page::new(layout));
            }
            for copy in copies {
                let (from, to) = (copy.from as usize, copy.to as usize);
                if from.max(to) >= all.len() {
                    return Err(Error::value("page", from.max(to), format!("below {}", all.len())));
                }
                all[to] = all[from].clone();
            }
        });
        Ok(())
    }
}

/// The pages of a sequence, which must exist.
fn checked_table(tables: &BlockTables, sequence: usize, pages: usize) -> Result<&[u32]> {
    let table = tables.table(sequence)?;
    match table.iter().find(|&&page| page as usize >= pages) {
        Some(page) => {
            let name = format!("block_table of sequence {sequence}");
            Err(Error::value(name, page, format!("pages below {pages}")))
        }
        None => Ok(table),
    }
}
