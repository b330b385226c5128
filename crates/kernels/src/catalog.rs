//! Every kernel that the library ships, by name.
//!
//! The kernels are those that a plan asks for, so that tile shapes are the planner's and a kernel that no plan
//! needs is not here. The options of a call multiply to many thousands; the catalogue has all that the planner chooses
//! of its own accord, and of every other option each value at each padded head dimension.

mod cache;
mod predict;

use std::collections::HashSet;
use std::sync::Arc;

use sage_core::{Accumulator, Alignment, Band, DType, Preset, Problem, Pv, Scheme, SmoothK};
use sage_ptx::Target;

use crate::attention::{AttentionConfig, MaskForm};
use crate::forward::{Alternative, Extent, ForwardPlan, Request, int8_scheme};
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::pass::Pass;
use crate::predict::PoolBlocksConfig;
use crate::sequence::Lengths;
use crate::tail::PooledTailConfig;
use crate::tiling::Tiling;

/// Head dimensions of models, and one (40) that fills no tile.
const HEAD_DIMS: [usize; 8] = [40, 64, 72, 80, 96, 128, 192, 256];

/// A head dimension for each that tiles are laid out for.
const PADDED_DIMS: [usize; 3] = [64, 128, 256];

/// Dimensions of heads whose values have others than their keys, or which are larger: of MLA's prefill, and of its
/// latent cache; of Gemma's global layers and of autoencoders.
const OTHER_DIMS: [[usize; 2]; 3] = [[192, 128], [576, 512], [512, 512]];

const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// Multiprocessors of the GPU that kernels are asked for: as many as an RTX 4090 has. Decides, with the lengths below,
/// whether keys are split.
const MULTIPROCESSORS: usize = 128;

/// Query heads of a key head where they are rows of one head.
const GROUP: usize = 4;

/// A kernel that the library ships.
#[derive(Clone, Debug)]
pub struct Entry {
    kernel: Arc<dyn Kernel>,
    by_default: bool,
}

/// Every kernel for `target`, each once. Nothing is built yet.
///
/// Kernels whose instructions the target lacks are not among them: their names are in the catalogue of a later target.
pub fn catalog(target: Target) -> Vec<Entry> {
    let mut list = List { target, entries: Vec::new(), names: HashSet::new() };
    for head_dim in HEAD_DIMS {
        for dtype in DTYPES {
            list.defaults(&Call { dtype, head_dim, ..Call::default() });
        }
    }
    for head_dim in PADDED_DIMS {
        list.schemes(head_dim);
        list.cuts(head_dim);
        list.options(head_dim);
        list.sparse(head_dim);
        list.preparation(head_dim);
    }
    for [head_dim, value_dim] in OTHER_DIMS {
        list.other_dims(head_dim, value_dim);
    }
    list.cache();
    list.predictions();
    list.entries
}

/// The kernels of all targets, each once.
pub fn catalog_of_all_targets() -> Vec<Entry> {
    let mut names = HashSet::new();
    let entries = Target::ALL.into_iter().flat_map(catalog);
    entries.filter(|entry| names.insert(entry.kernel.name())).collect()
}

impl Entry {
    /// The kernel.
    pub fn kernel(&self) -> &dyn Kernel {
        &*self.kernel
    }

    /// Whether the planner chooses it where the caller leaves everything open.
    pub fn is_default(&self) -> bool {
        self.by_default
    }
}

/// Masks that are the same for all heads, and those of keys alone, such as padding.
const ROWS: Extent = Extent { batches: false, heads: false, rows: true };
const KEYS: Extent = Extent { batches: true, heads: false, rows: false };

/// A call whose kernels are asked for.
#[derive(Clone, Copy, Debug)]
struct Call {
    dtype: DType,
    head_dim: usize,
    /// Channels of V, where they are not as many.
    value_dim: Option<usize>,
    scheme: Option<Scheme>,
    size: Size,
    /// How attention's work is cut, or none for the planner's choice.
    cut: Option<Cut>,
    mask: MaskForm,
    /// Which dimensions of the mask are not broadcast.
    mask_extent: Extent,
    blocks: Option<[usize; 2]>,
    pooled_tail: bool,
    causal: bool,
    lengths: Lengths,
    aligned: bool,
    softcap: bool,
    sinks: bool,
    lse: bool,
}

/// How attention's work is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    tiling: Tiling,
    splits: usize,
}

/// Sizes at which plans differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// Query blocks for every multiprocessor.
    Common,
    /// So few query blocks that keys are split.
    FewBlocks,
    /// Too few queries to repay quantising K.
    FewQueries,
    /// One query.
    Decode,
    /// A few queries, of [`GROUP`] heads for each key head.
    Speculative,
}

