//! Every kernel of the catalogue goes through NVIDIA's assembler: it must be accepted, and use as many registers and
//! spill as many bytes as `registers.txt` says. Spills that stand there are known: the assembler fills registers with
//! loads in flight and spills loop bounds for them, and every arrangement without was slower
//! (docs/performance/ampere.md#what-limits-it-now). New ones fail.
//!
//! Needs no GPU, but `ptxas`: the one that the variable `PTXAS` names, or the one that `scripts/fetch_ptxas.sh`
//! fetched. Without it the test says that it is skipped; with `SAGE_REQUIRE_PTXAS=1` it fails.
//! `SAGE_UPDATE_REGISTERS=1` rewrites `registers.txt`, which shows what a change to a kernel did to every other.
//! `SAGE_KERNELS=_rot,_lse` looks at the kernels alone whose names contain one of these texts, and leaves the other
//! lines as they are.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use sage_kernels::catalog::{Entry, catalog};
use sage_ptx::Target;

/// Targets that the whole catalogue is assembled for: the oldest, whose code differs most, the oldest with asynchronous
/// copies, and the one that has every kind of kernel.
const WHOLE: [Target; 3] = [Target::SM_75, Target::SM_80, Target::SM_90A];

/// Targets of which the planner's own choices for whole tiles are assembled, and every kind of instruction: their code
/// differs little from the others'.
const PART: [Target; 4] = [Target::SM_86, Target::SM_89, Target::SM_100, Target::SM_120];

/// The target of whose catalogue what no older one has is assembled: kernels of 4-bit floats.
const NEWEST: Target = Target::SM_120A;

/// Its kin, for which a part of those is assembled.
const KIN: Target = Target::SM_121A;

/// What the assembler said of one kernel for one target.
#[derive(Clone, Debug)]
struct Assembled {
    kernel: String,
    target: Target,
    registers: u32,
    spill_stores: u32,
    spill_loads: u32,
    /// What is wrong beside spills.
    complaints: Vec<String>,
    time: Duration,
}

/// A kernel to assemble.
struct Job {
    entry: Entry,
    target: Target,
}

#[test]
fn every_kernel_assembles_as_recorded() {
    let ptxas = match ptxas() {
        Ok(ptxas) => ptxas,
        Err(reason) => {
            let required = env::var_os("SAGE_REQUIRE_PTXAS").is_some_and(|value| value == "1");
            assert!(!required, "SAGE_REQUIRE_PTXAS=1, but {reason}");
            // Past the harness, which keeps what a passing test prints to itself.
            let _ = writeln!(std::io::stderr(), "assemble: skipped: {reason}");
            return;
        }
    };
    let begin = Instant::now();
    let done = assemble_all(&ptxas, &jobs());
    report(&done, begin.elapsed());
    let mut wrong = complaints(&done);
    wrong.extend(registers_that_changed(&done));
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// The assembler, or why there is none.
fn ptxas() -> Result<PathBuf, String> {
    let path = match env::var_os("PTXAS") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/ptxas/ptxas"),
    };
    match Command::new(&path).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(path),
        Ok(output) => Err(format!("{} --version ends with {}", path.display(), output.status)),
        Err(error) => Err(format!(
            "there is no ptxas at {} ({error}); run scripts/fetch_ptxas.sh, or set PTXAS",
            path.display()
        )),
    }
}

/// What is assembled, the largest heads first: they take longest, and nothing should wait for one of them at the end.
fn jobs() -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    for target in WHOLE {
        jobs.extend(catalog(target).into_iter().map(|entry| Job { entry, target }));
    }
    for target in PART {
        jobs.extend(representatives(target).into_iter().map(|entry| Job { entry, target }));
    }
    for (target, entries) in [(NEWEST, catalog(NEWEST)), (KIN, representatives(KIN))] {
        let own = entries.into_iter().filter(|entry| entry.kernel().oldest_target() == NEWEST);
        jobs.extend(own.map(|entry| Job { entry, target }));
    }
    jobs.retain(|job| is_asked_for(&job.entry.kernel().name()));
    jobs.sort_by_key(|job| std::cmp::Reverse(job.entry.kernel().head_dim()));
    jobs
}

