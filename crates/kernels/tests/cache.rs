//! The kernels of a KV cache in the emulator: tokens appended in chunks to pages in any order, and attention over them,
//! against the oracle of what a cache stores.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use sage_core::metrics::Accuracy;
use sage_core::oracle::{CachedHead, Matrix, cached};
use sage_core::{
    Alignment, Band, CacheLayout, CachedInputs, Call, DType, Options, Tensor, TensorView, ValueFormat, View,
};
use sage_emulator::{Buffer, Emulator, Failure};
use sage_kernels::combine::{CombineArgs, CombineConfig, PART};
use sage_kernels::decode::{
    AppendCall, AppendTensors, AttendCall, AttendTensors, CacheAttendArgs, CacheAttendConfig, PoolTensors,
    Storage,
};
use sage_kernels::pass::{Launcher, Pass};
use sage_kernels::{Kernel, Machine, SinkArgs, TensorArg};
use sage_ptx::{Arg, BoxedTensor, Target};
use sage_testkit::normal;

#[derive(Clone, Debug)]
struct Case {
    layout: CacheLayout,
    dtype: DType,
    group: usize,
    q_len: usize,
    /// New tokens of both sequences, chunk by chunk; the second sequence skips the first chunk.
    chunks: Vec<usize>,
    /// Tokens of a part, where it is not the plan that says so.
    split: Option<usize>,
    options: Options,
    /// Whether query heads have attention sinks.
    sinks: bool,
    /// Whether values of some tokens are a thousandth, or nothing, of the others'.
    value_sizes: bool,
}

const LAYOUT: CacheLayout =
    CacheLayout { num_kv_heads: 2, head_dim: 64, page_size: 64, values: ValueFormat::F16 };

fn case() -> Case {
    Case {
        layout: LAYOUT,
        dtype: DType::F16,
        group: 3,
        q_len: 1,
        chunks: vec![70, 1, 1, 30],
        split: Some(64),
        options: Options::default().band(Band::causal(Alignment::BottomRight)),
        sinks: false,
        value_sizes: false,
    }
}

/// A grid with few blocks along y, as one of very many heads, and some left over.
fn folded([x, y, z]: [u32; 3]) -> [u32; 3] {
    [x, 3, (y * z).div_ceil(3)]
}

/// Launches in grids that are folded, where they have more than a block.
struct Folded<'a> {
    emulator: &'a mut Emulator,
    kernels: Vec<std::sync::Arc<dyn Kernel>>,
}

impl Launcher for Folded<'_> {
    type Error = Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg, Failure> {
        Ok(self.emulator.tensor_map(&tensor.into()))
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<(), Failure> {
        let [_, y, z] = grid;
        let grid = if y * z > 1 { folded(grid) } else { grid };
        self.emulator.launch(&self.kernels[kernel].program(), grid, args).map(|_| ())
    }
}

fn bits(tensor: &Tensor) -> Vec<u16> {
    let narrow = |x: f32| match tensor.dtype() {
        DType::BF16 => bf16::from_f32(x).to_bits(),
        _ => f16::from_f32(x).to_bits(),
    };
    tensor.to_f32_vec().into_iter().map(narrow).collect()
}

/// A pool with two sequences, on the emulated device and as scalars.
struct Cache {
    emulator: Emulator,
    /// Without lengths.
    pool: PoolTensors,
    key_scales: Buffer,
    tables: Buffer,
    table_stride: usize,
    lens: Vec<i32>,
    heads: Vec<CachedHead>,
}

impl Case {
    fn storage(&self) -> Storage {
        Storage::new(&self.layout, Target::SM_90A).unwrap()
    }

    fn cache(&self) -> Cache {
        let total: usize = self.chunks.iter().sum();
        let table_stride = total.div_ceil(self.layout.page_size).max(1);
        let pages = 2 * table_stride + 1;
        let bytes = self.storage().pool(pages, self.layout.num_kv_heads);
        let mut emulator = Emulator::new();
        // Pages fall where tokens rise, the sequences' in turns.
        let tables: Vec<i32> = (0..2)
            .flat_map(|sequence| (0..table_stride).map(move |page| (pages - 1 - 2 * page - sequence) as i32))
            .collect();
        let tables = emulator.buffer("tables", &tables);
        let key_scales = emulator.uninitialized("key_scales", bytes.key_scales);
        let pool = PoolTensors {
            tables: tables.address(),
            kv_lens: 0,
            keys: emulator.uninitialized("keys", bytes.keys).address(),
            key_scales: key_scales.address(),
            constants: emulator.uninitialized("constants", bytes.constants).address(),
            values: emulator.uninitialized("values", bytes.values).address(),
            value_scales: emulator.uninitialized("value_scales", bytes.value_scales.max(4)).address(),
        };
        Cache {
            pool,
            key_scales,
            tables,
            table_stride,
            lens: vec![0; 2],
            heads: (0..2 * self.layout.num_kv_heads).map(|_| CachedHead::new(self.layout)).collect(),
            emulator,
        }
    }

