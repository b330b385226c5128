//! A forward pass in the emulator, and cases to try it on.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

use half::{bf16, f16};
use rand::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::metrics::Accuracy;
use sage_core::{
    Band, Call, DType, Inputs, Layout, Lengths, Mask, Options, Problem, Scheme, Tensor, TensorView, View,
    oracle,
};
use sage_emulator::{Emulator, Failure};
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{ForwardPlan, Request, Tensors};
use sage_kernels::pass::Launcher;
use sage_kernels::{Machine, TensorArg, Tiling};
use sage_ptx::{Arg, BoxedTensor, Program, Target};

/// A problem with its data. Tensors are dense `[batch, heads, rows, head_dim]`, or packed `[1, heads, total, head_dim]`.
#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: DType,
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    /// Elements between rows beyond the head: above 0, rows are not neighbours.
    pub gap: usize,
    /// Bytes that every tensor starts after a multiple of 256.
    pub misaligned: u32,
    pub k_bias: f32,
    pub v_bias: f32,
    /// Factor of channel 1 of queries and keys, or 0 for none.
    pub outlier: f32,
    pub band: Band,
    pub softcap: Option<f32>,
    pub sm_scale: Option<f32>,
    pub mask: MaskKind,
    /// The bias at `[batch, head, query, key]`, −∞ where a boolean mask hides; random where there is none.
    pub pattern: Option<fn([usize; 4]) -> f32>,
    /// Which dimensions the mask repeats.
    pub repeats: [bool; 4],
    /// What K and V hold where no query sees a key.
    pub spoil: Option<f32>,
    pub kv_lens: Option<Vec<i32>>,
    pub packed: Option<(Vec<i32>, Vec<i32>)>,
    /// Of packed sequences: the most queries and keys that the caller speaks of, where lengths are in device memory.
    pub longest: Option<[usize; 2]>,
    pub scheme: Option<Scheme>,
    pub target: Target,
    pub tiling: Option<Tiling>,
    pub lse: bool,
    pub multiprocessors: usize,
    /// Whether grids are folded as those of very many heads are.
    pub folded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaskKind {
    None,
    Bool,
    Bias(DType),
}

impl Default for Case {
    fn default() -> Self {
        Case {
            dtype: DType::F16,
            batch: 1,
            q_heads: 1,
            kv_heads: 1,
            q_len: 100,
            kv_len: 100,
            head_dim: 64,
            gap: 0,
            misaligned: 0,
            k_bias: 0.0,
            v_bias: 0.0,
            outlier: 0.0,
            band: Band::FULL,
            softcap: None,
            sm_scale: None,
            mask: MaskKind::None,
            pattern: None,
            repeats: [false; 4],
            spoil: None,
            kv_lens: None,
            packed: None,
            longest: None,
            scheme: None,
            target: Target::SM_80,
            tiling: None,
            lse: true,
            multiprocessors: 1,
            folded: false,
        }
    }
}

/// The output and log-sum-exp, in the oracle's order.
pub struct Computed {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub kernels: Vec<String>,
}

struct Emulated<'a> {
    emulator: &'a mut Emulator,
    programs: &'a [Program],
    folded: bool,
}

impl Launcher for Emulated<'_> {
    type Error = Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg, Failure> {
        // As the driver refuses.
        assert!(tensor.address != 0 && !tensor.shape.contains(&0), "{tensor:?}");
        Ok(self.emulator.tensor_map(&tensor.into()))
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<(), Failure> {
        let [x, y, z] = grid;
        // Three numbers along y, and some blocks too many.
        let grid = if self.folded && y > 3 { [x, 3, (y * z).div_ceil(3) + 1] } else { grid };
        self.emulator.launch(&self.programs[kernel], grid, args).map(|_| ())
    }
}

/// 16-bit elements of a tensor whose rows have gaps, and the same without gaps.
struct Data {
    bits: Vec<u16>,
    tensor: Tensor,
    strides: [i64; 3],
}

fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| StandardNormal.sample(&mut rng)).collect()
}

fn bits(dtype: DType, x: f32) -> u16 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_bits(),
        _ => f16::from_f32(x).to_bits(),
    }
}

fn value(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_bits(bits).to_f32(),
        _ => f16::from_bits(bits).to_f32(),
    }
}

