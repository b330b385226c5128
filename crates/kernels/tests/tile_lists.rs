//! Attention over the tiles of keys that lists in device memory name, in the emulator, against the oracle with the
//! block mask that the lists mean.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

use half::f16;
use sage_core::metrics::Accuracy;
use sage_core::{
    Alignment, Band, BlockMask, Call, DType, Inputs, Layout, Mask, Options, Preset, Scheme, Tensor, View,
    oracle,
};
use sage_emulator::{Emulator, Failure};
use sage_kernels::attention::{AttentionArgs, AttentionConfig, CUT_TILE, TileListArgs, TileSource};
use sage_kernels::forward::{ForwardPlan, Request, Tensors, int8_scheme};
use sage_kernels::pass::{Launcher, Pass};
use sage_kernels::{Engine, Kernel, Machine, TensorArg, Tiling, WarpTiling, WarpgroupTiling};
use sage_ptx::{Arg, BoxedTensor, Program, Target};
use sage_testkit::normal_tensor;

/// Relative L1 error against the oracle of the same scheme: see the tests of attention in a band.
const F16: f64 = 1e-3;

const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };

/// Which of a sequence's tiles of keys a block of queries is multiplied with: of head, tile of queries and tile of
/// keys.
type Listed = fn([usize; 3]) -> bool;

struct Case {
    scheme: Scheme,
    tiling: Tiling,
    head_dim: usize,
    q_heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    band: Band,
    masked: bool,
    multiprocessors: usize,
    listed: Listed,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            scheme: Preset::FULL.scheme(64),
            tiling: warps(),
            head_dim: 64,
            q_heads: 2,
            kv_heads: 1,
            q_len: 150,
            kv_len: 330,
            band: Band::FULL,
            masked: false,
            multiprocessors: 1,
            listed: |_| true,
        }
    }
}

const WARPS: WarpTiling = WarpTiling {
    warps: 4,
    rows_per_warp: 16,
    tile_keys: 64,
    step_keys: 32,
    queries_in_registers: true,
    stages: 2,
    min_blocks: 1,
    lazy_rescale: 8,
};

const WARPGROUPS: WarpgroupTiling = WarpgroupTiling {
    groups: 2,
    tile_keys: 64,
    queries_in_registers: true,
    stages: 2,
    sums_by_mma: true,
    lazy_rescale: 8,
};

fn warps() -> Tiling {
    Tiling::Warps(WARPS)
}

fn warpgroups() -> Tiling {
    Tiling::Warpgroups(WARPGROUPS)
}

/// Runs a pass whose attention kernel is another, which takes lists as well.
struct WithLists<'a> {
    emulator: &'a mut Emulator,
    programs: &'a [Program],
    attention: usize,
    lists: TileListArgs,
}

impl Launcher for WithLists<'_> {
    type Error = Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg, Failure> {
        Ok(self.emulator.tensor_map(&tensor.into()))
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<(), Failure> {
        let mut all = args.to_vec();
        if kernel == self.attention {
            all.splice(AttentionArgs::COUNT..AttentionArgs::COUNT, self.lists.args());
        }
        self.emulator.launch(&self.programs[kernel], grid, &all).map(|_| ())
    }
}

/// Q, K and V, `[1, heads, rows, head_dim]` each, and a mask `[1, q_heads, q_len, kv_len]`.
struct Data {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Vec<bool>>,
}

impl Case {
    fn data(&self) -> Data {
        let mask = |[head, row, key]: [usize; 3]| {
            // Some keys are hidden from every query.
            !key.is_multiple_of(17) && !(head + 3 * row + key).is_multiple_of(5)
        };
        let (rows, keys) = (self.q_len, self.kv_len);
        let scores = 0..self.q_heads * rows * keys;
        let mask = scores.map(|i| mask([i / (rows * keys), i / keys % rows, i % keys]));
        let normal = |seed, heads, rows| normal_tensor(seed, &[1, heads, rows, self.head_dim], DType::F16);
        Data {
            q: normal(1, self.q_heads, rows),
            k: normal(2, self.kv_heads, keys),
            v: normal(3, self.kv_heads, keys),
            mask: self.masked.then(|| mask.collect()),
        }
    }

