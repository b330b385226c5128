//! Calls, runs and comparisons that this crate's tests share.

// Each test file uses its own part of this module.
#![allow(dead_code, unreachable_pub)]

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::metrics::Accuracy;
use sage_core::oracle::Output;
use sage_core::{
    Band, BlockMask, Call, DType, Inputs, Layout, Lengths, Mask, Options, Preset, Scheme, Tensor, View,
};
use sage_cpu::{Cpu, InstructionSet};

/// A processor restricted to each instruction set that this machine has.
pub fn every_cpu() -> Vec<Cpu> {
    let with = |set| Cpu::detect().with_instruction_set(set).unwrap();
    InstructionSet::detected().into_iter().map(with).collect()
}

/// Values drawn from N(0, 1).
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// Dimensions of a mask that are not broadcast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// `[batch, heads, q_len, kv_len]`.
    All,
    /// `[1, 1, q_len, kv_len]`.
    Rows,
    /// `[batch, 1, 1, kv_len]`: padding.
    BatchKeys,
    /// `[1, heads, q_len, 1]`.
    HeadRows,
    /// `[kv_len]`.
    Keys,
    /// `[q_len, kv_len]`.
    Matrix,
}

/// An explicit mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Explicit {
    /// Hides about every third key.
    Bool(Extent),
    /// Adds N(0, 1), but −∞ to about every fifth key.
    Additive(DType, Extent),
}

/// Everything that decides which keys a query sees.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Masking {
    pub band: Band,
    pub explicit: Option<Explicit>,
    /// Queries and keys of a block; about every third block is hidden.
    pub blocks: Option<(usize, usize)>,
    /// Valid keys differ from batch entry to batch entry; the first has all, the last none where there are three.
    pub kv_lens: bool,
}

/// A call to build.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub seed: u64,
    pub dtype: DType,
    pub layout: Layout,
    pub batch: usize,
    /// Query heads and key heads.
    pub heads: (usize, usize),
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub masking: Masking,
    pub softcap: Option<f32>,
    /// Mean of every fourth channel of K.
    pub k_bias: f32,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            seed: 1,
            dtype: DType::F32,
            layout: Layout::Hnd,
            batch: 1,
            heads: (1, 1),
            q_len: 64,
            kv_len: 64,
            head_dim: 64,
            masking: Masking::default(),
            softcap: None,
            k_bias: 0.0,
        }
    }
}

/// Owned tensors of a call.
#[derive(Clone, Debug)]
pub struct Built {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub options: Options,
    pub bools: Option<(Vec<bool>, Vec<usize>)>,
    pub bias: Option<Tensor>,
    pub blocks: Option<(Vec<bool>, Vec<usize>, usize, usize)>,
    pub kv_lens: Option<Vec<i32>>,
    pub cu_seqlens: Option<(Vec<i32>, Vec<i32>)>,
}

impl Case {
    pub fn shape(&self, heads: usize, rows: usize) -> [usize; 4] {
        match self.layout {
            Layout::Hnd => [self.batch, heads, rows, self.head_dim],
            Layout::Nhd => [self.batch, rows, heads, self.head_dim],
        }
    }

