//! Attention as the models ask for it.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use crate::Result;

/// Attention of one layer. A model hands over the new tokens' Q, K and V; what came before is the implementor's to
/// keep.
pub trait Attend {
    /// `qkv` are Q, `[batch, heads, seq, head_dim]`, and K and V, which may have fewer heads; the result is as Q.
    ///
    /// # Errors
    /// What the computation says.
    fn attend(&mut self, layer: usize, qkv: [&Tensor; 3], visible: &Visible) -> Result<Tensor>;
}

impl<A: Attend + ?Sized> Attend for &mut A {
    fn attend(&mut self, layer: usize, qkv: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        (**self).attend(layer, qkv, visible)
    }
}

/// Attention that keeps earlier tokens' keys and values.
pub trait Cache: Attend {
    /// Adds the next tokens of a layer without computing attention.
    ///
    /// # Errors
    /// When they do not fit.
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Bytes of all layers' keys and values.
    ///
    /// # Errors
    /// When candle does not hand them out.
    fn bytes(&self) -> Result<usize>;
}

/// Which keys a query sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Visible {
    /// None that is later; the last query sees the last key.
    Causal,
    /// The first `lens[b]` of batch entry `b`.
    Padded(Vec<u32>),
}

/// Adds up the time that another spends.
pub struct Timed<A> {
    /// What is timed.
    pub inner: A,
    /// The sum so far.
    pub spent: Duration,
}

impl<A> Timed<A> {
    /// Nothing spent yet.
    pub fn new(inner: A) -> Self {
        Timed { inner, spent: Duration::ZERO }
    }
}

impl<A: Attend> Attend for Timed<A> {
    fn attend(&mut self, layer: usize, qkv: [&Tensor; 3], visible: &Visible) -> Result<Tensor> {
        let device = qkv[0].device();
        // A GPU's work is asked for, and done some time later.
        device.synchronize()?;
        let start = Instant::now();
        let out = self.inner.attend(layer, qkv, visible)?;
        device.synchronize()?;
        self.spent += start.elapsed();
        Ok(out)
    }
}
