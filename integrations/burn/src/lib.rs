//! SageAttention for models in [burn](https://burn.dev): [`attention`] takes the place of
//! [`burn::tensor::module::attention`](burn_tensor::module::attention), on every backend of burn.
//!
//! Tensors pass through this machine's memory, whichever backend they are of, and attention is computed on the CPU unless
//! [`Attention::device`] names a GPU. There are no gradients: for a training step use burn's own function.

use burn_tensor::backend::Backend;
use burn_tensor::{Bool, DType, Tensor, TensorData, bf16, f16};
use sageattention::{Attention, Error, Mask, Result, View};

/// `softmax(query · keyᵀ / √head_dim) · value`, with the arguments of [`burn::tensor::module::attention`](burn_tensor::module::attention):
///
/// - `query`: `[batch, heads, queries, head_dim]`
/// - `key`, `value`: `[batch, key heads, keys, head_dim]`; fewer key heads than query heads is grouped-query attention
/// - `mask`: `[batch, heads, queries, keys]`, each of which may be 1; `true` hides a key from a query
///
/// # Errors
/// When shapes do not go together, or the tensors' elements are not f32, f16 or bf16: the error names the tensor, what was
/// found and what was expected.
pub fn attention<B: Backend>(
    query: Tensor<B, 4>,
    key: Tensor<B, 4>,
    value: Tensor<B, 4>,
    mask: Option<Tensor<B, 4, Bool>>,
) -> Result<Tensor<B, 4>> {
    attention_with(&Attention::new(), query, key, value, mask)
}

/// The same with options, such as a causal mask, a scheme or a GPU. `mask` hides keys beside what the options hide, and
/// takes the place of a mask that they have.
///
/// # Errors
/// As [`attention`], and when an option does not go with the tensors.
pub fn attention_with<B: Backend>(
    options: &Attention<'_>,
    query: Tensor<B, 4>,
    key: Tensor<B, 4>,
    value: Tensor<B, 4>,
    mask: Option<Tensor<B, 4, Bool>>,
) -> Result<Tensor<B, 4>> {
    let device = query.device();
    let [q, k, v] =
        [("query", query), ("key", key), ("value", value)].map(|(name, t)| host(name, t.into_data()));
    let visible = mask
        .map(|mask| (mask.dims(), mask.into_data().iter::<bool>().map(|hides| !hides).collect::<Vec<_>>()));
    let mut options = options.clone();
    if let Some((shape, visible)) = &visible {
        options = options.mask(Mask::Bool(View::contiguous("mask", visible, shape)?));
    }
    let out = options.forward(&q?, &k?, &v?)?.out;
    Ok(Tensor::from_data(TensorData::new(out.to_f32_vec(), out.shape()), &device))
}

/// A tensor of burn's data.
fn host(name: &str, data: TensorData) -> Result<sageattention::Tensor> {
    let (shape, dtype) = (data.shape.clone(), data.dtype);
    let refused = || Error::value("dtype", format!("{dtype:?} of {name}"), "f32, f16 or bf16");
    let tensor = match dtype {
        DType::F32 => data.into_vec::<f32>().map(|elements| sageattention::Tensor::new(elements, &shape)),
        DType::F16 => data.into_vec::<f16>().map(|elements| sageattention::Tensor::new(elements, &shape)),
        DType::BF16 => data.into_vec::<bf16>().map(|elements| sageattention::Tensor::new(elements, &shape)),
        _ => return Err(refused()),
    };
    tensor.map_err(|_| refused())?
}
