//! Decoding on a GPU: passes that append tokens to a quantised KV cache, and one that attends to it.

use sage_core::{CacheLayout, CachedInputs, Call};
use sage_kernels::Machine;
use sage_kernels::decode::{AppendCall, AttendCall, AttendTensors, Storage};
use sage_kernels::pass::Pass;
use sageattention::{DType, Error, Inputs, Lengths, Options, Problem, Result, TensorView};

use crate::inputs;
use crate::made_up::MadeUp;
use crate::options::{CacheOptions, ProblemOptions};
use crate::pass_summary::PassSummary;

/// How tokens come into a cache, and how queries attend to them.
#[derive(Debug)]
pub struct DecodePlan {
    layout: CacheLayout,
    storage: Storage,
    options: Options,
    problem: Problem,
    kv_lens: Vec<i32>,
    sinks: Option<Vec<f32>>,
    appends: Vec<Append>,
    attend: Pass<AttendTensors>,
    table_stride: usize,
    splits: usize,
    reasons: Vec<String>,
}

/// New tokens of neighbouring sequences, as many of each.
#[derive(Clone, Copy, Debug)]
pub struct Append {
    /// The first sequence.
    pub sequence: usize,
    /// The first token, counted from the start of each sequence.
    pub token: usize,
    /// The pass's call.
    pub call: AppendCall,
}

impl DecodePlan {
    /// Plans the appending of all tokens that the options describe, and attention over them. The tokens that the
    /// queries belong to come last, after all that were there before.
    ///
    /// # Errors
    /// What is wrong with the call, or what a GPU has no kernels for.
    pub fn new(
        options: &ProblemOptions,
        cache: &CacheOptions,
        made_up: &MadeUp<'_>,
        machine: &Machine,
    ) -> Result<Self> {
        let layout = cache.layout(options.sizes.kv_heads(), options.head_dim.into());
        layout.check()?;
        let dtype = DType::from(options.dtype.dtype);
        if dtype == DType::F32 {
            let wanted = "f16 or bf16 on a GPU".into();
            return Err(Error::DType { name: "q".into(), found: dtype.to_string(), wanted });
        }
        let kv_lens = match &options.forward.kv_lens {
            Some(kv_lens) => kv_lens.clone(),
            None => {
                let len = options.sizes.kv_len();
                let wanted = format!("at most {} over a KV cache", i32::MAX);
                let len = i32::try_from(len).map_err(|_| Error::value("kv_len", len, wanted))?;
                vec![len; options.sizes.batch]
            }
        };
        let call_options = options.attention().options();
        let [q, ..] = made_up.tensors();
        let queries = CachedInputs {
            sinks: made_up.sinks().map(inputs::sinks).transpose()?,
            ..CachedInputs::new(q, &kv_lens)
        };
        let problem = Call::check_cached(&queries, &layout, &call_options)?.problem;
        let table_stride = problem.kv_len.div_ceil(layout.page_size).max(1);
        let storage = Storage::new(&layout, machine.target)?;
        let attend = AttendCall {
            storage,
            dtype,
            sequences: problem.batch,
            num_q_heads: problem.num_q_heads,
            num_kv_heads: problem.num_kv_heads,
            q_len: problem.q_len,
            kv_len: problem.kv_len,
            sm_scale: problem.sm_scale,
            band: problem.band,
            logit_softcap: problem.logit_softcap,
            sinks: problem.sinks,
            lse: options.forward.lse,
            table_stride,
        };
        let pass = attend.pass(machine)?;
        let splits = attend.splits(machine);
        let mut reasons = Vec::new();
        if splits > 1 {
            reasons
                .push(format!("tokens in {splits} parts: the query blocks alone would leave the GPU idle"));
        }
        let appends = appends(&kv_lens, &attend);
        Ok(DecodePlan {
            layout,
            storage,
            options: call_options,
            problem,
            kv_lens,
            sinks: made_up.sinks().map(<[f32]>::to_vec),
            appends,
            attend: pass,
            table_stride,
            splits,
            reasons,
        })
    }

    /// What a page of the cache holds.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// How it holds that.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The call, with all cached tokens as its keys.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// What is appended, in order.
    pub fn appends(&self) -> &[Append] {
        &self.appends
    }

    /// Attention over what was appended.
    pub fn attend(&self) -> &Pass<AttendTensors> {
        &self.attend
    }

    /// Pages in a row of the block tables.
    pub fn table_stride(&self) -> usize {
        self.table_stride
    }

    /// Parts that tokens are split into.
    pub fn splits(&self) -> usize {
        self.splits
    }

    /// Why the passes are what they are.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// What is stored, in words.
    pub fn scheme(&self) -> String {
        let CacheLayout { page_size, values, .. } = self.layout;
        format!("KV cache: INT8 keys, values in {values}, pages of {page_size} tokens")
    }

    /// The passes in words: all appends have the same kernels.
    pub fn summaries(&self) -> Vec<PassSummary> {
        let append = self.appends.first().map(|append| PassSummary::new("append", &append.call.pass()));
        append.into_iter().chain([PassSummary::new("attend", &self.attend)]).collect()
    }

    /// The attention sinks.
    pub fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_deref()
    }

    /// The queries over the cache, checked.
    ///
    /// # Errors
    /// None: they were checked before.
    pub fn cached_call<'a>(&'a self, q: TensorView<'a>) -> Result<Call<'a>> {
        let queries = CachedInputs {
            sinks: self.sinks().map(inputs::sinks).transpose()?,
            ..CachedInputs::new(q, &self.kv_lens)
        };
        Call::check_cached(&queries, &self.layout, &self.options)
    }

    /// The same attention over tensors, without a cache.
    ///
    /// # Errors
    /// None: they were checked before.
    pub fn exact_call<'a>(&'a self, [q, k, v]: [TensorView<'a>; 3]) -> Result<Call<'a>> {
        let tensors = Inputs::new(q, k, v).lengths(Lengths::KvLens(&self.kv_lens));
        Call::check(&tensors.sinks(self.sinks().map(inputs::sinks).transpose()?), &self.options)
    }
}

/// Sequences of one length at a time: first what comes before the queries' tokens, then those.
fn appends(kv_lens: &[i32], attend: &AttendCall) -> Vec<Append> {
    let mut appends = Vec::new();
    let mut sequence = 0;
    for alike in kv_lens.chunk_by(|a, b| a == b) {
        let len = alike[0] as usize;
        let before = len.saturating_sub(attend.q_len);
        for (token, tokens) in [(0, before), (before, len - before)] {
            let call = AppendCall {
                storage: attend.storage,
                dtype: attend.dtype,
                num_kv_heads: attend.num_kv_heads,
                sequences: alike.len(),
                tokens,
                table_stride: attend.table_stride,
            };
            appends.extend((tokens > 0).then_some(Append { sequence, token, call }));
        }
        sequence += alike.len();
    }
    appends
}
