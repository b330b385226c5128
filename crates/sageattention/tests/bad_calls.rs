//! Calls that cannot be carried out: each is refused with one message that names what is wrong, the value found and
//! the value wanted.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use half::f16;
use sage_core::Pv;
use sageattention::{
    Alignment, Attention, BlockMask, DType, Device, Error, Geometry, KvCacheOptions, Layout, Mask, Preset,
    Result, Scheme, SmoothK, Tensor, TensorView, View, ViewMut, nearest_scheme,
};

/// A row-major tensor of zeros.
fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(DType::F32, shape).unwrap()
}

/// Attention of zeros in the given shapes.
fn shapes(attention: &Attention<'_>, q: &[usize], k: &[usize], v: &[usize]) -> Result<()> {
    attention.forward(&zeros(q), &zeros(k), &zeros(v)).map(drop)
}

/// Attention of zeros, all of the same well-formed shape.
fn well_formed(attention: &Attention<'_>) -> Result<()> {
    shapes(attention, &[2, 4, 8, 16], &[2, 2, 6, 16], &[2, 2, 6, 16])
}

/// Attention of packed zeros: 6 queries, 8 keys.
fn packed(cu_seqlens_q: &[i32], cu_seqlens_k: &[i32]) -> Result<()> {
    shapes(&Attention::new().packed(cu_seqlens_q, cu_seqlens_k), &[6, 4, 16], &[8, 2, 16], &[8, 2, 16])
}

/// Attention with a boolean mask of the given shape.
fn masked(attention: &Attention<'_>, shape: &[usize]) -> Result<()> {
    let visible = vec![true; shape.iter().product()];
    well_formed(&attention.clone().mask(Mask::Bool(View::contiguous("mask", &visible, shape)?)))
}

/// Attention with a mask of blocks of the given shape.
fn block_masked(shape: &[usize], block_q: usize, block_k: usize) -> Result<()> {
    let flags = vec![true; shape.iter().product()];
    let blocks = View::contiguous("block_mask", &flags, shape)?;
    well_formed(&Attention::new().block_mask(BlockMask { blocks, block_q, block_k }))
}

/// Attention into an output of the given dtype, shape and strides. It stays as it is when the call is refused.
fn into<T: sageattention::Element + PartialEq>(
    shape: &[usize],
    strides: &[i64],
    lse: Option<usize>,
) -> Result<()>
where
    for<'a> ViewMut<'a, T>: Into<sageattention::TensorViewMut<'a>>,
{
    let (q, k) = (zeros(&[1, 2, 4, 16]), zeros(&[1, 2, 6, 16]));
    let untouched = T::from_f32(7.0);
    let mut data = vec![untouched; 4096];
    let mut lse = lse.map(|len| vec![7.0; len]);
    let result = ViewMut::strided("out", &mut data, Geometry::strided("out", shape, strides, 0)?)
        .and_then(|out| Attention::new().forward_into(&q, &k, &k, out.into(), lse.as_deref_mut()))
        .map(drop);
    assert!(result.is_ok() || data.iter().all(|&x| x == untouched));
    assert!(result.is_ok() || lse.iter().flatten().all(|&x| x == 7.0));
    result
}

/// Attention of a query tensor with the given strides.
fn strided_q(shape: &[usize], strides: &[i64], len: usize) -> Result<()> {
    let data = vec![0f32; len];
    let q = View::strided("q", &data, Geometry::strided("q", shape, strides, 0)?)?;
    let k = zeros(&[1, 2, 6, 16]);
    Attention::new().forward(q, &k, &k).map(drop)
}

/// Attention in which one tensor is of another dtype.
fn mixed(q: DType, k: DType, v: DType) -> Result<()> {
    let tensor = |dtype| Tensor::zeros(dtype, &[1, 2, 4, 16]);
    Attention::new().forward(&tensor(q)?, &tensor(k)?, &tensor(v)?).map(drop)
}

