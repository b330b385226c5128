//! Statistics of a few rows of K or V, which both take from the same kernel.

use super::call::{ForwardCall, ForwardPass, slot};
use super::tensors::Tensors;
use crate::pass::Slot;
use crate::preprocess::{ColumnStatistics, SampleArgs, SampleConfig};
use crate::tensor::TensorArg;

/// Adds the launch that samples `rows` of K for their means.
pub(super) fn means_of_keys(call: ForwardCall, rows: usize, pass: &mut ForwardPass) {
    let source = call.source();
    let mean = pass.slot(slot::K_MEAN, call.channel_bytes(&source));
    let outputs = Outputs { mean, scale: Slot::NONE, factor: Slot::NONE, v_max: 0.0 };
    let config = SampleConfig { source, rows, statistics: ColumnStatistics::Mean };
    sample(call, config, |tensors| &tensors.k, outputs, pass);
}

/// Adds the launch that samples `rows` of V for the scales of its channels, whose largest magnitude becomes `v_max`.
pub(super) fn scales_of_values(call: ForwardCall, rows: usize, v_max: f32, pass: &mut ForwardPass) {
    let source = call.value_source();
    let [scale, factor] =
        [slot::V_SCALE, slot::V_FACTOR].map(|name| pass.slot(name, call.channel_bytes(&source)));
    let outputs = Outputs { mean: Slot::NONE, scale, factor, v_max };
    let config = SampleConfig { source, rows, statistics: ColumnStatistics::Scale };
    sample(call, config, |tensors| &tensors.v, outputs, pass);
}

/// Where statistics go.
#[derive(Clone, Copy)]
struct Outputs {
    mean: Slot,
    scale: Slot,
    factor: Slot,
    v_max: f32,
}

fn sample(
    call: ForwardCall,
    config: SampleConfig,
    tensor: fn(&Tensors) -> &TensorArg,
    outputs: Outputs,
    pass: &mut ForwardPass,
) {
    let clears = pass.clears_counters();
    let keys = call.keys(pass);
    pass.launch(config, move |at, launch| {
        let (counters, counter_count) = at.counters(clears);
        let args = SampleArgs {
            input: keys.of(tensor(at.tensors), at),
            mean: at.of(outputs.mean),
            scale: at.of(outputs.scale),
            factor: at.of(outputs.factor),
            v_max: outputs.v_max,
            counters,
            counter_count,
        };
        launch(config.grid(call.problem.num_kv_heads, call.problem.batch), &args.args(), &[]);
    });
}
