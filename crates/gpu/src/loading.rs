//! From configurations to kernels on a GPU: those that are new are compiled side by side.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sage_core::{Error, Result};
use sage_cuda::{Kernel, KernelSource, Origin};
use sage_kernels::Kernel as Configuration;
use sage_kernels::pass::Pass;

use crate::{Cuda, driver};

/// A kernel that a call needs, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Its name.
    pub name: String,
    /// Where its code came from; none where this process had loaded it before.
    pub origin: Option<Origin>,
    /// What it took to write it, to compile or find it, and to load it.
    pub time: Duration,
}

impl LoadedKernel {
    /// Where its code came from, in a word: that of [`Origin::name`], or `loaded` where it was there.
    pub fn origin_name(&self) -> &'static str {
        self.origin.map_or("loaded", Origin::name)
    }
}

/// A kernel to be loaded.
#[derive(Clone, Debug)]
pub(super) struct Needed {
    configuration: Arc<dyn Configuration>,
    /// What would do where the GPU lacks an instruction.
    instead: &'static str,
}

impl Needed {
    /// The kernels of a pass, in the order of its launches.
    pub fn by<T>(pass: &Pass<T>, instead: &'static str) -> Vec<Needed> {
        let needed =
            |configuration: &Arc<dyn Configuration>| Needed { configuration: configuration.clone(), instead };
        pass.kernels().map(needed).collect()
    }

    /// Writes, compiles and loads the kernel.
    fn load(&self, cuda: &Cuda) -> Result<Kernel> {
        let (program, target) = (self.configuration.program(), cuda.machine().target);
        let ptx =
            program.ptx(target).map_err(|missing| Error::unsupported(missing.to_string(), self.instead))?;
        let source = KernelSource {
            name: &program.name,
            ptx: &ptx,
            target,
            params: &program.params,
            block: program.block,
            cluster: None,
            dynamic_shared_bytes: program.dynamic_shared_bytes(),
            needs_whole_compilation: program.needs_whole_compilation(),
            waits_for_launches_before: program.waits_for_launches_before(target),
        };
        cuda.device().load(&source).map_err(driver)
    }
}

/// The kernels that were loaded on a GPU so far, by their names.
#[derive(Debug, Default)]
pub(super) struct Kernels(Mutex<HashMap<String, Kernel>>);

impl Kernels {
    /// Compiled kernels for every launch of a pass. `instead` is what would do where the GPU lacks an instruction.
    pub fn of_pass<T>(&self, pass: &Pass<T>, cuda: &Cuda, instead: &'static str) -> Result<Vec<Kernel>> {
        let needed = Needed::by(pass, instead);
        self.load(&needed, cuda)?;
        let found = needed.iter().filter_map(|needed| self.known(&needed.configuration.name()));
        Ok(found.collect())
    }

    /// Loads kernels, those that are new side by side, on as many threads as the machine runs at once: each once, in
    /// the order in which they are first named.
    ///
    /// # Errors
    /// That of the first that cannot be loaded; the others are loaded all the same.
    pub fn load(&self, needed: &[Needed], cuda: &Cuda) -> Result<Vec<LoadedKernel>> {
        let mut names: Vec<String> = Vec::new();
        let mut once = Vec::new();
        for needed in needed {
            let name = needed.configuration.name();
            if !names.contains(&name) {
                once.push(needed);
                names.push(name);
            }
        }
        let new: Vec<usize> = (0..once.len()).filter(|&i| self.known(&names[i]).is_none()).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut loaded = Vec::new();
            while let Some(&index) = new.get(next.fetch_add(1, Ordering::Relaxed)) {
                let started = Instant::now();
                // Another thread may do the same meanwhile; a kernel is compiled once all the same.
                let kernel = once[index].load(cuda);
                if let Ok(kernel) = &kernel {
                    self.lock().insert(names[index].clone(), kernel.clone());
                }
                loaded.push((index, kernel.map(|kernel| kernel.origin()), started.elapsed()));
            }
            loaded
        };
        let mut report: Vec<_> = names.iter().map(|name| Ok((name.clone(), None, Duration::ZERO))).collect();
        for (index, origin, time) in side_by_side(new.len(), &work).into_iter().flatten() {
            report[index] = origin.map(|origin| (names[index].clone(), Some(origin), time));
        }
        let loaded =
            report.into_iter().map(|row| row.map(|(name, origin, time)| LoadedKernel { name, origin, time }));
        loaded.collect()
    }

    fn known(&self, name: &str) -> Option<Kernel> {
        self.lock().get(name).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Kernel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `work` returns on this thread and on others, as many together as the machine runs at once, but at most `most`.
fn side_by_side<R: Send>(most: usize, work: &(impl Fn() -> R + Sync)) -> Vec<R> {
    if most == 0 {
        // A plan whose kernels are known asks the system nothing: of tokens that are generated each has a plan.
        return Vec::new();
    }
    let threads = thread::available_parallelism().map_or(1, usize::from).min(most);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        let joined = others.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        // The others are waited for before anything is returned.
        let joined: Vec<R> = joined.collect();
        joined.into_iter().chain([own]).collect()
    })
}