    pub fn build(&self) -> Built {
        let tensor = |part, shape: [usize; 4]| {
            let mut values = normal(8 * self.seed + part, shape.iter().product());
            if part == 1 {
                let biased = |at: &usize| (at % self.head_dim).is_multiple_of(4);
                (0..values.len()).filter(biased).for_each(|at| values[at] += self.k_bias);
            }
            Tensor::new(values, &shape).unwrap().to_dtype(self.dtype)
        };
        let mut rng = ChaCha8Rng::seed_from_u64(8 * self.seed + 3);
        let (q_len, kv_len, Masking { band, explicit, blocks, kv_lens }) =
            (self.q_len, self.kv_len, self.masking);
        let mut built = Built {
            q: tensor(0, self.shape(self.heads.0, q_len)),
            k: tensor(1, self.shape(self.heads.1, kv_len)),
            v: tensor(2, self.shape(self.heads.1, kv_len)),
            options: Options { layout: self.layout, band, logit_softcap: self.softcap, ..Options::default() },
            bools: None,
            bias: None,
            blocks: None,
            kv_lens: kv_lens.then(|| {
                let len = |b: usize| if b == 2 { 0 } else { kv_len - (b * (kv_len / 3 + 1)).min(kv_len) };
                (0..self.batch).map(|b| len(b) as i32).collect()
            }),
            cu_seqlens: None,
        };
        let mask_shape = |extent| match extent {
            Extent::All => vec![self.batch, self.heads.0, q_len, kv_len],
            Extent::Rows => vec![1, 1, q_len, kv_len],
            Extent::BatchKeys => vec![self.batch, 1, 1, kv_len],
            Extent::HeadRows => vec![1, self.heads.0, q_len, 1],
            Extent::Keys => vec![kv_len],
            Extent::Matrix => vec![q_len, kv_len],
        };
        match explicit {
            Some(Explicit::Bool(extent)) => {
                let shape = mask_shape(extent);
                let len = shape.iter().product();
                built.bools = Some(((0..len).map(|_| rng.random_bool(0.67)).collect(), shape));
            }
            Some(Explicit::Additive(dtype, extent)) => {
                let shape = mask_shape(extent);
                let mut values = normal(8 * self.seed + 4, shape.iter().product());
                let hidden = |x: &mut f32| {
                    if rng.random_bool(0.2) {
                        *x = f32::NEG_INFINITY
                    }
                };
                values.iter_mut().for_each(hidden);
                built.bias = Some(Tensor::new(values, &shape).unwrap().to_dtype(dtype));
            }
            None => {}
        }
        if let Some((block_q, block_k)) = blocks {
            let shape = vec![self.batch, self.heads.0, q_len.div_ceil(block_q), kv_len.div_ceil(block_k)];
            let len = shape.iter().product();
            built.blocks = Some(((0..len).map(|_| rng.random_bool(0.67)).collect(), shape, block_q, block_k));
        }
        built
    }
}

impl Built {
    /// Tensors without masks, in HND layout.
    pub fn dense(q: Tensor, k: Tensor, v: Tensor) -> Self {
        let options = Options::default();
        Built { q, k, v, options, bools: None, bias: None, blocks: None, kv_lens: None, cu_seqlens: None }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        let bools =
            self.bools.as_ref().map(|(x, shape)| Mask::Bool(View::contiguous("mask", x, shape).unwrap()));
        let bias = self.bias.as_ref().map(|x| Mask::Additive(x.view()));
        let lengths = match (&self.kv_lens, &self.cu_seqlens) {
            (Some(kv_lens), _) => Lengths::KvLens(kv_lens),
            (_, Some((q, k))) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
            _ => Lengths::Dense,
        };
        Inputs {
            mask: bools.or(bias),
            block_mask: self.blocks.as_ref().map(|(x, shape, block_q, block_k)| BlockMask {
                blocks: View::contiguous("block_mask", x, shape).unwrap(),
                block_q: *block_q,
                block_k: *block_k,
            }),
            lengths,
            ..Inputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }

    pub fn call(&self) -> Call<'_> {
        Call::check(&self.inputs(), &self.options).unwrap()
    }

    /// Runs the call; a scheme of `None` leaves it to the plan.
    pub fn run(&self, cpu: &Cpu, scheme: Option<Scheme>) -> Run {
        run(cpu, &self.call(), self.q.shape(), scheme)
    }

    pub fn run_preset(&self, cpu: &Cpu, preset: Preset) -> Run {
        self.run(cpu, Some(preset.scheme(self.call().problem.head_dim)))
    }
}

/// What a run wrote, in the order of [`Output`], whatever the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

/// Runs a call into a row-major output of the caller's shape. Output and log-sum-exp start as a poison that no run
/// writes (a NaN of its own), and nothing of it may be left.
pub fn run(cpu: &Cpu, call: &Call<'_>, shape: &[usize], scheme: Option<Scheme>) -> Run {
    const POISON: u32 = 0x7fd5_5000;
    let plan = cpu.plan(&call.problem, scheme).unwrap();
    let len: usize = shape.iter().product();
    let poison = f32::from_bits(POISON);
    let mut out = Tensor::new(vec![poison; len], shape).unwrap().to_dtype(call.problem.dtype);
    let poisoned: Vec<u32> = out.to_f32_vec().iter().map(|x| x.to_bits()).collect();
    let mut lse = vec![poison; call.lse_shape().iter().product()];
    cpu.forward(&plan, call, out.view_mut(), Some(&mut lse)).unwrap();

    let geometry = call.check_output(out.dtype(), out.view().geometry()).unwrap();
    let wide = out.to_f32_vec();
    assert!(
        wide.iter().zip(&poisoned).all(|(x, poison)| x.to_bits() != *poison),
        "an element was not written"
    );
    assert!(lse.iter().all(|x| x.to_bits() != POISON), "a log-sum-exp was not written");
    let view = View::strided("out", &wide, geometry).unwrap();
    Run { out: elements(&view), lse }
}

