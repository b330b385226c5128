//! Times attention on a GPU, end to end and kernel by kernel, on random data that lies there already.
//!
//! ```text
//! bench_gpu [OPTION…] CHOICE,… SHAPE…   a line of JSON for each shape and choice
//! bench_gpu [OPTION…] CHOICE,… -        the same for shapes from standard input, with an empty line after each
//! ```
//!
//! Options: `--graphs` times calls in CUDA graphs, the GPU's time alone, and no single kernels; `--alternatives` does so
//! for every way that the planner weighs, a line for each, but for those that it predicts to take 1.5 times as long as
//! another; `--bf16` takes bf16 instead of f16; `--warm-up=MS` keeps the GPU busy with a call for so many milliseconds
//! before it is timed, by default 100; `--launch` launches every kernel once, for profilers.
//!
//! A choice is `auto`, `auto@ERROR` with the largest error allowed, or a scheme's name. A shape is
//! `BATCH,HEADS[/KV_HEADS],LENGTH,HEAD_DIM[/VALUE_DIM]`, where a length is `TOKENS` or `QUERIESxKEYS`, and what is
//! visible, each after a comma: `causal`; `blocks=QxK@DENSITY`, a block mask of random blocks; `mask=padding`, a boolean mask that hides
//! the last tenth of the keys; `mask=dense`, one of random scores; `mask=triangle`, a causal one; `mask=bias`, an additive
//! one of random biases. A scheme that cannot run is reported and passed over.

use std::error::Error;
use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use sage_core::{Geometry, Strided};
use sageattention::cuda::{Alternative, Cuda, CudaTensor, DeviceCall, DeviceTensor, Stream};
use sageattention::{Backend, Band, Call, Choice, DType, Inputs, Options, Preset, Tensor};
use serde_json::{Value, json};

mod masks;
#[path = "../noise/mod.rs"]
mod noise;
mod shape;
mod timing;

use masks::{Blocks, ExplicitMask};
use noise::normal;
use shape::Shape;
use timing::{Launching, times};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const USAGE: &str = "bench_gpu [--graphs] [--alternatives] [--bf16] [--warm-up=MS] [--launch] CHOICE,… SHAPE…, a shape \
    BATCH,HEADS[/KV_HEADS],LENGTH,HEAD_DIM[/VALUE_DIM][,VISIBLE…] or -";

fn main() -> Result<()> {
    let (flags, arguments): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|x| x.starts_with("--"));
    let [choices, shapes @ ..] = arguments.as_slice() else { return Err(USAGE.into()) };
    let (numbers, flags): (Vec<_>, Vec<_>) = flags.into_iter().partition(|x| x.starts_with("--warm-up="));
    let known = ["--graphs", "--alternatives", "--bf16", "--launch"];
    if shapes.is_empty() || flags.iter().any(|flag| !known.contains(&flag.as_str())) {
        return Err(USAGE.into());
    }
    let warm_up = match numbers.last() {
        Some(given) => given["--warm-up=".len()..].parse().map_err(|_| USAGE)?,
        None => 100,
    };
    let given = |flag: &str| flags.iter().any(|found| found == flag);
    let timed = match given("--alternatives") {
        true => Timed::Alternatives,
        false if given("--graphs") => Timed::Calls(Launching::Graphs),
        false if given("--launch") => Timed::Nothing,
        false => Timed::Calls(Launching::Queued),
    };
    let choices: Vec<&str> = choices.split(',').collect();
    let mut bench = Bench::new(
        timed,
        Duration::from_millis(warm_up),
        if given("--bf16") { DType::BF16 } else { DType::F16 },
    )?;
    if shapes != ["-"] {
        return shapes.iter().try_for_each(|shape| bench.shape(&choices, shape));
    }
    for line in io::stdin().lines() {
        bench.shape(&choices, line?.trim())?;
        println!();
        io::stdout().flush()?;
    }
    Ok(())
}

/// How many times as long as another an alternative must be predicted to take not to be timed.
const HOPELESS: f64 = 1.5;

/// What is timed of each choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timed {
    /// The call, and where it is queued its kernels.
    Calls(Launching),
    /// Every way that the planner weighs, in graphs.
    Alternatives,
    /// Nothing: every kernel is launched once.
    Nothing,
}

/// A GPU, and memory that all shapes share, so that only the first large one waits for data.
struct Bench {
    gpu: Cuda,
    stream: Stream,
    inputs: [CudaTensor; 3],
    out: CudaTensor,
    timed: Timed,
    warm_up: Duration,
    dtype: DType,
}

impl Bench {
    fn new(timed: Timed, warm_up: Duration, dtype: DType) -> Result<Self> {
        let gpu = Cuda::new(0)?;
        let stream = gpu.stream()?;
        let empty = || CudaTensor::uninitialized(&stream, dtype, &[1]);
        let (inputs, out) = ([empty()?, empty()?, empty()?], empty()?);
        Ok(Bench { gpu, stream, inputs, out, timed, warm_up, dtype })
    }

