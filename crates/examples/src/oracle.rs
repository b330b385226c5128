//! A scheme's attention as the oracle has it, for schemes that no CPU kernel computes.

use candle_core::Tensor;
use sage_core::{Alignment, Band, Call, Inputs, Lengths, Options, Scheme, oracle};

use crate::Result;
use crate::attend::Visible;

/// Attention by a scheme, `[batch, heads, seq, head_dim]`, number by number.
///
/// # Errors
/// When the tensors do not fit together.
pub fn scheme(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible, scheme: &Scheme) -> Result<Tensor> {
    scheme.check()?;
    let plain = |tensor: &Tensor| -> Result<sage_core::Tensor> {
        Ok(sage_core::Tensor::new(tensor.flatten_all()?.to_vec1::<f32>()?, tensor.dims())?)
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
    let inputs = Inputs { lengths, ..Inputs::new(plain_q.view(), k.view(), v.view()) };
    let call = Call::check(&inputs, &Options { band, ..Options::default() })?;
    let out: Vec<f32> = oracle::scheme(&call, scheme).out.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(out, q.dims(), q.device())?)
}