/// Asserts that each call is refused in the words beside it.
fn refused<const N: usize>(calls: [(Result<()>, &str); N]) {
    for (result, words) in calls {
        assert_eq!(result.map_err(|error: Error| error.to_string()), Err(words.to_owned()));
    }
}

#[test]
fn ranks_are_those_of_the_layout() {
    let new = Attention::new;
    refused([
        (
            shapes(&new(), &[2, 8, 16], &[2, 2, 6, 16], &[2, 2, 6, 16]),
            "q: shape is [2, 8, 16], expected [batch, heads, seq, head_dim]",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[6, 16], &[6, 16]),
            "k: shape is [6, 16], expected [batch, heads, seq, head_dim]",
        ),
        (
            shapes(&new().layout(Layout::Nhd), &[2, 8, 4, 16], &[2, 6, 2, 16], &[]),
            "v: shape is [], expected [batch, seq, heads, head_dim]",
        ),
        (
            shapes(&new().packed(&[0, 8], &[0, 6]), &[1, 8, 4, 16], &[6, 2, 16], &[6, 2, 16]),
            "q: shape is [1, 8, 4, 16], expected [total, heads, head_dim]",
        ),
        (
            Tensor::zeros(DType::F32, &[1, 1, 1, 1, 1]).map(drop),
            "tensor: shape is [1, 1, 1, 1, 1], expected at most 4 dimensions",
        ),
    ]);
}

#[test]
fn sizes_and_dtypes_fit_together() {
    let new = Attention::new;
    refused([
        (
            shapes(&new(), &[2, 4, 8, 0], &[2, 2, 6, 0], &[2, 2, 6, 0]),
            "head_dim: value is 0, expected 1 to 576",
        ),
        (
            shapes(&new(), &[1, 1, 2, 577], &[1, 1, 2, 577], &[1, 1, 2, 64]),
            "head_dim: value is 577, expected 1 to 576",
        ),
        (
            shapes(&new(), &[1, 1, 2, 576], &[1, 1, 2, 576], &[1, 1, 2, 576]),
            "head_dim of v: value is 576, expected 1 to 512",
        ),
        (
            shapes(&new(), &[1, 1, 2, 64], &[1, 1, 2, 64], &[1, 1, 2, 0]),
            "head_dim of v: value is 0, expected 1 to 512",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[2, 2, 6, 32], &[2, 2, 6, 32]),
            "k: shape is [2, 2, 6, 32], expected head_dim 16, as q",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[3, 2, 6, 16], &[3, 2, 6, 16]),
            "k: shape is [3, 2, 6, 16], expected batch 2, as q, or 1",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[1, 2, 6, 16], &[3, 2, 6, 16]),
            "v: shape is [3, 2, 6, 16], expected batch 2, as q, or 1",
        ),
        (
            shapes(&new(), &[1, 4, 8, 16], &[2, 2, 6, 16], &[2, 2, 6, 16]),
            "k: shape is [2, 2, 6, 16], expected batch 1, as q",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[2, 3, 6, 16], &[2, 3, 6, 16]),
            "k: shape is [2, 3, 6, 16], expected a number of heads that divides q's 4",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[2, 0, 6, 16], &[2, 0, 6, 16]),
            "k: shape is [2, 0, 6, 16], expected a number of heads that divides q's 4",
        ),
        (
            shapes(&new(), &[2, 4, 8, 16], &[2, 2, 6, 16], &[2, 2, 5, 16]),
            "v: shape is [2, 2, 5, 16], expected [2, 2, 6, head_dim], as k",
        ),
        (
            shapes(&new().layout(Layout::Nhd), &[2, 8, 4, 16], &[2, 6, 3, 16], &[2, 6, 3, 16]),
            "k: shape is [2, 6, 3, 16], expected a number of heads that divides q's 4",
        ),
        (mixed(DType::F16, DType::F32, DType::F16), "k: dtype is f32, expected f16, as q"),
        (mixed(DType::BF16, DType::BF16, DType::F16), "v: dtype is f16, expected bf16, as q"),
    ]);
}

