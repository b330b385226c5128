//! Files of queries, keys and values: safetensors with tensors `q`, `k` and `v` behind any number of prefixes.

use half::{bf16, f16};
use sage_core::{Error, Tensor};

pub use crate::file_error::{FileError, Result, printable};
use crate::header::{self, Entry};

/// A file's tensors, borrowed from its bytes.
#[derive(Clone, Debug)]
pub struct QkvFile<'a> {
    bytes: &'a [u8],
    entries: Vec<Entry>,
}

/// Queries, keys and values with one prefix.
#[derive(Clone, Debug, PartialEq)]
pub struct Qkv {
    /// What stands before `q`, `k` and `v` in the tensors' names.
    pub prefix: String,
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// A mask as it stands in a file.
#[derive(Clone, Debug, PartialEq)]
pub enum MaskTensor {
    /// `BOOL` or `U8`: not zero means that the key is visible.
    Bool {
        /// One flag for each pair of query and key, in row-major order.
        visible: Vec<bool>,
        /// Sizes of the dimensions.
        shape: Vec<usize>,
    },
    /// `F32`, `F16` or `BF16`, added to the scores.
    Additive(Tensor),
}

/// Reads the header and proves that every tensor lies inside `bytes`. Nothing of the tensors is copied.
///
/// # Errors
/// When `bytes` is not a whole and consistent safetensors file.
pub fn parse(bytes: &[u8]) -> Result<QkvFile<'_>> {
    Ok(QkvFile { bytes, entries: header::read(bytes)? })
}

impl QkvFile<'_> {
    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.entries.iter().map(|entry| entry.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Prefixes for which the file holds all of `q`, `k` and `v`, in natural order (`layer2.` before `layer10.`).
    ///
    /// # Errors
    /// When there is none.
    pub fn prefixes(&self) -> Result<Vec<String>> {
        let names = self.names();
        let holds = |name: String| names.binary_search(&name.as_str()).is_ok();
        let mut prefixes: Vec<String> = names
            .iter()
            .filter_map(|name| name.strip_suffix('q'))
            .filter(|prefix| holds(format!("{prefix}k")) && holds(format!("{prefix}v")))
            .map(str::to_owned)
            .collect();
        if prefixes.is_empty() {
            return Err(FileError::NoQkv { found: self.listing() });
        }
        prefixes.sort_by_cached_key(|prefix| natural(prefix));
        Ok(prefixes)
    }

    /// Queries, keys and values behind `prefix`.
    ///
    /// # Errors
    /// When one is missing, or has an element type or number of dimensions that attention does not take.
    pub fn load(&self, prefix: &str) -> Result<Qkv> {
        let [q, k, v] = ["q", "k", "v"].map(|name| self.tensor(&format!("{prefix}{name}")));
        Ok(Qkv { prefix: prefix.to_owned(), q: q?, k: k?, v: v? })
    }

    /// A tensor of floating-point numbers.
    ///
    /// # Errors
    /// When it is missing, or has an element type or number of dimensions that attention does not take.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        self.float(entry)?.ok_or_else(|| FileError::Unusable {
            name: printable(name),
            what: "dtype",
            found: entry.dtype.clone(),
            wanted: "F32, F16 or BF16".into(),
        })
    }

    /// A mask.
    ///
    /// # Errors
    /// When it is missing, or has an element type or number of dimensions that a mask cannot have.
    pub fn mask(&self, name: &str) -> Result<MaskTensor> {
        let entry = self.entry(name)?;
        if matches!(entry.dtype.as_str(), "BOOL" | "U8") {
            let visible = self.bytes[entry.bytes.clone()].iter().map(|&byte| byte != 0).collect();
            return Ok(MaskTensor::Bool { visible, shape: entry.shape.clone() });
        }
        self.float(entry)?.map(MaskTensor::Additive).ok_or_else(|| FileError::Unusable {
            name: printable(name),
            what: "dtype",
            found: entry.dtype.clone(),
            wanted: "BOOL, U8, F32, F16 or BF16 for a mask".into(),
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.iter().find(|entry| entry.name == name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> FileError {
        FileError::Missing { name: printable(name), found: self.listing() }
    }

    /// The names there are, for messages.
    fn listing(&self) -> String {
        const SHOWN: usize = 12;
        let names = self.names();
        let mut found = names.iter().take(SHOWN).map(|name| printable(name)).collect::<Vec<_>>().join(", ");
        if names.len() > SHOWN {
            found.push_str(&format!(" and {} more", names.len() - SHOWN));
        } else if names.is_empty() {
            found.push_str("no tensor at all");
        }
        found
    }

    /// The tensor of an entry, or `None` when its element type is not a floating-point one.
    fn float(&self, entry: &Entry) -> Result<Option<Tensor>> {
        let bytes = &self.bytes[entry.bytes.clone()];
        // Copied element by element: the file's bytes need not be aligned.
        let (pairs, _) = bytes.as_chunks::<2>();
        let (quads, _) = bytes.as_chunks::<4>();
        let tensor = match entry.dtype.as_str() {
            "F32" => {
                Tensor::new(quads.iter().map(|&b| f32::from_le_bytes(b)).collect::<Vec<_>>(), &entry.shape)
            }
            "F16" => {
                Tensor::new(pairs.iter().map(|&b| f16::from_le_bytes(b)).collect::<Vec<_>>(), &entry.shape)
            }
            "BF16" => {
                Tensor::new(pairs.iter().map(|&b| bf16::from_le_bytes(b)).collect::<Vec<_>>(), &entry.shape)
            }
            _ => return Ok(None),
        };
        tensor.map(Some).map_err(|error| FileError::Unusable {
            name: printable(&entry.name),
            what: "shape",
            found: format!("{:?}", entry.shape),
            wanted: match error {
                Error::Shape { wanted, .. } => wanted.into(),
                other => other.to_string().into(),
            },
        })
    }
}

/// A key by which numbers in names sort by value.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, tail) = rest.split_at(text);
        let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (digits, tail) = tail.split_at(digits);
        parts.push((text.to_owned(), digits.parse().unwrap_or(u64::MAX)));
        rest = tail;
    }
    parts
}
