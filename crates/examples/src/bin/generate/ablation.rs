//! What each part of a scheme is worth, on the model's own Q, K and V.

use std::path::PathBuf;

use candle_core::Tensor;
use sage_core::{
    Accumulator, Granularity, IntBits, IntQuantizer, Preset, Pv, Qk, ScaleRows, Scheme, SmoothK, SmoothQ,
    Smoothing,
};
use sage_examples::attend::Visible;
use sage_examples::llama::Llama;
use sage_examples::method::{Method, Recorded, relative_l1_by_head};
use sage_examples::{Result, progress, table};
use sageattention_candle::{Options, sage_attention};

use crate::AtHand;
use crate::evaluate::{Contestant, evaluate};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tokens of the text. Schemes without a kernel are computed by the oracle, number by number.
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Tokens of a window.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Leaves out the schemes that only the oracle computes, which allows for a long text.
    #[arg(long)]
    kernels_only: bool,
    /// Only the schemes whose names have one of these texts, such as `FP4` or `rotat`; all where none is given.
    #[arg(long, value_delimiter = ',', value_name = "TEXT,…")]
    only: Vec<String>,
    /// Another text than the one that scripts/fetch_models.sh fetched.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| name.contains(text.as_str()))
    }
}

pub fn run(args: &Args, at_hand: &AtHand) -> Result<()> {
    let tokens = at_hand.tokens(args.text.as_ref(), args.tokens)?;
    let context = args.context.max(2);
    let model = &at_hand.model;
    let schemes = schemes(model.config().head_dim);
    let methods: Vec<Method> = schemes.iter().map(|scheme| method(*scheme, model)).collect::<Result<_>>()?;
    let methods: Vec<Method> = methods
        .into_iter()
        .filter(|method| !args.kernels_only || matches!(method, Method::Sage(_)))
        .filter(|method| args.wants(&method.to_string()))
        .collect();
    if methods.is_empty() {
        return Err(format!("--only: no scheme's name has {}", args.only.join(" or ")).into());
    }

    let mut recorded = Recorded::default();
    model.forward(&tokens[..context.min(tokens.len())], 0, &mut recorded)?;
    let exact: Vec<Tensor> = recorded
        .layers
        .iter()
        .map(|[q, k, v]| Method::Exact.compute(q, k, v, &Visible::Causal))
        .collect::<Result<_>>()?;

    let windows = tokens.len().div_ceil(context);
    let bar = progress::bar(methods.len() + windows * (methods.len() + 1), "");
    let mut errors = Vec::new();
    for method in &methods {
        bar.set_message(method.to_string());
        let mut heads = Vec::new();
        for ([q, k, v], exact) in recorded.layers.iter().zip(&exact) {
            heads.extend(relative_l1_by_head(&method.compute(q, k, v, &Visible::Causal)?, exact)?);
        }
        bar.inc(1);
        errors.push(heads);
    }
    let mut contestants: Vec<Contestant<'_>> = methods.iter().map(|&method| method.into()).collect();
    let scores = evaluate(model, &tokens, context, Method::Exact, &mut contestants, &bar)?;
    bar.finish_and_clear();
    let rows: Vec<Vec<String>> = methods
        .iter()
        .zip(&errors)
        .zip(&scores[1..])
        .map(|((method, errors), score)| {
            vec![
                method.to_string(),
                format!("{:.4}", errors.iter().sum::<f32>() / errors.len() as f32),
                format!("{:.4}", errors.iter().fold(0f32, |largest, &error| largest.max(error))),
                format!("{:+.3}%", 100.0 * (score.perplexity() / scores[0].perplexity() - 1.0)),
                format!("{:.2}%", 100.0 * score.same_best()),
                format!("{:.1e}", score.divergence()),
                if matches!(method, Method::Sage(_)) { "kernel" } else { "oracle" }.to_owned(),
            ]
        })
        .collect();
    println!(
        "{} predictions in windows of {context}; perplexity of exact attention {:.3}\n",
        scores[0].predictions(),
        scores[0].perplexity()
    );
    table::print(
        &["scheme", "relative L1, mean", "worst head", "perplexity", "same top-1", "KL", "computed by"],
        &rows,
    );
    Ok(())
}

