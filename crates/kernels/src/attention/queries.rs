//! A warp's query rows: read, smoothed, quantised, and kept in shared memory as operands of Q·Kᵀ.

use sage_core::{Granularity, IntBits, IntQuantizer};
use sage_ptx::{
    CHUNK_BYTES, Code, FragmentA, Half, MmaElement, PanelMatrix, Shared, SharedTile, Stored, Val, WarpgroupA,
};

use super::config::{AttentionConfig, AttentionParams, Engine, Scores};
use super::place::Place;
use super::scores::nonzero;
use crate::integer::{Step, magnitude_bits};
use crate::rotation::{RowLayout, rotate};

/// Queries as operands: each lane's own registers, `[m][step]`.
pub(super) struct Queries<'k> {
    fragments: Fragments<'k>,
    steps: usize,
    /// Factor of each row slot's scores, not zero.
    pub scale: Vec<Val<'k, f32>>,
    /// What smoothing K took from each row's scaled scores, in the natural base.
    pub taken: Vec<Val<'k, f32>>,
}

/// Where operands stay between the tiles that they are multiplied with.
enum Fragments<'k> {
    Registers(Vec<[Val<'k, u32>; 4]>),
    /// The lane's own words: no other lane reads them.
    Memory(Shared<'k, u32>),
    /// The warpgroup's rows.
    Panels(PanelMatrix<'k>),
}

/// How many 32-byte steps the depth of Q·Kᵀ takes.
pub(super) fn depth_steps(config: &AttentionConfig) -> usize {
    config.depth().div_ceil(8 * elements_per_word(config))
}

/// Elements of a 32-bit register of the operands of Q·Kᵀ.
pub(super) fn elements_per_word(config: &AttentionConfig) -> usize {
    match config.scores {
        Scores::Full => 2,
        Scores::Int(IntQuantizer { bits: IntBits::Eight, .. }) => 4,
        Scores::Int(IntQuantizer { bits: IntBits::Four, .. }) => 8,
    }
}

impl<'k> Queries<'k> {
    pub fn load<H: Half + Stored<Value = H>>(
        code: &'k Code,
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
    ) -> Self {
        code.note("queries: read, smooth, quantise");
        let slots = config.tiling.rows_per_warp / 8;
        let (steps, per) = (depth_steps(config), elements_per_word(config));
        let batch = place.sequence.batch.widen() * p.q_stride_batch + place.head.widen() * p.q_stride_head;
        let row_of = |slot: usize| place.row(slot);
        let quad = place.lane & 3;
        // words[slot][register] are the neighbouring channels of a register, as loaded. The last row stands in for rows that the
        // sequence does not have, which nobody reads.
        let loaded: Vec<Vec<Vec<Val<'k, u32>>>> = (0..slots)
            .map(|slot| {
                let row = row_of(slot).min(place.sequence.q_len - 1) + place.sequence.q_start;
                let base = p.q.cast::<H>().at(batch + row.widen() * p.q_stride_row);
                let register = |word: usize| {
                    load_channels::<H>(config, base, quad * per as i32, (word * 4 * per) as i32, per)
                };
                (0..2 * steps).map(register).collect()
            })
            .collect();
        let channels = |words: &Vec<Val<'k, u32>>| {
            words.iter().flat_map(|word| word.split::<H>()).map(|x| x.to_f32()).collect()
        };
        // The same in single precision.
        let mut rows: Vec<Vec<Vec<Val<'k, f32>>>> =
            loaded.iter().map(|registers| registers.iter().map(channels).collect()).collect();

        // Scores of smoothed keys lack the same amount for all keys of a row: the product with the keys' mean.
        let needs_taken = config.smooth_k && (config.lse || config.softcap);
        let taken = if needs_taken {
            let mean = p.k_mean.at(place.kv_index(p) * config.padded_dim() as i32).at(quad * per as i32);
            rows.iter().map(|registers| product(registers, mean, per) * p.sm_scale).collect()
        } else {
            vec![code.constant(0.0); slots]
        };

        if let Some(block) = config.smooth_q {
            for (slot, registers) in rows.iter_mut().enumerate() {
                let row = row_of(slot);
                let valid = row.lt(place.sequence.q_len);
                let mean = p.q_mean.at(place.query_block(row, block, p) * config.padded_dim() as i32);
                let mean = mean.at(quad * per as i32);
                for (word, channels) in registers.iter_mut().enumerate() {
                    for (i, x) in channels.iter_mut().enumerate() {
                        let mean = mean.plus((word * 4 * per + i) as i32).load();
                        *x = valid.select(*x - mean, 0.0);
                    }
                }
            }
        }

        if config.rotate {
            code.note("queries: rotation");
            let layout = RowLayout { per, lanes: 4, lane: quad };
            for registers in &mut rows {
                let mut row = registers.concat();
                rotate(&mut row, &layout, config.head_dim);
                *registers = row.chunks(per).map(<[_]>::to_vec).collect();
            }
        }

        let (words, scale) = match config.scores {
            Scores::Full => {
                let words = pack_words(&loaded, steps, |_, words| words[0]);
                (words, vec![p.sm_scale * std::f32::consts::LOG2_E; slots])
            }
            Scores::Int(quantizer) => {
                if quantizer.scale_q_first {
                    let factor = p.sm_scale * std::f32::consts::LOG2_E;
                    rows.iter_mut().flatten().flatten().for_each(|x| *x = *x * factor);
                }
                let as_loaded = config.smooth_q.is_none() && !config.rotate && !quantizer.scale_q_first;
                let maximum = |slot: usize| {
                    let bits = if as_loaded {
                        let [low, high] = packed_maximum::<H>(loaded[slot].iter().flatten());
                        magnitude_bits(low).max(magnitude_bits(high))
                    } else {
                        let bits = rows[slot].iter().flatten().map(|&x| magnitude_bits(x));
                        bits.reduce(Val::max).unwrap_or(code.constant(0))
                    };
                    row_of(slot).lt(place.sequence.q_len).select(bits, 0)
                };
                let maxima = (0..slots).map(maximum).collect();
                let steps_of_rows = groups(code, config, &quantizer, place, maxima);
                let words = pack_words(&rows, steps, |slot, x| steps_of_rows[slot].round_word(x));
                let factor = if quantizer.scale_q_first {
                    code.constant(1.0)
                } else {
                    p.sm_scale * std::f32::consts::LOG2_E
                };
                (words, steps_of_rows.iter().map(|step| nonzero(step.scale * factor)).collect())
            }
        };
        let fragments = if config.tiling.queries_in_registers {
            Fragments::Registers(words)
        } else if config.tiling.engine == Engine::Warpgroups {
            Fragments::Panels(panels(code, config, place, &words))
        } else {
            let lane_words = 4 * words.len();
            let memory = code.shared::<u32>("q_fragments", config.threads() as usize * lane_words);
            let memory = memory.at(code.thread() * lane_words as i32);
            for (index, &words) in words.iter().enumerate() {
                memory.plus(4 * index as i32).store_vector(words);
            }
            Fragments::Memory(memory)
        };
        Queries { fragments, steps, scale, taken }
    }

    /// The operand of 16 rows at one step of the depth.
    #[track_caller]
    pub fn fragment<E: MmaElement>(&self, m: usize, step: usize) -> FragmentA<'k, E> {
        let index = m * self.steps + step;
        FragmentA::new(match &self.fragments {
            Fragments::Registers(words) => words[index],
            Fragments::Memory(words) => words.plus(4 * index as i32).load_vector(),
            Fragments::Panels(_) => unreachable!("a warpgroup's queries are no warp's"),
        })
    }

    /// The operand of the warpgroup's rows at one step of the depth.
    pub fn warpgroup_operand<E: MmaElement>(&self, step: usize) -> WarpgroupA<'k, E> {
        match &self.fragments {
            Fragments::Panels(rows) => WarpgroupA::Shared(rows.depth_in_columns(0, 32 * step)),
            _ => WarpgroupA::Registers(self.fragment(0, step)),
        }
    }
}