#[test]
fn memory_holds_what_shape_and_strides_say() {
    let contiguous = [128, 64, 16, 1];
    refused([
        (
            Tensor::new(vec![0f32; 5], &[2, 3]).map(drop),
            "tensor: memory holds 5 elements, expected 6 for shape [2, 3]",
        ),
        (
            strided_q(&[1, 2, 4, 16], &contiguous, 127),
            "q: memory holds 127 elements, expected at least 128 for [1, 2, 4, 16] strides [128, 64, 16, \
             1] offset 0",
        ),
        (
            strided_q(&[1, 2, 4, 16], &[128, 64, -16, 1], 128),
            "q: memory holds 128 elements, expected none before the first, but [1, 2, 4, 16] strides [128, \
             64, -16, 1] offset 0 reaches index -48",
        ),
        (
            strided_q(&[1, 2, 4, 16], &[128, 64, 1, 4], 128),
            "q: strides are [128, 64, 1, 4], expected 1 for the last dimension (head_dim)",
        ),
        (
            strided_q(&[1, 2, 4, 16], &[64, 16, 1], 128),
            "q: strides are [64, 16, 1], expected 4 strides, one for each dimension of shape [1, 2, 4, 16]",
        ),
        (
            strided_q(&[1 << 40, 1 << 40, 4, 16], &[0, 0, 16, 1], 128),
            "q: shape is [1099511627776, 1099511627776, 4, 16], expected less than 2⁶³ elements, where a \
             size of 0 counts as 1",
        ),
    ]);
}

#[test]
fn options_are_within_their_range() {
    let new = Attention::new;
    refused([
        (well_formed(&new().sm_scale(f32::NAN)), "sm_scale: value is NaN, expected a finite number above 0"),
        (well_formed(&new().sm_scale(0.0)), "sm_scale: value is 0, expected a finite number above 0"),
        (well_formed(&new().sm_scale(-0.125)), "sm_scale: value is -0.125, expected a finite number above 0"),
        (
            well_formed(&new().sm_scale(f32::INFINITY)),
            "sm_scale: value is inf, expected a finite number above 0",
        ),
        (
            well_formed(&new().logit_softcap(0.0)),
            "logit_softcap: value is 0, expected a finite number above 0",
        ),
        (
            well_formed(&new().logit_softcap(f32::NAN)),
            "logit_softcap: value is NaN, expected a finite number above 0",
        ),
    ]);
    let names = Preset::ALL.iter().map(Preset::name).collect::<Vec<_>>().join(", ");
    let words = format!("scheme: value is sage9, expected one of {names}");
    refused([("sage9".parse::<Preset>().map(drop), &words)]);
}

#[test]
fn masks_are_broadcast_to_the_scores() {
    let new = Attention::new;
    refused([
        (masked(&new(), &[3, 1]), "mask: shape is [3, 1], expected broadcastable to [2, 4, 8, 6]"),
        (
            masked(&new().causal(true), &[2, 1, 8, 8]),
            "mask: shape is [2, 1, 8, 8], expected broadcastable to [2, 4, 8, 6]",
        ),
        (masked(&new(), &[1, 1, 1, 8, 6]), "mask: shape is [1, 1, 1, 8, 6], expected at most 4 dimensions"),
        (block_masked(&[2, 4, 2, 2], 0, 4), "block_mask.block_q: value is 0, expected at least 1"),
        (block_masked(&[2, 4, 2, 2], 4, 0), "block_mask.block_k: value is 0, expected at least 1"),
        (
            block_masked(&[2, 4, 2, 3], 4, 4),
            "block_mask: shape is [2, 4, 2, 3], expected broadcastable to [2, 4, 2, 2]",
        ),
    ]);
}