impl Default for Call {
    fn default() -> Self {
        Call {
            dtype: DType::F16,
            head_dim: 64,
            value_dim: None,
            scheme: None,
            size: Size::Common,
            cut: None,
            mask: MaskForm::None,
            mask_extent: Extent::ALL,
            blocks: None,
            pooled_tail: false,
            causal: false,
            lengths: Lengths::Dense,
            aligned: true,
            softcap: false,
            sinks: false,
            lse: false,
        }
    }
}

impl Call {
    /// The plan, where there is one on the target.
    fn plan(&self, target: Target) -> Option<ForwardPlan> {
        let (problem, request) = self.asked();
        ForwardPlan::new(&problem, &request, &machine(target)).ok()
    }

    /// How the planner may cut attention's work.
    fn cuts(&self, target: Target) -> Vec<Cut> {
        let (problem, request) = self.asked();
        let all = Alternative::all(&problem, &request, &machine(target)).unwrap_or_default();
        all.into_iter().map(|Alternative { tiling, splits, .. }| Cut { tiling, splits }).collect()
    }

    /// What a planner is asked.
    fn asked(&self) -> (Problem, Request) {
        let (batch, heads, q_len, kv_len) = match self.size {
            Size::Common => (8, 32, 4096, 4096),
            Size::FewBlocks => (1, 4, 128, 4096),
            Size::FewQueries => (8, 32, 64, 1024),
            Size::Decode => (1, 8, 1, 4096),
            Size::Speculative => (1, 8, 4, 4096),
        };
        let group = if self.size == Size::Speculative { GROUP } else { 1 };
        let packed = self.lengths == Lengths::Packed;
        let rows = |len: usize| if packed { batch * len } else { len };
        let mut problem =
            Problem::dense(self.dtype, [batch, group * heads, heads], [q_len, kv_len], self.head_dim)
                .value_dim(self.value_dim.unwrap_or(self.head_dim))
                .blocks(self.blocks)
                .pooled_tail(self.pooled_tail)
                .sinks(self.sinks);
        if self.causal {
            problem.band = Band::causal(Alignment::BottomRight);
        }
        problem.logit_softcap = self.softcap.then_some(1.0);
        problem.packed = packed;
        problem.masked = self.mask != MaskForm::None;
        let request = Request {
            scheme: self.scheme,
            tiling: self.cut.map(|cut| cut.tiling),
            splits: self.cut.map(|cut| cut.splits),
            mask: self.mask,
            mask_extent: self.mask_extent,
            lengths: self.lengths,
            q_rows: rows(q_len),
            kv_rows: rows(kv_len),
            aligned: self.aligned,
            has_tensor_map: self.aligned,
            has_query_map: self.aligned,
            lse: self.lse,
            ..Request::new(&problem)
        };
        (problem, request)
    }
}

/// The GPU that kernels are asked for.
fn machine(target: Target) -> Machine {
    Machine { multiprocessors: MULTIPROCESSORS, ..Machine::typical(target) }
}

/// The catalogue while it is being made.
struct List {
    target: Target,
    entries: Vec<Entry>,
    names: HashSet<String>,
}

impl List {
    /// Adds the kernels of a call that `wanted` picks.
    fn add(&mut self, call: &Call, by_default: bool, wanted: impl Fn(&dyn Kernel) -> bool) {
        if let Some(plan) = call.plan(self.target) {
            self.add_pass(plan.pass(), by_default, wanted);
        }
    }

    fn add_pass<T>(&mut self, pass: &Pass<T>, by_default: bool, wanted: impl Fn(&dyn Kernel) -> bool) {
        for kernel in pass.kernels().filter(|kernel| wanted(&***kernel)) {
            let there = kernel.oldest_target().sm() <= self.target.sm();
            if there && self.names.insert(kernel.name()) {
                self.entries.push(Entry { kernel: kernel.clone(), by_default });
            }
        }
    }

    /// The kernels of a KV cache.
    fn cache(&mut self) {
        let machine = machine(self.target);
        for call in cache::calls() {
            self.add_pass(&call.append().pass(), call.is_default(), |_| true);
            if let Ok(pass) = call.attend().pass(&machine) {
                self.add_pass(&pass, call.is_default(), |_| true);
            }
        }
    }

    /// The kernels that predict block maps.
    fn predictions(&mut self) {
        for (call, predictor) in predict::calls() {
            if let Ok(pass) = call.pass(&predictor) {
                self.add_pass(&pass, false, |_| true);
            }
        }
    }

