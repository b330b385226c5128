//! A pass: launches that follow one another on a stream and share a workspace.
//!
//! A planner makes one with a `PassBuilder`: each kernel reserves the slots of the workspace that it writes, finds
//! those that it reads, and says how a launch's arguments follow from the caller's tensors. A [`Pass`] knows no driver:
//! whoever runs it, on a GPU or in the emulator, loads [`Pass::programs`], zeroes [`Pass::zeroed_bytes`] at the
//! workspace's start (often none), and launches what [`Pass::run`] hands over, in order.

use std::fmt;
use std::sync::Arc;

use sage_ptx::{Arg, BoxedTensor, Program, Target};

use crate::kernel::Kernel;

/// Slots start at multiples of so many bytes, and so must the workspace.
pub const SLOT_ALIGNMENT: usize = 256;

/// Most arguments of a launch with tensor maps.
pub(crate) const MAX_ARGS: usize = 72;

/// Launches over tensors of type `T`, in order.
pub struct Pass<T> {
    launches: Vec<Launch<T>>,
    workspace: Workspace,
}

/// A part of a pass's workspace, which one kernel writes and later ones read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(Option<usize>);

impl Slot {
    /// No part: a kernel that does not read it is handed a null pointer.
    pub const NONE: Slot = Slot(None);
}

/// Who runs the launches of a pass: a GPU's stream, or the emulator.
pub trait Launcher {
    /// What can go wrong.
    type Error;

    /// The tensor map of a tensor, as an argument.
    ///
    /// # Errors
    /// Where there can be none.
    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg, Self::Error>;

    /// Launches kernel `kernel` of [`Pass::programs`].
    ///
    /// # Errors
    /// Where the launch fails.
    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<(), Self::Error>;
}

/// Takes a launch's grid, its arguments, and what its tensor maps, which follow them, describe.
pub(crate) type Launching<'l> = dyn FnMut([u32; 3], &[Arg], &[BoxedTensor]) + 'l;

/// Makes a launch of the addresses at hand.
type Bind<T> = dyn Fn(&Addresses<'_, T>, &mut Launching<'_>) + Send + Sync;

struct Launch<T> {
    kernel: Arc<dyn Kernel>,
    bind: Box<Bind<T>>,
}

/// Where the tensors and the workspace of a run lie.
pub(crate) struct Addresses<'a, T> {
    /// What the caller handed over.
    pub tensors: &'a T,
    start: u64,
    workspace: &'a Workspace,
}

impl<T> Addresses<'_, T> {
    /// Address of a slot.
    pub fn of(&self, slot: Slot) -> u64 {
        slot.0.map_or(0, |index| self.start + self.workspace.slots[index].offset)
    }

    /// Address and number of the 32-bit counters that a launch is to set to zero: none unless it `clears` them.
    pub fn counters(&self, clears: bool) -> (u64, i32) {
        if clears { (self.start, (self.workspace.zeroed / 4) as i32) } else { (0, 0) }
    }
}

/// The slots of a workspace: counters, which start as zeros, before all others.
#[derive(Debug, Default)]
struct Workspace {
    slots: Vec<Reserved>,
    /// Bytes of the counters.
    zeroed: u64,
    /// Whether a launch sets them to zero.
    cleared_by_a_launch: bool,
    bytes: u64,
}

#[derive(Debug)]
struct Reserved {
    name: &'static str,
    bytes: usize,
    counts: bool,
    offset: u64,
}

impl Workspace {
    fn find(&self, name: &str) -> Slot {
        Slot(self.slots.iter().position(|slot| slot.name == name))
    }

    fn reserve(&mut self, name: &'static str, bytes: usize, counts: bool) -> Slot {
        match self.find(name) {
            Slot::NONE => {
                self.slots.push(Reserved { name, bytes, counts, offset: 0 });
                Slot(Some(self.slots.len() - 1))
            }
            found => found,
        }
    }

    fn lay_out(&mut self) {
        let mut end = 0u64;
        let mut place = |slot: &mut Reserved| {
            slot.offset = end;
            end += slot.bytes.next_multiple_of(SLOT_ALIGNMENT) as u64;
            end
        };
        self.slots.iter_mut().filter(|slot| slot.counts).for_each(|slot| self.zeroed = place(slot));
        self.bytes = self.zeroed;
        self.slots.iter_mut().filter(|slot| !slot.counts).for_each(|slot| self.bytes = place(slot));
    }
}

/// A pass in the making.
pub(crate) struct PassBuilder<T> {
    launches: Vec<Launch<T>>,
    workspace: Workspace,
}

impl<T> PassBuilder<T> {
    /// Without launches.
    pub fn new() -> Self {
        PassBuilder { launches: Vec::new(), workspace: Workspace::default() }
    }

