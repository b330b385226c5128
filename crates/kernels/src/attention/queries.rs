//! A warp's query rows: read, smoothed, quantised, and kept as the operand of Q·Kᵀ.

use sage_core::{Fp4Format, Granularity, IntQuantizer};
use sage_ptx::{
    AddressSpace, Code, E2M1, FragmentA, Global, Half, MmaElement, OperandTile, PanelMatrix, Pointer, Rows,
    SLOT_ROWS, ScaledA, Shared, Stored, Val, WarpgroupA, lane_row,
};

use super::config::{AttentionConfig, AttentionParams, padded_dim, panel_row_bytes};
use super::place::Place;
use super::warpgroups::StagedRows;
use crate::fp4::{GroupScale, ScalesOfA};
use crate::integer::{Step, magnitude_bits, nonzero};
use crate::rotation::{RowLayout, rotate};
use crate::tiling::Engine;

/// Queries as the operand A of Q·Kᵀ.
pub(super) struct Queries<'k> {
    operand: Operand<'k>,
    /// For 4-bit elements, the scales of each strip's groups at each step of the depth, as operand A has them.
    group_scales: Vec<Vec<Val<'k, u32>>>,
    /// Factor of each row's scores, not zero.
    pub scale: Rows<Val<'k, f32>>,
    /// What smoothing K took from each row's scaled scores, in the natural base.
    pub taken: Rows<Val<'k, f32>>,
}

/// Where the operand stays between the tiles that it is multiplied with.
enum Operand<'k> {
    /// The warp's rows: the lane's own words.
    Words(OperandTile<'k>),
    /// The warpgroup's rows in shared memory.
    Panels(PanelMatrix<'k>),
}

/// The channels of each register of each row's operand: packed in words, or one by one.
type Registers<'k, T> = Rows<Vec<Vec<Val<'k, T>>>>;

/// Maxima of groups of several warps' rows: one of each lane.
pub(super) fn maxima_of_warps(config: &AttentionConfig) -> usize {
    config.threads() as usize
}

/// How many 32-byte steps the depth of Q·Kᵀ takes.
pub(super) fn depth_steps(config: &AttentionConfig) -> usize {
    config.depth().div_ceil(8 * elements_per_word(config))
}

/// Elements of a 32-bit register of the operands of Q·Kᵀ.
pub(super) fn elements_per_word(config: &AttentionConfig) -> usize {
    config.operands.q.element.per_register()
}

impl<'k> Queries<'k> {
    /// Reads and prepares them; `scratch` is shared memory that nothing else needs meanwhile, where there is some, and
    /// `staged` has the block's rows where they are in shared memory already.
    pub fn load<H: Half + Stored<Value = H>>(
        code: &'k Code,
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        scratch: Option<Shared<'k, i32>>,
        staged: Option<&StagedRows<'k>>,
    ) -> Self {
        code.note("queries: read, smooth, quantise");
        let quad = place.lane & 3;
        if let Some(staged) = staged.filter(|_| config.multiplies_staged_queries()) {
            let slots = config.tiling.rows_per_warp() / SLOT_ROWS;
            let scale = p.sm_scale * std::f32::consts::LOG2_E;
            return Queries {
                operand: Operand::Panels(staged.matrix(place.warp)),
                group_scales: Vec::new(),
                scale: Rows::from_fn(slots, |_| scale),
                taken: Rows::from_fn(slots, |_| code.constant(0.0)),
            };
        }
        let loader = Loader { code, config, p, place, scratch, quad, per: elements_per_word(config) };
        let loaded = match staged {
            Some(staged) => loader.staged(staged),
            None => loader.load::<H>(place.head_start(&p.q)),
        };
        let channels = |words: &Vec<Val<'k, u32>>| {
            words.iter().flat_map(|word| word.split::<H>()).map(|x| x.to_f32()).collect()
        };
        // The same in single precision.
        let mut rows: Registers<'k, f32> = loaded.map(|registers| registers.iter().map(channels).collect());
        let taken = loader.taken(&rows);
        if let Some(block) = config.smooth_q {
            loader.smooth(&mut rows, block);
        }
        if config.rotate {
            loader.rotate(&mut rows);
        }
        let unscaled = || {
            let scale = p.sm_scale * std::f32::consts::LOG2_E;
            loaded.map(|_| scale)
        };
        let mut group_scales = Vec::new();
        let (words, scale) = match (config.operands.quantizer, config.operands.q.fp4()) {
            (Some(quantizer), _) => loader.quantize::<H>(&quantizer, &loaded, rows),
            (None, Some(format)) => {
                let (words, scales) = loader.quantize_fp4(format, &rows);
                group_scales = scales;
                (words, unscaled())
            }
            (None, None) => (OperandTile::of_rows(&loaded, |_, words| words[0]), unscaled()),
        };
        Queries { operand: loader.keep(words), group_scales, scale, taken }
    }

    /// The operand of the warp's rows at one step of the depth: a fragment for each 16.
    #[track_caller]
    pub fn fragments<E: MmaElement>(&self, step: usize) -> Vec<FragmentA<'k, E>> {
        match &self.operand {
            Operand::Words(words) => words.fragments(step),
            Operand::Panels(_) => unreachable!("a warpgroup's queries are no warp's"),
        }
    }

    /// The same of 4-bit elements, with the scales of their groups.
    #[track_caller]
    pub fn scaled_fragments(&self, step: usize) -> Vec<ScaledA<'k>> {
        let strips = self.fragments::<E2M1>(step).into_iter().zip(&self.group_scales);
        strips.map(|(fragment, scales)| ScaledA { fragment, scales: scales[step] }).collect()
    }

    /// The operand of the warpgroup's rows at one step of the depth.
    pub fn warpgroup_operand<E: MmaElement>(&self, step: usize) -> WarpgroupA<'k, E> {
        match &self.operand {
            Operand::Words(words) => WarpgroupA::Registers(words.fragments(step)[0]),
            Operand::Panels(rows) => WarpgroupA::Shared(rows.depth_in_columns(0, 32 * step)),
        }
    }
}