    fn tensor(&self, seed: u64, shape: &[usize], bias: f32) -> Tensor {
        let mut data = normal(seed, shape.iter().product());
        for (at, x) in data.iter_mut().enumerate() {
            *x += if (at % self.layout.head_dim).is_multiple_of(4) { bias } else { 0.0 };
        }
        Tensor::new(data, shape).unwrap().to_dtype(self.dtype)
    }

    /// Appends to one sequence.
    fn append(&self, cache: &mut Cache, sequence: usize, k: &Tensor, v: &Tensor) {
        let CacheLayout { num_kv_heads, head_dim, .. } = self.layout;
        let tokens = k.shape()[2];
        let table = cache.tables.address() + 4 * (sequence * cache.table_stride) as u64;
        let emulator = &mut cache.emulator;
        let (k_bits, v_bits) = (emulator.buffer("k", &bits(k)), emulator.buffer("v", &bits(v)));
        let lens = emulator.buffer("kv_lens", &cache.lens[sequence..=sequence]);
        let pool = PoolTensors { tables: table, kv_lens: lens.address(), ..cache.pool };
        let tensor = |bits: Buffer| TensorArg {
            address: bits.address(),
            strides: [0, (tokens * head_dim) as i64, head_dim as i64],
        };
        let call = AppendCall {
            storage: self.storage(),
            dtype: self.dtype,
            num_kv_heads,
            sequences: 1,
            tokens,
            table_stride: cache.table_stride,
        };
        let tensors = AppendTensors { k: tensor(k_bits), v: tensor(v_bits), pool };
        self.run(emulator, &call.pass(), &tensors);
        cache.lens[sequence] = emulator.read::<i32>(lens)[0];
        for head in 0..num_kv_heads {
            let rows = |x: &Tensor| Matrix::of_head(&x.view(), 0, head, 0, tokens);
            cache.heads[sequence * num_kv_heads + head].append(&rows(k), &rows(v));
        }
    }

    /// Runs a pass, in grids that are folded.
    fn run<T>(&self, emulator: &mut Emulator, pass: &Pass<T>, tensors: &T) {
        let workspace = emulator.uninitialized("workspace", pass.workspace_bytes().max(1));
        assert_eq!(pass.zeroed_bytes(), 0);
        let mut launcher = Folded { emulator, kernels: pass.kernels().cloned().collect() };
        pass.run(tensors, workspace.address(), &mut launcher)
            .unwrap_or_else(|failure| panic!("{self:?}\n{failure}"));
    }

    /// Attention by parts of `split` tokens, which are fewer than a plan's.
    fn attend_in_parts(
        &self,
        machine: &Machine,
        emulator: &mut Emulator,
        call: &AttendCall,
        t: &AttendTensors,
        split: usize,
    ) {
        let group = call.num_q_heads / call.num_kv_heads;
        let (head_dim, rows) = (call.storage.head_dim, call.rows());
        let log2e = std::f32::consts::LOG2_E;
        let config = CacheAttendConfig {
            storage: call.storage,
            dtype: call.dtype,
            softcap: call.logit_softcap.is_some(),
            sinks: false,
            split: true,
            lse: false,
            stages: 0,
        }
        .with_stages(machine);
        let splits = call.kv_len.div_ceil(split).max(1);
        let partial = emulator.uninitialized("partial", 4 * splits * rows * head_dim);
        let partial_sums = emulator.uninitialized("partial_sums", 4 * PART * splits * rows);
        let limit = |side: Option<usize>| side.map_or(1 << 30, |n| n.min(1 << 30) as i32);
        let args = CacheAttendArgs {
            q: t.q,
            pool: t.pool,
            out: t.out,
            lse: t.lse,
            partial: partial.address(),
            partial_sums: partial_sums.address(),
            table_stride: call.table_stride as i32,
            kv_heads: call.num_kv_heads as i32,
            group: group as i32,
            q_len: call.q_len as i32,
            sequences: call.sequences as i32,
            split: split as i32,
            scale: call.sm_scale * log2e,
            cap: call.logit_softcap.unwrap_or(0.0) * log2e,
            left: limit(call.band.left),
            right: limit(call.band.right),
            ..CacheAttendArgs::default()
        };
        let grid = folded(config.grid(splits, call.num_kv_heads, call.q_len, group, call.sequences));
        emulator
            .launch(&config.program(), grid, &args.args())
            .unwrap_or_else(|failure| panic!("{self:?}\n{failure}"));
        let combine =
            CombineConfig { sinks: call.sinks, ..CombineConfig::new(call.dtype, head_dim, true, splits) };
        let args = CombineArgs {
            partial: partial.address(),
            partial_sums: partial_sums.address(),
            out: t.out,
            lse: t.lse,
            total_rows: rows as i32,
            q_rows: call.q_len as i32,
            q_heads: call.num_q_heads as i32,
            splits: splits as i32,
            sinks: t.sinks,
        };
        let of_sinks = call.sinks.then(|| t.sinks.args());
        let args: Vec<_> = args.args().into_iter().chain(of_sinks.into_iter().flatten()).collect();
        emulator
            .launch(&combine.program(), combine.grid(rows), &args)
            .unwrap_or_else(|failure| panic!("{self:?}\n{failure}"));
    }

