//! Where inputs are read from and outputs are written to: strides, gaps, far offsets.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use half::f16;
use half::slice::HalfBitsSliceExt;
use sage_core::{
    Alignment, Band, Call, DType, Element, Geometry, Inputs, Layout, Options, Preset, Scheme, Tensor,
    TensorView, TensorViewMut, View, ViewMut,
};
use sage_cpu::Cpu;
use sage_testkit::{Bias, Case, OwnedCall, Runner, every_cpu, for_each_index, normal, run_on_cpu};

/// Every way through the keys: split (where queries are few), tiled in floating point, in integers, and rotated.
fn schemes(head_dim: usize) -> [Scheme; 4] {
    let int8 = Preset::INT8.scheme(head_dim);
    [Preset::FULL.scheme(head_dim), int8, Preset::INT8_F32.scheme(head_dim), Scheme { rotate: true, ..int8 }]
}

/// Queries: few enough to be split over keys, and more.
const Q_LENS: [usize; 2] = [3, 37];

fn strided<'a, E: Copy>(data: &'a [E], shape: [usize; 4], strides: [i64; 4], offset: i64) -> View<'a, E> {
    View::strided("x", data, Geometry::strided("x", &shape, &strides, offset).unwrap()).unwrap()
}

/// A tensor's elements in row-major order of its view.
fn elements<T: Copy>(view: &View<'_, T>) -> Vec<T> {
    let mut elements = Vec::new();
    for_each_index(view.geometry().shape(), |at| elements.push(view.at([at[0], at[1], at[2], at[3]])));
    elements
}

/// A row-major copy of a view.
fn copied<E: Element>(view: &View<'_, E>) -> Tensor {
    let wide: Vec<f32> = elements(view).into_iter().map(E::to_f32).collect();
    Tensor::new(wide, view.geometry().shape()).unwrap().to_dtype(E::DTYPE)
}

/// Checks that views give the same bits as row-major copies of them.
fn same_as_copies<'a, E: Element>([q, k, v]: [View<'a, E>; 3], layout: Layout, what: &str)
where
    TensorView<'a>: From<View<'a, E>>,
{
    let mut built = OwnedCall::dense(copied(&q), copied(&k), copied(&v));
    built.options = Options::default().layout(layout).band(Band::causal(Alignment::BottomRight));
    let inputs = Inputs::new(q.into(), k.into(), v.into());
    let call = Call::check(&inputs, &built.options).unwrap();
    for cpu in every_cpu() {
        for scheme in schemes(call.problem.head_dim) {
            let expected = cpu.run(&built, Some(scheme));
            assert!(expected.out.iter().any(|x| *x != 0.0));
            let actual = run_on_cpu(&cpu, &call, built.out, Some(scheme));
            assert_eq!(actual.bits(), expected.bits(), "{what}: {scheme} on {}", cpu.instruction_set());
        }
    }
}

#[test]
fn a_fused_qkv_tensor_is_read_in_place() {
    let (batch, heads, head_dim) = (2, 3, 40);
    for seq in Q_LENS {
        let data = normal(1, batch * seq * 3 * heads * head_dim);
        let halves: Vec<f16> = data.iter().map(|x| f16::from_f32(*x)).collect();
        let row = (3 * heads * head_dim) as i64;
        let nhd = ([batch, seq, heads, head_dim], [seq as i64 * row, row, head_dim as i64, 1]);
        let hnd = ([batch, heads, seq, head_dim], [seq as i64 * row, head_dim as i64, row, 1]);
        for (layout, (shape, strides)) in [(Layout::Nhd, nhd), (Layout::Hnd, hnd)] {
            let part = |p: usize| (p * heads * head_dim) as i64;
            let what = format!("{} of {seq}", layout.name());
            same_as_copies([0, 1, 2].map(|p| strided(&data, shape, strides, part(p))), layout, &what);
            same_as_copies([0, 1, 2].map(|p| strided(&halves, shape, strides, part(p))), layout, &what);
        }
    }
}

