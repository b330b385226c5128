//! Operands of P·V: V in E4M3 or in 4 bits, or converted to the other 16-bit type.

use sage_core::{Accumulator, DType, Error, Pv, Qk, Result, ScaleRows, Scheme};

use super::call::{ForwardCall, ForwardPass, slot};
use super::sample;
use crate::operand::{Element, Operand, OperandSource, ValueForm};
use crate::pass::Slot;
use crate::preprocess::{
    ConvertVArgs, ConvertVConfig, MOST_CHANNELS, QuantizeFp4VArgs, QuantizeFp4VConfig, QuantizeVArgs,
    QuantizeVConfig, ValueScales,
};

/// What P and V are multiplied as, where kernels do.
pub(super) fn form(call: &ForwardCall, scheme: &Scheme) -> Result<ValueForm> {
    let mut fp4 = None;
    let (element, sums) = match scheme.pv {
        Pv::F16(Accumulator::F32ThenF32) => {
            let instead = "use f32: its sums are exact already";
            return Err(Error::unsupported("FP16 P·V summed in f32+f32", instead));
        }
        Pv::F16(accumulator) => (Element::F16, accumulator),
        Pv::BF16(_) if call.machine.product_dtype(DType::BF16) != DType::BF16 => {
            return Err(Error::unsupported(
                format!("BF16 P·V on {}", call.machine.target),
                "products of bf16 need sm_80 or later; use FP16 P·V",
            ));
        }
        Pv::BF16(Accumulator::F32) => (Element::BF16, Accumulator::F32),
        Pv::BF16(accumulator) => {
            return Err(Error::value("pv accumulator", accumulator.name(), "f32 for BF16 P·V"));
        }
        Pv::Fp8 { .. } if !call.machine.has_fp8() => {
            return Err(Error::unsupported(
                format!("FP8 P·V on {}", call.machine.target),
                "FP8 needs sm_89 or later; use FP16 P·V",
            ));
        }
        Pv::Fp8 { accumulator: Accumulator::F16, .. } => {
            return Err(Error::unsupported("FP8 P·V summed in f16", "use f16+f32"));
        }
        Pv::Fp8 { accumulator, .. } => (Element::E4M3, accumulator),
        Pv::Fp4 { format, levels } => {
            if !call.machine.has_fp4() {
                return Err(Error::unsupported(
                    format!("{} P·V on {}", format.name(), call.machine.target),
                    "block-scaled FP4 needs sm_120a or sm_121a",
                ));
            }
            if !matches!(scheme.qk, Qk::Fp4(_)) {
                return Err(Error::unsupported(
                    format!("{} P·V with scores of other formats", format.name()),
                    "on a GPU FP4 values go with FP4 scores, whose keys lie in their order",
                ));
            }
            fp4 = Some((format, levels));
            (Element::E2M1, Accumulator::F32)
        }
        Pv::F32 | Pv::Int8 | Pv::Fixed12 { .. } => {
            let what = format!("scheme `{scheme}`");
            return Err(Error::unsupported(what, "no GPU kernel computes its P·V"));
        }
    };
    let dim = call.problem.head_dim.max(call.problem.value_dim);
    match scheme.pv {
        _ if dim > MOST_CHANNELS && element != Element::of(call.problem.dtype) => Err(Error::unsupported(
            format!("P·V in {} with heads of {dim} channels on a GPU", element.name()),
            format!(
                "values beside more than {MOST_CHANNELS} channels are multiplied as given: use P·V in {}",
                call.problem.dtype
            ),
        )),
        Pv::Fp8 { rows: ScaleRows::Sampled(_), .. } if scheme.smooth.v => Err(Error::unsupported(
            "smooth V with sampled scales",
            "V's mean is of all rows, and so are its scales then",
        )),
        _ if scheme.smooth.v && element != Element::E4M3 => {
            Err(Error::unsupported("smooth V with 16-bit P·V", "on a GPU V is smoothed for FP8 only"))
        }
        _ => Ok(ValueForm { element, sums, fp4 }),
    }
}

