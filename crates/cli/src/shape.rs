//! Sizes of a problem whose speed is measured, in the form of the command line.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// Sizes of a problem to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "expected batch,heads,seq,head_dim such as 1,8,1024,64 or 1,32/8,1x4096,192/128".to_owned();
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
        let pair = |text: &str, separator| match text.split_once(separator) {
            Some((a, b)) => Ok((number(a)?, number(b)?)),
            None => number(text).map(|n| (n, n)),
        };
        let fields: Vec<&str> = text.split(',').collect();
        let [batch, heads, seq, head_dim] = fields[..] else { return Err(wrong()) };
        let ((heads, kv_heads), (q_len, kv_len)) = (pair(heads, '/')?, pair(seq, 'x')?);
        let (head_dim, value_dim) = pair(head_dim, '/')?;
        Ok(Shape { batch: number(batch)?, heads, kv_heads, q_len, kv_len, head_dim, value_dim })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim } = self;
        let heads = if heads == kv_heads { heads.to_string() } else { format!("{heads}/{kv_heads}") };
        let seq = if q_len == kv_len { q_len.to_string() } else { format!("{q_len}x{kv_len}") };
        write!(f, "{batch},{heads},{seq},{head_dim}")?;
        if value_dim == head_dim { Ok(()) } else { write!(f, "/{value_dim}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_prints_as_it_is_read() {
        for text in ["1,8,1024,64", "1,32/8,1x4096,128", "2,4,3x5,7", "1,128,4096,192/128"] {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
    }
}