/// Whether `SAGE_KERNELS` is not set, or has a part of the kernel's name.
fn is_asked_for(kernel: &str) -> bool {
    let Ok(parts) = env::var("SAGE_KERNELS") else { return true };
    parts.split(',').any(|part| kernel.contains(part))
}

/// The planner's own choices for head dimensions that fill their tiles, and as many others as bring an instruction that
/// the kernels before them lack.
fn representatives(target: Target) -> Vec<Entry> {
    let whole = |entry: &Entry| matches!(entry.kernel().head_dim(), None | Some(64 | 128 | 256));
    let (chosen, others): (Vec<_>, Vec<_>) =
        catalog(target).into_iter().partition(|entry| entry.is_default() && whole(entry));
    let mut known = HashSet::new();
    let mut new_kinds = |entry: &Entry| {
        let before = known.len();
        // Where the target lacks an instruction, assembling it will say so.
        let ptx = entry.kernel().program().ptx(target).unwrap_or_default();
        known.extend(ptx.lines().filter_map(opcode).map(str::to_owned));
        known.len() > before
    };
    chosen.iter().for_each(|entry| _ = new_kinds(entry));
    let others: Vec<_> = others.into_iter().filter(new_kinds).collect();
    chosen.into_iter().chain(others).collect()
}

/// The opcode of a line of PTX: `add.s32` of `@%p_1 add.s32 %r_1, %r_2, 1;`.
fn opcode(line: &str) -> Option<&str> {
    let line = line.trim().strip_suffix(';')?;
    let line = if line.starts_with('@') { line.split_once(' ')?.1 } else { line };
    line.split_whitespace().next()
}

/// Assembles on every core.
fn assemble_all(ptxas: &Path, jobs: &[Job]) -> Vec<Assembled> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("assemble");
    // Without what other versions of the kernels left there.
    _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push(assemble(ptxas, &folder, job));
        }
        done
    };
    let workers = thread::available_parallelism().map_or(1, |cores| cores.get());
    let mut done: Vec<Assembled> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    done.sort_by(|a, b| (&a.kernel, a.target).cmp(&(&b.kernel, b.target)));
    done
}

/// Assembles one kernel. Its PTX stays in the folder, to be looked at.
fn assemble(ptxas: &Path, folder: &Path, job: &Job) -> Assembled {
    let (kernel, target) = (job.entry.kernel().name(), job.target);
    let mut assembled = Assembled {
        kernel,
        target,
        registers: 0,
        spill_stores: 0,
        spill_loads: 0,
        complaints: Vec::new(),
        time: Duration::ZERO,
    };
    let ptx = match job.entry.kernel().program().ptx(target) {
        Ok(ptx) => ptx,
        Err(unsupported) => {
            assembled.complaints.push(unsupported.to_string());
            return assembled;
        }
    };
    let file = folder.join(format!("{}.{target}.ptx", assembled.kernel));
    fs::write(&file, ptx).unwrap();
    let cubin = file.with_extension("cubin");
    let begin = Instant::now();
    let output = Command::new(ptxas)
        .arg("-v")
        .arg(format!("-arch={target}"))
        .arg("-o")
        .args([&cubin, &file])
        .output()
        .unwrap();
    assembled.time = begin.elapsed();
    _ = fs::remove_file(&cubin);
    let log = String::from_utf8_lossy(&output.stderr);
    read_log(&log, &mut assembled);
    if !output.status.success() {
        assembled.complaints.push(format!("{}: {}", output.status, log.trim()));
    }
    assembled
}