    /// What the planner chooses for calls of every size.
    fn defaults(&mut self, call: &Call) {
        let few = [Size::FewQueries, Size::Decode, Size::Speculative];
        for size in [Size::Common, Size::FewBlocks].into_iter().chain(few) {
            self.add(&Call { size, ..*call }, true, |_| true);
        }
    }

    /// What the planner chooses for such heads, and usual schemes and options beside.
    fn other_dims(&mut self, head_dim: usize, value_dim: usize) {
        let value_dim = Some(value_dim);
        for dtype in DTYPES {
            self.defaults(&Call { dtype, head_dim, value_dim, ..Call::default() });
        }
        let presets = [Preset::FULL, Preset::INT8_FP8, Preset::SAGE2_INT8_FP8_PER_THREAD];
        let schemes = presets.map(|preset| preset.scheme(head_dim));
        for scheme in schemes.into_iter().chain([int8_scheme(DType::BF16)]).map(Some) {
            let call = Call { dtype: DType::BF16, head_dim, value_dim, scheme, ..Call::default() };
            for call in [
                call,
                Call { lse: true, ..call },
                Call { mask: MaskForm::Bool, ..call },
                Call { lengths: Lengths::Packed, ..call },
            ] {
                self.add(&call, false, |_| true);
            }
        }
    }

    /// Every scheme that has kernels.
    fn schemes(&mut self, head_dim: usize) {
        for preset in Preset::ALL {
            let scheme = Some(preset.scheme(head_dim));
            self.add(&Call { head_dim, scheme, ..Call::default() }, false, |_| true);
        }
        // Both kinds of 16-bit values that are not the inputs' own, FP8 beside bfloat16, K as it is, and our own with
        // a rotation.
        let int8 = |pv| Scheme { pv, ..int8_scheme(DType::F16) };
        let mut rough = int8_scheme(DType::F16);
        rough.smooth.k = SmoothK::Off;
        for (dtype, scheme) in [
            (DType::F16, int8(Pv::BF16(Accumulator::F32))),
            (DType::BF16, int8(Pv::F16(Accumulator::F32))),
            (DType::BF16, Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(head_dim)),
            (DType::BF16, Preset::FULL.scheme(head_dim)),
            (DType::F16, rough),
            (DType::F16, Scheme { rotate: true, ..int8_scheme(DType::F16) }),
            (DType::BF16, Preset::INT8_FP8.scheme(head_dim)),
            (DType::BF16, Preset::ATTN_QAT_NVFP4.scheme(head_dim)),
            (DType::BF16, Preset::NVFP4_FP8.scheme(head_dim)),
            (DType::F16, Scheme { rotate: true, ..Preset::SAGE3_NVFP4.scheme(head_dim) }),
        ] {
            self.add(&Call { dtype, head_dim, scheme: Some(scheme), ..Call::default() }, false, |_| true);
        }
    }

    /// Attention in every tile shape that the planner weighs, keys whole and split.
    fn cuts(&mut self, head_dim: usize) {
        let fp8 = Preset::INT8_FP8.scheme(head_dim);
        for scheme in [Preset::FULL.scheme(head_dim), int8_scheme(DType::F16), fp8] {
            for size in [Size::Common, Size::FewBlocks] {
                let call = Call { head_dim, scheme: Some(scheme), size, ..Call::default() };
                for cut in call.cuts(self.target) {
                    self.add(&Call { cut: Some(cut), ..call }, false, |_| true);
                }
            }
        }
    }

