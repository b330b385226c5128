//! How fast programs run: `cargo test --test speed -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Instant;

use sage_emulator::{Emulator, EmulatorOptions};
use sage_ptx::isa::{Matrix, Mma, MmaTy};
use sage_ptx::kernel;

mod support;
use support::{Raw, Source};

#[test]
#[ignore = "a measurement"]
fn arithmetic_loop() {
    let program = kernel("sum", 128, |k| {
        let out = k.global::<f32>("out");
        let (x, y) = (k.var(1.0f32), k.var(0i32));
        k.range(0, 200_000, |i| {
            x.set(x.get() * 0.5 + 1.0);
            y.set(y.get() + i);
        });
        out.at(k.thread()).store(x.get() + y.get().to_f32());
    });
    let options = EmulatorOptions { workers: 1, ..EmulatorOptions::default() };
    let mut emulator = Emulator::with_options(options);
    let out = emulator.uninitialized("out", 4 * 128);
    let start = Instant::now();
    let report = emulator.launch(&program, [1, 1, 1], &[out.arg()]).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{report}{:.1} million warp instructions a second", report.total() as f64 / seconds / 1e6);
}

#[test]
#[ignore = "a measurement"]
fn shared_memory_loop() {
    let program = kernel("shared", 128, |k| {
        let out = k.global::<f32>("out");
        let tile = k.shared::<f32>("tile", 4 * 128);
        let at = tile.at(k.thread() * 4);
        k.range(0, 50_000, |i| {
            let x = i.to_f32();
            at.store_vector([x, x, x, x]);
            k.barrier();
            let [a, ..] = tile.at((k.thread() ^ 32) * 4).load_vector::<4>();
            out.at(k.thread()).store(a);
            k.barrier();
        });
    });
    let options = EmulatorOptions { workers: 1, ..EmulatorOptions::default() };
    let mut emulator = Emulator::with_options(options);
    let out = emulator.uninitialized("out", 4 * 128);
    let start = Instant::now();
    let report = emulator.launch(&program, [1, 1, 1], &[out.arg()]).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{report}{:.1} million warp instructions a second", report.total() as f64 / seconds / 1e6);
}

#[test]
#[ignore = "a measurement"]
fn products() {
    for (a, acc) in [
        (MmaTy::S8, MmaTy::S32),
        (MmaTy::E4M3, MmaTy::F32),
        (MmaTy::F16, MmaTy::F32),
        (MmaTy::F16, MmaTy::F16),
    ] {
        for fp8 in [sage_emulator::Fp8Accumulation::Exact, sage_emulator::Fp8Accumulation::Truncated] {
            let mut raw = Raw::new(32);
            let mma = Mma { a, b: a, acc };
            let registers: Vec<_> = (0..6).map(|_| raw.mov(0x3838_3838u32)).collect();
            let acc: Vec<_> = (0..mma.acc_registers()).map(|_| raw.mov(0)).collect();
            let src: Vec<_> = registers.iter().chain(&acc).map(|reg| reg.operand()).collect();
            const COUNT: usize = 20_000;
            for _ in 0..COUNT {
                raw.matrix(Matrix::Mma(mma), &acc, &src);
            }
            let options = EmulatorOptions { fp8, ..EmulatorOptions::default() };
            let emulator = Emulator::with_options(options);
            let program = raw.done();
            let start = Instant::now();
            emulator.launch(&program, [1, 1, 1], &[]).unwrap();
            let micros = start.elapsed().as_secs_f64() * 1e6 / COUNT as f64;
            println!("{mma:?} {fp8:?}: {micros:.2} µs");
        }
    }
}
