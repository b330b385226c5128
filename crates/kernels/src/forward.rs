//! A whole forward pass: which kernels, in which order, with which arguments and which workspace.

mod alternatives;
mod attention;
mod call;
mod choice;
mod cut;
mod fallback;
mod forms;
mod groups;
mod lists;
mod masks;
mod predicted;
mod preferences;
mod request;
mod sample;
mod scores;
mod tail;
mod tensors;
mod values;

use sage_core::{DType, Error, MAX_HEADS, Problem, Qk, Result, Scheme};

use crate::attention::MaskForm;
use crate::machine::Machine;
use crate::pass::Pass;
use crate::preprocess::MOST_CHANNELS;
use crate::sequence::Lengths;
use crate::tiling::Tiling;
use crate::tuning::Key;
pub use alternatives::Alternative;
use attention::PlannedAttention;
use call::{ForwardCall, ForwardPass};
use choice::choose;
pub use choice::int8_scheme;
pub use fallback::nearest_scheme;
use fallback::{computed, naming_nearest};
use forms::Forms;
use groups::HeadsAsRows;
pub use preferences::{Preference, Preferences};
pub use request::{Extent, Request};
pub use tensors::Tensors;

/// How a problem is computed on a GPU.
#[derive(Debug)]
pub struct ForwardPlan {
    scheme: Scheme,
    pass: Pass<Tensors>,
    key: Key,
    tiling: Tiling,
    splits: usize,
    heads_as_rows: Option<HeadsAsRows>,
    reasons: Vec<String>,
}

/// Launches for a scheme, and what was decided on the way.
struct Planned {
    pass: Pass<Tensors>,
    key: Key,
    tiling: Tiling,
    splits: usize,
}

impl ForwardPlan {
    /// The plan for a problem.
    ///
    /// # Errors
    /// When no kernel computes the scheme, or not with such options or on such a GPU; names the nearest scheme that has
    /// kernels.
    pub fn new(problem: &Problem, request: &Request, machine: &Machine) -> Result<Self> {
        if problem.dtype == DType::F32 {
            return Err(Error::DType {
                name: "q".into(),
                found: "f32".into(),
                wanted: "f16 or bf16 on a GPU".into(),
            });
        }
        check_sizes(problem, request)?;
        let mut reasons = Vec::new();
        let given = match request.scheme {
            Some(scheme) => scheme,
            None => {
                let (scheme, reason) = choose(problem, request, machine)?;
                reasons.push(reason);
                if problem.head_dim > MOST_CHANNELS {
                    reasons
                        .push(format!("more than {MOST_CHANNELS} channels are multiplied in 16 bits alone"));
                }
                scheme
            }
        };
        given.check()?;
        let products = machine.product_dtype(problem.dtype);
        let scheme = computed(given, products, &mut reasons);
        let heads_as_rows = HeadsAsRows::of(problem, request, &scheme);
        if heads_as_rows.is_some() {
            let group = problem.group_size();
            reasons
                .push(format!("{group} query heads are rows of one: K and V are read once for all of them"));
        }
        let call = ForwardCall::new(problem, request, machine, heads_as_rows);
        let problem = call.problem;
        let mut planned = Planned::new(call, &scheme, &mut reasons).map_err(|error| {
            let mut unused = Vec::new();
            let nearest = nearest_scheme(given, problem.dtype, machine.target);
            let nearest = computed(nearest, products, &mut unused);
            match Planned::new(call, &nearest, &mut unused) {
                Ok(_) => naming_nearest(error, &nearest, problem.head_dim),
                Err(_) => error,
            }
        })?;
        if problem.batch * problem.num_q_heads == 0 || problem.q_len == 0 {
            planned.pass = Pass::empty();
            reasons.push("nothing to launch: there is no query".into());
        }
        let Planned { pass, key, tiling, splits } = planned;
        Ok(ForwardPlan { scheme, pass, key, tiling, splits, heads_as_rows, reasons })
    }

    /// The scheme that is computed.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// A call's tensors as [`ForwardPlan::pass`] takes them.
    pub fn arranged(&self, tensors: &Tensors) -> Tensors {
        self.heads_as_rows.map_or(*tensors, |heads| heads.tensors(tensors))
    }

    /// The launches, which run over [`ForwardPlan::arranged`] tensors.
    pub fn pass(&self) -> &Pass<Tensors> {
        &self.pass
    }