#[test]
fn lengths_are_within_the_tensors() {
    let new = Attention::new;
    refused([
        (well_formed(&new().kv_lens(&[6])), "kv_lens: shape is [1], expected [2], one for each batch entry"),
        (well_formed(&new().kv_lens(&[6, 7])), "kv_lens[1]: value is 7, expected 0 to 6, k's length"),
        (well_formed(&new().kv_lens(&[-1, 6])), "kv_lens[0]: value is -1, expected 0 to 6, k's length"),
        (packed(&[1, 6], &[0, 8]), "cu_seqlens_q[0]: value is 1, expected 0"),
        (
            packed(&[0, 4, 2, 6], &[0, 2, 4, 8]),
            "cu_seqlens_q[2]: value is 2, expected at least 4, the entry before",
        ),
        (packed(&[0, 6], &[0, 7]), "cu_seqlens_k[1]: value is 7, expected 8, the number of packed rows"),
        (packed(&[0, 6], &[0, 9]), "cu_seqlens_k[1]: value is 9, expected 8, the number of packed rows"),
        (packed(&[0, 3, 6], &[0, 8]), "cu_seqlens_k: shape is [2], expected [3], as cu_seqlens_q"),
        (packed(&[], &[]), "cu_seqlens_q: shape is [0], expected [batch + 1]"),
        (packed(&[0, -3, 6], &[0, 4, 8]), "cu_seqlens_q[1]: value is -3, expected at least 0"),
        (packed(&[0], &[0]), "cu_seqlens_q[0]: value is 0, expected 6, the number of packed rows"),
    ]);
}

#[test]
fn outputs_have_their_shape_and_memory() {
    let contiguous = [128, 64, 16, 1];
    refused([
        (
            into::<f32>(&[1, 2, 5, 16], &[160, 80, 16, 1], None),
            "out: shape is [1, 2, 5, 16], expected [1, 2, 4, 16], as q",
        ),
        (into::<f16>(&[1, 2, 4, 16], &contiguous, None), "out: dtype is f16, expected f32, as q"),
        (
            into::<f32>(&[2, 4, 16], &[64, 16, 1], None),
            "out: shape is [2, 4, 16], expected [batch, heads, seq, head_dim]",
        ),
        (
            into::<f32>(&[1, 2, 4, 16], &[128, 64, 0, 1], None),
            "out: strides are [128, 64, 0, 1], expected no two elements of shape [1, 2, 4, 16] in one place",
        ),
        (
            into::<f32>(&[1, 2, 4, 16], &[128, 1, 32, 2], None),
            "out: strides are [128, 1, 32, 2], expected 1 for the last dimension (head_dim)",
        ),
        (
            into::<f32>(&[1, 2, 4, 16], &contiguous, Some(7)),
            "lse: shape is [7], expected [8], the rows of [1, 2, 4]",
        ),
        (
            into::<f32>(&[1, 2, 4, 16], &contiguous, Some(0)),
            "lse: shape is [0], expected [8], the rows of [1, 2, 4]",
        ),
    ]);
}

/// What no backend does is refused as such, with the scheme's part that stands in the way.
#[test]
fn schemes_without_kernels_are_unsupported() {
    let error = well_formed(&Attention::new().scheme(short_blocks())).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().starts_with("12-bit P·V of 64 keys in the CPU kernels is not supported: "),
        "{error}"
    );
    let nearest = "; the nearest that they compute is `int8`, INT8 QK per-block · smooth K · 12-bit PV (128)";
    assert!(error.to_string().ends_with(nearest), "{error}");
}

/// A scheme that the CPU has no kernels for.
fn short_blocks() -> Scheme {
    Scheme { pv: Pv::Fixed12 { block: 64 }, ..Preset::INT8.scheme(16) }
}

