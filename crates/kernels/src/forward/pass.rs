//! Which kernels compute a problem.

use sage_core::{
    Accumulator, DType, Error, Granularity, IntBits, IntQuantizer, Problem, Pv, Qk, Result, ScaleRows,
    Scheme, SmoothK, SmoothQ,
};
use sage_ptx::Target;

use super::{Gpu, Request, Step};
use crate::attention::{AttentionConfig, MaskForm, Scores, ValueSource, Values, padded_dim};
use crate::choice::FEW_QUERIES;
use crate::combine::CombineConfig;
use crate::preprocess::{
    ColumnStatistics, ConvertVConfig, DeltaSConfig, KeyMean, QuantizeKConfig, QuantizeVConfig,
    QueryMeansConfig, RankKeysConfig, SampleConfig, SeenKeysConfig, Source, ValueScales,
};
use crate::sequence::Lengths;
use crate::tuning::{Shape, Tuned, tiling};

/// What the choice of kernels depends on.
pub(super) struct Pass<'a> {
    pub problem: &'a Problem,
    pub request: &'a Request,
    pub gpu: &'a Gpu,
    pub scheme: &'a Scheme,
}

impl Pass<'_> {
    fn source(&self) -> Source {
        Source {
            dtype: self.problem.dtype,
            head_dim: self.problem.head_dim,
            aligned: self.request.aligned,
            lengths: self.request.lengths,
            masked: self.request.mask != MaskForm::None,
        }
    }

    /// The launches, what the attention kernel's tile shape is for, and the parts that keys are split into.
    pub fn steps(&self, reasons: &mut Vec<String>) -> Result<(Vec<Step>, Shape, usize)> {
        let (problem, request, scheme) = (self.problem, self.request, self.scheme);
        let scores = match scheme.qk {
            Qk::Full => Scores::Full,
            Qk::Int(quantizer) if quantizer.granularity == Granularity::PerTensor => {
                return Err(Error::unsupported(
                    "scales per tensor",
                    "on a GPU scales are per block or finer",
                ));
            }
            Qk::Int(quantizer) => Scores::Int(quantizer),
            Qk::Nvfp4 => {
                return Err(Error::unsupported("scheme with NVFP4 scores", "no GPU kernel computes it yet"));
            }
        };
        let quantised = matches!(scores, Scores::Int(_));
        let (values, convert) = self.values()?;
        let source = self.source();
        let mut steps = Vec::new();
        if source.masked {
            steps.push(Step::SeenKeys(SeenKeysConfig { mask: request.mask, lengths: request.lengths }));
            // Only means and scales ask which keys count.
            if quantised || convert.is_some() || matches!(values, Values::Fp8(_)) {
                steps.push(Step::RankKeys(RankKeysConfig));
            }
        }

        let smooth_q = match scheme.smooth.q {
            SmoothQ::Off => None,
            SmoothQ::Block(rows) if rows.is_multiple_of(64) => Some(rows),
            SmoothQ::Block(rows) => {
                return Err(Error::value("smooth.q block", rows, "a multiple of 64 on a GPU"));
            }
            SmoothQ::Sequence => Some(problem.q_len.next_multiple_of(64).max(64)),
        };
        if let Some(block) = smooth_q {
            let lengths = if request.lengths == Lengths::Packed { Lengths::Packed } else { Lengths::Dense };
            steps.push(Step::QueryMeans(QueryMeansConfig {
                source: Source { lengths, masked: false, ..source },
                block,
            }));
        }
        if quantised {
            if let Scores::Int(quantizer) = scores {
                let IntQuantizer { bits, granularity, rounding, zero_group, .. } = quantizer;
                let mean = match scheme.smooth.k {
                    SmoothK::Off => KeyMean::Zero,
                    SmoothK::Mean => KeyMean::Collected,
                    SmoothK::Sampled(rows) => {
                        let statistics = ColumnStatistics::Mean;
                        steps.push(Step::SampleK(SampleConfig { source, rows, statistics }));
                        KeyMean::Given
                    }
                };
                steps.push(Step::QuantizeK(QuantizeKConfig {
                    source,
                    bits,
                    granularity,
                    rounding,
                    zero_group,
                    mean,
                    rotate: scheme.rotate,
                }));
            }
        } else if scheme.smooth.k.is_on() || smooth_q.is_some() {
            return Err(Error::unsupported("smoothing of full-precision scores", "it changes nothing there"));
        } else if scheme.rotate {
            return Err(Error::unsupported("rotation of full-precision scores", "it changes nothing there"));
        }
        if smooth_q.is_some() {
            steps.push(Step::DeltaS(DeltaSConfig { source, smooth_k: scheme.smooth.k.is_on() }));
        }
        if let Values::Fp8(_) = values {
            let smooth = scheme.smooth.v;
            let quantise = |scales| Step::QuantizeV(QuantizeVConfig { source, smooth, scales });
            match scheme.pv {
                Pv::Fp8 { rows: ScaleRows::Sampled(rows), .. } => {
                    if smooth {
                        let wanted = "V's mean is of all rows, and so are its scales then";
                        return Err(Error::unsupported("smooth V with sampled scales", wanted));
                    }
                    let statistics = ColumnStatistics::Scale;
                    steps.push(Step::SampleV(SampleConfig { source, rows, statistics }));
                    steps.push(quantise(ValueScales::Given));
                    steps.push(quantise(ValueScales::CollectedWhereMarked));
                }
                _ => steps.push(quantise(ValueScales::Collected)),
            }
        } else if scheme.smooth.v {
            return Err(Error::unsupported(
                "smooth V with 16-bit P·V",
                "on a GPU V is smoothed for FP8 only",
            ));
        }
        if let Some(to) = convert {
            steps.push(Step::ConvertV(ConvertVConfig { source, to }));
        }

        let shape = Shape {
            integer: quantised,
            fp8: matches!(values, Values::Fp8(_)),
            two_level: matches!(
                values,
                Values::F16(Accumulator::F16ThenF32)
                    | Values::Fp8(Accumulator::F16ThenF32 | Accumulator::F32ThenF32)
            ),
            padded_dim: padded_dim(problem.head_dim),
            plain: request.mask != MaskForm::None
                || problem.logit_softcap.is_some()
                || smooth_q.is_some()
                || matches!(scores, Scores::Int(q) if q.granularity == Granularity::PerToken),
            unaligned: !request.aligned,
            max_rows_per_warp: max_rows_per_warp(&scores),
            warpgroups: self.suits_warpgroups(&scores, &values, convert.is_some()),
            per_block: matches!(scores, Scores::Int(q) if q.granularity == Granularity::PerBlock),
            few_rows: problem.q_len <= 128,
        };
        let tuned = match request.tiling {
            Some(tiling) => Tuned { tiling, reason: "as asked for, or as `sageattn tune` measured" },
            None => tiling(self.gpu.target, &shape),
        };
        let mut attention = AttentionConfig {
            dtype: problem.dtype,
            head_dim: problem.head_dim,
            scores,
            values,
            value_source: match (values, convert) {
                (Values::Fp8(_), _) | (_, Some(_)) => ValueSource::Workspace,
                _ => ValueSource::Given,
            },
            mask: request.mask,
            softcap: problem.logit_softcap.is_some(),
            lse: request.lse,
            smooth_k: scheme.smooth.k.is_on(),
            smooth_q,
            smooth_v: scheme.smooth.v,
            rotate: scheme.rotate,
            lengths: request.lengths,
            aligned: request.aligned,
            split: false,
            tiling: tuned.tiling,
        };
        reasons.push(format!(
            "{} warps of {} query rows, tiles of {} keys: {}",
            attention.tiling.warps, attention.tiling.rows_per_warp, attention.tiling.tile_keys, tuned.reason
        ));
        let splits = self.splits(&attention);
        if splits > 1 {
            reasons.push(format!("keys in {splits} parts: the query blocks alone would leave the GPU idle"));
            attention.split = true;
        }
        steps.push(Step::Attention(attention));
        if splits > 1 {
            let (dtype, head_dim) = (problem.dtype, problem.head_dim);
            steps.push(Step::Combine(CombineConfig { dtype, head_dim, lse: request.lse }));
        }
        Ok((steps, shape, splits))
    }

    /// Whether there is a kernel of warpgroups for such operands, and work for it: it takes 128 query rows and more at
    /// once, and keys.
    fn suits_warpgroups(&self, scores: &Scores, values: &Values, convert: bool) -> bool {
        // Tiles of the workspace always have a map, wherever they came from.
        let in_workspace = *scores != Scores::Full && (convert || matches!(values, Values::Fp8(_)));
        let mapped = if in_workspace { self.request.aligned } else { self.request.boxed };
        let scores = match scores {
            Scores::Full => true,
            Scores::Int(quantizer) => quantizer.bits == IntBits::Eight,
        };
        let values = match values {
            Values::F16(Accumulator::F32) | Values::BF16 | Values::Fp8(Accumulator::F32) => true,
            // A tile's own sums beside all tiles' would take 256 registers of wider heads: 2.4 KB of spills in the loop.
            Values::Fp8(Accumulator::F32ThenF32) => self.problem.head_dim <= 128,
            _ => false,
        };
        let hopper = self.gpu.target == Target::SM_90A;
        // There is no tensor map of nothing, and the other kernels need none to write zeros.
        let work = self.problem.q_len > FEW_QUERIES && self.problem.kv_len > 0;
        hopper && scores && values && mapped && work && self.counts_pieces()
    }

    /// Whether a counter of 32 bits holds the pieces of work of all warpgroups, of which the least has 64 query rows:
    /// not with very many packed sequences of which one is long.
    fn counts_pieces(&self) -> bool {
        let heads = self.problem.batch * self.problem.num_q_heads;
        heads.checked_mul(self.problem.q_len.div_ceil(64)).is_some_and(|count| i32::try_from(count).is_ok())
    }

    /// P·V's form, and what V must be converted to first.
    fn values(&self) -> Result<(Values, Option<DType>)> {
        let dtype = self.problem.dtype;
        match self.scheme.pv {
            Pv::F16(Accumulator::F32ThenF32) => {
                Err(Error::unsupported("FP16 P·V summed in f32+f32", "use f32: its sums are exact already"))
            }
            Pv::F16(accumulator) => {
                Ok((Values::F16(accumulator), (dtype == DType::BF16).then_some(DType::F16)))
            }
            Pv::BF16(Accumulator::F32) => Ok((Values::BF16, (dtype == DType::F16).then_some(DType::BF16))),
            Pv::BF16(accumulator) => {
                Err(Error::value("pv accumulator", accumulator.name(), "f32 for BF16 P·V"))
            }
            Pv::Fp8 { .. } if self.gpu.target.sm() < 89 => Err(Error::unsupported(
                format!("FP8 P·V on {}", self.gpu.target),
                "FP8 needs sm_89 or later; use FP16 P·V",
            )),
            Pv::Fp8 { accumulator: Accumulator::F16, .. } => {
                Err(Error::unsupported("FP8 P·V summed in f16", "use f16+f32"))
            }
            Pv::Fp8 { accumulator, .. } => Ok((Values::Fp8(accumulator), None)),
            Pv::F32 | Pv::Int8 | Pv::Fixed12 { .. } | Pv::Nvfp4 => {
                Err(Error::unsupported(format!("scheme `{}`", self.scheme), "no GPU kernel computes its P·V"))
            }
        }
    }

    /// Parts of the keys that give every multiprocessor a block, where the queries alone do not.
    fn splits(&self, attention: &AttentionConfig) -> usize {
        let problem = self.problem;
        let pieces = attention.pieces(problem.batch, problem.num_q_heads, problem.q_len, 1);
        let blocks = pieces.iter().product::<usize>();
        let wanted = 2 * self.gpu.multiprocessors;
        let tiles = problem.kv_len.div_ceil(attention.tiling.tile_keys);
        // Fewer than four tiles a part cost more to merge than they save.
        if blocks == 0 || blocks * 2 > wanted { 1 } else { (wanted / blocks).min(tiles / 4).max(1) }
    }
}

/// Most query rows of a warp: the groups of smaller warps would be mixed in one lane.
fn max_rows_per_warp(scores: &Scores) -> usize {
    match scores {
        Scores::Int(IntQuantizer {
            granularity: Granularity::PerWarp | Granularity::PerThread,
            tile,
            ..
        }) => tile.warp_q,
        _ => 32,
    }
}