    /// What the attention kernel's tile shape is chosen for.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The attention kernel's tile shape.
    pub fn tiling(&self) -> Tiling {
        self.tiling
    }

    /// Parts that keys are split into.
    pub fn splits(&self) -> usize {
        self.splits
    }

    /// Why the plan is what it is, a sentence for each choice.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }
}

impl Planned {
    fn new(call: ForwardCall, scheme: &Scheme, reasons: &mut Vec<String>) -> Result<Self> {
        let forms = Forms::of(&call, scheme)?;
        let Forms { operands, smooth_q, .. } = forms;
        let mut pass = ForwardPass::new();
        let (mut call, lse) = (call, call.request.lse);
        let tail = call.problem.blocks.filter(|_| call.problem.pooled_tail);
        if tail.is_some() && !call.machine.has_async_copies() {
            return Err(Error::unsupported(
                format!("pooled terms of blocks left out on {}", call.machine.target),
                "their kernel needs sm_80 or later: leave them out, or keep all blocks",
            ));
        }
        if tail.is_some() && !lse {
            // Pooled terms are weighted by what is kept.
            pass.slot(call::slot::LSE, 4 * call.total_rows());
            call.request.lse = true;
        }
        masks::prepare(call, [operands.k, operands.v], &mut pass);
        if scheme.qk != Qk::Full {
            scores::quantize(call, scheme, &operands, smooth_q, &mut pass);
        }
        values::prepare(call, scheme, operands.v, &mut pass);
        let attention = PlannedAttention::new(call, scheme, &forms, reasons);
        attention.launch(&mut pass);
        if let Some(blocks) = tail {
            reasons.push("the means of the blocks left out are added to what attention has written".into());
            tail::add(call, blocks, lse, &mut pass);
        }
        let (key, tiling, splits) = (attention.key, attention.tiling(), attention.splits);
        Ok(Planned { pass: pass.finish(), key, tiling, splits })
    }
}

/// Most rows of a tensor: sums with the "no limit" of a window and the rows of a tile fit 32 bits.
const MAX_ROWS: usize = (1 << 30) - 1024;

/// Sizes that tensors with strides of 0, or very many packed sequences, can have, but not the kernels' numbers.
fn check_sizes(problem: &Problem, request: &Request) -> Result<()> {
    for (name, rows) in [("q", request.q_rows), ("k", request.kv_rows)] {
        if rows > MAX_ROWS {
            return Err(Error::value(
                format!("rows of {name}"),
                rows,
                format!("at most {MAX_ROWS} on a GPU"),
            ));
        }
    }
    if problem.pooled_tail && problem.head_dim.max(problem.value_dim) > MOST_CHANNELS {
        return Err(Error::unsupported(
            format!("pooled_tail with heads of more than {MOST_CHANNELS} channels on a GPU"),
            "leave it out: the blocks that are kept are computed without it",
        ));
    }
    if problem.pooled_tail && request.lengths == Lengths::Packed {
        return Err(Error::unsupported(
            "pooled_tail with cu_seqlens on a GPU",
            "give dense tensors, or each sequence by itself",
        ));
    }
    // Kernels count keys from the first that some query sees, which the limits would have to follow.
    let (left, _) = problem.band.limits();
    if left.is_some_and(|left| left < 0)
        && request.lengths != Lengths::Dense
        && request.mask == MaskForm::None
    {
        return Err(Error::unsupported(
            "an alignment whose offset is above the window's left limit, with kv_lens or cu_seqlens, on a GPU",
            "leave out the keys before the window, and so much of the offset",
        ));
    }
    // So would the blocks of a block mask.
    let leaves_out_first = problem.band.left.is_some()
        && (request.lengths != Lengths::Dense || problem.band.seen(problem.q_len, problem.kv_len).start > 0);
    if problem.blocks.is_some() && request.mask == MaskForm::None && leaves_out_first {
        return Err(Error::unsupported(
            "a block mask with a window that hides the first keys from every query, on a GPU",
            "leave out those keys, and their blocks",
        ));
    }
    if problem.batch.saturating_mul(problem.num_q_heads) > MAX_HEADS {
        let found = format!("boundaries of {} sequences of {} heads", problem.batch, problem.num_q_heads);
        let wanted = format!("at most {MAX_HEADS} heads, all sequences together");
        return Err(Error::value("cu_seqlens_q", found, wanted));
    }
    Ok(())
}