/// A tensor's elements in row-major order of its view.
pub fn elements<T: Copy>(view: &View<'_, T>) -> Vec<T> {
    let shape = view.geometry().shape().to_vec();
    let [batch, heads, rows, width] = shape[..] else { panic!("four dimensions") };
    let mut out = Vec::new();
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..rows {
                out.extend((0..width).map(|c| view.at([b, h, i, c])));
            }
        }
    }
    out
}

/// Every way through the keys and every form of the two products.
pub fn schemes(head_dim: usize) -> Vec<Scheme> {
    let (full, int8) = (Preset::FULL.scheme(head_dim), Preset::INT8.scheme(head_dim));
    vec![
        full,
        Scheme { pv: int8.pv, ..full },
        int8,
        Preset::INT8_F32.scheme(head_dim),
        Preset::INT8_PER_TOKEN.scheme(head_dim),
        Scheme { rotate: true, smooth: full.smooth, ..int8 },
    ]
}

/// Largest relative error of rounding a normal number to an element type: half a unit in the last of 8 or 11 bits.
/// (The mean over many numbers is less than half of it.)
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
    }
}

/// How far a run may be from an oracle.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of the output as a whole.
    pub relative_l1: f64,
    /// Of each element, as a part of the largest magnitude expected anywhere: what one hidden key too many, or a
    /// row of another head, must not stay under.
    pub element: f64,
    /// Of each log-sum-exp.
    pub lse: f64,
}

impl Run {
    /// How far the output is from an oracle's.
    pub fn accuracy(&self, expected: &Output) -> Accuracy {
        Accuracy::of(&self.out, &expected.out)
    }

    /// Largest error of a log-sum-exp; NaN where one side is NaN or −∞ alone.
    pub fn lse_error(&self, expected: &Output) -> f64 {
        Accuracy::of(&self.lse, &expected.lse).max_abs_error
    }

    /// Checks the run against an oracle; the rounding of the output to `dtype` comes on top of the tolerance.
    pub fn check(&self, expected: &Output, dtype: DType, tolerance: &Tolerance) -> Result<(), String> {
        let rounding = unit_roundoff(dtype);
        let scale = expected.out.iter().fold(0f64, |max, x| max.max(x.abs()));
        if self.out.len() != expected.out.len() || self.lse.len() != expected.lse.len() {
            return Err("sizes differ".into());
        }
        for (at, (&a, &e)) in self.out.iter().zip(&expected.out).enumerate() {
            // Below the normal range of half precision the last place is 2⁻²⁴.
            let bound = tolerance.element * scale + rounding * e.abs() + 2f64.powi(-25);
            if (f64::from(a) - e).abs() > bound || a.is_nan() != e.is_nan() {
                return Err(format!("element {at} is {a}, expected {e} ± {bound:.2e}"));
            }
        }
        let accuracy = self.accuracy(expected);
        if accuracy.relative_l1 > tolerance.relative_l1 + rounding {
            return Err(accuracy.to_string());
        }
        for (row, (&a, &e)) in self.lse.iter().zip(&expected.lse).enumerate() {
            let a = f64::from(a);
            if a != e && !((a - e).abs() <= tolerance.lse * e.abs().max(1.0) || a.is_nan() && e.is_nan()) {
                return Err(format!("log-sum-exp {row} is {a}, expected {e}"));
            }
        }
        Ok(())
    }
}

/// The bits of a run, for comparisons in which a NaN equals itself.
pub fn bits(run: &Run) -> Vec<u32> {
    run.out.iter().chain(&run.lse).map(|x| x.to_bits()).collect()
}
