//! Any combination of tensors, masks, lengths and options: [`Call::check`] refuses it, or every element that the call
//! speaks of lies in the caller's memory, and the CPU backend computes what exact attention does. Never a panic.
#![no_main]

use std::collections::HashSet;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use half::{bf16, f16};
use libfuzzer_sys::fuzz_target;
use sage_core::{
    Alignment, Band, BlockMask, Call, DType, Element, Geometry, Inputs, Layout, Lengths, Mask, Options,
    Preset, Tensor, TensorView, View, ViewMut, oracle,
};
use sage_cpu::Cpu;

/// Elements of a tensor's memory.
const MAX_MEMORY: usize = 1 << 13;
/// Tensors of more elements are not read one by one.
const MAX_READ: usize = 1 << 14;
/// Multiply-adds of an exact attention that is computed.
const MAX_WORK: usize = 1 << 18;

/// Sizes that go together, and what is then done to spoil them.
#[derive(Arbitrary, Debug)]
struct Case {
    dtype: Type,
    batch: u8,
    num_kv_heads: u8,
    group_size: u8,
    q_len: u8,
    kv_len: u8,
    head_dim: u8,
    value_dim: Option<u8>,
    /// Whether K and V have one batch entry.
    shared: bool,
    nhd: bool,
    q: Storage,
    k: Storage,
    v: Storage,
    out: Storage,
    mask: Option<AnyMask>,
    block_mask: Option<AnyBlockMask>,
    lengths: AnyLengths,
    sm_scale: Option<f32>,
    left: Option<u16>,
    right: Option<u16>,
    top_left: bool,
    logit_softcap: Option<f32>,
    preset: Option<u8>,
    instruction_set: u8,
    values: Vec<u8>,
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Type {
    F32,
    F16,
    BF16,
}

/// How a tensor of a wanted shape lies in memory.
#[derive(Arbitrary, Debug)]
struct Storage {
    /// Element type instead of the others'.
    dtype: Option<Type>,
    /// Sizes instead of the wanted ones.
    shape: Option<AnyShape>,
    /// Dimensions from the fastest varying one outwards; the last one is where it belongs unless this says otherwise.
    order: [u8; 4],
    /// Elements left out after each dimension.
    gaps: [u8; 4],
    /// Dimensions that run backwards, one bit each.
    backwards: u8,
    /// Dimensions that repeat (stride 0), one bit each.
    repeated: u8,
    /// Strides instead of these.
    strides: Option<Vec<i64>>,
    /// Added to the offset that makes the first element in memory element 0.
    offset: Offset,
    /// Elements after the last one; negative: elements that are missing.
    slack: i8,
}

#[derive(Arbitrary, Debug)]
enum AnyShape {
    One(u8, usize),
    All(Vec<usize>),
    Ones(u8),
}

#[derive(Arbitrary, Debug)]
enum Offset {
    Exact,
    Plus(u8),
    Any(i64),
}

#[derive(Arbitrary, Debug)]
struct AnyMask {
    boolean: bool,
    storage: Storage,
}

#[derive(Arbitrary, Debug)]
struct AnyBlockMask {
    block_q: u8,
    block_k: u8,
    huge: bool,
    storage: Storage,
}

#[derive(Arbitrary, Debug)]
enum AnyLengths {
    Dense,
    KvLens(Vec<u8>),
    AnyKvLens(Vec<i32>),
    Packed(Vec<(u8, u8)>),
    AnyPacked(Vec<i32>, Vec<i32>),
}

fuzz_target!(|case: Case| {
    run(&case);
});

/// Wanted shape of a dense or packed tensor.
fn shape(case: &Case, packed: bool, [batch, heads, rows, channels]: [usize; 4]) -> Vec<usize> {
    match (packed, case.nhd) {
        (true, _) => vec![rows, heads, channels],
        (false, true) => vec![batch, rows, heads, channels],
        (false, false) => vec![batch, heads, rows, channels],
    }
}

fn batch(case: &Case) -> usize {
    few_or_huge(case.batch)
}

/// Mostly 0 to 3; rarely so many that only a tensor without elements, or with strides of 0, can have them.
fn few_or_huge(n: u8) -> usize {
    match n {
        0..0xfc => usize::from(n % 4),
        huge => 1 << (20 + 12 * (huge - 0xfc)),
    }
}

/// Often small, sometimes beyond what is allowed, sometimes 0.
fn channels(n: u8) -> usize {
    match n {
        0..128 => usize::from(n % 16),
        128..244 => usize::from(n % 16) * 16,
        244..250 => usize::from(n - 244) + 510,
        large => usize::from(large - 250) + 574,
    }
}

/// Nothing when a tensor cannot be made at all, which its constructor found.
fn run(case: &Case) -> Option<()> {
    let kv_heads = few_or_huge(case.num_kv_heads);
    let q_heads = kv_heads * usize::from(case.group_size % 4);
    let (mut q_len, mut kv_len) = (usize::from(case.q_len % 24), usize::from(case.kv_len % 40));
    let packed = matches!(case.lengths, AnyLengths::Packed(_) | AnyLengths::AnyPacked(..));

    let (mut first, mut second) = (Vec::new(), Vec::new());
    match &case.lengths {
        AnyLengths::Dense => {}
        AnyLengths::KvLens(lens) => {
            first = (0..batch(case).min(8))
                .map(|b| i32::from(lens.get(b).copied().unwrap_or(0)) % (kv_len as i32 + 1))
                .collect();
        }
        AnyLengths::AnyKvLens(lens) => first.clone_from(lens),
        AnyLengths::Packed(lens) => {
            (first, second) = (vec![0], vec![0]);
            (q_len, kv_len) = (0, 0);
            for &(q, k) in lens.iter().take(5) {
                q_len += usize::from(q % 12);
                kv_len += usize::from(k % 20);
                first.push(q_len as i32);
                second.push(kv_len as i32);
            }
        }
        AnyLengths::AnyPacked(q, k) => (first, second) = (q.clone(), k.clone()),
    }
    let lengths = match case.lengths {
        AnyLengths::Dense => Lengths::Dense,
        AnyLengths::KvLens(_) | AnyLengths::AnyKvLens(_) => Lengths::KvLens(&first),
        AnyLengths::Packed(_) | AnyLengths::AnyPacked(..) => {
            Lengths::Packed { cu_seqlens_q: &first, cu_seqlens_k: &second }
        }
    };

    let memory = |name, storage: &Storage, wanted: &[usize], seed| {
        Memory::new(name, storage, wanted, storage.dtype.unwrap_or(case.dtype), &case.values, seed)
    };
    let head_dim = channels(case.head_dim);
    let value_dim = case.value_dim.map_or(head_dim, channels);
    let kv_batch = if case.shared { 1 } else { batch(case) };
    let q = memory("q", &case.q, &shape(case, packed, [batch(case), q_heads, q_len, head_dim]), 0)?;
    let k = memory("k", &case.k, &shape(case, packed, [kv_batch, kv_heads, kv_len, head_dim]), 1)?;
    let v = memory("v", &case.v, &shape(case, packed, [kv_batch, kv_heads, kv_len, value_dim]), 2)?;
    let mut out =
        memory("out", &case.out, &shape(case, packed, [batch(case), q_heads, q_len, value_dim]), 3)?;

    let scores = [batch(case), q_heads, q_len, kv_len];
    let mask = match &case.mask {
        Some(mask) if mask.boolean => {
            Some((true, Memory::new("mask", &mask.storage, &scores, Type::F32, &case.values, 4)?))
        }
        Some(mask) => {
            let dtype = mask.storage.dtype.unwrap_or(Type::F32);
            Some((false, Memory::new("mask", &mask.storage, &scores, dtype, &case.values, 4)?))
        }
        None => None,
    };
    let block_mask = match &case.block_mask {
        Some(mask) => {
            let size =
                |size: u8| if mask.huge { usize::MAX - usize::from(size) } else { usize::from(size % 17) };
            let (block_q, block_k) = (size(mask.block_q), size(mask.block_k));
            let blocks = [
                batch(case),
                q_heads,
                q_len.checked_div(block_q).map_or(0, |n| n + usize::from(!q_len.is_multiple_of(block_q))),
                kv_len.checked_div(block_k).map_or(0, |n| n + usize::from(!kv_len.is_multiple_of(block_k))),
            ];
            Some((
                block_q,
                block_k,
                Memory::new("block_mask", &mask.storage, &blocks, Type::F32, &case.values, 5)?,
            ))
        }
        None => None,
    };

    let inputs = Inputs::new(q.view("q")?, k.view("k")?, v.view("v")?)
        .mask(match &mask {
            Some((true, memory)) => Some(Mask::Bool(memory.flags("mask")?)),
            Some((false, memory)) => Some(Mask::Additive(memory.view("mask")?)),
            None => None,
        })
        .block_mask(match &block_mask {
            Some((block_q, block_k, memory)) => {
                Some(BlockMask { blocks: memory.flags("block_mask")?, block_q: *block_q, block_k: *block_k })
            }
            None => None,
        })
        .lengths(lengths);
    // Hardly a random number is a usable scale: half of them become one.
    let positive = |x: f32| if x.to_bits() & 1 == 0 { x.abs() } else { x };
    let options = Options::default()
        .layout(if case.nhd { Layout::Nhd } else { Layout::Hnd })
        .sm_scale(case.sm_scale.map(positive))
        .band(Band {
            left: case.left.map(limit),
            right: case.right.map(limit),
            alignment: if case.top_left { Alignment::TopLeft } else { Alignment::BottomRight },
        })
        .logit_softcap(case.logit_softcap.map(positive));
    let call = match Call::check(&inputs, &options) {
        Ok(call) => call,
        Err(error) => {
            one_line(&error.to_string());
            return None;
        }
    };
    check_call(&call);
    check_out(&call, &mut out);
    check_results(case, &call)
}

/// Mostly near the lengths, sometimes at the end of what a number holds.
fn limit(limit: u16) -> usize {
    if limit < 0xff00 { usize::from(limit % 64) } else { usize::MAX - usize::from(limit & 0xff) }
}

/// What a checked call promises about its tensors and sequences.
fn check_call(call: &Call<'_>) {
    let p = &call.problem;
    let rows = |t: &TensorView<'_>| t.shape()[2];
    let tensor_batch = if p.packed { 1 } else { p.batch };
    assert_eq!(call.q.shape(), [tensor_batch, p.num_q_heads, rows(&call.q), p.head_dim]);
    assert_eq!(call.k.shape(), [tensor_batch, p.num_kv_heads, rows(&call.k), p.head_dim]);
    assert_eq!(call.v.shape(), [tensor_batch, p.num_kv_heads, rows(&call.k), p.value_dim]);
    assert!(p.num_kv_heads > 0 && p.group_size() * p.num_kv_heads == p.num_q_heads);
    for tensor in [&call.q, &call.k, &call.v] {
        assert_eq!(tensor.dtype(), p.dtype);
        let memory = match tensor {
            TensorView::F32(v) => v.data().len(),
            TensorView::F16(v) => v.data().len(),
            TensorView::BF16(v) => v.data().len(),
        };
        within(tensor.geometry(), memory, |at| {
            tensor.at(at);
        });
    }
    match &call.mask {
        Some(Mask::Bool(view)) => within(view.geometry(), view.data().len(), |at| {
            view.at(at);
        }),
        Some(Mask::Additive(TensorView::F32(view))) => within(view.geometry(), view.data().len(), |at| {
            view.at(at);
        }),
        Some(Mask::Additive(TensorView::F16(view))) => within(view.geometry(), view.data().len(), |at| {
            view.at(at);
        }),
        Some(Mask::Additive(TensorView::BF16(view))) => within(view.geometry(), view.data().len(), |at| {
            view.at(at);
        }),
        None => {}
    }
    if let Some(mask) = &call.mask {
        assert_eq!(mask.geometry().shape(), [p.batch, p.num_q_heads, p.q_len, p.kv_len]);
    }
    if let Some(mask) = &call.block_mask {
        let blocks = [p.q_len.div_ceil(mask.block_q), p.kv_len.div_ceil(mask.block_k)];
        assert_eq!(mask.blocks.geometry().shape(), [p.batch, p.num_q_heads, blocks[0], blocks[1]]);
        within(mask.blocks.geometry(), mask.blocks.data().len(), |at| {
            mask.blocks.at(at);
        });
    }

    assert_eq!(call.sequences().len(), p.batch);
    let lse_len: usize = call.lse_shape().iter().product();
    let mut seen = HashSet::new();
    for sequence in call.sequences() {
        assert!(sequence.batch < tensor_batch);
        assert!(sequence.q_start + sequence.q_len <= rows(&call.q));
        assert!(sequence.kv_start + sequence.kv_len <= rows(&call.k));
        assert!(sequence.q_len <= p.q_len && sequence.kv_len <= p.kv_len);
        if p.num_q_heads.max(1) * sequence.q_len > MAX_READ || seen.len() > MAX_READ {
            continue;
        }
        for i in 0..sequence.q_len {
            let keys = p.band.keys(i, sequence.q_len, sequence.kv_len);
            assert!(keys.start <= keys.end && keys.end <= sequence.kv_len);
            for head in 0..p.num_q_heads {
                let index = call.lse_index(&sequence, head, i);
                assert!(index < lse_len && seen.insert(index), "log-sum-exp {index} of {lse_len}");
            }
        }
    }
}

/// An output that is accepted has a place of its own for every element.
fn check_out(call: &Call<'_>, out: &mut Memory) {
    let dtype = out.dtype();
    let geometry = match call.check_output(dtype, &out.geometry) {
        Ok(geometry) => geometry,
        Err(error) => return one_line(&error.to_string()),
    };
    assert_eq!(dtype, call.problem.dtype);
    assert_eq!(geometry.shape(), call.q.shape());
    assert_eq!(geometry.span(), out.geometry.span(), "{geometry:?} and {:?}", out.geometry);
    let places = match &mut out.elements {
        Elements::F32(data) => write_each(data, geometry),
        Elements::F16(data) => write_each(data, geometry),
        Elements::BF16(data) => write_each(data, geometry),
    };
    if let Some(places) = places {
        assert_eq!(places, geometry.len(), "{geometry:?}");
    }
}

/// Writes 1 to every element of a memory of zeros and counts the places that are 1 then.
fn write_each<T: Element>(data: &mut [T], geometry: Geometry) -> Option<usize> {
    data.fill(T::ZERO);
    let mut view = ViewMut::strided("out", data, geometry).ok()?;
    if geometry.len() > MAX_READ {
        return None;
    }
    each(&geometry, |at| view.set(at, T::from_f32(1.0)));
    Some(data.iter().filter(|x| x.to_f32() == 1.0).count())
}

/// Exact attention and the CPU backend's, where they are cheap.
fn check_results(case: &Case, call: &Call<'_>) -> Option<()> {
    let p = &call.problem;
    let preset = case.preset.map(|n| Preset::ALL[usize::from(n) % Preset::ALL.len()]);
    let sets = &cpu().machine().instruction_sets;
    let cpu =
        cpu().clone().with_instruction_set(sets[usize::from(case.instruction_set) % sets.len()]).ok()?;
    let plan = match cpu.plan(p, preset.map(|preset| preset.scheme(p.head_dim))) {
        Ok(plan) => Some(plan),
        Err(error) => {
            one_line(&error.to_string());
            None
        }
    };
    let work = call.sequences().try_fold(0usize, |sum, s| {
        sum.checked_add(
            s.q_len
                .checked_mul(s.kv_len)?
                .checked_mul(p.num_q_heads)?
                .checked_mul(p.head_dim.max(p.value_dim))?,
        )
    });
    let elements = [&call.q, &call.k, &call.v].map(|t| t.geometry().len());
    let heads = call.sequences().len().saturating_mul(p.num_q_heads.max(p.num_kv_heads));
    if work.is_none_or(|work| work > MAX_WORK) || heads > MAX_READ || elements.iter().any(|&n| n > MAX_READ) {
        return None;
    }
    let exact = oracle::exact(call);
    assert_eq!(exact.out.len(), call.out_dimensions().iter().product::<usize>());
    assert_eq!(exact.lse.len(), call.lse_shape().iter().product::<usize>());

    let [q, k, v] = [&call.q, &call.k, &call.v].map(largest);
    let bias = match &call.mask {
        Some(Mask::Additive(bias)) => Some(bias),
        _ => None,
    };
    let (mut bias_ends, mut bias_max) = (true, 0f64);
    if let Some(bias) = bias {
        each(bias.geometry(), |at| {
            let value = f64::from(bias.at(at));
            bias_ends &= value < f64::INFINITY;
            if value > f64::NEG_INFINITY {
                bias_max = bias_max.max(value.abs());
            }
        });
    }
    let finite = q.is_finite() && k.is_finite() && v.is_finite() && bias_ends;
    if finite {
        let bound = v * (1.0 + 1e-9);
        assert!(exact.out.iter().all(|x| x.abs() <= bound), "out reaches beyond {v}: {:?}", exact.out);
        assert!(exact.lse.iter().all(|x| *x < f64::INFINITY), "lse is {:?}", exact.lse);
    }

    let plan = plan?;
    assert!(!plan.to_string().is_empty());
    let mut lse = vec![0f32; exact.lse.len()];
    let out = forward(call, |out| cpu.forward(&plan, call, out, Some(&mut lse)))?;
    // Where scores are small, single precision is close to exact; quantised schemes stay near what V holds.
    let scores = q * k * p.head_dim as f64 * f64::from(p.sm_scale) + bias_max;
    let ordinary = |x: f64| x == 0.0 || (1e-4..1e4).contains(&x);
    if !finite || scores > 50.0 || ![q, k, v, f64::from(p.sm_scale)].into_iter().all(ordinary) {
        return None;
    }
    let full = plan.scheme() == &Preset::FULL.scheme(p.head_dim);
    for (i, (&found, &exact)) in out.iter().zip(&exact.out).enumerate() {
        let found = f64::from(found);
        // f16 and bf16 round the result: 2⁻⁹ of it at most. The rest is far above what 50 and MAX_WORK can cause.
        let close = if full { (found - exact).abs() <= 0.01 * v } else { found.abs() <= 1.3 * v };
        assert!(close, "out[{i}] is {found}, exact {exact}, largest v {v}, {}", plan.scheme());
    }
    for (i, (&found, &exact)) in lse.iter().zip(&exact.lse).enumerate() {
        let found = f64::from(found);
        let close = if full { found == exact || (found - exact).abs() <= 0.01 } else { !found.is_nan() };
        assert!(close, "lse[{i}] is {found}, exact {exact}, {}", plan.scheme());
    }
    Some(())
}

/// The output of a call in this call's order, row-major.
fn forward(
    call: &Call<'_>,
    run: impl FnOnce(sage_core::TensorViewMut<'_>) -> sage_core::Result<()>,
) -> Option<Vec<f32>> {
    // In the caller's layout: where each element is then found is what `check_output` says.
    let dtype = call.problem.dtype;
    let mut out = Tensor::zeros(dtype, &call.out_shape()).ok()?;
    let geometry = call.check_output(dtype, out.view().geometry()).unwrap();
    if let Err(error) = run(out.view_mut()) {
        one_line(&error.to_string());
        return None;
    }
    let data = out.to_f32_vec();
    let mut ordered = Vec::with_capacity(data.len());
    each(&geometry, |at| ordered.push(data[geometry.index(at) as usize]));
    Some(ordered)
}

/// This processor, looked at once; one thread, so that a finding can be repeated.
fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(|| {
        // An earlier pool would do as well.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(1).build_global();
        Cpu::detect()
    })
}

/// The largest magnitude, infinite where an element is not finite.
fn largest(tensor: &TensorView<'_>) -> f64 {
    let mut largest = 0f64;
    each(tensor.geometry(), |at| {
        let x = f64::from(tensor.at(at).abs());
        largest = largest.max(if x.is_finite() { x } else { f64::INFINITY });
    });
    largest
}

/// All elements lie in memory: by the span, and by reading them where there are few.
fn within(geometry: &Geometry, memory: usize, read: impl FnMut([usize; 4])) {
    if let Some((low, high)) = geometry.span() {
        assert!(
            low >= 0 && low <= high && (high as u64) < memory as u64,
            "{geometry:?} in {memory} elements"
        );
    }
    if geometry.len() <= MAX_READ {
        each(geometry, read);
    }
}

/// Calls `f` with every position.
fn each(geometry: &Geometry, mut f: impl FnMut([usize; 4])) {
    // Without elements a dimension may still be huge.
    if geometry.is_empty() || geometry.len() > MAX_READ {
        return;
    }
    let mut shape = [1; 4];
    shape[4 - geometry.rank()..].copy_from_slice(geometry.shape());
    for a in 0..shape[0] {
        for b in 0..shape[1] {
            for c in 0..shape[2] {
                for d in 0..shape[3] {
                    f([a, b, c, d]);
                }
            }
        }
    }
}

/// A message stays on one line.
fn one_line(message: &str) {
    assert!(!message.is_empty() && !message.contains('\n'), "message is {message:?}");
}

#[derive(Debug)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// A tensor's memory and where it says its elements are.
#[derive(Debug)]
struct Memory {
    elements: Elements,
    flags: Vec<bool>,
    geometry: Geometry,
}

impl Memory {
    fn new(
        name: &str,
        storage: &Storage,
        wanted: &[usize],
        dtype: Type,
        values: &[u8],
        seed: usize,
    ) -> Option<Self> {
        let geometry = match geometry(name, storage, wanted) {
            Ok(geometry) => geometry,
            Err(error) => {
                one_line(&error.to_string());
                return None;
            }
        };
        // What the geometry needs, unless that is too much: then the memory is too short, and must be refused.
        let needed = geometry.span().map_or(0, |(_, high)| high.saturating_add(1).max(0));
        let len = needed.saturating_add(i64::from(storage.slack)).clamp(0, MAX_MEMORY as i64) as usize;
        let byte = |i: usize| values.get((i + seed * 7) % values.len().max(1)).copied().unwrap_or(0);
        // Small numbers mostly, and whatever bits there are where a byte is marked.
        let element = |i: usize| match byte(i) {
            marked @ 0xf0.. => f32::from_bits(u32::from_le_bytes([
                byte(i + 1),
                byte(i + 2),
                byte(i + 3),
                marked << 4 | byte(i + 4) >> 4,
            ])),
            small => (f32::from(small) - 96.0) / 32.0,
        };
        let floats = (0..len).map(element);
        let elements = match dtype {
            Type::F32 => Elements::F32(floats.collect()),
            Type::F16 => Elements::F16(floats.map(f16::from_f32).collect()),
            Type::BF16 => Elements::BF16(floats.map(bf16::from_f32).collect()),
        };
        let flags = (0..len).map(|i| byte(i) & 1 == 0).collect();
        Some(Memory { elements, flags, geometry })
    }