/// Adds the launches that write V's tiles, where attention does not read V as given.
pub(super) fn prepare(call: ForwardCall, scheme: &Scheme, v: Operand, pass: &mut ForwardPass) {
    let source = call.value_source();
    let quantizer = |scales| QuantizeVConfig { source, smooth: scheme.smooth.v, scales };
    match scheme.pv {
        Pv::Fp8 { rows: ScaleRows::Sampled(rows), v_max, .. } => {
            sample::scales_of_values(call, rows, v_max, pass);
            quantize_v(call, quantizer(ValueScales::Given), v_max, pass);
            quantize_v(call, quantizer(ValueScales::CollectedWhereMarked), v_max, pass);
        }
        Pv::Fp8 { v_max, .. } => quantize_v(call, quantizer(ValueScales::Collected), v_max, pass),
        Pv::Fp4 { format, .. } => quantize_fp4_v(call, QuantizeFp4VConfig { source, format }, pass),
        _ if v.source == OperandSource::Workspace => {
            let to = if v.element == Element::BF16 { DType::BF16 } else { DType::F16 };
            convert(call, ConvertVConfig { source, to }, pass);
        }
        _ => {}
    }
}

fn quantize_v(call: ForwardCall, config: QuantizeVConfig, v_max: f32, pass: &mut ForwardPass) {
    let (problem, tiles, source) = (call.problem, call.key_tiles(), config.source);
    let lead = call.lead(&source);
    let keys = call.keys(pass);
    let out = pass.slot(slot::V, problem.num_kv_heads * tiles * config.tile_bytes());
    let [scale, mean, factor] = [slot::V_SCALE, slot::V_MEAN, slot::V_FACTOR]
        .map(|name| pass.slot(name, call.channel_bytes(&source)));
    let (mut partials, mut arrivals) = (Slot::NONE, Slot::NONE);
    if config.scales != ValueScales::Given {
        let singles = config.statistics().partials();
        partials = pass.slot("v_partials", call.tile_channel_bytes(&source, singles));
        arrivals = pass.counters("v_arrivals", call.all_kv_heads());
    }
    let marked = match config.scales {
        ValueScales::Given => pass.counters(slot::V_MARKED, call.all_kv_heads()),
        _ => pass.find(slot::V_MARKED),
    };
    pass.launch(config, move |at, launch| {
        let args = QuantizeVArgs {
            input: keys.of(&at.tensors.v, at),
            out: at.of(out),
            mean: at.of(mean),
            scale: at.of(scale),
            factor: at.of(factor),
            partials: at.of(partials),
            arrivals: at.of(arrivals),
            marked: at.of(marked),
            key_tiles: tiles as i32,
            v_max,
            lead: lead as i32,
        };
        let grid = config.grid(problem.kv_len, problem.num_kv_heads, problem.batch, lead);
        launch(grid, &args.args(), &[]);
    });
}

fn quantize_fp4_v(call: ForwardCall, config: QuantizeFp4VConfig, pass: &mut ForwardPass) {
    let (problem, tiles) = (call.problem, call.key_tiles());
    let keys = call.keys(pass);
    let out = pass.slot(slot::V, problem.num_kv_heads * tiles * config.tile_bytes());
    pass.launch(config, move |at, launch| {
        let args =
            QuantizeFp4VArgs { input: keys.of(&at.tensors.v, at), out: at.of(out), key_tiles: tiles as i32 };
        launch(config.grid(problem.kv_len, problem.num_kv_heads, problem.batch), &args.args(), &[]);
    });
}

fn convert(call: ForwardCall, config: ConvertVConfig, pass: &mut ForwardPass) {
    let (problem, tiles) = (call.problem, call.key_tiles());
    let keys = call.keys(pass);
    let out = pass.slot(slot::V, problem.num_kv_heads * tiles * config.tile_bytes());
    pass.launch(config, move |at, launch| {
        let args =
            ConvertVArgs { input: keys.of(&at.tensors.v, at), out: at.of(out), key_tiles: tiles as i32 };
        launch(config.grid(problem.kv_len, problem.num_kv_heads, problem.batch), &args.args(), &[]);
    });
}
