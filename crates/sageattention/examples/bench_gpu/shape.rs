//! What attention is timed on, as it is named on the command line.

use std::str::FromStr;

use crate::Result;

/// What attention is timed on.
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    /// Channels of a head of V.
    pub value_dim: usize,
    pub causal: bool,
    /// Queries and keys of a block, and the share of blocks that are computed.
    pub blocks: Option<(usize, usize, f64)>,
    pub mask: Option<MaskKind>,
}

/// An explicit mask, of all heads and batch entries alike.
#[derive(Clone, Copy)]
pub enum MaskKind {
    Padding,
    Dense,
    Triangle,
    Bias,
}

impl FromStr for Shape {
    type Err = Box<dyn std::error::Error>;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            format!(
                "shape is {text:?}, expected BATCH,HEADS[/KV_HEADS],LENGTH,HEAD_DIM[/VALUE_DIM][,VISIBLE…]"
            )
        };
        let parts: Vec<&str> = text.split(',').collect();
        let [batch, heads, length, head_dim, ref visible @ ..] = parts[..] else {
            return Err(wrong().into());
        };
        let (mut causal, mut blocks, mut mask) = (false, None, None);
        for visible in visible {
            match visible.split_once('=') {
                None if *visible == "causal" => causal = true,
                Some(("blocks", sizes)) => {
                    let (sizes, density) = sizes.split_once('@').ok_or_else(wrong)?;
                    let (q, k) = sizes.split_once('x').ok_or_else(wrong)?;
                    blocks = Some((q.parse()?, k.parse()?, density.parse()?));
                }
                Some(("mask", kind)) => {
                    mask = Some(match kind {
                        "padding" => MaskKind::Padding,
                        "dense" => MaskKind::Dense,
                        "triangle" => MaskKind::Triangle,
                        "bias" => MaskKind::Bias,
                        _ => return Err(wrong().into()),
                    });
                }
                _ => return Err(wrong().into()),
            }
        }
        let (heads, kv_heads) = heads.split_once('/').unwrap_or((heads, heads));
        let (head_dim, value_dim) = head_dim.split_once('/').unwrap_or((head_dim, head_dim));
        let (q_len, kv_len) = length.split_once('x').unwrap_or((length, length));
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        Ok(Shape {
            batch: number(batch)?,
            heads: number(heads)?,
            kv_heads: number(kv_heads)?,
            q_len: number(q_len)?,
            kv_len: number(kv_len)?,
            head_dim: number(head_dim)?,
            value_dim: number(value_dim)?,
            causal,
            blocks,
            mask,
        })
    }
}