    /// The slot of that name: reserved with so many bytes unless an earlier kernel has.
    pub fn slot(&mut self, name: &'static str, bytes: usize) -> Slot {
        self.workspace.reserve(name, bytes, false)
    }

    /// As [`PassBuilder::slot`], for counters of 32 bits, which are zeros before the pass's first launch counts.
    pub fn counters(&mut self, name: &'static str, count: usize) -> Slot {
        self.workspace.reserve(name, 4 * count, true)
    }

    /// The slot of that name, if an earlier kernel has reserved it.
    pub fn find(&self, name: &str) -> Slot {
        self.workspace.find(name)
    }

    /// Whether the launch that asks shall set all counters to zero: where none before it clears them or counts.
    pub fn clears_counters(&mut self) -> bool {
        let first =
            !self.workspace.cleared_by_a_launch && self.workspace.slots.iter().all(|slot| !slot.counts);
        self.workspace.cleared_by_a_launch |= first;
        first
    }

    /// Adds a launch; `bind` hands its grid and arguments over once addresses are known, and allocates nothing.
    pub fn launch(
        &mut self,
        kernel: impl Kernel,
        bind: impl Fn(&Addresses<'_, T>, &mut Launching<'_>) + Send + Sync + 'static,
    ) {
        self.launches.push(Launch { kernel: Arc::new(kernel), bind: Box::new(bind) });
    }

    /// The pass.
    pub fn finish(mut self) -> Pass<T> {
        self.workspace.lay_out();
        Pass { launches: self.launches, workspace: self.workspace }
    }
}

impl<T> Pass<T> {
    /// A pass of no launches.
    pub(crate) fn empty() -> Self {
        PassBuilder::new().finish()
    }

    /// The kernels, in the order of their launches.
    pub fn kernels(&self) -> impl ExactSizeIterator<Item = &Arc<dyn Kernel>> {
        self.launches.iter().map(|launch| &launch.kernel)
    }

    /// Their programs for a target, with what it lacks put together from what it has ([`Program::lowered`]).
    pub fn programs(&self, target: Target) -> Vec<Program> {
        self.kernels().map(|kernel| kernel.program().lowered(target).into_owned()).collect()
    }

    /// Their names.
    pub fn kernel_names(&self) -> Vec<String> {
        self.kernels().map(|kernel| kernel.name()).collect()
    }

    /// Bytes of workspace, to be aligned to [`SLOT_ALIGNMENT`].
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.bytes as usize
    }

    /// Name and bytes of each part of the workspace.
    pub fn slots(&self) -> impl Iterator<Item = (&'static str, usize)> {
        self.workspace.slots.iter().map(|slot| (slot.name, slot.bytes))
    }

    /// Bytes at the workspace's start that must be zeros before the first launch.
    pub fn zeroed_bytes(&self) -> usize {
        if self.workspace.cleared_by_a_launch { 0 } else { self.workspace.zeroed as usize }
    }

    /// Hands every launch over, in order. Allocates nothing.
    ///
    /// # Errors
    /// The first of `launcher`.
    pub fn run<L: Launcher>(&self, tensors: &T, workspace: u64, launcher: &mut L) -> Result<(), L::Error> {
        let addresses = Addresses { tensors, start: workspace, workspace: &self.workspace };
        for (index, launch) in self.launches.iter().enumerate() {
            let mut result = Ok(());
            (launch.bind)(&addresses, &mut |grid, args, boxed| {
                result = launch_with_maps(launcher, index, grid, args, boxed);
            });
            result?;
        }
        Ok(())
    }
}

fn launch_with_maps<L: Launcher>(
    launcher: &mut L,
    kernel: usize,
    grid: [u32; 3],
    args: &[Arg],
    boxed: &[BoxedTensor],
) -> Result<(), L::Error> {
    if boxed.is_empty() {
        return launcher.launch(kernel, grid, args);
    }
    let mut all = [Arg::I32(0); MAX_ARGS];
    let count = args.len() + boxed.len();
    all[..args.len()].copy_from_slice(args);
    for (arg, tensor) in all[args.len()..count].iter_mut().zip(boxed) {
        *arg = launcher.tensor_map(tensor)?;
    }
    launcher.launch(kernel, grid, &all[..count])
}

/// Rows `name value`: the kernels in the order of their launches, the parts of the workspace, and all of it.
impl<T> fmt::Display for Pass<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kernels().try_for_each(|kernel| writeln!(f, "kernel      {}", kernel.name()))?;
        self.slots().try_for_each(|(slot, bytes)| writeln!(f, "slot        {slot}, {bytes} bytes"))?;
        write!(f, "workspace   {} bytes", self.workspace_bytes())
    }
}

impl<T> fmt::Debug for Pass<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernels: Vec<_> = self.kernels().collect();
        f.debug_struct("Pass").field("kernels", &kernels).field("workspace", &self.workspace).finish()
    }
}