/// How a warp's queries are read and prepared.
struct Loader<'k, 'a> {
    code: &'k Code,
    config: &'a AttentionConfig,
    p: &'a AttentionParams<'k>,
    place: &'a Place<'k>,
    scratch: Option<Shared<'k, i32>>,
    /// The lane's place in its quad, whose lanes hold neighbouring channels of a row.
    quad: Val<'k, i32>,
    /// Channels of a register.
    per: usize,
}

impl<'k> Loader<'k, '_> {
    /// Neighbouring channels of each register, as loaded. The last row stands in for rows that the sequence does not
    /// have, which nobody reads.
    fn load<H: Half + Stored<Value = H>>(&self, head: Val<'k, i64>) -> Registers<'k, u32> {
        let Loader { config, p, place, per, .. } = *self;
        Rows::from_fn(config.tiling.rows_per_warp() / SLOT_ROWS, |slot| {
            let row = place.row(slot).min(place.rows - 1);
            let base = p.q.start.cast::<H>().at(place.row_start(&p.q, head, row));
            let register = |word: usize| {
                load_channels::<H>(
                    (config.head_dim, config.aligned),
                    base,
                    self.quad * per as i32,
                    (word * 4 * per) as i32,
                    per,
                )
            };
            (0..2 * depth_steps(config)).map(register).collect()
        })
    }

    /// The same of rows in shared memory. Rows that the sequence does not have may hold anything, as nobody reads what
    /// comes of them.
    fn staged(&self, rows: &StagedRows<'k>) -> Registers<'k, u32> {
        let Loader { config, place, per, .. } = *self;
        Rows::from_fn(config.tiling.rows_per_warp() / SLOT_ROWS, |slot| {
            (0..2 * depth_steps(config)).map(|word| rows.words(place, slot, word, per)).collect()
        })
    }

    /// What smoothing K took from each row's scores: scores of smoothed keys lack the same amount for all keys of a
    /// row, the product with the keys' mean. Zeros where nobody asks.
    fn taken(&self, rows: &Registers<'k, f32>) -> Rows<Val<'k, f32>> {
        let Loader { code, config, p, place, quad, per, .. } = *self;
        if !(config.smooth_k && (config.lse || config.softcap || config.sinks)) {
            return rows.map(|_| code.constant(0.0));
        }
        let mean = p.k_mean.at(place.kv_index(p) * padded_dim(config.head_dim) as i32).at(quad * per as i32);
        rows.map(|registers| product(registers, mean, per) * p.sm_scale)
    }

    /// Subtracts the means of blocks of `block` rows.
    fn smooth(&self, rows: &mut Registers<'k, f32>, block: usize) {
        let Loader { config, p, place, quad, per, .. } = *self;
        for (slot, registers) in rows.iter_mut().enumerate() {
            let row = place.row(slot);
            let valid = row.lt(place.rows);
            let mean = p.q_mean.at(place.query_block(row, block, p) * padded_dim(config.head_dim) as i32);
            let mean = mean.at(quad * per as i32);
            for (word, channels) in registers.iter_mut().enumerate() {
                for (i, x) in channels.iter_mut().enumerate() {
                    let mean = mean.plus((word * 4 * per + i) as i32).load();
                    *x = valid.select(*x - mean, 0.0);
                }
            }
        }
    }

    /// Multiplies rows by the matrix that quantised K was multiplied by.
    fn rotate(&self, rows: &mut Registers<'k, f32>) {
        self.code.note("queries: rotation");
        let layout = RowLayout { per: self.per, lanes: 4, lane: self.quad };
        for registers in rows.iter_mut() {
            let mut row = registers.concat();
            rotate(&mut row, &layout, self.config.head_dim);
            *registers = row.chunks(self.per).map(<[_]>::to_vec).collect();
        }
    }

    /// The quantised rows, and the factor of each one's scores.
    fn quantize<H: Half>(
        &self,
        quantizer: &IntQuantizer,
        loaded: &Registers<'k, u32>,
        mut rows: Registers<'k, f32>,
    ) -> (OperandTile<'k>, Rows<Val<'k, f32>>) {
        let Loader { code, config, p, place, .. } = *self;
        if quantizer.scale_q_first {
            let factor = p.sm_scale * std::f32::consts::LOG2_E;
            rows.iter_mut().flatten().flatten().for_each(|x| *x = *x * factor);
        }
        let as_loaded = config.smooth_q.is_none() && !config.rotate && !quantizer.scale_q_first;
        let maxima = Rows::from_fn(rows.slots(), |slot| {
            let bits = if as_loaded {
                let [low, high] = packed_maximum::<H>(loaded[slot].iter().flatten());
                magnitude_bits(low).max(magnitude_bits(high))
            } else {
                let bits = rows[slot].iter().flatten().map(|&x| magnitude_bits(x));
                bits.reduce(Val::max).unwrap_or(code.constant(0))
            };
            place.row(slot).lt(place.rows).select(bits, 0)
        });
        let steps = groups(code, config, quantizer, place, self.scratch, &maxima);
        let words = OperandTile::of_rows(&rows, |slot, x| steps[slot].round_word(x));
        let factor =
            if quantizer.scale_q_first { code.constant(1.0) } else { p.sm_scale * std::f32::consts::LOG2_E };
        (words, steps.map(|step| nonzero(step.scale * factor)))
    }

    /// The rows in 4 bits, and the scales of each strip's groups at each step of the depth.
    fn quantize_fp4(
        &self,
        format: Fp4Format,
        rows: &Registers<'k, f32>,
    ) -> (OperandTile<'k>, Vec<Vec<Val<'k, u32>>>) {
        let of_a = ScalesOfA::new(format, self.place.lane);
        let group = |channels: &Vec<Val<'k, f32>>| {
            let bits = channels.iter().map(|&x| magnitude_bits(x)).reduce(Val::max);
            let bits = bits.unwrap_or(self.code.constant(0));
            GroupScale::of_group(format, of_a.among_sharing(bits, Val::max))
        };
        let scales: Rows<Vec<GroupScale<'k>>> = rows.map(|registers| registers.iter().map(group).collect());
        // What becomes a word, and its group's scale.
        let scaled =
            Rows::from_fn(rows.slots(), |slot| rows[slot].iter().zip(&scales[slot]).collect::<Vec<_>>());
        let words = OperandTile::of_rows(&scaled, |_, (x, scale)| scale.word(std::array::from_fn(|i| x[i])));
        let of_strip = |strip: usize| {
            let byte = |slot: usize, word: usize| scales[2 * strip + slot][word].code;
            let of_step = |step: usize| {
                let [low, high] = [0, 1].map(|half| 2 * step + half);
                let groups = byte(0, low) | byte(0, high) << 8 | byte(1, low) << 16 | byte(1, high) << 24;
                of_a.word(groups)
            };
            (0..depth_steps(self.config)).map(of_step).collect()
        };
        (words, (0..rows.slots() / 2).map(of_strip).collect())
    }

    /// Puts the operand where it stays.
    fn keep(&self, words: OperandTile<'k>) -> Operand<'k> {
        let Loader { code, config, .. } = *self;
        if config.tiling.queries_in_registers() {
            Operand::Words(words)
        } else if config.tiling.engine() == Engine::Warpgroups {
            Operand::Panels(self.panels(&words))
        } else {
            let lanes = config.threads() as usize;
            let memory = code.shared::<u32>("q_fragments", lanes * words.lane_words());
            Operand::Words(words.in_memory(memory, code.thread()))
        }
    }

    /// Stores the warpgroup's rows where `wgmma` reads them.
    fn panels(&self, words: &OperandTile<'k>) -> PanelMatrix<'k> {
        let Loader { code, config, place, per, .. } = *self;
        let (rows, bytes) = (config.block_q(), config.key_columns() * 4 / per);
        let row_bytes = panel_row_bytes(bytes);
        let memory = code.shared::<u8>("queries", rows * bytes);
        let row = place.warp * 16 + lane_row(place.lane);
        words.store_panels(memory, [rows, row_bytes], row, place.lane);
        code.fence_async_proxy();
        config.group_barrier(code, place.warp);
        PanelMatrix::new(memory, rows, row_bytes).at(place.warp >> 2, 64 * row_bytes)
    }
}

/// The largest magnitudes among the lower and the upper halves of words; NaN where one is.
fn packed_maximum<'k, 'a, H: Half>(words: impl Iterator<Item = &'a Val<'k, u32>>) -> [Val<'k, f32>; 2]
where
    'k: 'a,
{
    let magnitudes = words.map(|word| (*word & 0x7fff_7fff).reinterpret::<H::Pair>());
    let largest = magnitudes.reduce(|a, b| a.max_nan(b)).expect("a row has channels");
    largest.reinterpret::<u32>().split::<H>().map(|x| x.to_f32())
}

/// `per` channels of a row from `first + offset` on, two to a word, zeros beyond the head's; rows of heads of so many
/// channels, and whether these are whole chunks of 16 bytes.
pub(crate) fn load_channels<'k, H: Half + Stored<Value = H>>(
    (head_dim, aligned): (usize, bool),
    row: Global<'k, H>,
    offset: Val<'k, i32>,
    first: i32,
    per: usize,
) -> Vec<Val<'k, u32>> {
    let code = row.code();
    let dim = head_dim as i32;
    // Lanes of a quad hold neighbouring channels; only the last step can pass the head's end.
    let passes = first + 4 * per as i32 > dim;
    if aligned {
        // Heads are whole 16-byte chunks here, so a register's channels are all inside or all beyond.
        let channel = offset + first;
        let here = if passes { (channel + per as i32).le(dim) } else { code.constant(true) };
        let at = row.at(here.select(channel, 0)).cast::<u32>();
        load_words(at, per / 2).into_iter().map(|word| here.select(word, 0u32)).collect()
    } else {
        let element = |i: usize| {
            let channel = offset + (first + i as i32);
            let here = if passes { channel.lt(dim) } else { code.constant(true) };
            here.select(row.at(here.select(channel, 0)).load().to_f32(), 0.0)
        };
        (0..per / 2).map(|word| element(2 * word).pack::<H>(element(2 * word + 1)).reinterpret()).collect()
    }
}

/// One, two or four neighbouring words.
pub(super) fn load_words<'k, S: AddressSpace>(at: Pointer<'k, S, u32>, count: usize) -> Vec<Val<'k, u32>> {
    match count {
        1 => vec![at.load()],
        2 => at.load_vector::<2>().to_vec(),
        _ => at.load_vector::<4>().to_vec(),
    }
}