    fn dtype(&self) -> DType {
        match self.elements {
            Elements::F32(_) => DType::F32,
            Elements::F16(_) => DType::F16,
            Elements::BF16(_) => DType::BF16,
        }
    }

    fn view(&self, name: &str) -> Option<TensorView<'_>> {
        match &self.elements {
            Elements::F32(data) => View::strided(name, data, self.geometry).map(TensorView::from),
            Elements::F16(data) => View::strided(name, data, self.geometry).map(TensorView::from),
            Elements::BF16(data) => View::strided(name, data, self.geometry).map(TensorView::from),
        }
        .map_err(|error| one_line(&error.to_string()))
        .ok()
    }

    fn flags(&self, name: &str) -> Option<View<'_, bool>> {
        View::strided(name, &self.flags, self.geometry).map_err(|error| one_line(&error.to_string())).ok()
    }
}

fn geometry(name: &str, storage: &Storage, wanted: &[usize]) -> sage_core::Result<Geometry> {
    let mut shape = wanted.to_vec();
    match &storage.shape {
        Some(AnyShape::One(at, size)) => {
            let at = usize::from(*at) % shape.len();
            shape[at] = *size;
        }
        Some(AnyShape::All(all)) => shape.clone_from(all),
        // Broadcast dimensions: ones, or missing leading dimensions.
        Some(AnyShape::Ones(bits)) => {
            (0..shape.len()).filter(|d| bits >> d & 1 == 1).for_each(|d| shape[d] = 1);
            shape.drain(..usize::from(bits >> 4 & 3).min(shape.len()));
        }
        None => {}
    }
    let rank = shape.len();
    // The order of dimensions in memory, from the innermost: a permutation of all but the last unless marked.
    let mut dims: Vec<usize> = (0..rank).rev().collect();
    for (i, &swap) in storage.order.iter().enumerate().take(rank.min(4)) {
        let with = usize::from(swap & 0x7f) % rank;
        if swap >= 0x80 && (i > 0 && with > 0 || swap >= 0xf0) {
            dims.swap(i, with);
        }
    }
    let mut strides = vec![0i64; rank];
    let mut stride: i64 = 1;
    let mut offset: i64 = 0;
    for (position, &d) in dims.iter().enumerate() {
        let size = i64::try_from(shape[d]).unwrap_or(i64::MAX);
        strides[d] = stride;
        if storage.backwards >= 0x80 && position < 7 && storage.backwards >> position & 1 == 1 {
            strides[d] = -stride;
            offset = offset.saturating_add(stride.saturating_mul((size - 1).max(0)));
        }
        let gap = i64::from(storage.gaps.get(position).map_or(0, |gap| gap.saturating_sub(0xf0)));
        stride = stride.saturating_mul(size.max(1)).saturating_add(gap);
    }
    if let Some(any) = &storage.strides {
        strides.clone_from(any);
    }
    for (d, stride) in strides.iter_mut().enumerate().take(4) {
        if storage.repeated >= 0x80 && storage.repeated >> d & 1 == 1 {
            *stride = 0;
        }
    }
    let offset = match storage.offset {
        Offset::Exact => offset,
        Offset::Plus(n) => offset.saturating_add(i64::from(n)),
        Offset::Any(any) => any,
    };
    Geometry::strided(name, &shape, &strides, offset)
}