/// Stores the fragments of the warpgroup's rows where `wgmma` reads them.
fn panels<'k>(
    code: &'k Code,
    config: &AttentionConfig,
    place: &Place<'k>,
    words: &[[Val<'k, u32>; 4]],
) -> PanelMatrix<'k> {
    let (rows, bytes) = (config.block_q(), config.padded_dim() * 4 / elements_per_word(config));
    let row_bytes = bytes.min(128);
    let memory = code.shared::<u8>("queries", rows * bytes);
    let row = place.warp * 16 + (place.lane >> 2);
    for (step, words) in words.iter().enumerate() {
        for (half, pair) in words.chunks(2).enumerate() {
            let chunk = 2 * step + half;
            let panel = memory.plus((chunk * CHUNK_BYTES / row_bytes * rows * row_bytes) as i32);
            let panel = SharedTile::new(panel, row_bytes);
            let first = panel.chunk(row, (chunk % (row_bytes / CHUNK_BYTES)) as i32);
            for (i, &word) in pair.iter().enumerate() {
                first.step(8 * i, 0).cast::<u32>().at(place.lane & 3).store(word);
            }
        }
    }
    code.fence_async_proxy();
    config.group_barrier(code, place.warp);
    PanelMatrix::new(memory, rows, row_bytes).at(place.warp >> 2, 64 * row_bytes)
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

/// `per` channels of a row from `first + offset` on, two to a word, zeros beyond the head's.
fn load_channels<'k, H: Half + Stored<Value = H>>(
    config: &AttentionConfig,
    row: sage_ptx::Global<'k, H>,
    offset: Val<'k, i32>,
    first: i32,
    per: usize,
) -> Vec<Val<'k, u32>> {
    let code = row.code();
    let dim = config.head_dim as i32;
    // Lanes of a quad hold neighbouring channels; only the last step can pass the head's end.
    let passes = first + 4 * per as i32 > dim;
    if config.aligned {
        // Heads are whole 16-byte chunks here, so a register's channels are all inside or all beyond.
        let channel = offset + first;
        let here = if passes { (channel + per as i32).le(dim) } else { code.constant(true) };
        let at = row.at(here.select(channel, 0)).cast::<u32>();
        let words: Vec<Val<'k, u32>> = match per {
            2 => vec![at.load()],
            4 => at.load_vector::<2>().to_vec(),
            _ => at.load_vector::<4>().to_vec(),
        };
        words.into_iter().map(|word| here.select(word, 0u32)).collect()
    } else {
        let element = |i: usize| {
            let channel = offset + (first + i as i32);
            let here = if passes { channel.lt(dim) } else { code.constant(true) };
            here.select(row.at(here.select(channel, 0)).load().to_f32(), 0.0)
        };
        (0..per / 2).map(|word| element(2 * word).pack::<H>(element(2 * word + 1)).reinterpret()).collect()
    }
}

