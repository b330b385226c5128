//! Times attention on a GPU, end to end and kernel by kernel, on random data that lies there already.
//!
//! ```text
//! bench_gpu SCHEME,… SHAPE…           a line of JSON for each shape and scheme
//! bench_gpu SCHEME,… -                the same for shapes from standard input, with an empty line after each
//! bench_gpu --launch SCHEME,… SHAPE…  launches every kernel once, for profilers
//! ```
//!
//! A shape is `BATCH,HEADS[/KV_HEADS],LENGTH,HEAD_DIM`, where a length is `TOKENS` or `QUERIESxKEYS`, and what is visible,
//! each after a comma: `causal`;
//! `blocks=QxK@DENSITY`, a block mask of random blocks; `mask=padding`, a boolean mask that hides the last tenth of the
//! keys; `mask=dense`, one of random scores; `mask=triangle`, a causal one; `mask=bias`, an additive one of random
//! biases. A scheme that cannot run is reported and passed over.

use std::error::Error;
use std::io::{self, Write};
use std::str::FromStr;
use std::time::Duration;

use sage_core::{Geometry, Strided};
use sageattention::cuda::{
    Buffer, Cuda, CudaTensor, DeviceBytes, DeviceCall, DeviceMask, DeviceTensor, Stream,
};
use sageattention::{Backend, Band, BlockMask, Call, Choice, DType, Inputs, Options, Preset, Tensor};
use serde_json::{Value, json};

mod noise;

use noise::normal;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// A contestant is run until both are reached before times are taken: a GPU that waited has lowered its clock.
const WARM_UP_RUNS: usize = 3;
const WARM_UP_TIME: Duration = Duration::from_millis(20);
/// Calls between two events last this long together, so that launching the first does not count.
const GROUP: Duration = Duration::from_millis(1);
/// Groups are timed for this long, but so many at least and at most. `scripts/bench_gpu.py` does all of this the same
/// way.
const TIMED: Duration = Duration::from_millis(80);
const GROUPS: std::ops::RangeInclusive<usize> = 7..=50;

const USAGE: &str =
    "bench_gpu [--launch] SCHEME,… SHAPE…, a shape BATCH,HEADS[/KV_HEADS],LENGTH,HEAD_DIM[,VISIBLE…] or -";

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let launch_only = arguments.first().is_some_and(|first| first == "--launch");
    if launch_only {
        arguments.remove(0);
    }
    let [schemes, shapes @ ..] = arguments.as_slice() else { return Err(USAGE.into()) };
    if shapes.is_empty() {
        return Err(USAGE.into());
    }
    let schemes: Vec<&str> = schemes.split(',').collect();
    let mut bench = Bench::new(launch_only)?;
    if shapes != ["-"] {
        return shapes.iter().try_for_each(|shape| bench.shape(&schemes, shape));
    }
    for line in io::stdin().lines() {
        bench.shape(&schemes, line?.trim())?;
        println!();
        io::stdout().flush()?;
    }
    Ok(())
}

/// What attention is timed on.
struct Shape {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    head_dim: usize,
    causal: bool,
    /// Queries and keys of a block, and the share of blocks that are computed.
    blocks: Option<(usize, usize, f64)>,
    mask: Option<MaskKind>,
}

/// An explicit mask, of all heads and batch entries alike.
#[derive(Clone, Copy)]
enum MaskKind {
    Padding,
    Dense,
    Triangle,
    Bias,
}

impl FromStr for Shape {
    type Err = Box<dyn Error>;

    fn from_str(text: &str) -> Result<Self> {
        let wrong =
            || format!("shape is {text:?}, expected BATCH,HEADS[/KV_HEADS],LENGTH,HEAD_DIM[,VISIBLE…]");
        let parts: Vec<&str> = text.split(',').collect();
        let [batch, heads, length, head_dim, ref visible @ ..] = parts[..] else {
            return Err(wrong().into());
        };
        let (mut causal, mut blocks, mut mask) = (false, None, None);
        for visible in visible {
            match visible.split_once('=') {
                None if *visible == "causal" => causal = true,
                Some(("blocks", sizes)) => {
                    let (sizes, density) = sizes.split_once('@').ok_or_else(wrong)?;
                    let (q, k) = sizes.split_once('x').ok_or_else(wrong)?;
                    blocks = Some((q.parse()?, k.parse()?, density.parse()?));
                }
                Some(("mask", kind)) => {
                    mask = Some(match kind {
                        "padding" => MaskKind::Padding,
                        "dense" => MaskKind::Dense,
                        "triangle" => MaskKind::Triangle,
                        "bias" => MaskKind::Bias,
                        _ => return Err(wrong().into()),
                    });
                }
                _ => return Err(wrong().into()),
            }
        }
        let (heads, kv_heads) = heads.split_once('/').unwrap_or((heads, heads));
        let (q_len, kv_len) = length.split_once('x').unwrap_or((length, length));
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        Ok(Shape {
            batch: number(batch)?,
            heads: number(heads)?,
            kv_heads: number(kv_heads)?,
            q_len: number(q_len)?,
            kv_len: number(kv_len)?,
            head_dim: number(head_dim)?,
            causal,
            blocks,
            mask,
        })
    }
}