impl Case {
    fn data(&self, seed: u64, heads: usize, rows: usize, [bias, outlier]: [f32; 2]) -> Data {
        let batch = if self.packed.is_some() { 1 } else { self.batch };
        let (dim, pitch) = (self.head_dim, self.head_dim + self.gap);
        let channel = normal(seed + 1000, dim);
        let dense: Vec<f32> = normal(seed, batch * heads * rows * dim)
            .into_iter()
            .enumerate()
            .map(|(i, x)| if outlier != 0.0 && i % dim == 1 { outlier * x } else { x })
            .enumerate()
            .map(|(i, x)| value(self.dtype, bits(self.dtype, x + bias * channel[i % dim])))
            .collect();
        // What lies in the gaps must never be read: NaN would show.
        let mut bits_of_rows = vec![bits(self.dtype, f32::NAN); batch * heads * rows * pitch];
        for (row, chunk) in dense.chunks(dim).enumerate() {
            for (c, &x) in chunk.iter().enumerate() {
                bits_of_rows[row * pitch + c] = bits(self.dtype, x);
            }
        }
        let shape =
            if self.packed.is_some() { vec![heads, rows, dim] } else { vec![batch, heads, rows, dim] };
        let tensor = Tensor::new(dense, &shape).unwrap().to_dtype(self.dtype);
        let strides = [(heads * rows * pitch) as i64, (rows * pitch) as i64, pitch as i64];
        Data { bits: bits_of_rows, tensor, strides }
    }

    /// Runs the case and returns what came out, and what the oracle of its scheme says.
    pub fn run(&self) -> (Computed, oracle::Output) {
        let (computed, of_scheme, _) = self.run_beside(false);
        (computed, of_scheme)
    }

    /// The same, and exact attention.
    pub fn run_beside_exact(&self) -> (Computed, oracle::Output, oracle::Output) {
        let (computed, of_scheme, exact) = self.run_beside(true);
        (computed, of_scheme, exact.unwrap())
    }

    fn run_beside(&self, exact: bool) -> (Computed, oracle::Output, Option<oracle::Output>) {
        let total = |cu: &[i32]| *cu.last().unwrap() as usize;
        let (q_rows, kv_rows) = match &self.packed {
            Some((q, k)) => (total(q), total(k)),
            None => (self.q_len, self.kv_len),
        };
        let q = self.data(1, self.q_heads, q_rows, [0.0, self.outlier]);
        let mut k = self.data(2, self.kv_heads, kv_rows, [self.k_bias, self.outlier]);
        let mut v = self.data(3, self.kv_heads, kv_rows, [self.v_bias, 0.0]);

        // The oracle takes packed tensors as [total, heads, head_dim]: views with the strides of ours.
        fn packed(tensor: &Tensor) -> TensorView<'_> {
            let shape = tensor.shape();
            let (heads, rows, dim) = (shape[0], shape[1], shape[2]);
            let strides = [dim as i64, (rows * dim) as i64, 1];
            let geometry = sage_core::Geometry::strided("tensor", &[rows, heads, dim], &strides, 0).unwrap();
            match tensor.view() {
                TensorView::F16(view) => View::strided("tensor", view.data(), geometry).unwrap().into(),
                TensorView::BF16(view) => View::strided("tensor", view.data(), geometry).unwrap().into(),
                TensorView::F32(view) => View::strided("tensor", view.data(), geometry).unwrap().into(),
            }
        }
        let views = match self.packed {
            Some(_) => [packed(&q.tensor), packed(&k.tensor), packed(&v.tensor)],
            None => [q.tensor.view(), k.tensor.view(), v.tensor.view()],
        };