    /// Every option of a call, beside the usual schemes.
    fn options(&mut self, head_dim: usize) {
        let schemes =
            [int8_scheme(DType::F16), Preset::FULL.scheme(head_dim), Preset::SAGE3_NVFP4.scheme(head_dim)];
        for scheme in schemes {
            let call = Call { head_dim, scheme: Some(scheme), ..Call::default() };
            for call in [
                Call { mask: MaskForm::Bool, ..call },
                Call { mask: MaskForm::Bias(DType::F16), ..call },
                Call { mask: MaskForm::Bias(DType::F16), mask_extent: ROWS, ..call },
                Call { mask: MaskForm::Bias(DType::BF16), mask_extent: ROWS, ..call },
                Call { mask: MaskForm::Bias(DType::F32), mask_extent: ROWS, ..call },
                Call { mask: MaskForm::Bool, mask_extent: KEYS, ..call },
                Call { mask: MaskForm::Bias(DType::F16), mask_extent: KEYS, ..call },
                Call { mask: MaskForm::Bias(DType::BF16), mask_extent: KEYS, ..call },
                Call { mask: MaskForm::Bias(DType::F32), mask_extent: KEYS, ..call },
                Call { mask: MaskForm::Bias(DType::BF16), ..call },
                Call { mask: MaskForm::Bias(DType::F32), ..call },
                Call { blocks: Some([128, 64]), ..call },
                Call { blocks: Some([64, 128]), ..call },
                Call { blocks: Some([48, 80]), mask: MaskForm::Bias(DType::F16), ..call },
                Call { softcap: true, ..call },
                Call { sinks: true, ..call },
                Call { lse: true, ..call },
                Call { lengths: Lengths::KvLens, ..call },
                Call { lengths: Lengths::Packed, ..call },
                Call { aligned: false, ..call },
                Call { size: Size::FewBlocks, lse: true, ..call },
                Call { size: Size::FewBlocks, sinks: true, lse: true, ..call },
            ] {
                self.add(&call, false, |_| true);
            }
        }
        let scheme = Some(Preset::FULL.scheme(head_dim));
        let steps =
            Call { head_dim, scheme, size: Size::Speculative, lengths: Lengths::Packed, ..Call::default() };
        self.add(&steps, false, |_| true);
        self.add(&Call { sinks: true, lengths: Lengths::Dense, ..steps }, false, |_| true);
    }

    /// Block masks beside FP8 values, summed in one level and in two.
    fn sparse(&mut self, head_dim: usize) {
        for preset in [Preset::INT8_FP8, Preset::SAGE2_INT8_FP8_PER_THREAD] {
            for blocks in [[128, 64], [64, 128]] {
                let scheme = Some(preset.scheme(head_dim));
                let call = Call { head_dim, scheme, blocks: Some(blocks), ..Call::default() };
                self.add(&call, false, |_| true);
            }
        }
        let int8 = Some(int8_scheme(DType::F16));
        let usual = Call { head_dim, blocks: Some([64, 64]), pooled_tail: true, ..Call::default() };
        for call in [
            Call { scheme: int8, ..usual },
            Call { dtype: DType::BF16, causal: true, lse: true, scheme: int8, ..usual },
            Call { causal: true, lengths: Lengths::KvLens, aligned: false, softcap: true, ..usual },
        ] {
            self.add(&call, false, |kernel| {
                kernel.downcast_ref::<PooledTailConfig>().is_some()
                    || kernel.downcast_ref::<PoolBlocksConfig>().is_some()
            });
        }
    }