/// A GPU, and memory that all shapes share, so that only the first large one waits for data.
struct Bench {
    gpu: Cuda,
    stream: Stream,
    inputs: [CudaTensor; 3],
    out: CudaTensor,
    launch_only: bool,
}

impl Bench {
    fn new(launch_only: bool) -> Result<Self> {
        let gpu = Cuda::new(0)?;
        let stream = gpu.stream()?;
        let empty = || CudaTensor::uninitialized(&stream, DType::F16, &[1]);
        let (inputs, out) = ([empty()?, empty()?, empty()?], empty()?);
        Ok(Bench { gpu, stream, inputs, out, launch_only })
    }

    /// Times all schemes on one shape.
    fn shape(&mut self, schemes: &[&str], text: &str) -> Result<()> {
        let shape: Shape = text.parse()?;
        let sizes = |heads, rows| [shape.batch, heads, rows, shape.head_dim];
        let (q_sizes, kv_sizes) = (sizes(shape.heads, shape.q_len), sizes(shape.kv_heads, shape.kv_len));
        for (seed, (tensor, sizes)) in (1..).zip(self.inputs.iter_mut().zip([q_sizes, kv_sizes, kv_sizes])) {
            let len = sizes.iter().product();
            if elements(tensor) < len {
                *tensor = CudaTensor::upload(&self.stream, &Tensor::new(normal(seed, len), &[len])?.view())?;
            }
        }
        let len = q_sizes.iter().product();
        if elements(&self.out) < len {
            self.out = CudaTensor::uninitialized(&self.stream, DType::F16, &[len])?;
        }
        let [q, k, v] = &self.inputs;
        let blocks = shape.blocks.map(|blocks| Blocks::new(&self.stream, &shape, blocks)).transpose()?;
        let mask = shape.mask.map(|mask| ExplicitMask::new(&self.stream, &shape, mask)).transpose()?;
        let inputs = Inputs::new(seen_as(q, &q_sizes)?, seen_as(k, &kv_sizes)?, seen_as(v, &kv_sizes)?)
            .mask(mask.as_ref().map(ExplicitMask::view).transpose()?)
            .block_mask(blocks.as_ref().map(Blocks::view).transpose()?);
        let out = seen_as(&self.out, &q_sizes)?;
        let band = Band { right: shape.causal.then_some(0), ..Band::FULL };
        let call = Call::check(&inputs, &Options::default().band(band))?;
        for &scheme in schemes {
            let row = self.scheme(scheme, &call, out);
            let mut row = row.unwrap_or_else(|error| json!({ "error": error.to_string() }));
            row["scheme"] = scheme.into();
            row["shape"] = text.into();
            println!("{row}");
        }
        Ok(())
    }

    fn scheme(&self, scheme: &str, checked: &DeviceCall<'_>, out: DeviceTensor<'_>) -> Result<Value> {
        let choice = match scheme {
            "auto" => Choice::Automatic,
            name => Choice::Preset(name.parse::<Preset>()?),
        };
        let (gpu, stream) = (&self.gpu, &self.stream);
        let call = || gpu.run(stream, checked, choice, out, None);
        let calls = |count: usize| gpu.time(stream, || (0..count).try_for_each(|_| call()));
        let times = if self.launch_only { Vec::new() } else { times(calls)? };
        let runs = times.len().max(1);
        let kernels = gpu.time_kernels(stream, checked, choice, out, runs)?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let kernels: Vec<Value> =
            kernels.iter().map(|(name, time)| json!({ "kernel": name, "ms": ms(*time) })).collect();
        Ok(json!({ "ms": times.get(times.len() / 2).copied().map(ms), "kernels": kernels }))
    }
}

