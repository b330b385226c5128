//! Random calls on a real GPU, against the oracle: shapes, strides, layouts, lengths, masks and options that nobody
//! thought of. `SAGE_RANDOM_CALLS` says how many. Without a driver the test prints that it is skipped.

#![cfg(feature = "cuda")]

mod random_calls;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use random_calls::{Found, check};
use sage_testkit::{RandomCall, count, gpu, presets};

/// Most rows of a sequence.
const MOST_ROWS: usize = 300;

/// The oracle takes longer than the GPU, so calls are computed by as many threads as there are cores.
#[test]
fn random_calls_agree_with_the_oracle() {
    let Some(cuda) = gpu::first("random_calls_agree_with_the_oracle") else { return };
    let presets = presets(cuda.machine());
    let count = count(300);
    let (next, computed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worst = Mutex::new(Found::default());
    let failures = Mutex::new(Vec::new());
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            let call = RandomCall::new(number, MOST_ROWS, &presets);
            // All failures of a run are told, each with its call.
            match catch_unwind(AssertUnwindSafe(|| check(&cuda, &call))) {
                Ok(Ok(found)) => {
                    let mut worst = worst.lock().unwrap();
                    *worst = worst.max(found);
                    computed.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Err(refused)) => eprintln!("{call:?}: not computed: {refused}"),
                Err(panic) => {
                    let words = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
                    failures.lock().unwrap().push(format!("{call:?}: {words}"));
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let failures = failures.into_inner().unwrap();
    let computed = computed.into_inner();
    assert!(failures.is_empty(), "{} of {count} calls failed:\n{}", failures.len(), failures.join("\n"));
    let Found { of_scheme, of_exact } = worst.into_inner().unwrap();
    eprintln!(
        "{computed} of {count} calls computed; worst errors {of_scheme:.2} of what the scheme and {of_exact:.2} of \
         what exact attention allows"
    );
    assert!(computed * 10 >= count * 9, "{computed} of {count}");
}