    /// Times all choices on one shape.
    fn shape(&mut self, choices: &[&str], text: &str) -> Result<()> {
        let shape: Shape = text.parse()?;
        let of_queries = |channels| [shape.batch, shape.heads, shape.q_len, channels];
        let of_keys = |channels| [shape.batch, shape.kv_heads, shape.kv_len, channels];
        let (q_sizes, out_sizes) = (of_queries(shape.head_dim), of_queries(shape.value_dim));
        let (k_sizes, v_sizes) = (of_keys(shape.head_dim), of_keys(shape.value_dim));
        for (seed, (tensor, sizes)) in (1..).zip(self.inputs.iter_mut().zip([q_sizes, k_sizes, v_sizes])) {
            let len = sizes.iter().product();
            if elements(tensor) < len {
                let values = Tensor::new(normal(seed, len), &[len])?.to_dtype(self.dtype);
                *tensor = CudaTensor::upload(&self.stream, &values.view())?;
            }
        }
        let len = out_sizes.iter().product();
        if elements(&self.out) < len {
            self.out = CudaTensor::uninitialized(&self.stream, self.dtype, &[len])?;
        }
        let [q, k, v] = &self.inputs;
        let blocks = shape.blocks.map(|blocks| Blocks::new(&self.stream, &shape, blocks)).transpose()?;
        let mask = shape.mask.map(|mask| ExplicitMask::new(&self.stream, &shape, mask)).transpose()?;
        let inputs = Inputs::new(seen_as(q, &q_sizes)?, seen_as(k, &k_sizes)?, seen_as(v, &v_sizes)?)
            .mask(mask.as_ref().map(ExplicitMask::view).transpose()?)
            .block_mask(blocks.as_ref().map(Blocks::view).transpose()?);
        let out = seen_as(&self.out, &out_sizes)?;
        let band = Band { right: shape.causal.then_some(0), ..Band::FULL };
        let call = Call::check(&inputs, &Options::default().band(band))?;
        for &choice in choices {
            let rows = self.rows(choice, &call, out);
            for mut row in rows.unwrap_or_else(|error| vec![json!({ "error": error.to_string() })]) {
                row["scheme"] = choice.into();
                row["shape"] = text.into();
                println!("{row}");
            }
        }
        Ok(())
    }

    fn rows(&self, choice: &str, checked: &DeviceCall<'_>, out: DeviceTensor<'_>) -> Result<Vec<Value>> {
        let choice = match choice.split_once('@') {
            None if choice == "auto" => Choice::Automatic,
            None => Choice::Preset(choice.parse::<Preset>()?),
            Some(("auto", error)) => Choice::Within(error.parse()?),
            Some(_) => {
                return Err(format!("choice is {choice:?}, expected auto, auto@ERROR or a scheme").into());
            }
        };
        let (gpu, stream) = (&self.gpu, &self.stream);
        let call = || gpu.run(stream, checked, choice, out, None);
        match self.timed {
            Timed::Alternatives => self.alternatives(choice, checked, out),
            Timed::Nothing => {
                gpu.time_kernels(stream, checked, choice, out, 1)?;
                Ok(Vec::new())
            }
            Timed::Calls(Launching::Graphs) => {
                let times = times(gpu, stream, (Launching::Graphs, self.warm_up), call)?;
                let plan = gpu.plan(checked, choice, false)?.to_string();
                Ok(vec![json!({ "ms": median_ms(&times), "plan": plan.lines().collect::<Vec<_>>() })])
            }
            Timed::Calls(Launching::Queued) => {
                let times = times(gpu, stream, (Launching::Queued, self.warm_up), call)?;
                let kernels = gpu.time_kernels(stream, checked, choice, out, times.len())?;
                let kernels = kernels.iter().map(|(name, time)| json!({ "kernel": name, "ms": ms(*time) }));
                Ok(vec![json!({ "ms": median_ms(&times), "kernels": kernels.collect::<Vec<_>>() })])
            }
        }
    }

    /// Times of every way that the planner weighs.
    fn alternatives(
        &self,
        choice: Choice,
        call: &DeviceCall<'_>,
        out: DeviceTensor<'_>,
    ) -> Result<Vec<Value>> {
        let (gpu, mut alternatives) = (&self.gpu, self.gpu.alternatives(call, choice)?);
        let least = alternatives.iter().filter_map(|alternative| alternative.predicted).reduce(f64::min);
        let is_hopeless = |alternative: &Alternative| {
            let times = alternative.predicted.zip(least);
            times.is_some_and(|(predicted, least)| predicted > HOPELESS * least)
        };
        alternatives.retain(|alternative| !is_hopeless(alternative));
        // Kernels are compiled side by side; what this finds wrong is found again below.
        thread::scope(|scope| {
            for alternative in &alternatives {
                scope.spawn(move || gpu.run_alternative(&gpu.stream()?, call, alternative, out));
            }
        });
        let row = |alternative: &Alternative| {
            let run = || gpu.run_alternative(&self.stream, call, alternative, out);
            let mut row = match times(gpu, &self.stream, (Launching::Graphs, self.warm_up), run) {
                Ok(times) => json!({ "ms": median_ms(&times) }),
                Err(error) => json!({ "error": error.to_string() }),
            };
            row["computed"] = alternative.scheme.to_string().into();
            row["tiling"] = alternative.tiling.to_string().into();
            row["splits"] = alternative.splits.into();
            row["predicted_us"] = alternative.predicted.into();
            row
        };
        Ok(alternatives.iter().map(row).collect())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The median of sorted times.
fn median_ms(times: &[Duration]) -> Option<f64> {
    times.get(times.len() / 2).copied().map(ms)
}

fn elements(tensor: &CudaTensor) -> usize {
    tensor.view().geometry().len()
}

/// The start of a tensor that has at least as many elements.
fn seen_as<'a>(tensor: &'a CudaTensor, sizes: &[usize]) -> Result<DeviceTensor<'a>> {
    Ok(tensor.view().with_geometry(Geometry::contiguous("tensor", sizes)?))
}