/// The product of a row, spread over the lanes of a quad, with a vector whose first channel of the lane is given.
fn product<'k>(registers: &[Vec<Val<'k, f32>>], vector: Global<'k, f32>, per: usize) -> Val<'k, f32> {
    let code = vector.code();
    let mut sum = code.constant(0.0);
    for (word, channels) in registers.iter().enumerate() {
        for (i, &x) in channels.iter().enumerate() {
            sum = x.mul_add(vector.plus((word * 4 * per + i) as i32).load(), sum);
        }
    }
    sum.reduce_quad(|a, b| a + b)
}

/// The quantisation step of each row, of which `maxima` are the bits of the lane's largest magnitudes.
fn groups<'k>(
    code: &'k Code,
    config: &AttentionConfig,
    quantizer: &IntQuantizer,
    place: &Place<'k>,
    scratch: Option<Shared<'k, i32>>,
    maxima: &Rows<Val<'k, i32>>,
) -> Rows<Step<'k>> {
    let maximum = |a: Val<'k, i32>, b: Val<'k, i32>| a.max(b);
    let rows = maxima.map(|bits| bits.reduce_quad(maximum));
    if quantizer.granularity == Granularity::PerToken {
        return rows.map(|&max| Step::of_group(quantizer, max));
    }
    let all = rows.iter().copied().reduce(maximum).unwrap_or(code.constant(0));
    // Rows that are equal modulo 8 are one lane's slots; a coarser group takes the other lanes' as well.
    let own = match quantizer.granularity {
        Granularity::PerThread => all,
        _ => all.reduce_lanes(4 | 8 | 16, maximum),
    };
    let rows_of_group = match quantizer.granularity {
        Granularity::PerThread | Granularity::PerWarp => quantizer.tile.warp_q,
        _ => quantizer.tile.block_q.min(config.block_q()),
    };
    let warps = rows_of_group / config.tiling.rows_per_warp();
    let shared = if warps == 1 {
        own
    } else {
        // A group of several warps' rows: each warp reads what the others found.
        let maxima = scratch.unwrap_or_else(|| code.shared("q_maxima", maxima_of_warps(config)));
        // Only the rows of a whole block are more than a warpgroup's.
        let meet = || if warps <= 4 { config.group_barrier(code, place.warp) } else { config.barrier(code) };
        maxima.at(code.thread()).store(own);
        meet();
        let first = place.warp - (place.warp & (warps as i32 - 1));
        let of_group = maxima.at(first * 32 + place.lane);
        let maxima = (0..warps as i32).map(|warp| of_group.plus(32 * warp).load());
        let of_group = maxima.reduce(maximum).unwrap_or(own);
        if config.tiling.engine() == Engine::Warpgroups {
            // The next queries' maxima must not overtake these.
            meet();
        }
        of_group
    };
    let step = Step::of_group(quantizer, shared);
    rows.map(|_| step)
}