        let mut mask_shape = [self.batch, self.q_heads, self.q_len, self.kv_len];
        for (size, repeats) in mask_shape.iter_mut().zip(self.repeats) {
            *size = if repeats { 1 } else { *size };
        }
        let mask_len: usize = mask_shape.iter().product();
        let at = |index: usize| {
            let [_, heads, rows, keys] = mask_shape;
            [index / (heads * rows * keys), index / (rows * keys) % heads, index / keys % rows, index % keys]
        };
        let (visible, bias): (Vec<bool>, Vec<f32>) = match self.pattern {
            Some(pattern) => {
                (0..mask_len).map(|i| pattern(at(i))).map(|x| (x > f32::NEG_INFINITY, x)).unzip()
            }
            None => (normal(4, mask_len).into_iter().map(|x| x < 0.8).collect(), normal(5, mask_len)),
        };
        let bias = Tensor::new(bias, &mask_shape).unwrap();
        let bias = match self.mask {
            MaskKind::Bias(dtype) => bias.to_dtype(dtype),
            _ => bias,
        };
        let mask = match self.mask {
            MaskKind::None => None,
            MaskKind::Bool => Some(Mask::Bool(View::contiguous("mask", &visible, &mask_shape).unwrap())),
            MaskKind::Bias(_) => Some(Mask::Additive(bias.view())),
        };
        let lengths = match (&self.packed, &self.kv_lens) {
            (Some((q, k)), _) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
            (None, Some(lens)) => Lengths::KvLens(lens),
            (None, None) => Lengths::Dense,
        };
        let inputs = Inputs { mask, lengths, ..Inputs::new(views[0], views[1], views[2]) };
        let options = Options {
            layout: Layout::Hnd,
            sm_scale: self.sm_scale,
            band: self.band,
            logit_softcap: self.softcap,
        };
        let call = Call::check(&inputs, &options).unwrap();

        // Of dense tensors the call holds those keys alone that the band lets some query see.
        let kept = match (&self.packed, &self.kv_lens, self.mask) {
            (None, None, MaskKind::None) => self.band.seen(self.q_len, self.kv_len),
            _ => 0..kv_rows,
        };
        if let Some(value) = self.spoil {
            let mut seen = vec![false; k.bits.len() / k.strides[2] as usize];
            let [batch, head, row] = k.strides.map(|stride| (stride / k.strides[2]) as usize);
            for sequence in call.sequences() {
                for kv_head in 0..self.kv_heads {
                    let keys = oracle::SeenKeys::of(&call, &sequence, kv_head);
                    let first =
                        sequence.batch * batch + kv_head * head + (sequence.kv_start + kept.start) * row;
                    (0..keys.len()).for_each(|j| seen[first + j] = keys.is_visible(j));
                }
            }
            let pitch = k.strides[2] as usize;
            for bits_of_rows in [&mut k.bits, &mut v.bits] {
                let rows = bits_of_rows.chunks_mut(pitch).zip(&seen);
                rows.filter(|(_, seen)| !**seen).for_each(|(row, _)| row.fill(bits(self.dtype, value)));
            }
        }

        let aligned = self.misaligned == 0 && self.head_dim.is_multiple_of(8) && self.gap.is_multiple_of(8);
        let request = Request {
            scheme: self.scheme,
            accuracy: None,
            mask: match self.mask {
                MaskKind::None => MaskForm::None,
                MaskKind::Bool => MaskForm::Bool,
                MaskKind::Bias(dtype) => MaskForm::Bias(dtype),
            },
            lengths: match (&self.packed, &self.kv_lens) {
                (Some(_), _) => sage_kernels::Lengths::Packed,
                (None, Some(_)) => sage_kernels::Lengths::KvLens,
                (None, None) => sage_kernels::Lengths::Dense,
            },
            q_rows,
            kv_rows: kept.len(),
            aligned,
            has_tensor_map: aligned,
            lse: self.lse,
            tiling: self.tiling,
        };
        let gpu = Machine { multiprocessors: self.multiprocessors, ..Machine::typical(self.target) };
        let [q_len, kv_len] = self.longest.unwrap_or([call.problem.q_len, call.problem.kv_len]);
        let problem = Problem { q_len, kv_len, ..call.problem };
        let forward = ForwardPlan::new(&problem, &request, &gpu).unwrap();

