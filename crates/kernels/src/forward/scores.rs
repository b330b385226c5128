//! Operands of Q·Kᵀ: means of Q, quantised K, and the products of both that smoothing Q takes from the scores.

use sage_core::{Error, Granularity, IntQuantizer, Qk, Result, Scheme, SmoothK, SmoothQ};

use super::call::{ForwardCall, ForwardPass, slot};
use super::sample;
use crate::operand::Operands;
use crate::pass::Slot;
use crate::preprocess::{
    ColumnStatistics, DeltaSArgs, DeltaSConfig, InputArgs, KeyMean, MOST_CHANNELS, QuantizeFp4KArgs,
    QuantizeFp4KConfig, QuantizeKArgs, QuantizeKConfig, QueryMeansArgs, QueryMeansConfig, Source,
};
use crate::sequence::{KEY_TILE, Lengths};

/// What Q and K are multiplied as, where kernels do.
pub(super) fn form(call: &ForwardCall, scheme: &Scheme) -> Result<Qk> {
    let (dtype, machine) = (call.problem.dtype, &call.machine);
    match scheme.qk {
        Qk::Int(quantizer) if quantizer.granularity == Granularity::PerTensor => {
            Err(Error::unsupported("scales per tensor", "on a GPU scales are per block or finer"))
        }
        Qk::Fp4(format) if !call.machine.has_fp4() => Err(Error::unsupported(
            format!("{} Q·Kᵀ on {}", format.name(), call.machine.target),
            "block-scaled FP4 needs sm_120a or sm_121a",
        )),
        Qk::Int(_) | Qk::Fp4(_) if call.problem.head_dim > MOST_CHANNELS => {
            let format = match scheme.qk {
                Qk::Int(quantizer) => quantizer.bits.name(),
                Qk::Fp4(format) => format.name(),
                Qk::Full => "full",
            };
            Err(Error::unsupported(
                format!("{format} Q·Kᵀ with head_dim {} on a GPU", call.problem.head_dim),
                format!("heads of more than {MOST_CHANNELS} channels are multiplied in 16 bits: use `full`"),
            ))
        }
        qk @ (Qk::Int(_) | Qk::Fp4(_)) => Ok(qk),
        Qk::Full if scheme.smooth.k.is_on() || scheme.smooth.q != SmoothQ::Off => {
            Err(Error::unsupported("smoothing of full-precision scores", "it changes nothing there"))
        }
        Qk::Full if scheme.rotate => {
            Err(Error::unsupported("rotation of full-precision scores", "it changes nothing there"))
        }
        Qk::Full if machine.product_dtype(dtype) != dtype => Err(Error::unsupported(
            format!("full-precision scores of {dtype} on {}", machine.target),
            match call.problem.head_dim > MOST_CHANNELS {
                true => format!("products of {dtype} need sm_80 or later; give q, k and v in f16"),
                false => format!("products of {dtype} need sm_80 or later; use INT8 scores"),
            },
        )),
        Qk::Full => Ok(Qk::Full),
    }
}

/// Query rows that share a mean which is subtracted.
pub(super) fn smooth_q_rows(scheme: &Scheme, q_len: usize) -> Result<Option<usize>> {
    match scheme.smooth.q {
        SmoothQ::Off => Ok(None),
        SmoothQ::Block(rows) if rows.is_multiple_of(64) => Ok(Some(rows)),
        SmoothQ::Block(rows) => Err(Error::value("smooth.q block", rows, "a multiple of 64 on a GPU")),
        SmoothQ::Sequence => Ok(Some(q_len.next_multiple_of(64).max(64))),
    }
}

/// Adds the launches that quantise K, where it is not multiplied as given, after those that its smoothing and Q's need.
pub(super) fn quantize(
    call: ForwardCall,
    scheme: &Scheme,
    operands: &Operands,
    smooth_q: Option<usize>,
    pass: &mut ForwardPass,
) {
    let (source, rotate) = (call.source(), scheme.rotate);
    if let Some(rows) = smooth_q {
        query_means(call, rows, pass);
    }
    let mean = match scheme.smooth.k {
        SmoothK::Off => KeyMean::Zero,
        SmoothK::Mean => KeyMean::Collected,
        SmoothK::Sampled(rows) => {
            sample::means_of_keys(call, rows, pass);
            KeyMean::Given
        }
    };
    match scheme.qk {
        Qk::Full => {}
        Qk::Int(IntQuantizer { bits, granularity, rounding, zero_group, .. }) => {
            let config = QuantizeKConfig { source, bits, granularity, rounding, zero_group, mean, rotate };
            quantize_k(call, config, pass);
        }
        Qk::Fp4(format) => {
            let order = operands.key_order();
            quantize_fp4_k(call, QuantizeFp4KConfig { source, format, order, mean, rotate }, pass);
        }
    }
    if let Some(rows) = smooth_q {
        delta_s(
            call,
            DeltaSConfig::new(source, scheme.smooth.k.is_on(), call.machine.shared_bytes),
            rows,
            pass,
        );
    }
}

