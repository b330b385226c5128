//! Memory of a long call. A process of its own: another test's memory would be counted too.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use sage_core::{DType, Preset, Tensor};
use sage_cpu::Cpu;
use sage_testkit::Case;

/// The system's allocator, which counts: the peak of resident memory would hide what freed memory had room for.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    PEAK.fetch_max(NOW.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every request goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Largest growth of the heap while `work` runs.
fn growth(work: impl FnOnce()) -> usize {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    work();
    PEAK.load(Relaxed) - before
}

const MIB: usize = 1 << 20;

/// One test, because others would run beside it and be counted.
#[test]
fn a_call_needs_little_beside_its_tensors() {
    a_long_call_packs_what_the_plan_says();
    few_queries_of_a_long_sequence_need_next_to_nothing();
}

fn a_long_call_packs_what_the_plan_says() {
    let seen = growth(|| drop(std::hint::black_box(vec![1u8; 100 * MIB])));
    assert!((100 * MIB..101 * MIB).contains(&seen), "the meter is wrong: {seen} for {}", 100 * MIB);

    // Scores alone would be 64 MiB in f32. K and V in f32 are 32 MiB, of which 24 MiB may be packed at once.
    let (q_len, kv_len, head_dim) = (512, 16_384, 128);
    let case = Case { dtype: DType::BF16, q_heads: 2, kv_heads: 2, q_len, kv_len, head_dim, ..Case::f32() };
    let built = case.build();
    let call = built.call();
    for preset in [Preset::INT8, Preset::INT8_F32, Preset::FULL] {
        let cpu = Cpu::detect();
        let plan = cpu.plan(&call.problem, Some(preset.scheme(head_dim))).unwrap();
        let out_bytes = 2 * 2 * q_len * head_dim;
        let run = || {
            let mut out = Tensor::zeros(DType::BF16, built.q.shape()).unwrap();
            cpu.forward(&plan, &call, out.view_mut(), None).unwrap();
        };
        let (first, second) = (growth(run), growth(run));
        println!("{preset}: {first} bytes, then {second}, planned {}", plan.workspace_bytes());
        assert!(first <= out_bytes + 64 * MIB, "{preset}: {} MiB", first / MIB);
        // What the plan says, and bookkeeping: means, lists of work.
        let planned = plan.workspace_bytes();
        assert!(first <= out_bytes + planned + MIB, "{preset}: {first} bytes, but the plan says {planned}");
        // Memory for packed keys and values is kept for the next call.
        assert!(second <= out_bytes + MIB, "{preset}: {second} bytes in the second call");
    }
}

fn few_queries_of_a_long_sequence_need_next_to_nothing() {
    let case = Case { q_heads: 8, kv_heads: 1, q_len: 1, kv_len: 100_000, head_dim: 64, ..Case::f32() };
    let built = case.build();
    let call = built.call();
    let cpu = Cpu::detect();
    let plan = cpu.plan(&call.problem, Some(Preset::FULL.scheme(64))).unwrap();
    let mut out = Tensor::zeros(DType::F32, built.q.shape()).unwrap();
    let growth = growth(|| cpu.forward(&plan, &call, out.view_mut(), None).unwrap());
    assert!(growth <= plan.workspace_bytes() + MIB, "{growth}, planned {}", plan.workspace_bytes());
    assert!(growth <= 4 * MIB, "{growth}");
}