#[test]
fn strides_may_be_negative() {
    let (batch, heads, kv_len, head_dim) = (2, 2, 150, 24);
    let row = head_dim as i64;
    for q_len in Q_LENS {
        let tensor = |seed, rows: usize| normal(seed, batch * heads * rows * head_dim);
        let (q, k, v) = (tensor(1, q_len), tensor(2, kv_len), tensor(3, kv_len));
        // Which of batch, head and row run backwards.
        for reversed in [[true, false, false], [false, true, false], [false, false, true], [true, true, true]]
        {
            let view = |data, rows: usize| {
                let sizes = [batch, heads, rows];
                let mut strides = [heads as i64 * rows as i64 * row, rows as i64 * row, row, 1];
                let mut offset = 0;
                for d in 0..3 {
                    if reversed[d] {
                        offset += (sizes[d] as i64 - 1) * strides[d];
                        strides[d] = -strides[d];
                    }
                }
                strided(data, [batch, heads, rows, head_dim], strides, offset)
            };
            let views = [view(&q, q_len), view(&k, kv_len), view(&v, kv_len)];
            same_as_copies(views, Layout::Hnd, &format!("{reversed:?} of {q_len}"));
        }
    }
}

#[test]
fn expanded_dimensions_repeat() {
    let (batch, heads, kv_len, head_dim) = (2, 4, 150, 24);
    let row = head_dim as i64;
    for q_len in Q_LENS {
        let q = normal(1, batch * heads * q_len * head_dim);
        let (k, v) = (normal(2, kv_len * head_dim), normal(3, kv_len * head_dim));
        let q_row = q_len as i64 * row;
        let q = strided(&q, [batch, heads, q_len, head_dim], [heads as i64 * q_row, q_row, row, 1], 0);
        let kv = |data| strided(data, [batch, heads, kv_len, head_dim], [0, 0, row, 1], 0);
        same_as_copies([q, kv(&k), kv(&v)], Layout::Hnd, "heads and batch");
        // Every key the same row of memory.
        let one = |data| strided(data, [batch, heads, kv_len, head_dim], [0, row, 0, 1], 7);
        same_as_copies([q, one(&k), one(&v)], Layout::Hnd, "keys");
    }
}

/// A call, its plan and an output buffer full of a poison, with the output in every `step`-th row of a wider tensor.
fn into_slice<E: Element>(cpu: &Cpu, scheme: Scheme, layout: Layout, q_len: usize)
where
    for<'a> TensorViewMut<'a>: From<ViewMut<'a, E>>,
{
    let (batch, heads, kv_len, head_dim) = (2, 3, 140, 20);
    let case = Case {
        seed: 32,
        dtype: E::DTYPE,
        layout,
        batch,
        q_heads: heads,
        kv_heads: 3,
        q_len,
        kv_len,
        head_dim,
        ..Case::default()
    };
    let built = case.build();
    let before = built.clone();
    let call = built.call();
    let plan = cpu.plan(&call.problem, Some(scheme)).unwrap();
    let poison = E::from_f32(-77.0);
    // Rows of 29 with 20 in the middle, other heads and rows between, backwards in batch.
    let shape = built.q.shape();
    let (inner, outer) = (shape[2] as i64, shape[1] as i64);
    let (row, plane) = (29i64, 29 * (2 * inner + 1));
    let item = plane * (outer + 2);
    let strides = [-item, plane, 2 * row, 1];
    let mut data = vec![poison; (item * batch as i64 + 50) as usize];
    let geometry = Geometry::strided("out", shape, &strides, item * (batch as i64 - 1) + 11).unwrap();
    let mut lse = vec![f32::NAN; batch * heads * q_len];
    let view = ViewMut::strided("out", &mut data, geometry).unwrap();
    cpu.forward(&plan, &call, view.into(), Some(&mut lse)).unwrap();

    let expected = cpu.run(&built, Some(scheme));
    let canonical = call.check_output(E::DTYPE, &geometry).unwrap();
    let written = View::strided("out", &data, canonical).unwrap();
    let out: Vec<f32> = elements(&written).into_iter().map(E::to_f32).collect();
    let found: Vec<u32> = out.iter().chain(&lse).map(|x| x.to_bits()).collect();
    assert_eq!(found, expected.bits(), "{scheme} {} {}", layout.name(), E::DTYPE);
    let gaps = data.iter().filter(|x| x.to_f32() == -77.0).count();
    assert_eq!(gaps, data.len() - geometry.len(), "a gap was written: {scheme} {}", layout.name());
    assert!(built.q == before.q && built.k == before.k && built.v == before.v);
}