fn query_means(call: ForwardCall, rows: usize, pass: &mut ForwardPass) {
    let problem = call.problem;
    let lengths = if call.request.lengths == Lengths::Packed { Lengths::Packed } else { Lengths::Dense };
    let source = Source { lengths, masked: false, ..call.source() };
    let mean = pass.slot(slot::Q_MEAN, call.query_block_bytes(rows, source.padded_dim()));
    let config = QueryMeansConfig { source, block: rows };
    pass.launch(config, move |at, launch| {
        let heads = [problem.num_q_heads, problem.batch];
        let args = QueryMeansArgs {
            input: InputArgs {
                cu_seqlens: at.tensors.cu_seqlens_q,
                cu_seqlens_q: at.tensors.cu_seqlens_q,
                q_rows: call.request.q_rows as i32,
                ..InputArgs::unmasked(at.tensors.q, call.request.q_rows, heads)
            },
            mean: at.of(mean),
        };
        launch(config.grid(problem.q_len, problem.num_q_heads, problem.batch), &args.args(), &[]);
    });
}

fn quantize_k(call: ForwardCall, config: QuantizeKConfig, pass: &mut ForwardPass) {
    let (problem, tiles, lead) = (call.problem, call.key_tiles(), call.lead(&config.source));
    let keys = call.keys(pass);
    let all_tiles = problem.num_kv_heads * tiles;
    let out = pass.slot(slot::K, all_tiles * config.tile_bytes());
    let scale = pass.slot(slot::K_SCALE, 4 * all_tiles * config.groups());
    let MeanSlots { mean, partials, arrivals } = MeanSlots::new(&call, config.mean, pass);
    pass.launch(config, move |at, launch| {
        let args = QuantizeKArgs {
            input: keys.of(&at.tensors.k, at),
            out: at.of(out),
            scale: at.of(scale),
            mean: at.of(mean),
            partials: at.of(partials),
            arrivals: at.of(arrivals),
            key_tiles: tiles as i32,
            lead: lead as i32,
        };
        let grid = config.grid(problem.kv_len, problem.num_kv_heads, problem.batch, lead);
        launch(grid, &args.args(), &[]);
    });
}

fn quantize_fp4_k(call: ForwardCall, config: QuantizeFp4KConfig, pass: &mut ForwardPass) {
    let (problem, tiles, lead) = (call.problem, call.key_tiles(), call.lead(&config.source));
    let keys = call.keys(pass);
    let out = pass.slot(slot::K, problem.num_kv_heads * tiles * config.tile_bytes());
    let MeanSlots { mean, partials, arrivals } = MeanSlots::new(&call, config.mean, pass);
    pass.launch(config, move |at, launch| {
        let args = QuantizeFp4KArgs {
            input: keys.of(&at.tensors.k, at),
            out: at.of(out),
            mean: at.of(mean),
            partials: at.of(partials),
            arrivals: at.of(arrivals),
            key_tiles: tiles as i32,
            lead: lead as i32,
        };
        let grid = config.grid(problem.kv_len, problem.num_kv_heads, problem.batch, lead);
        launch(grid, &args.args(), &[]);
    });
}

/// Where the means of K's channels lie, and what they are collected in.
struct MeanSlots {
    mean: Slot,
    partials: Slot,
    arrivals: Slot,
}

impl MeanSlots {
    fn new(call: &ForwardCall, mean: KeyMean, pass: &mut ForwardPass) -> Self {
        if mean != KeyMean::Collected {
            return MeanSlots { mean: pass.find(slot::K_MEAN), partials: Slot::NONE, arrivals: Slot::NONE };
        }
        let (source, singles) = (call.source(), ColumnStatistics::Mean.partials());
        MeanSlots {
            mean: pass.slot(slot::K_MEAN, call.channel_bytes(&source)),
            partials: pass.slot("k_partials", call.tile_channel_bytes(&source, singles)),
            arrivals: pass.counters("k_arrivals", call.all_kv_heads()),
        }
    }
}

fn delta_s(call: ForwardCall, config: DeltaSConfig, rows: usize, pass: &mut ForwardPass) {
    let problem = call.problem;
    let keys = call.keys(pass);
    let (k_mean, q_mean) = (pass.find(slot::K_MEAN), pass.find(slot::Q_MEAN));
    let columns = problem.kv_len.next_multiple_of(KEY_TILE).max(KEY_TILE);
    let delta_s = pass.slot(slot::DELTA_S, call.query_block_bytes(rows, columns));
    pass.launch(config, move |at, launch| {
        let args = DeltaSArgs {
            input: keys.of(&at.tensors.k, at),
            k_mean: at.of(k_mean),
            q_mean: at.of(q_mean),
            delta_s: at.of(delta_s),
            group_size: problem.group_size() as i32,
            q_blocks: call.query_blocks(rows) as i32,
            block_rows: rows as i32,
        };
        launch(config.grid(problem.kv_len, problem.num_kv_heads, problem.batch), &args.args(), &[]);
    });
}