    fn filled(&self) -> Cache {
        let mut cache = self.cache();
        for (i, &tokens) in self.chunks.iter().enumerate() {
            for sequence in 0..2 {
                if i > 0 || sequence == 0 {
                    let shape = [1, self.layout.num_kv_heads, tokens, self.layout.head_dim];
                    let seed = 100 + 4 * i as u64 + 2 * sequence as u64;
                    let (k, mut v) = (self.tensor(seed, &shape, 4.0), self.tensor(seed + 1, &shape, 0.0));
                    if self.value_sizes {
                        let size = |at: usize| [1.0, 1e-3, 0.0, 8.0][at / self.layout.head_dim / 13 % 4];
                        let values = v.to_f32_vec().into_iter().enumerate().map(|(at, x)| x * size(at));
                        v = Tensor::new(values.collect::<Vec<_>>(), &shape).unwrap().to_dtype(self.dtype);
                    }
                    self.append(&mut cache, sequence, &k, &v);
                }
            }
        }
        cache
    }

    fn check(&self) {
        let mut cache = self.filled();
        let CacheLayout { num_kv_heads, head_dim, .. } = self.layout;
        let q_heads = num_kv_heads * self.group;
        let q = self.tensor(1, &[2, q_heads, self.q_len, head_dim], 0.0);
        let lens = cache.lens.clone();
        // From far below the log-sum-exps of the rows to far above them, and none for the last.
        let mut sinks: Vec<f32> = (0..q_heads).map(|head| -4.0 + 3.0 * head as f32).collect();
        sinks[q_heads - 1] = f32::NEG_INFINITY;
        let of_heads = TensorView::F32(View::contiguous("sinks", &sinks, &[q_heads]).unwrap());
        let inputs =
            CachedInputs { sinks: self.sinks.then_some(of_heads), ..CachedInputs::new(q.view(), &lens) };
        let call = Call::check_cached(&inputs, &self.layout, &self.options).unwrap();
        let expected = cached(&call, &cache.heads);

        let rows = 2 * q_heads * self.q_len;
        let emulator = &mut cache.emulator;
        let strides = [q_heads * self.q_len * head_dim, self.q_len * head_dim, head_dim].map(|n| n as i64);
        let tensors = AttendTensors {
            q: TensorArg { address: emulator.buffer("q", &bits(&q)).address(), strides },
            sinks: SinkArgs::of_heads(emulator.buffer("sinks", &sinks).address()),
            pool: PoolTensors { kv_lens: emulator.buffer("kv_lens", &lens).address(), ..cache.pool },
            ..AttendTensors::default()
        };
        let longest = lens.iter().max().map_or(0, |&len| len as usize);
        let attend = AttendCall {
            storage: self.storage(),
            dtype: self.dtype,
            sequences: 2,
            num_q_heads: q_heads,
            num_kv_heads,
            q_len: self.q_len,
            kv_len: longest,
            sm_scale: call.problem.sm_scale,
            band: self.options.band,
            logit_softcap: self.options.logit_softcap,
            sinks: self.sinks,
            lse: true,
            table_stride: cache.table_stride,
        };
        let wide = |x: u16| match self.dtype {
            DType::BF16 => bf16::from_bits(x).to_f32(),
            _ => f16::from_bits(x).to_f32(),
        };
        // Tokens go straight to registers, or through shared memory where the copy engine brings them.
        for machine in [Target::SM_80, Target::SM_90A].map(Machine::typical) {
            let out = emulator.uninitialized("out", 2 * rows * head_dim);
            let lse = emulator.uninitialized("lse", 4 * rows);
            let to = TensorArg { address: out.address(), strides };
            let tensors = AttendTensors { out: to, lse: lse.address(), ..tensors };
            match self.split {
                Some(split) => self.attend_in_parts(&machine, emulator, &attend, &tensors, split),
                None => self.run(emulator, &attend.pass(&machine).unwrap(), &tensors),
            }
            let found: Vec<f32> = emulator.read::<u16>(out).into_iter().map(wide).collect();
            let lse: Vec<f32> = emulator.read(lse);
            // Constants are summed in single precision, so that now and then an integer is off by one; beside that there is
            // the rounding of the output, 2⁻¹¹ or 2⁻⁸ of each element. Measured in f16: at most 7e-4; doubled.
            let tolerance = if self.dtype == DType::BF16 { 6e-3 } else { 1.4e-3 };
            let accuracy = Accuracy::of(&found, &expected.out);
            assert!(accuracy.relative_l1 <= tolerance, "{self:?}: {accuracy}");
            let lse = Accuracy::of(&lse, &expected.lse);
            assert!(lse.max_abs_error <= 2e-3, "{self:?}: lse {lse}");
        }
    }
}