/// The product of a row, spread over the lanes of a quad, with a vector whose first channel of the lane is given.
fn product<'k>(
    registers: &[Vec<Val<'k, f32>>],
    vector: sage_ptx::Global<'k, f32>,
    per: usize,
) -> Val<'k, f32> {
    let code = vector.code();
    let mut sum = code.constant(0.0);
    for (word, channels) in registers.iter().enumerate() {
        for (i, &x) in channels.iter().enumerate() {
            sum = x.mul_add(vector.plus((word * 4 * per + i) as i32).load(), sum);
        }
    }
    sum.reduce_lanes(3, |a, b| a + b)
}

/// The quantisation step of each row slot, of which `maxima` are the bits of the lane's largest magnitudes.
fn groups<'k>(
    code: &'k Code,
    config: &AttentionConfig,
    quantizer: &IntQuantizer,
    place: &Place<'k>,
    maxima: Vec<Val<'k, i32>>,
) -> Vec<Step<'k>> {
    let maximum = |a: Val<'k, i32>, b: Val<'k, i32>| a.max(b);
    let rows: Vec<_> = maxima.into_iter().map(|bits| bits.reduce_lanes(3, maximum)).collect();
    if quantizer.granularity == Granularity::PerToken {
        return rows.into_iter().map(|max| Step::of_group(quantizer, max)).collect();
    }
    let slots = rows.len();
    let all = rows.into_iter().reduce(maximum).unwrap_or(code.constant(0));
    // Rows that are equal modulo 8 are one lane's slots; a coarser group takes the other lanes' as well.
    let own = match quantizer.granularity {
        Granularity::PerThread => all,
        _ => all.reduce_lanes(4 | 8 | 16, maximum),
    };
    let rows_of_group = match quantizer.granularity {
        Granularity::PerThread | Granularity::PerWarp => quantizer.tile.warp_q,
        _ => quantizer.tile.block_q.min(config.block_q()),
    };
    let warps = rows_of_group / config.tiling.rows_per_warp;
    let shared = if warps == 1 {
        own
    } else {
        // A group of several warps' rows: each warp reads what the others found.
        let maxima = code.shared::<i32>("q_maxima", config.tiling.warps * 32);
        // Only the rows of a whole block are more than a warpgroup's.
        let meet = || if warps <= 4 { config.group_barrier(code, place.warp) } else { config.barrier(code) };
        maxima.at(code.thread()).store(own);
        meet();
        let first = place.warp - (place.warp & (warps as i32 - 1));
        let of_group = maxima.at(first * 32 + place.lane);
        let maxima = (0..warps as i32).map(|warp| of_group.plus(32 * warp).load());
        let of_group = maxima.reduce(maximum).unwrap_or(own);
        if config.tiling.engine == Engine::Warpgroups {
            // The next queries' maxima must not overtake these.
            meet();
        }
        of_group
    };
    vec![Step::of_group(quantizer, shared); slots]
}

/// Packs each register's channels: fragments of rows `g` and `g + 8` of 16, low and high depth of a step.
fn pack_words<'k, T>(
    rows: &[Vec<Vec<Val<'k, T>>>],
    steps: usize,
    pack: impl Fn(usize, &[Val<'k, T>]) -> Val<'k, u32>,
) -> Vec<[Val<'k, u32>; 4]> {
    let mut words = Vec::new();
    for m in 0..rows.len() / 2 {
        for step in 0..steps {
            let word = |half: usize, depth: usize| pack(2 * m + half, &rows[2 * m + half][2 * step + depth]);
            words.push([word(0, 0), word(1, 0), word(0, 1), word(1, 1)]);
        }
    }
    words
}
