//! What the peers share: how a call is timed, and the shapes they are given.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Result of the peers' programs.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Times of repeated calls.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Milliseconds of each call, rising.
    pub ms: Vec<f64>,
}

impl Timing {
    /// Calls `f` once to warm up, then until `budget` is spent, 3 to 200 times.
    /// When one call alone takes the budget, that call is the sample.
    pub fn of(budget: Duration, mut f: impl FnMut()) -> Self {
        let mut call = || {
            let start = Instant::now();
            f();
            start.elapsed()
        };
        let first = call();
        let mut times = Vec::new();
        if first >= budget {
            times.push(first);
        } else {
            while times.len() < 3 || (times.iter().sum::<Duration>() < budget && times.len() < 200) {
                times.push(call());
            }
        }
        times.sort_unstable();
        Timing { ms: times.iter().map(|t| t.as_secs_f64() * 1e3).collect() }
    }

    /// The middle time, or the mean of the two in the middle.
    pub fn median_ms(&self) -> f64 {
        let n = self.ms.len();
        (self.ms[(n - 1) / 2] + self.ms[n / 2]) / 2.0
    }

    /// The shortest time.
    pub fn min_ms(&self) -> f64 {
        self.ms[0]
    }
}

/// Element types that the peers are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// Single precision.
    F32,
    /// bfloat16.
    BF16,
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
        })
    }
}

/// One problem, written `dtype:batch:heads:q_len:kv_len:head_dim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Element type of Q, K and V.
    pub dtype: DType,
    /// Sequences.
    pub batch: usize,
    /// Heads of Q, K and V.
    pub heads: usize,
    /// Queries of a sequence.
    pub q_len: usize,
    /// Keys of a sequence.
    pub kv_len: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("shape is {text:?}, expected dtype:batch:heads:q_len:kv_len:head_dim");
        let (dtype, sizes) = text.split_once(':').ok_or_else(wrong)?;
        let dtype = match dtype {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            other => return Err(format!("dtype is {other:?}, expected f32 or bf16")),
        };
        let sizes: Vec<usize> =
            sizes.split(':').map(|n| n.parse().map_err(|_| wrong())).collect::<Result<_, _>>()?;
        let &[batch, heads, q_len, kv_len, head_dim] = &sizes[..] else {
            return Err(wrong());
        };
        Ok(Shape { dtype, batch, heads, q_len, kv_len, head_dim })
    }
}

/// Value of `--name VALUE`, taken out of `args`.
pub fn take_option<T: FromStr>(args: &mut Vec<String>, name: &str) -> Result<Option<T>> {
    let Some(at) = args.iter().position(|a| a == name) else {
        return Ok(None);
    };
    if at + 1 >= args.len() {
        return Err(format!("{name}: a value is missing").into());
    }
    let value = args.remove(at + 1);
    args.remove(at);
    value.parse().map(Some).map_err(|_| format!("{name}: value is {value:?}, expected a number").into())
}