/// Reads what `ptxas -v` prints, such as
///
/// ```text
/// ptxas info    : Function properties for axpy
///     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
/// ptxas info    : Used 12 registers, used 1 barriers, 8 bytes cumulative stack size
/// ```
fn read_log(log: &str, assembled: &mut Assembled) {
    for line in log.lines() {
        let number_before = |what: &str| -> u32 {
            let before = line.split(what).next().filter(|before| before.len() < line.len());
            before.and_then(|text| text.split_whitespace().last()?.parse().ok()).unwrap_or(0)
        };
        assembled.registers = assembled.registers.max(number_before(" registers"));
        assembled.spill_stores = assembled.spill_stores.max(number_before(" bytes spill stores"));
        assembled.spill_loads = assembled.spill_loads.max(number_before(" bytes spill loads"));
        // For one: C7517 and C7519, waits that ptxas puts between products of wgmma which were written too close.
        if line.contains("warning") || line.contains("(C75") {
            assembled.complaints.push(line.trim().to_owned());
        }
    }
}

/// Figures for whoever looks: with `--nocapture`, or where the test fails.
fn report(done: &[Assembled], elapsed: Duration) {
    let cpu: Duration = done.iter().map(|one| one.time).sum();
    println!(
        "{} kernels assembled in {:.0} s, {:.0} s of them in ptxas",
        done.len(),
        elapsed.as_secs_f64(),
        cpu.as_secs_f64()
    );
    let mut of_target: BTreeMap<Target, (usize, Duration)> = BTreeMap::new();
    for one in done {
        let sum = of_target.entry(one.target).or_default();
        *sum = (sum.0 + 1, sum.1 + one.time);
    }
    for (target, (count, time)) in of_target {
        println!("  {target:<7} {count:>5} kernels {:>6.0} s", time.as_secs_f64());
    }
    let mut slowest: Vec<_> = done.iter().collect();
    slowest.sort_by_key(|one| std::cmp::Reverse(one.time));
    for one in slowest.iter().take(5) {
        println!("  {:>6.2} s {} for {}", one.time.as_secs_f64(), one.kernel, one.target);
    }
}

fn complaints(done: &[Assembled]) -> Vec<String> {
    let all = done.iter().flat_map(|one| one.complaints.iter().map(move |text| (one, text)));
    all.map(|(one, text)| format!("{} for {}: {text}", one.kernel, one.target)).collect()
}

/// Compares with the committed file, or rewrites it.
fn registers_that_changed(done: &[Assembled]) -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("registers.txt");
    // A line for each, so that a change to a kernel is a change of its lines alone.
    let line = |one: &Assembled| {
        let spills = one.spill_stores + one.spill_loads;
        let spilled = if spills == 0 {
            String::new()
        } else {
            format!(" spills {}/{}", one.spill_stores, one.spill_loads)
        };
        format!("{} {} {}{spilled}", one.kernel, one.target, one.registers)
    };
    let found: Vec<String> = done.iter().map(line).collect();
    let text = fs::read_to_string(&path).unwrap_or_default();
    let kernel_of = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let (looked_at, others): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|line| is_asked_for(&kernel_of(line)));
    if env::var_os("SAGE_UPDATE_REGISTERS").is_some_and(|value| value == "1") {
        let mut lines: Vec<&str> = found.iter().map(String::as_str).chain(others).collect();
        let target_of = |line: &str| line.split(' ').nth(1).and_then(|target| target.parse::<Target>().ok());
        lines.sort_by_key(|line| (kernel_of(line), target_of(line)));
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        return None;
    }
    let known: HashSet<&str> = looked_at.iter().copied().collect();
    let new: HashSet<&str> = found.iter().map(String::as_str).collect();
    let mut message = String::new();
    for gone in looked_at.iter().filter(|line| !new.contains(*line)) {
        _ = writeln!(message, "  - {gone}");
    }
    for come in found.iter().filter(|line| !known.contains(line.as_str())) {
        _ = writeln!(message, "  + {come}");
    }
    (!message.is_empty()).then(|| {
        format!(
            "registers.txt says otherwise (kernel, target, registers, bytes of spill stores/loads):\n{message}\
             Where that is meant: SAGE_UPDATE_REGISTERS=1 cargo test -p sage-kernels --test assemble"
        )
    })
}