    /// Every kernel that prepares K and V, for each kind of tensor.
    fn preparation(&mut self, head_dim: usize) {
        let base = Call { head_dim, ..Call::default() };
        let int4 = Preset::SAGE2_INT4_FP8.scheme(head_dim);
        for scheme in [
            int8_scheme(DType::F16),
            Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(head_dim),
            Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD.scheme(head_dim),
            Scheme { pv: Pv::BF16(Accumulator::F32), ..int8_scheme(DType::F16) },
            // What INT4 needs beside V in FP8, which older targets lack.
            Scheme { pv: Pv::F16(Accumulator::F32), ..int4 },
            int4,
            Preset::SAGE3_NVFP4.scheme(head_dim),
            Preset::SAGE3_MXFP4.scheme(head_dim),
        ] {
            let base = Call { scheme: Some(scheme), ..base };
            for call in [
                base,
                Call { dtype: DType::BF16, ..base },
                Call { lengths: Lengths::KvLens, ..base },
                Call { lengths: Lengths::Packed, ..base },
                Call { aligned: false, ..base },
            ] {
                self.add(&call, false, |kernel| kernel.downcast_ref::<AttentionConfig>().is_none());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use sage_core::Granularity;

    use super::*;
    use crate::attention::padded_dim;
    use crate::operand::{Element, OperandSource, Scales};

    fn attention(entries: &[Entry]) -> impl Iterator<Item = &AttentionConfig> {
        entries.iter().filter_map(|entry| entry.kernel().downcast_ref())
    }

    #[test]
    fn every_value_of_every_option_is_there_at_every_padded_dimension() {
        let entries = catalog(Target::SM_89);
        for dim in PADDED_DIMS {
            let has = |what: &str, wanted: &dyn Fn(&AttentionConfig) -> bool| {
                let of_dim = |config: &&AttentionConfig| padded_dim(config.head_dim) == dim;
                let found = attention(&entries).filter(of_dim).any(wanted);
                assert!(found, "head_dim {dim}: no kernel with {what}");
            };
            use Accumulator::{F16, F16ThenF32, F32, F32ThenF32};
            let half = [F32, F16, F16ThenF32].map(|sums| (Element::F16, sums));
            let eight_bits = [F32, F32ThenF32, F16ThenF32].map(|sums| (Element::E4M3, sums));
            for (element, sums) in half.into_iter().chain([(Element::BF16, F32)]).chain(eight_bits) {
                has(&format!("{element:?} summed in {}", sums.name()), &|config| {
                    config.operands.v.element == element && config.operands.sums == sums
                });
            }
            use Granularity::{PerBlock, PerThread, PerToken, PerWarp};
            for granularity in [PerBlock, PerWarp, PerThread, PerToken] {
                has(&format!("{granularity:?}"), &|config| {
                    config.operands.k.scales == Scales::Rows(granularity)
                });
            }
            has("INT4 and smooth Q", &|config| {
                config.operands.k.element == Element::I4 && config.smooth_q.is_some()
            });
            for mask in [DType::F16, DType::BF16, DType::F32]
                .map(MaskForm::Bias)
                .into_iter()
                .chain([MaskForm::None, MaskForm::Bool])
            {
                has(&format!("{mask:?}"), &|config| config.mask == mask);
            }
            for lengths in [Lengths::Dense, Lengths::KvLens, Lengths::Packed] {
                has(&format!("{lengths:?}"), &|config| config.lengths == lengths);
            }
            has("full scores", &|config| config.operands.quantizer.is_none());
            has("a converted V", &|config| {
                let v = config.operands.v;
                v.source == OperandSource::Workspace && v.element != Element::E4M3
            });
            has("softcap", &|config| config.softcap);
            has("sinks", &|config| config.sinks && !config.split);
            has("sinks of split keys", &|config| config.sinks && config.split);
            has("LSE", &|config| config.lse && !config.split);
            has("smooth V", &|config| config.smooth_v);
            has("a rough K", &|config| !config.smooth_k);
            has("a rotation", &|config| config.rotate);
            has("unaligned rows", &|config| !config.aligned);
            has("split keys", &|config| config.split);
            has("heads as rows", &|config| config.heads_as_rows);
        }
    }

    #[test]
    fn names_are_unique_and_minimum_targets_true() {
        let mut names = HashSet::new();
        for entry in catalog_of_all_targets() {
            assert!(names.insert(entry.kernel.name()), "{} occurs twice", entry.kernel.name());
            let (program, minimum) = (entry.kernel.program(), entry.kernel.oldest_target());
            assert_eq!(program.name, entry.kernel.name());
            assert!(
                program.missing_on(minimum).is_none(),
                "{} lacks something on {minimum}",
                entry.kernel.name()
            );
            let older = Target::ALL.into_iter().filter(|target| target.sm() < minimum.sm());
            for target in older {
                assert!(program.missing_on(target).is_some(), "{} needs no {minimum}", entry.kernel.name());
            }
        }
    }

    /// What the driver must be told of a kernel is what its text asks for.
    #[test]
    fn facts_of_programs_are_those_of_their_texts() {
        let mut whole = [0, 0];
        for entry in catalog_of_all_targets() {
            let (program, target) = (entry.kernel.program(), entry.kernel.oldest_target());
            let ptx = program.ptx(target).unwrap();
            let needs = program.needs_whole_compilation();
            assert_eq!(
                needs,
                ptx.contains("wgmma.") || ptx.contains("setmaxnreg"),
                "{}",
                entry.kernel.name()
            );
            let waits = ptx.contains("griddepcontrol.wait");
            assert_eq!(
                program.waits_for_launches_before(target),
                waits,
                "{} on {target}",
                entry.kernel.name()
            );
            whole[usize::from(needs)] += 1;
        }
        assert!(whole.iter().all(|&count| count > 0), "one kind only: {whole:?}");
    }

    /// Of the targets whose GPUs have least of it.
    #[test]
    fn kernels_fit_the_shared_memory_of_their_gpu() {
        let mut larger = Vec::new();
        for target in [Target::SM_75, Target::SM_86] {
            for entry in catalog(target) {
                let bytes = entry.kernel().program().shared_bytes() as usize;
                if bytes > machine(target).shared_bytes {
                    larger.push(format!("{} on {target}: {bytes} bytes", entry.kernel().name()));
                }
            }
        }
        assert!(larger.is_empty(), "{}", larger.join("\n"));
    }

    #[test]
    fn nobody_is_offered_what_the_target_lacks() {
        for target in Target::ALL {
            for entry in catalog(target) {
                assert!(
                    entry.kernel.oldest_target().sm() <= target.sm(),
                    "{} on {target}",
                    entry.kernel.name()
                );
            }
        }
    }
}
