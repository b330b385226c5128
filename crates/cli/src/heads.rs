//! One head of a tensor at a time, without copies: how exact attention is spread over threads.

use half::{bf16, f16};
use sage_core::oracle;
use sage_core::sparse::Predictor;
use sage_core::{Call, Inputs};
use sageattention::{Geometry, Layout, Options, Result, Scheme, Tensor, TensorView, View};
use sageattn_files::qkv_file::Qkv;

use crate::inputs;

/// A query head of a batch entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
}

/// Checked queries, keys and values that can be taken head by head.
#[derive(Clone, Debug)]
pub struct Heads<'a> {
    qkv: &'a Qkv,
    options: Options,
    sinks: Option<&'a [f32]>,
    /// Query heads that share a key head.
    group_size: usize,
    list: Vec<Head>,
}

impl<'a> Heads<'a> {
    /// Checks the tensors, and attention sinks where there are some, as a call to attention would.
    pub fn new(qkv: &'a Qkv, options: Options, sinks: Option<&'a [f32]>) -> Result<Self> {
        let tensors = Inputs::new(qkv.q.view(), qkv.k.view(), qkv.v.view());
        let tensors = tensors.sinks(sinks.map(inputs::sinks).transpose()?);
        let problem = Call::check(&tensors, &options)?.problem;
        let list = (0..problem.batch)
            .flat_map(|batch| (0..problem.num_q_heads).map(move |head| Head { batch, head }))
            .collect();
        Ok(Heads { qkv, options, sinks, group_size: problem.group_size(), list })
    }

    /// All query heads.
    pub fn list(&self) -> &[Head] {
        &self.list
    }

    /// Channels of a head of queries and keys.
    pub fn head_dim(&self) -> usize {
        self.qkv.q.shape()[3]
    }

    /// Exact attention of one head, `[q_len, value_dim]`.
    pub fn exact(&self, head: Head) -> Result<Vec<f64>> {
        self.with_call(head, |call| oracle::exact(call).out)
    }

    /// A scheme's attention of one head, `[q_len, value_dim]`.
    pub fn scheme(&self, head: Head, scheme: &Scheme) -> Result<Vec<f64>> {
        self.with_call(head, |call| oracle::scheme(call, scheme).out)
    }

    /// What an oracle says of one head over the blocks that a predictor keeps of it.
    pub fn over_blocks<T>(
        &self,
        head: Head,
        predictor: &Predictor,
        oracle: impl FnOnce(&Call<'_>) -> T,
    ) -> Result<T> {
        let (inputs, options) = self.slices(head)?;
        let call = Call::check_sparse(&inputs, &options, predictor)?;
        let map = predictor.map(&call)?;
        Ok(oracle(&call.over(&map)?))
    }

    /// One head of an output.
    pub fn output(&self, out: &Tensor, head: Head) -> Result<Vec<f32>> {
        Ok(values(&slice("out", out.view(), self.options.layout, head)?))
    }

    /// The keys that a query head sees, `[kv_len, head_dim]`.
    pub fn keys(&self, head: Head) -> Result<Vec<f32>> {
        let kv_head = Head { head: head.head / self.group_size, ..head };
        Ok(values(&slice("k", self.qkv.k.view(), self.options.layout, kv_head)?))
    }

    fn with_call<T>(&self, head: Head, compute: impl FnOnce(&Call<'_>) -> T) -> Result<T> {
        let (inputs, options) = self.slices(head)?;
        // Of a dense call nothing is left out that a pooled tail could stand for.
        Ok(compute(&Call::check(&inputs, &options.pooled_tail(false))?))
    }

    /// The tensors of one head.
    fn slices(&self, head: Head) -> Result<(Inputs<'a>, Options)> {
        let layout = self.options.layout;
        let kv_head = Head { head: head.head / self.group_size, ..head };
        let tensors = Inputs::new(
            slice("q", self.qkv.q.view(), layout, head)?,
            slice("k", self.qkv.k.view(), layout, kv_head)?,
            slice("v", self.qkv.v.view(), layout, kv_head)?,
        );
        let own = self.sinks.map(|sinks| inputs::sinks(&sinks[head.head..=head.head])).transpose()?;
        let tensors = tensors.sinks(own);
        // The slices are all in one order, whatever the tensors' layout was.
        Ok((tensors, self.options.layout(Layout::Hnd)))
    }
}

/// One head as `[1, 1, seq, channels]`. One batch entry is every one's.
fn slice<'t>(name: &str, tensor: TensorView<'t>, layout: Layout, head: Head) -> Result<TensorView<'t>> {
    fn typed<'t, T: Copy>(name: &str, view: View<'t, T>, geometry: Geometry) -> Result<TensorView<'t>>
    where
        View<'t, T>: Into<TensorView<'t>>,
    {
        Ok(View::strided(name, view.data(), geometry)?.into())
    }
    let (shape, strides) = (tensor.shape(), tensor.geometry().strides());
    let (heads, seq) = match layout {
        Layout::Hnd => (1, 2),
        Layout::Nhd => (2, 1),
    };
    // An empty tensor has no first element to point at.
    let mut at = [0; 4];
    if !tensor.geometry().is_empty() {
        at[0] = if shape[0] == 1 { 0 } else { head.batch };
        at[heads] = head.head;
    }
    let geometry = Geometry::strided(
        name,
        &[1, 1, shape[seq], shape[3]],
        &[strides[0], strides[heads], strides[seq], strides[3]],
        tensor.geometry().index(at),
    )?;
    match tensor {
        TensorView::F32(view) => typed::<f32>(name, view, geometry),
        TensorView::F16(view) => typed::<f16>(name, view, geometry),
        TensorView::BF16(view) => typed::<bf16>(name, view, geometry),
    }
}

/// All elements of a head, widened.
fn values(head: &TensorView<'_>) -> Vec<f32> {
    let shape = head.shape();
    let (rows, width) = (shape[2], shape[3]);
    (0..rows * width).map(|i| head.at([0, 0, i / width, i % width])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sageattention::DType;

    /// Heads taken one by one are those of the whole, in both layouts, with shared key heads and a shared batch of them.
    #[test]
    fn heads_one_by_one_are_the_whole() {
        for layout in [Layout::Hnd, Layout::Nhd] {
            let tensor = |[batch, heads, rows, channels]: [usize; 4], seed| {
                let shape = match layout {
                    Layout::Hnd => [batch, heads, rows, channels],
                    Layout::Nhd => [batch, rows, heads, channels],
                };
                inputs::normal(DType::F32, &shape, seed).unwrap()
            };
            let (q, k) = (tensor([2, 4, 5, 8], 1), tensor([2, 2, 7, 8], 2));
            let qkv = Qkv { prefix: String::new(), q, k, v: tensor([1, 2, 7, 6], 3) };
            let options = Options::default().layout(layout);
            for sinks in [None, Some(&[0.5, -1.0, f32::NEG_INFINITY, 2.0][..])] {
                let heads = Heads::new(&qkv, options, sinks).unwrap();
                let inputs = Inputs::new(qkv.q.view(), qkv.k.view(), qkv.v.view())
                    .sinks(sinks.map(|sinks| inputs::sinks(sinks).unwrap()));
                let whole = oracle::exact(&Call::check(&inputs, &options).unwrap()).out;
                let parts: Vec<f64> =
                    heads.list().iter().flat_map(|&head| heads.exact(head).unwrap()).collect();
                assert_eq!(parts, whole);
            }
        }
    }
}