#[test]
fn an_output_slice_is_written_and_the_gaps_are_not() {
    for cpu in every_cpu() {
        for scheme in schemes(20) {
            for layout in [Layout::Hnd, Layout::Nhd] {
                for q_len in Q_LENS {
                    into_slice::<f32>(&cpu, scheme, layout, q_len);
                    into_slice::<f16>(&cpu, scheme, layout, q_len);
                    into_slice::<half::bf16>(&cpu, scheme, layout, q_len);
                }
            }
        }
    }
}

#[test]
fn offsets_may_be_beyond_32_bits() {
    // Keys of the last batch entry begin 2³¹ elements after those of the first; memory in between is never touched.
    const FAR: usize = 1 << 30;
    let (batch, kv_len, head_dim) = (3, 130, 16);
    let len = 2 * FAR + 2 * kv_len * head_dim;
    let mut probe: Vec<u16> = Vec::new();
    if usize::BITS < 64 || probe.try_reserve_exact(len).is_err() {
        println!("skipped: no {} GiB of address space for one tensor", (2 * len) >> 30);
        return;
    }
    drop(probe);
    let mut data = vec![0u16; len];
    let (k, v) = (0, kv_len * head_dim);
    for b in 0..batch {
        for (part, start) in [(0, k), (1, v)] {
            let row = normal(10 + 2 * b as u64 + part, kv_len * head_dim);
            let to = &mut data[b * FAR + start..][..row.len()];
            to.iter_mut().zip(row).for_each(|(to, x)| *to = f16::from_f32(x).to_bits());
        }
    }
    let data: &[f16] = data.reinterpret_cast();
    let kv = |offset: usize| {
        let strides = [FAR as i64, 0, head_dim as i64, 1];
        strided(data, [batch, 1, kv_len, head_dim], strides, offset as i64)
    };
    for q_len in Q_LENS {
        let q: Vec<f16> = normal(1, batch * q_len * head_dim).into_iter().map(f16::from_f32).collect();
        let q_row = (q_len * head_dim) as i64;
        let q = strided(&q, [batch, 1, q_len, head_dim], [q_row, q_row, head_dim as i64, 1], 0);
        same_as_copies([q, kv(k), kv(v)], Layout::Hnd, "far");
    }
}

#[test]
fn a_log_sum_exp_is_optional_and_changes_nothing() {
    for q_len in Q_LENS {
        let k_bias = Bias::EveryFourth(2.0);
        let case = Case { seed: 40, q_len, kv_len: 200, k_bias, ..Case::f32() };
        let built = case.build();
        let call = built.call();
        for cpu in every_cpu() {
            for scheme in schemes(64) {
                let with = cpu.run(&built, Some(scheme));
                let plan = cpu.plan(&call.problem, Some(scheme)).unwrap();
                let mut out = Tensor::zeros(DType::F32, built.q.shape()).unwrap();
                cpu.forward(&plan, &call, out.view_mut(), None).unwrap();
                assert_eq!(out.to_f32_vec(), with.out, "{scheme}");
            }
        }
    }
}