        let mut emulator = Emulator::new();
        let tensor = |emulator: &mut Emulator, name: &str, data: &Data| TensorArg {
            // What is empty has no memory.
            address: match data.bits.is_empty() {
                true => 0,
                false => emulator.buffer_at(name, &data.bits, self.misaligned).address(),
            },
            strides: data.strides,
        };
        let mut arguments =
            [("q", &q), ("k", &k), ("v", &v)].map(|(name, data)| tensor(&mut emulator, name, data));
        for keys in &mut arguments[1..] {
            keys.address += 2 * kept.start as u64 * keys.strides[2] as u64;
        }
        let out_buffer = emulator.uninitialized_at("out", 2 * q.bits.len(), self.misaligned);
        let lse_rows = q.bits.len() / (self.head_dim + self.gap);
        let lse_buffer = emulator.uninitialized("lse", 4 * lse_rows);
        let mask_address = match self.mask {
            MaskKind::None => 0,
            MaskKind::Bool => {
                let bytes: Vec<u8> = visible.iter().map(|&x| u8::from(x)).collect();
                emulator.buffer("mask", &bytes).address()
            }
            MaskKind::Bias(DType::F32) => emulator.buffer("mask", &bias.to_f32_vec()).address(),
            MaskKind::Bias(dtype) => {
                let elements: Vec<u16> = bias.to_f32_vec().into_iter().map(|x| bits(dtype, x)).collect();
                emulator.buffer("mask", &elements).address()
            }
        };
        let list = |emulator: &mut Emulator, name: &str, values: Option<&Vec<i32>>| {
            values.map_or(0, |values| emulator.buffer(name, values).address())
        };
        let cu_q = list(&mut emulator, "cu_seqlens_q", self.packed.as_ref().map(|packed| &packed.0));
        let cu_k = self.packed.as_ref().map(|packed| &packed.1).or(self.kv_lens.as_ref());
        let cu_k = list(&mut emulator, "cu_seqlens_k", cu_k);
        let [_, heads, rows, keys] = mask_shape.map(|n| n as i64);
        let mut mask_strides = [heads * rows * keys, rows * keys, keys, 1];
        for (stride, repeats) in mask_strides.iter_mut().zip(self.repeats) {
            *stride = if repeats { 0 } else { *stride };
        }
        let tensors = Tensors {
            q: arguments[0],
            k: arguments[1],
            v: arguments[2],
            out: TensorArg { address: out_buffer.address(), strides: q.strides },
            lse: lse_buffer.address(),
            mask: (mask_address, mask_strides),
            cu_seqlens_q: cu_q,
            cu_seqlens_k: cu_k,
        };
        // Zeroed and other parts of the workspace are separate here, so that reads of what nothing wrote are found.
        let zeroed = forward.pass().zeroed_bytes();
        let workspace = emulator.uninitialized("workspace", forward.pass().workspace_bytes().max(1));
        emulator.write(workspace, &vec![0u8; zeroed]);
        let programs = forward.pass().programs();
        let mut launcher = Emulated { emulator: &mut emulator, programs: &programs, folded: self.folded };
        forward
            .pass()
            .run(&tensors, workspace.address(), &mut launcher)
            .unwrap_or_else(|failure| panic!("{self:?}\n{failure}"));
        let kernels = forward.pass().kernel_names();

        let pitch = self.head_dim + self.gap;
        let raw: Vec<u16> = emulator.read(out_buffer);
        let out =
            raw.chunks(pitch).flat_map(|row| &row[..self.head_dim]).map(|&x| value(self.dtype, x)).collect();
        let lse = if self.lse { emulator.read(lse_buffer) } else { Vec::new() };
        let computed = Computed { out, lse, kernels };
        let scheme = *forward.scheme();
        (computed, oracle::scheme(&call, &scheme), exact.then(|| oracle::exact(&call)))
    }

    /// Runs the case and compares it with the oracle of its scheme.
    ///
    /// Returns the names of the kernels.
    pub fn check(&self, relative_l1: f64) -> Vec<String> {
        let (computed, expected) = self.run();
        let label = format!("{self:?}\n{:?}", computed.kernels);
        let accuracy = Accuracy::of(&computed.out, &expected.out);
        assert!(computed.out.iter().all(|x| x.is_finite()), "{label}: not finite");
        assert!(accuracy.relative_l1 <= relative_l1, "{label}: {accuracy:?}");
        if !self.lse {
            return computed.kernels;
        }
        for (row, (&found, &wanted)) in computed.lse.iter().zip(&expected.lse).enumerate() {
            // A row of biases that do not fit base 2 has the least finite number.
            let near = (f64::from(found) - wanted).abs() <= 5e-4 * wanted.abs().max(1.0)
                || wanted < -1e38 && found == f32::MIN;
            assert!(
                near || f64::from(found) == wanted,
                "{label}: lse of row {row} is {found}, expected {wanted}"
            );
        }
        computed.kernels
    }
}