    fn inputs<'a>(&self, data: &'a Data) -> Inputs<'a> {
        let shape = [1, self.q_heads, self.q_len, self.kv_len];
        let mask = data.mask.as_ref().map(|mask| Mask::Bool(View::contiguous("mask", mask, &shape).unwrap()));
        Inputs { mask, ..Inputs::new(data.q.view(), data.k.view(), data.v.view()) }
    }

    fn options(&self) -> Options {
        Options { layout: Layout::Hnd, band: self.band, ..Options::default() }
    }

    fn plan(&self, data: &Data) -> ForwardPlan {
        let problem = Call::check(&self.inputs(data), &self.options()).unwrap().problem;
        let request = Request {
            scheme: Some(self.scheme),
            lse: true,
            tiling: Some(self.tiling),
            ..Request::new(&problem)
        };
        let target = if self.tiling.engine() == Engine::Warps { Target::SM_80 } else { Target::SM_90A };
        let machine = Machine { multiprocessors: self.multiprocessors, ..Machine::typical(target) };
        ForwardPlan::new(&problem, &request, &machine).unwrap()
    }

    /// Tiles of queries and of keys.
    fn tiles(&self) -> [usize; 2] {
        [self.q_len.div_ceil(self.tiling.block_q()), self.kv_len.div_ceil(self.tiling.tile_keys())]
    }

    /// The list of a tile of queries, the last tile of keys first.
    fn list(&self, head: usize, q_tile: usize) -> Vec<u32> {
        let (block_q, tile_keys) = (self.tiling.block_q(), self.tiling.tile_keys());
        let whole = |tile: usize| {
            let mut rows = q_tile * block_q..((q_tile + 1) * block_q).min(self.q_len);
            rows.all(|row| {
                let keys = self.band.keys(row, self.q_len, self.kv_len);
                keys.start <= tile * tile_keys && (tile + 1) * tile_keys <= keys.end
            })
        };
        let [_, tiles] = self.tiles();
        let listed = (0..tiles).rev().filter(|&tile| (self.listed)([head, q_tile, tile]));
        listed.map(|tile| tile as u32 | if whole(tile) { 0 } else { CUT_TILE }).collect()
    }

    /// All lists in the emulator's memory.
    fn lists(&self, emulator: &mut Emulator) -> TileListArgs {
        let [q_tiles, tiles] = self.tiles();
        let lists: Vec<_> =
            (0..self.q_heads * q_tiles).map(|list| self.list(list / q_tiles, list % q_tiles)).collect();
        let counts: Vec<i32> = lists.iter().map(|list| list.len() as i32).collect();
        // Nothing behind the entries of a list is read: there is no such tile.
        let entry = |list: &Vec<u32>, i: usize| list.get(i).copied().unwrap_or(u32::MAX);
        let entries = lists.iter().flat_map(|list| (0..tiles).map(move |i| entry(list, i)));
        let entries: Vec<u32> = entries.collect();
        TileListArgs {
            tile_counts: emulator.buffer("tile_counts", &counts).address(),
            tile_lists: emulator.buffer("tile_lists", &entries).address(),
            list_stride: tiles as i32,
            list_stride_sequence: (self.q_heads * q_tiles) as i32,
            list_stride_head: q_tiles as i32,
        }
    }

    /// Runs the pass, whose attention kernel computes listed tiles, in the emulator. Returns how that kernel was
    /// configured, the output and the log-sum-exps.
    fn run(&self, data: &Data, pass: &Pass<Tensors>) -> (AttentionConfig, Vec<f32>, Vec<f32>) {
        let configs = pass.kernels().map(|kernel| kernel.downcast_ref::<AttentionConfig>().copied());
        let (attention, config) =
            configs.enumerate().find_map(|(index, config)| config.map(|config| (index, config))).unwrap();
        let config = AttentionConfig { tiles: TileSource::List, ..config };
        let mut programs = pass.programs();
        programs[attention] = config.program();

        let mut emulator = Emulator::new();
        let lists = self.lists(&mut emulator);
        let [q, k, v] = [("q", &data.q), ("k", &data.k), ("v", &data.v)].map(|(name, tensor)| {
            let bits = tensor.to_f32_vec().into_iter().map(|x| f16::from_f32(x).to_bits());
            let bits: Vec<u16> = bits.collect();
            let [heads, rows, dim] = [1, 2, 3].map(|i| tensor.shape()[i] as i64);
            let address = emulator.buffer(name, &bits).address();
            TensorArg { address, strides: [heads * rows * dim, rows * dim, dim] }
        });
        let mask = data.mask.as_ref().map_or(0, |mask| {
            let bytes: Vec<u8> = mask.iter().map(|&visible| u8::from(visible)).collect();
            emulator.buffer("mask", &bytes).address()
        });
        let [heads, rows, keys] = [self.q_heads, self.q_len, self.kv_len].map(|size| size as i64);
        let rows_of_all = self.q_heads * self.q_len;
        let out = emulator.uninitialized("out", 2 * rows_of_all * self.head_dim);
        let lse = emulator.uninitialized("lse", 4 * rows_of_all);
        let workspace = emulator.uninitialized("workspace", pass.workspace_bytes().max(1));
        emulator.write(workspace, &vec![0u8; pass.zeroed_bytes()]);
        let tensors = Tensors {
            q,
            k,
            v,
            out: TensorArg { address: out.address(), strides: q.strides },
            lse: lse.address(),
            mask: TensorArg { address: mask, strides: [heads * rows * keys, rows * keys, keys, 1] },
            cu_seqlens_q: 0,
            cu_seqlens_k: 0,
        };
        let mut launcher = WithLists { emulator: &mut emulator, programs: &programs, attention, lists };
        pass.run(&tensors, workspace.address(), &mut launcher)
            .unwrap_or_else(|failure| panic!("{}\n{failure}", config.name()));
        let out: Vec<u16> = emulator.read(out);
        let out = out.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect();
        (config, out, emulator.read(lse))
    }

    /// Runs the case and compares it with the oracle. Returns how the kernel was configured.
    fn check(&self) -> AttentionConfig {
        let data = self.data();
        let plan = self.plan(&data);
        let (config, out, lse) = self.run(&data, plan.pass());

        let [q_tiles, tiles] = self.tiles();
        let blocks = 0..self.q_heads * q_tiles * tiles;
        let blocks = blocks.map(|i| (self.listed)([i / (q_tiles * tiles), i / tiles % q_tiles, i % tiles]));
        let blocks: Vec<bool> = blocks.collect();
        let blocks = View::contiguous("block_mask", &blocks, &[1, self.q_heads, q_tiles, tiles]).unwrap();
        let (block_q, block_k) = (self.tiling.block_q(), self.tiling.tile_keys());
        let block_mask = Some(BlockMask { blocks, block_q, block_k });
        let inputs = Inputs { block_mask, ..self.inputs(&data) };
        let expected = oracle::scheme(&Call::check(&inputs, &self.options()).unwrap(), plan.scheme());

        let (name, accuracy) = (config.name(), Accuracy::of(&out, &expected.out));
        assert!(out.iter().all(|x| x.is_finite()) && accuracy.relative_l1 <= F16, "{name}: {accuracy:?}");
        for (row, (&found, &wanted)) in lse.iter().zip(&expected.lse).enumerate() {
            let near = (f64::from(found) - wanted).abs() <= 5e-4 * wanted.abs().max(1.0);
            assert!(near || f64::from(found) == wanted, "{name}: lse of row {row}: {found}, {wanted}");
        }
        config
    }
}