/// A kernel of the model's device where there is one.
fn method(scheme: Scheme, model: &Llama) -> Result<Method> {
    let (device, dtype) = model.place();
    let small = Tensor::zeros((1, 1, 1, model.config().head_dim), dtype, device)?;
    let planned = sage_attention(&small, &small, &small, &Options::new().scheme(scheme));
    Ok(if planned.is_ok() { Method::Sage(scheme.into()) } else { Method::Oracle(scheme) })
}

/// One part changed at a time, from INT8 Q·Kᵀ per token with smooth-K and P·V in single precision.
fn schemes(head_dim: usize) -> Vec<Scheme> {
    let preset = |preset: Preset| preset.scheme(head_dim);
    let base = Scheme { pv: Pv::F32, ..preset(Preset::INT8_PER_TOKEN) };
    let rough = |scheme: Scheme| Scheme { smooth: Smoothing { k: SmoothK::Off, ..scheme.smooth }, ..scheme };
    let rotated = |scheme: Scheme| Scheme { rotate: true, ..scheme };
    let of = |from: Preset, granularity: Granularity| {
        let qk = match preset(from).qk {
            Qk::Int(quantizer) => Qk::Int(IntQuantizer { granularity, ..quantizer }),
            other => other,
        };
        Scheme { qk, ..base }
    };
    let int4 = |scheme: Scheme| match scheme.qk {
        Qk::Int(quantizer) => {
            Scheme { qk: Qk::Int(IntQuantizer { bits: IntBits::Four, ..quantizer }), ..scheme }
        }
        _ => scheme,
    };
    let per_block = of(Preset::INT8, Granularity::PerBlock);
    let fp8 =
        |v_max: f32, accumulator| Scheme { pv: Pv::Fp8 { v_max, rows: ScaleRows::All, accumulator }, ..base };
    let smooth_q =
        |scheme: Scheme| Scheme { smooth: Smoothing { q: SmoothQ::Block(128), ..scheme.smooth }, ..scheme };
    vec![
        // Granularity, with and without smoothing of K.
        of(Preset::INT8, Granularity::PerTensor),
        per_block,
        of(Preset::SAGE2_INT8_FP8_PER_WARP, Granularity::PerWarp),
        of(Preset::SAGE2_INT8_FP8_PER_THREAD, Granularity::PerThread),
        base,
        rough(per_block),
        rough(of(Preset::SAGE2_INT8_FP8_PER_THREAD, Granularity::PerThread)),
        rough(base),
        // Rotation, in place of smoothing and beside it.
        rotated(rough(per_block)),
        rotated(per_block),
        rotated(base),
        // How P·V is computed.
        preset(Preset::INT8_PER_TOKEN),
        Scheme { pv: Pv::F16(Accumulator::F16ThenF32), ..base },
        fp8(448.0, Accumulator::F32ThenF32),
        fp8(2.25, Accumulator::F16ThenF32),
        Scheme { pv: Pv::Int8, ..base },
        // Four bits.
        int4(base),
        smooth_q(int4(base)),
        rotated(smooth_q(int4(base))),
        preset(Preset::SAGE3_NVFP4),
        rotated(preset(Preset::SAGE3_NVFP4)),
        preset(Preset::SAGE3_NVFP4_ONE_LEVEL),
        rotated(preset(Preset::SAGE3_NVFP4_ONE_LEVEL)),
        preset(Preset::SAGE3_MXFP4),
        rotated(preset(Preset::SAGE3_MXFP4)),
        preset(Preset::ATTN_QAT_NVFP4),
        rotated(preset(Preset::ATTN_QAT_NVFP4)),
        // FP4 scores alone.
        preset(Preset::NVFP4_FP8),
        rotated(preset(Preset::NVFP4_FP8)),
        preset(Preset::NVFP4_FP16),
        rotated(preset(Preset::NVFP4_FP16)),
        rough(rotated(preset(Preset::NVFP4_FP16))),
    ]
}
