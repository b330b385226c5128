//! Calls in forked processes: they end, and give the bits of the parent.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Case, Explicit, Extent, Masking, bits, schemes};
use sage_core::{BlockTables, CacheLayout, CachedInputs, Call, DType, Options, Tensor, ValueFormat};
use sage_cpu::{CachePages, Cpu};

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn _exit(code: i32) -> !;
}

const WNOHANG: i32 = 1;
const SIGKILL: i32 = 9;

/// Far longer than any call here takes, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `work` in a forked process, and checks that it returns in time, with `true`.
fn in_child(what: &str, work: impl FnOnce() -> bool) {
    // SAFETY: the child leaves by `_exit`, and nothing here that it runs waits for a lock of another thread's.
    let pid = unsafe { fork() };
    if pid == 0 {
        let good = catch_unwind(AssertUnwindSafe(work)).unwrap_or(false);
        // SAFETY: ends the process and runs nothing of the parent's.
        unsafe { _exit(if good { 0 } else { 1 }) }
    }
    assert!(pid > 0, "{what}: cannot fork");
    let start = Instant::now();
    let mut status = 0;
    loop {
        // SAFETY: waits for our own child; the pointer is to a local.
        match unsafe { waitpid(pid, &mut status, WNOHANG) } {
            0 if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(2)),
            0 => {
                // SAFETY: our own child, which is still there.
                unsafe { kill(pid, SIGKILL) };
                panic!("{what}: the child hangs");
            }
            _ => break,
        }
    }
    assert_eq!(status, 0, "{what}: the child failed");
}

/// Bits of calls of every kind.
fn results() -> Vec<Vec<u32>> {
    let cpu = Cpu::detect();
    let masking = Masking { explicit: Some(Explicit::Bool(Extent::Keys)), ..Masking::default() };
    let mut all = Vec::new();
    for (q_len, masking) in [(300, Masking::default()), (2, Masking::default()), (300, masking), (2, masking)]
    {
        let built = Case { batch: 2, heads: (4, 2), q_len, kv_len: 1100, masking, ..Case::default() }.build();
        all.extend(schemes(64).into_iter().map(|scheme| bits(&built.run(&cpu, Some(scheme)))));
        all.push(bits(&built.run(&cpu, None)));
    }
    all.push(cached(&cpu));
    all
}

/// Bits of attention over a cache that is filled first.
fn cached(cpu: &Cpu) -> Vec<u32> {
    let layout = CacheLayout { num_kv_heads: 2, head_dim: 64, page_size: 64, values: ValueFormat::Int8 };
    let tensor =
        |seed, tokens| Tensor::new(common::normal(seed, 2 * tokens * 64), &[1, 2, tokens, 64]).unwrap();
    let (mut pages, mut tables) = (CachePages::new(layout).unwrap(), BlockTables::new(1, 64, None));
    let copies = tables.reserve(&[0], 700).unwrap();
    pages.prepare(tables.pages(), &copies).unwrap();
    cpu.append_cached(&mut pages, &tables, &[0], tensor(1, 700).view(), tensor(2, 700).view()).unwrap();
    tables.advance(&[0], 700).unwrap();
    let q = tensor(3, 3);
    let inputs = CachedInputs { q: q.view(), mask: None, block_mask: None, kv_lens: &[700] };
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
    let built = Case { heads: (4, 4), q_len: 200, kv_len: 200, ..Case::default() }.build();
    let small = bits(&built.run(&cpu, None));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    built.run(&cpu, None);
                }
            });
        }
        let children = || {
            let call = || bits(&built.run(&cpu, None)) == small;
            (0..50).for_each(|_| in_child("forked while other threads compute", call));
        };
        let outcome = catch_unwind(AssertUnwindSafe(children));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    assert!(same(), "the parent computes as before");
}
