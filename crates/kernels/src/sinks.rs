//! Attention sinks: a logit for each query head, which is one more score of its rows' softmax and has no value.
//!
//! They come in where rows are done: `O = Σ exp(s_j)·V_j / (Σ exp(s_j) + exp(sink))`. Of keys that are split, what merges
//! the parts adds them, once.

use std::f32::consts::LOG2_E;
use std::ops::Deref;

use sage_ptx::{Arg, Val};

use crate::params::kernel_params;
use crate::pass::MAX_ARGS;

kernel_params! {
    /// What a launch of a kernel with attention sinks passes after its other numbers.
    SinkParams, SinkArgs {
        /// The sinks, in natural units.
        sinks: [f32],
        /// From one head's to the next's: 1, but where query heads are rows of one head.
        sink_stride_head: i32,
        /// From one row's to the next's: 0, but where rows are query heads.
        sink_stride_row: i32,
    }
}

impl SinkArgs {
    /// A number for each query head from `address` on.
    pub fn of_heads(address: u64) -> Self {
        SinkArgs { sinks: address, sink_stride_head: 1, sink_stride_row: 0 }
    }

    /// The same where `group` query heads have become rows of one.
    pub(crate) fn as_rows(self, group: usize) -> Self {
        SinkArgs { sink_stride_head: group as i32, sink_stride_row: 1, ..self }
    }

    /// A launch's other arguments, and these.
    pub(crate) fn after(&self, args: &[Arg]) -> ArgsWithSinks {
        let (mut all, count) = ([Arg::I32(0); MAX_ARGS], args.len() + Self::COUNT);
        all[..args.len()].copy_from_slice(args);
        all[args.len()..count].copy_from_slice(&self.args());
        ArgsWithSinks { all, count }
    }
}

/// Arguments of a launch, those of the sinks last.
pub(crate) struct ArgsWithSinks {
    all: [Arg; MAX_ARGS],
    count: usize,
}

impl Deref for ArgsWithSinks {
    type Target = [Arg];

    fn deref(&self) -> &[Arg] {
        &self.all[..self.count]
    }
}

impl<'k> SinkParams<'k> {
    /// The sink of a row in base 2, less what smoothing K took from the row's scores: `taken`, in natural units.
    #[track_caller]
    pub(crate) fn of_row(&self, head: Val<'k, i32>, row: Val<'k, i32>, taken: Val<'k, f32>) -> Val<'k, f32> {
        let index = head * self.sink_stride_head + row * self.sink_stride_row;
        (self.sinks.at(index).load() - taken) * LOG2_E
    }
}

/// `1 / (divisor + 2^(sink − reference))`, where exponentials relative to `2^reference` sum to `divisor`; 0 where a row
/// sees no key.
#[track_caller]
pub(crate) fn inverse_with_sink<'k>(
    sink: Val<'k, f32>,
    reference: Val<'k, f32>,
    divisor: Val<'k, f32>,
) -> Val<'k, f32> {
    // Of a sink far above all scores the power is infinite, and the inverse 0, as it should be.
    divisor.eq(0.0).select(0.0, (divisor + (sink - reference).exp2()).recip())
}

/// The sum of exponentials with that of the sink, and what it is relative to in base 2: the larger of `reference` and the
/// sink.
#[track_caller]
pub(crate) fn sum_with_sink<'k>(
    sink: Val<'k, f32>,
    reference: Val<'k, f32>,
    sum: Val<'k, f32>,
) -> (Val<'k, f32>, Val<'k, f32>) {
    // Finite, so that differences with it are numbers.
    let reference = reference.max(f32::MIN);
    let larger = reference.max(sink);
    (sum.mul_add((reference - larger).exp2(), (sink - larger).exp2()), larger)
}
