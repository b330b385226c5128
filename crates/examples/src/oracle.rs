//! A scheme's attention as the oracle has it, for schemes that no CPU kernel computes.

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use sage_core::{Alignment, Band, Call, Inputs, Lengths, Options, Scheme, oracle};

use crate::Result;
use crate::attend::Visible;

/// Attention by a scheme, `[batch, heads, seq, head_dim]`, number by number; key heads side by side on all threads.
///
/// # Errors
/// When the tensors do not fit together.
pub fn scheme(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible, scheme: &Scheme) -> Result<Tensor> {
    scheme.check()?;
    let kv_heads = k.dim(1)?;
    let group = q.dim(1)? / kv_heads;
    let heads = (0..kv_heads).into_par_iter().map(|head| {
        let (q, k, v) = (q.narrow(1, head * group, group)?, k.narrow(1, head, 1)?, v.narrow(1, head, 1)?);
        one_group(&q, &k, &v, visible, scheme)
    });
    Ok(Tensor::cat(&heads.collect::<Result<Vec<_>>>()?, 1)?)
}

/// The query heads of one key head.
fn one_group(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible, scheme: &Scheme) -> Result<Tensor> {
    let plain = |tensor: &Tensor| -> Result<sage_core::Tensor> {
        Ok(sage_core::Tensor::new(
            tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?,
            tensor.dims(),
        )?)
    };
    let (plain_q, k, v) = (plain(q)?, plain(k)?, plain(v)?);
    let lens: Vec<i32>;
    let (band, lengths) = match visible {
        Visible::Causal => (Band::causal(Alignment::BottomRight), Lengths::Dense),
        Visible::Padded(padded) => {
            lens = padded.iter().map(|&len| i32::try_from(len)).collect::<Result<_, _>>()?;
            (Band::FULL, Lengths::KvLens(&lens))
        }
    };
    let inputs = Inputs::new(plain_q.view(), k.view(), v.view()).lengths(lengths);
    let call = Call::check(&inputs, &Options::default().band(band))?;
    let out: Vec<f32> = oracle::scheme(&call, scheme).out.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(out, q.dims(), q.device())?.to_dtype(q.dtype())?)
}