/// Masks and packed sequences do not go together, and the message says what does.
#[test]
fn masks_need_dense_tensors() {
    let (cu_q, cu_k) = ([0, 6], [0, 8]);
    let visible = [true; 48];
    let mask = View::contiguous("mask", &visible, &[6, 8]).unwrap();
    let call = |attention: &Attention<'_>| {
        shapes(attention, &[6, 4, 16], &[8, 2, 16], &[8, 2, 16]).unwrap_err().to_string()
    };
    let packed = Attention::new().packed(&cu_q, &cu_k);
    assert_eq!(
        call(&packed.clone().mask(Mask::Bool(mask))),
        "mask with cu_seqlens is not supported: an explicit mask needs dense tensors, or use causal and window options"
    );
    // A block mask has an entry for each sequence.
    assert_eq!(
        call(&packed.block_mask(BlockMask { blocks: mask, block_q: 1, block_k: 2 })),
        "block_mask: shape is [6, 8], expected broadcastable to [1, 4, 6, 4]"
    );
}

/// What an option asks for and a call cannot give is an error, not forgotten.
#[test]
fn no_option_is_dropped() {
    let (q, mut out) = (zeros(&[1, 2, 4, 16]), zeros(&[1, 2, 4, 16]));
    let mut into = |attention: &Attention<'_>, lse: Option<&mut [f32]>| {
        attention.forward_into(&q, &q, &q, out.view_mut(), lse).map(drop).map_err(|error| error.to_string())
    };
    let with_lse = Attention::new().return_lse(true);
    let wanted =
        "return_lse without memory for the log-sum-exp is not supported: give some, or leave the option out";
    assert_eq!(into(&with_lse, None), Err(wanted.into()));
    assert_eq!(into(&with_lse, Some(&mut [0.0; 8])), Ok(()));
    assert_eq!(into(&Attention::new(), Some(&mut [0.0; 8])), Ok(()), "memory asks by itself");

    let mut cache = KvCacheOptions::new(2, 16).build().unwrap();
    cache.append(&q, &q).unwrap();
    let mut out = zeros(&[1, 2, 4, 16]);
    let error = cache.attend_into(&[0], &q, &with_lse, out.view_mut(), None).unwrap_err();
    assert_eq!(error.to_string(), wanted);
    for attention in [Attention::new().smooth_k(false), Attention::new().nearest(true)] {
        let error = cache.attend(&q, &attention).unwrap_err().to_string();
        assert!(error.starts_with("a scheme over a KV cache is not supported"), "{error}");
    }
}

/// A scheme without kernels, with its nearest, and without smoothing.
#[test]
fn the_nearest_scheme_and_no_smoothing_are_options() {
    let x = zeros(&[1, 2, 200, 16]);
    let scheme = |attention: Attention<'_>| *attention.plan(&x, &x, &x).unwrap().scheme();
    let nearest = Attention::new().scheme(short_blocks()).nearest(true);
    assert_eq!(scheme(nearest.clone()), nearest_scheme(short_blocks(), DType::F32, Device::Cpu));
    assert_eq!(scheme(nearest.smooth_k(false)).smooth.k, SmoothK::Off);
    let own = Attention::new().scheme(Preset::INT8_PER_TOKEN);
    assert!(scheme(own.clone()).smooth.k.is_on());
    assert_eq!(scheme(own.smooth_k(false)).smooth.k, SmoothK::Off);
    assert_eq!(scheme(Attention::new().accuracy(0.02).smooth_k(false)).smooth.k, SmoothK::Off);
}

/// The same checks stand before `plan`.
#[test]
fn plans_are_checked_as_calls_are() {
    let q = zeros(&[1, 2, 4, 16]);
    let k = zeros(&[1, 2, 4, 8]);
    let error =
        Attention::new().causal_alignment(Alignment::TopLeft).plan(&q, &k, TensorView::from(&k)).unwrap_err();
    assert_eq!(error.to_string(), "k: shape is [1, 2, 4, 8], expected head_dim 16, as q");
}
