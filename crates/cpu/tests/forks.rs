//! Calls in forked processes: they end, and give the bits of the parent.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use sage_core::{BlockTables, CacheLayout, CachedInputs, Call, DType, Options, Tensor, ValueFormat};
use sage_cpu::{CachePages, Cpu};
use sage_testkit::{Case, CaseMask, Extent, Runner, cpu_schemes as schemes, in_child, normal_tensor};

/// Bits of calls of every kind.
fn results() -> Vec<Vec<u32>> {
    let cpu = Cpu::detect();
    let masked = Some(CaseMask::bool(Extent::Keys));
    let mut all = Vec::new();
    for (q_len, mask) in [(300, None), (2, None), (300, masked), (2, masked)] {
        let built =
            Case { batch: 2, q_heads: 4, kv_heads: 2, q_len, kv_len: 1100, mask, ..Case::f32() }.build();
        all.extend(schemes(64).into_iter().map(|scheme| cpu.run(&built, Some(scheme)).bits()));
        all.push(cpu.run(&built, None).bits());
    }
    all.push(cached(&cpu));
    all
}

/// Bits of attention over a cache that is filled first.
fn cached(cpu: &Cpu) -> Vec<u32> {
    let layout = CacheLayout { num_kv_heads: 2, head_dim: 64, page_size: 64, values: ValueFormat::Int8 };
    let tensor = |seed, tokens| normal_tensor(seed, &[1, 2, tokens, 64], DType::F32);
    let (mut pages, mut tables) = (CachePages::new(layout).unwrap(), BlockTables::new(1, 64, None));
    let copies = tables.reserve(&[0], 700).unwrap();
    pages.prepare(tables.pages(), &copies).unwrap();
    cpu.append_cached(&mut pages, &tables, &[0], tensor(1, 700).view(), tensor(2, 700).view()).unwrap();
    tables.advance(&[0], 700).unwrap();
    let q = tensor(3, 3);
    let inputs = CachedInputs::new(q.view(), &[700]);
    let call = Call::check_cached(&inputs, &layout, &Options::default()).unwrap();
    let mut out = Tensor::zeros(DType::F32, q.shape()).unwrap();
    cpu.forward_cached(&pages, &tables, &[0], &call, out.view_mut(), None).unwrap();
    out.to_f32_vec().iter().map(|x| x.to_bits()).collect()
}

/// One test, whose parts need the process in the states that they leave it in.
#[test]
fn calls_in_forked_processes_end_and_give_the_same_bits() {
    // Rayon's global pool exists, but nothing has been computed here yet.
    rayon::join(|| (), || ());
    in_child("the first call is in the child", || results().len() > 20);

    let wanted = results();
    let same = || results() == wanted;
    in_child("a call before the fork", same);
    in_child("a second child", same);
    in_child("a child of a child", || {
        in_child("its child before any call", same);
        let first = same();
        in_child("its child after a call", same);
        first && same()
    });
    in_child("threads of the child call at once", || {
        std::thread::scope(|scope| {
            let calls: Vec<_> = (0..4).map(|_| scope.spawn(same)).collect();
            calls.into_iter().all(|call| call.join().unwrap())
        })
    });
    in_child("in a pool that the child made", || {
        rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(same)
    });
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| in_child("forked by a thread of a pool", same));

    // Locks that other threads hold at the moment of a fork stay locked in the child.
    let (done, cpu) = (AtomicBool::new(false), Cpu::detect());
    let built = Case { q_heads: 4, kv_heads: 4, q_len: 200, kv_len: 200, ..Case::f32() }.build();
    let small = cpu.run(&built, None).bits();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    cpu.run(&built, None);
                }
            });
        }
        let children = || {
            let call = || cpu.run(&built, None).bits() == small;
            (0..50).for_each(|_| in_child("forked while other threads compute", call));
        };
        let outcome = catch_unwind(AssertUnwindSafe(children));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    assert!(same(), "the parent computes as before");
}