/// Each tile in half of the lists, so that every key counts when K is smoothed and quantised.
fn every_second([head, q_tile, tile]: [usize; 3]) -> bool {
    (head + q_tile + tile).is_multiple_of(2)
}

fn both_schemes(check: impl Fn(Scheme)) {
    [Preset::FULL.scheme(64), int8_scheme(DType::F16)].into_iter().for_each(check);
}

#[test]
fn lists_of_all_tiles_are_the_band() {
    both_schemes(|scheme| {
        for band in [Band::FULL, CAUSAL] {
            Case { scheme, band, ..Case::default() }.check();
            Case { scheme, band, tiling: warpgroups(), ..Case::default() }.check();
        }
    });
}

#[test]
fn every_second_tile() {
    both_schemes(|scheme| {
        for band in [Band::FULL, CAUSAL] {
            let case = Case { scheme, band, listed: every_second, ..Case::default() };
            case.check();
            Case { tiling: warpgroups(), ..case }.check();
        }
    });
}

#[test]
fn masks_hide_keys_of_listed_tiles() {
    both_schemes(|scheme| {
        let case = Case { scheme, masked: true, band: CAUSAL, listed: every_second, ..Case::default() };
        case.check();
        Case { tiling: warpgroups(), ..case }.check();
    });
}

#[test]
fn other_tilings() {
    let listed = every_second as Listed;
    let narrow = Tiling::Warps(WarpTiling { tile_keys: 32, stages: 3, ..WARPS });
    Case { tiling: narrow, listed, ..Case::default() }.check();
    both_schemes(|scheme| {
        let deep = Tiling::Warps(WarpTiling { rows_per_warp: 32, stages: 3, ..WARPS });
        Case { scheme, tiling: deep, listed, ..Case::default() }.check();
        let wide = Tiling::Warpgroups(WarpgroupTiling { tile_keys: 128, ..WARPGROUPS });
        Case { scheme, tiling: wide, listed, ..Case::default() }.check();
    });
    // Rows whose chunks do not divide the threads.
    Case { head_dim: 40, listed, ..Case::default() }.check();
}

#[test]
fn a_row_whose_list_is_empty_is_zero() {
    for tiling in [warps(), warpgroups()] {
        Case { tiling, listed: |[head, q_tile, _]| head != q_tile, ..Case::default() }.check();
    }
}

#[test]
fn parts_of_a_list() {
    for tiling in [warps(), warpgroups()] {
        let case = Case { tiling, q_len: 70, kv_len: 1100, multiprocessors: 40, ..Case::default() };
        let config = Case { listed: every_second, ..case }.check();
        assert!(config.split, "{}", config.name());
    }
}
