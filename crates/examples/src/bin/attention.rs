//! Attention of the shapes of real models, without their weights: candle's own operations against ours, speed and
//! error.
//!
//! `cargo run --release -p sage-examples --bin attention -- --device cuda`, in a build with `--features cuda`

#![forbid(unsafe_code)]

use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use sage_examples::attend::Visible;
use sage_examples::method::{Method, relative_l1_by_head};
use sage_examples::place::Place;
use sage_examples::timing::Rounds;
use sage_examples::{Result, progress, table};

/// Attention of SmolLM2-135M's and all-MiniLM-L6-v2's shapes, random tensors, against candle's matmul and softmax.
#[derive(Debug, Parser)]
#[command(name = "attention")]
struct Args {
    /// cpu, or cuda:NUMBER in a build with --features cuda.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Place,
    /// Element types; attention on a GPU takes f16 and bf16. All that the device takes, if left out.
    #[arg(long, value_delimiter = ',')]
    dtype: Vec<Element>,
    /// Prompts of SmolLM2: 9 query heads over 3, head_dim 64, causal.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192")]
    context: Vec<usize>,
    /// Batches of MiniLM: 12 heads, head_dim 32, 256 tokens, each sentence padded from another length.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    batch: Vec<usize>,
    /// What is compared with candle's operations.
    #[arg(long, value_delimiter = ',', default_value = "sage")]
    method: Vec<Method>,
    /// Turns of each contestant.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Calls of a turn, one after another: a GPU works on the first while the next are asked for.
    #[arg(long, default_value_t = 10)]
    calls: usize,
    /// Largest relative L1 error of ours, or the program fails.
    #[arg(long, value_name = "ERROR")]
    max_error: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Element {
    F32,
    F16,
    Bf16,
}

impl Element {
    fn dtype(self) -> DType {
        match self {
            Element::F32 => DType::F32,
            Element::F16 => DType::F16,
            Element::Bf16 => DType::BF16,
        }
    }
}

/// What one layer of a model asks.
struct Case {
    name: String,
    q: Vec<usize>,
    kv: Vec<usize>,
    visible: Visible,
}

fn main() -> ExitCode {
    sage_examples::finish(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    let elements = match (args.dtype.as_slice(), args.device) {
        ([], Place::Cpu) => vec![Element::F32],
        ([], Place::Cuda(_)) => vec![Element::F16, Element::Bf16],
        (elements, _) => elements.to_vec(),
    };
    let cases = cases(args);
    let bar = progress::bar(cases.len() * elements.len(), "");
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for case in &cases {
        for element in &elements {
            bar.set_message(format!("{} {element:?}", case.name));
            compare(args, case, element.dtype(), &device, &mut rows, &mut failures)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    println!(
        "Milliseconds of a call, {} in a turn; speed-up over exact, median and range of {} turns. exact: candle's \
         matmul and softmax in f32; candle: the same in the tensors' type. Error: relative L1 against exact on the \
         CPU.\n",
        args.calls, args.rounds
    );
    table::print(&["shape", "dtype", "attention", "ms", "speed-up", "range", "of candle", "error"], &rows);
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ").into()) }
}

fn cases(args: &Args) -> Vec<Case> {
    let prompts = args.context.iter().map(|&tokens| Case {
        name: format!("SmolLM2, {tokens} tokens"),
        q: vec![1, 9, tokens, 64],
        kv: vec![1, 3, tokens, 64],
        visible: Visible::Causal,
    });
    let decoding = args.context.iter().map(|&tokens| Case {
        name: format!("SmolLM2, 1 token after {tokens}"),
        q: vec![1, 9, 1, 64],
        kv: vec![1, 3, tokens, 64],
        visible: Visible::Causal,
    });
    let sentences = args.batch.iter().map(|&batch| Case {
        name: format!("MiniLM, {batch} × 256 padded"),
        q: vec![batch, 12, 256, 32],
        kv: vec![batch, 12, 256, 32],
        // The longest fills its row, as in any batch.
        visible: Visible::Padded((0..batch as u32).map(|i| 256 - i * 37 % 200).collect()),
    });
    prompts.chain(decoding).chain(sentences).collect()
}

fn compare(
    args: &Args,
    case: &Case,
    dtype: DType,
    device: &Device,
    rows: &mut Vec<Vec<String>>,
    failures: &mut Vec<String>,
) -> Result<()> {
    // Rounded to the element type before either side sees them.
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype);
    let (q, k, v) = (random(&case.q)?, random(&case.kv)?, random(&case.kv)?);
    let expected = by_key_heads(&q.to_dtype(DType::F32)?, &k.to_dtype(DType::F32)?, &v, &case.visible)?;
    let there = |tensor: &Tensor| tensor.to_device(device);
    let (q, k, v) = (there(&q)?, there(&k)?, there(&v)?);
    let methods: Vec<Method> =
        [Method::Exact, Method::Candle].into_iter().chain(args.method.iter().copied()).collect();
    let errors = methods.iter().map(|method| -> Result<f32> {
        let out = method.compute(&q, &k, &v, &case.visible)?.to_device(&Device::Cpu)?;
        let heads = relative_l1_by_head(&out, &expected)?;
        Ok(heads.iter().sum::<f32>() / heads.len() as f32)
    });
    let errors = errors.collect::<Result<Vec<_>>>()?;
    let mut contestants: Vec<Box<dyn FnMut() -> Result<()> + '_>> = Vec::new();
    for method in &methods {
        let (q, k, v) = (&q, &k, &v);
        contestants.push(Box::new(move || {
            for _ in 0..args.calls.max(1) {
                method.compute(q, k, v, &case.visible)?;
            }
            Ok(device.synchronize()?)
        }));
    }
    let rounds = Rounds::of(args.rounds, &mut contestants)?;
    for (at, (method, error)) in methods.iter().zip(&errors).enumerate() {
        let [ratio, low, high] = rounds.speedup(at, 0);
        rows.push(vec![
            case.name.clone(),
            dtype.as_str().to_owned(),
            method.to_string(),
            format!("{:.4}", 1e3 * rounds.median(at) / args.calls.max(1) as f64),
            format!("{ratio:.2}×"),
            format!("{low:.2}–{high:.2}"),
            format!("{:.2}×", rounds.speedup(at, 1)[0]),
            format!("{error:.5}"),
        ]);
        let ours = at >= 2;
        if ours && args.max_error.is_some_and(|limit| error.is_nan() || *error > limit) {
            failures.push(format!("{}, {}, {method}: error {error}", case.name, dtype.as_str()));
        }
    }
    Ok(())
}

/// Exact attention in single precision, one key head after another: scores of all heads of a long prompt would not fit.
fn by_key_heads(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Visible) -> Result<Tensor> {
    let v = v.to_dtype(DType::F32)?;
    let kv_heads = k.dim(1)?;
    let group = q.dim(1)? / kv_heads;
    let heads = (0..kv_heads).map(|head| {
        let (k, v) = (k.narrow(1, head, 1)?, v.narrow(1, head, 1)?);
        Method::Exact.compute(&q.narrow(1, head * group, group)?, &k, &v, visible)
    });
    Ok(Tensor::cat(&heads.collect::<Result<Vec<_>>>()?, 1)?)
}
