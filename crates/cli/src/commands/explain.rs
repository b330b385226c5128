//! `sageattn explain`: how a problem would be computed, and why.

use clap::Args;
use half::{bf16, f16};
use sageattention::{DType, Element, Geometry, MAX_HEAD_DIM, Plan, TensorView, View};
use serde_json::json;

use crate::call_options::{CallOptions, DTypeName, LayoutName, SchemeName};
use crate::console::Console;
use crate::failure::Result;

/// Say how a problem would be computed, and why
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing is computed, and no memory is needed for the tensors.

Examples:
  sageattn explain --batch 1 --heads 32 --kv-heads 8 --seq 4096 --head-dim 128 --causal
  sageattn explain --heads 12 --seq 1 --kv-len 8192 --head-dim 64
  sageattn explain --heads 12 --seq 512 --head-dim 32 --scheme auto --json")]
pub struct Explain {
    /// Sequences
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Query heads
    #[arg(long)]
    heads: usize,
    /// Key and value heads [default: as many as query heads]
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Queries of a sequence
    #[arg(long)]
    seq: usize,
    /// Keys of a sequence [default: as many as queries]
    #[arg(long)]
    kv_len: Option<usize>,
    /// Channels of a head
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=MAX_HEAD_DIM as i64))]
    head_dim: u16,
    /// Element type of queries, keys and values
    #[arg(long, value_enum, default_value_t)]
    dtype: DTypeName,
    /// Order of the tensors' dimensions
    #[arg(long, value_enum, default_value_t)]
    layout: LayoutName,
    #[command(flatten)]
    call: CallOptions,
    /// Scheme, or "auto" for the fastest that is accurate
    #[arg(long, value_name = "NAME", default_value = SchemeName::AUTOMATIC)]
    scheme: SchemeName,
}

impl Explain {
    /// Prints the plan.
    pub fn execute(&self, console: Console) -> Result<()> {
        let plan = self.plan()?;
        if !console.json {
            return console.print(&format!("{plan}\n"));
        }
        let p = plan.problem();
        console.print_json(&json!({
            "command": "explain",
            "batch": p.batch,
            "heads": p.num_q_heads,
            "kv_heads": p.num_kv_heads,
            "q_len": p.q_len,
            "kv_len": p.kv_len,
            "head_dim": p.head_dim,
            "dtype": p.dtype.name(),
            "causal": p.band.right == Some(0),
            "sm_scale": p.sm_scale,
            "scheme": plan.scheme().to_string(),
            "workspace_bytes": plan.workspace_bytes(),
            "plan": plan.to_string().lines().collect::<Vec<_>>(),
        }))
    }

    fn plan(&self) -> Result<Plan> {
        match self.dtype.into() {
            DType::F32 => self.plan_of::<f32>(),
            DType::F16 => self.plan_of::<f16>(),
            DType::BF16 => self.plan_of::<bf16>(),
        }
    }

    /// The plan for tensors that repeat one row of zeros, so that a large problem needs no memory.
    fn plan_of<T: Element>(&self) -> Result<Plan>
    where
        for<'a> View<'a, T>: Into<TensorView<'a>>,
    {
        let row = vec![T::ZERO; usize::from(self.head_dim)];
        let tensor = |name: &str, heads: usize, rows: usize| -> Result<View<'_, T>> {
            let shape = match self.layout {
                LayoutName::Hnd => [self.batch, heads, rows, row.len()],
                LayoutName::Nhd => [self.batch, rows, heads, row.len()],
            };
            Ok(View::strided(name, &row, Geometry::strided(name, &shape, &[0, 0, 0, 1], 0)?)?)
        };
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        let kv_len = self.kv_len.unwrap_or(self.seq);
        let attention = self.call.attention().layout(self.layout.into()).scheme(self.scheme.choice());
        Ok(attention.plan(
            tensor("q", self.heads, self.seq)?,
            tensor("k", kv_heads, kv_len)?,
            tensor("v", kv_heads, kv_len)?,
        )?)
    }
}