/// A block mask of random blocks on the GPU.
struct Blocks {
    flags: Buffer,
    shape: [usize; 4],
    sizes: [usize; 2],
}

impl Blocks {
    fn new(stream: &Stream, shape: &Shape, (q, k, density): (usize, usize, f64)) -> Result<Self> {
        let blocks = [shape.batch, shape.heads, shape.q_len.div_ceil(q), shape.kv_len.div_ceil(k)];
        let mut random = uniform(4);
        let flags: Vec<u8> = (0..blocks.iter().product()).map(|_| u8::from(random() < density)).collect();
        Ok(Blocks { flags: Buffer::from_slice(stream, &flags)?, shape: blocks, sizes: [q, k] })
    }

    fn view(&self) -> Result<BlockMask<DeviceBytes<'_>>> {
        let [block_q, block_k] = self.sizes;
        Ok(BlockMask { blocks: bytes(&self.flags, &self.shape)?, block_q, block_k })
    }
}

/// An explicit mask on the GPU.
enum ExplicitMask {
    Bool(Buffer, [usize; 4]),
    Additive(CudaTensor),
}

impl ExplicitMask {
    fn new(stream: &Stream, shape: &Shape, kind: MaskKind) -> Result<Self> {
        let Shape { q_len, kv_len, .. } = *shape;
        let scores = [1, 1, q_len, kv_len];
        let count = q_len * kv_len;
        let bools =
            |flags: Vec<u8>, sizes| Ok(ExplicitMask::Bool(Buffer::from_slice(stream, &flags)?, sizes));
        match kind {
            MaskKind::Padding => bools(
                (0..kv_len).map(|key| u8::from(key < kv_len - kv_len / 10)).collect(),
                [1, 1, 1, kv_len],
            ),
            MaskKind::Dense => {
                let mut random = uniform(5);
                bools((0..count).map(|_| u8::from(random() < 0.5)).collect(), scores)
            }
            MaskKind::Triangle => {
                // The last query sees the last key.
                bools(
                    (0..count).map(|at| u8::from(at % kv_len + q_len <= at / kv_len + kv_len)).collect(),
                    scores,
                )
            }
            MaskKind::Bias => {
                let biases = Tensor::new(normal(6, count), &scores)?;
                Ok(ExplicitMask::Additive(CudaTensor::upload(stream, &biases.view())?))
            }
        }
    }

    fn view(&self) -> Result<DeviceMask<'_>> {
        Ok(match self {
            ExplicitMask::Bool(flags, shape) => DeviceMask::Bool(bytes(flags, shape)?),
            ExplicitMask::Additive(biases) => DeviceMask::Additive(biases.view()),
        })
    }
}

/// A buffer's bytes as a row-major tensor of such a shape, which it has.
fn bytes<'a>(buffer: &'a Buffer, shape: &[usize]) -> Result<DeviceBytes<'a>> {
    let geometry = Geometry::contiguous("mask", shape)?;
    // SAFETY: the buffer was made of as many bytes as the shape has elements.
    Ok(unsafe { DeviceBytes::from_raw(geometry, buffer.address()) })
}

fn elements(tensor: &CudaTensor) -> usize {
    tensor.view().geometry().len()
}

/// The start of a tensor that has at least as many elements.
fn seen_as<'a>(tensor: &'a CudaTensor, sizes: &[usize]) -> Result<DeviceTensor<'a>> {
    Ok(tensor.view().with_geometry(Geometry::contiguous("tensor", sizes)?))
}

/// Sorted times of a call, warmed up.
fn times(calls: impl Fn(usize) -> sageattention::Result<Duration>) -> Result<Vec<Duration>> {
    let (mut runs, mut spent) = (0, Duration::ZERO);
    while runs < WARM_UP_RUNS || spent < WARM_UP_TIME {
        spent += calls(1)?;
        runs += 1;
    }
    let group = (GROUP.as_secs_f64() * runs as f64 / spent.as_secs_f64()).ceil() as usize;
    let (mut times, mut spent) = (Vec::new(), Duration::ZERO);
    while times.len() < *GROUPS.start() || times.len() < *GROUPS.end() && spent < TIMED {
        let time = calls(group)?;
        times.push(time.div_f64(group as f64));
        spent += time;
    }
    times.sort();
    Ok(times)
}

/// Numbers from 0 to 1.
fn uniform(seed: u64) -> impl FnMut() -> f64 {
    let mut bits = noise::bits(seed);
    move || (bits() >> 11) as f64 / (1u64 << 53) as f64
}