#[test]
fn every_value_format_and_odd_size_is_the_oracles() {
    for values in ValueFormat::ALL {
        for (head_dim, page_size, group) in
            [(64, 64, 3), (128, 16, 1), (40, 32, 2), (80, 16, 5), (256, 64, 4)]
        {
            let layout = CacheLayout { num_kv_heads: 2, head_dim, page_size, values };
            Case { layout, group, ..case() }.check();
        }
    }
}

#[test]
fn chunks_of_queries_windows_and_soft_caps_are_the_oracles() {
    let causal = Band::causal(Alignment::BottomRight);
    for band in [Band::FULL, causal, Band { left: Some(20), ..causal }] {
        for logit_softcap in [None, Some(5.0)] {
            let options = Options::default().band(band).logit_softcap(logit_softcap);
            for q_len in [2, 7] {
                Case { q_len, options, dtype: DType::BF16, ..case() }.check();
            }
        }
    }
}

#[test]
fn every_number_of_rows_and_length_of_parts_is_the_oracles() {
    for (group, q_len) in [(5, 1), (16, 1), (5, 7), (1, 17)] {
        for split in [64, 128, 1024].map(Some) {
            Case { split, group, q_len, ..case() }.check();
        }
    }
}

#[test]
fn attention_sinks_of_whole_sequences_and_of_parts_are_the_oracles() {
    let window = Band { left: Some(20), ..Band::causal(Alignment::BottomRight) };
    for split in [None, Some(64)] {
        let sinks = Case { sinks: true, split, ..case() };
        sinks.check();
        // A sequence without tokens: its log-sum-exps are the sinks.
        Case { chunks: vec![9], ..sinks.clone() }.check();
        let options = Options::default().band(window).logit_softcap(5.0);
        Case { q_len: 7, dtype: DType::BF16, options, ..sinks.clone() }.check();
        let layout = CacheLayout { values: ValueFormat::Int8, ..LAYOUT };
        Case { layout, value_sizes: true, ..sinks }.check();
    }
}

#[test]
fn a_sequence_without_tokens_is_zeros() {
    // The second sequence has none, and then one.
    Case { chunks: vec![9], ..case() }.check();
    Case { chunks: vec![9, 1], ..case() }.check();
}

#[test]
fn a_row_that_is_not_finite_spoils_what_sees_it_and_no_other() {
    let case = Case { layout: CacheLayout { num_kv_heads: 1, ..LAYOUT }, group: 1, ..case() };
    let mut cache = case.cache();
    let shape = [1, 1, 3, 64];
    let mut k = case.tensor(1, &shape, 0.0).to_f32_vec();
    k[64 + 5] = f32::INFINITY;
    let k = Tensor::new(k, &shape).unwrap().to_dtype(DType::F16);
    case.append(&mut cache, 0, &k, &case.tensor(2, &shape, 0.0));
    let scales: Vec<f32> = cache.emulator.read(cache.key_scales);
    let table: Vec<i32> = cache.emulator.read(cache.tables);
    let first = table[0] as usize * 64;
    let expected = &cache.heads[0].key_scales;
    assert!(scales[first + 1].is_nan() && expected[1].is_nan());
    for i in [0, 2] {
        assert!((scales[first + i] - expected[i]).abs() <= 1e-6 * expected[i], "{scales:?}, {expected:?}");
    }
}

#[test]
fn values_of_very_different_sizes_are_the_oracles() {
    for values in ValueFormat::ALL {
        for chunks in [vec![90, 40, 70], vec![200]] {
            Case { layout: CacheLayout { values, ..LAYOUT }, value_sizes: true, chunks, ..case() }.check();
        }
    }
}

#[test]
fn planned_passes_are_the_oracles() {
    let window = Band { left: Some(50), right: Some(0), alignment: Alignment::BottomRight };
    let windowed = Options::default().band(window).logit_softcap(20.0);
    for (q_len, group, options) in [(1, 1, case().options), (1, 2, windowed), (3, 4, case().options)] {
        // The first sequence is split.
        Case { split: None, chunks: vec![690, 1, 40], q_len, group, options, ..case() }.check();
    }
    let empty = Case { split: None, q_len: 0, ..case() };
    empty.check();
}
