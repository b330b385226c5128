//! Attention of made-up tensors by burn's own function and by ours: how far they lie apart, and how long each takes.
//!
//! ```text
//! cargo run --release --manifest-path integrations/burn/Cargo.toml --example attention
//! ```

use std::error::Error;
use std::time::Instant;

use burn_ndarray::NdArray;
use burn_tensor::{Distribution, Tensor, module};
use sageattention::Attention;
use sageattention_burn::{attention, attention_with};

type Backend = NdArray<f32>;

fn main() -> Result<(), Box<dyn Error>> {
    let shape = [1, 12, 1024, 64];
    let random = || Tensor::<Backend, 4>::random(shape, Distribution::Normal(0.0, 1.0), &Default::default());
    let (q, k, v) = (random(), random(), random());

    let start = Instant::now();
    let theirs = module::attention(q.clone(), k.clone(), v.clone(), None);
    let of_theirs = start.elapsed();

    let start = Instant::now();
    let ours = attention(q.clone(), k.clone(), v.clone(), None)?;
    let of_ours = start.elapsed();

    println!(
        "burn's own {of_theirs:.1?}, ours {of_ours:.1?}, relative L1 {:.4}",
        relative_l1(&ours, &theirs)
    );

    // Options that burn's function does not have.
    let causal = attention_with(&Attention::new().causal(true), q, k, v.clone(), None)?;
    let first = relative_l1(&causal.narrow(2, 0, 1), &v.narrow(2, 0, 1));
    println!("causal: the first query sees the first key alone, relative L1 to its value {first:.4}");
    Ok(())
}

/// Σ|x − y| / Σ|y|.
fn relative_l1(x: &Tensor<Backend, 4>, y: &Tensor<Backend, 4>) -> f32 {
    let [difference, sum] = [x.clone() - y.clone(), y.clone()].map(|t| t.abs().sum().into_scalar());
    difference / sum
}
