//! The header of a safetensors file: where each tensor lies, proven to be inside the file.
//!
//! The format's own crate is used for writing. For reading, three things are wanted that it does not give: an error
//! that names the tensor, the value found and the value wanted; refusal of a name that occurs twice; and sums of
//! sizes that cannot overflow, whatever a header claims.

use std::fmt;
use std::ops::Range;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::file_error::{FileError, Result, printable};

/// Bytes of the number in front of the header.
const PREFIX: usize = 8;

/// Most dimensions that a tensor may claim; more than any use here needs, so that messages stay short.
const MAX_DIMENSIONS: usize = 8;

/// A tensor's entry in the header.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// Bits of one element of each element type that the format knows.
fn bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Entries of all tensors, in the order of their bytes.
pub(crate) fn read(file: &[u8]) -> Result<Vec<Entry>> {
    let wrong = |what: &str, found: String, wanted: String| {
        Err(FileError::Malformed { what: what.to_owned(), found, wanted })
    };
    let Some((length, rest)) = file.split_first_chunk::<PREFIX>() else {
        return wrong("file", format!("{} bytes", file.len()), format!("at least {PREFIX}"));
    };
    let length = u64::from_le_bytes(*length);
    let Some((header, data)) = usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n)) else {
        return wrong(
            "header",
            format!("{length} bytes"),
            format!("at most the {} bytes that the file has left", rest.len()),
        );
    };
    let header = match serde_json::from_slice::<Header>(header) {
        Ok(header) => header,
        Err(error) => {
            return wrong(
                "header",
                format!("invalid JSON ({})", printable(&error.to_string())),
                "a JSON object of tensors".into(),
            );
        }
    };
    let start = PREFIX + length as usize;
    let mut entries = header
        .0
        .into_iter()
        .map(|(name, info)| entry(name, info, start, data.len()))
        .collect::<Result<Vec<_>>>()?;
    // Empty tensors share their neighbour's start, so both ends take part in the order.
    entries.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
    let mut end = start;
    for entry in &entries {
        if entry.bytes.start != end {
            return wrong(
                &format!("tensor \"{}\"", printable(&entry.name)),
                format!("a start at data byte {}", entry.bytes.start - start),
                format!("{}, the end of the tensor before", end - start),
            );
        }
        end = entry.bytes.end;
    }
    if end != file.len() {
        return wrong(
            "tensors",
            format!("an end at data byte {}", end - start),
            format!("{}, the end of the file", data.len()),
        );
    }
    Ok(entries)
}

/// Checks what the header says of one tensor. The data starts at byte `start` of the file and has `len` bytes.
fn entry(name: String, info: Info, start: usize, len: usize) -> Result<Entry> {
    let wrong = |found: String, wanted: String| {
        Err(FileError::Malformed { what: format!("tensor \"{}\"", printable(&name)), found, wanted })
    };
    let [from, to] = info.data_offsets;
    let (Ok(first), Ok(last)) = (usize::try_from(from), usize::try_from(to)) else {
        return wrong(
            format!("data_offsets [{from}, {to}]"),
            format!("offsets within the {len} bytes of data"),
        );
    };
    if first > last || last > len {
        return wrong(
            format!("data_offsets [{from}, {to}]"),
            format!("rising offsets within the {len} bytes of data"),
        );
    }
    let Some(bits) = bits(&info.dtype) else {
        return wrong(
            format!("dtype {}", printable(&info.dtype)),
            "a dtype of the safetensors format".into(),
        );
    };
    if info.shape.len() > MAX_DIMENSIONS {
        return wrong(format!("{} dimensions", info.shape.len()), format!("at most {MAX_DIMENSIONS}"));
    }
    let shape: Option<Vec<usize>> = info.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let size = |shape: &[usize]| match shape.contains(&0) {
        true => Some(0),
        false => shape.iter().try_fold(bits, |bits, &n| bits.checked_mul(n)),
    };
    let whole = |shape: Vec<usize>| Some((size(&shape).filter(|bits| bits.is_multiple_of(8))? / 8, shape));
    let Some((size, shape)) = shape.and_then(whole) else {
        let found = format!("{} {:?}", info.dtype, info.shape);
        return wrong(found, "whole bytes, fewer than 2⁶⁴ bits".into());
    };
    if size != last - first {
        let wanted = format!("{size} for {} {shape:?}", info.dtype);
        return wrong(format!("{} bytes of data", last - first), wanted);
    }
    Ok(Entry { name, dtype: info.dtype, shape, bytes: start + first..start + last })
}

/// What the header says of a tensor.
#[derive(serde::Deserialize)]
#[serde(expecting = "an object with dtype, shape and data_offsets")]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header, in the file's own order.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut entries = Vec::new();
                let mut names = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(de::Error::custom(format!("tensor \"{name}\" occurs twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
