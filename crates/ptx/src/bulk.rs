//! Bulk copies and the `mbarrier`s that count their bytes.

use crate::code::Code;
use crate::isa::{Control, SharedWindow};
use crate::pointer::{Global, Shared, Stored};
use crate::program::Operand;
use crate::value::{Use, Val};

/// `mbarrier`s in shared memory, side by side.
#[derive(Clone, Copy, Debug)]
pub struct Mbarriers<'k>(Shared<'k, u64>);

/// One of them. It is in phase 0 first; a phase ends when all arrivals and all bytes announced are there.
#[derive(Clone, Copy, Debug)]
pub struct Mbarrier<'k>(Shared<'k, u64>);

impl Code {
    /// `count` barriers, to be initialised by one thread, all of them before [`Code::fence_mbarriers`].
    pub fn mbarriers(&self, name: &str, count: usize) -> Mbarriers<'_> {
        Mbarriers(self.shared::<u64>(name, count))
    }

    /// Makes initialised barriers visible to the copy engine.
    #[track_caller]
    pub fn fence_mbarriers(&self) {
        self.emit(Control::FenceMbarrierInit, &[], &[]);
    }
}

impl<'k> Mbarriers<'k> {
    /// Barrier `index`.
    #[track_caller]
    pub fn at(&self, index: Val<'k, i32>) -> Mbarrier<'k> {
        Mbarrier(self.0.at(index))
    }

    /// Those from `index` on.
    pub fn from(&self, index: usize) -> Mbarriers<'k> {
        Mbarriers(self.0.plus(index as i32))
    }

    /// Barrier `index`, known now.
    pub fn plus(&self, index: usize) -> Mbarrier<'k> {
        Mbarrier(self.0.plus(index as i32))
    }
}

impl<'k> Mbarrier<'k> {
    #[track_caller]
    fn operand(&self) -> Operand {
        self.0.address().in_register_operand()
    }

    /// Expects `arrivals` in every phase.
    #[track_caller]
    pub fn init(&self, arrivals: u32) {
        let code = self.0.code();
        code.emit(Control::MbarrierInit, &[], &[self.operand(), code.constant(arrivals).operand()]);
    }

    /// Arrives once.
    #[track_caller]
    pub fn arrive(&self) {
        self.0.code().emit(Control::MbarrierArrive, &[], &[self.operand()]);
    }

    /// Arrives once and announces `bytes` of copies, which the phase waits for.
    #[track_caller]
    pub fn arrive_expecting(&self, bytes: impl Use<'k, i32>) {
        let bytes = bytes.value(self.0.code()).operand();
        self.0.code().emit(Control::MbarrierArriveExpect, &[], &[self.operand(), bytes]);
    }

    /// Waits until the phase of parity `parity` is over: of a new barrier, that of parity 1 is.
    #[track_caller]
    pub fn wait(&self, parity: Val<'k, i32>) {
        let code = self.0.code();
        let src = [self.operand(), parity.operand()];
        code.while_loop(|| !code.value::<bool>(Control::MbarrierTryWait, &src), || {});
    }
}

impl<'k, T: Stored> Shared<'k, T> {
    /// Starts copying the box at `corner`, the innermost coordinate first, of the tensor map at `map` to here, which
    /// must be aligned to 128 bytes (to eight rows where they are swizzled); its bytes count at `done`.
    #[track_caller]
    pub fn copy_tensor(self, map: Val<'k, u64>, corner: &[Val<'k, i32>], done: &Mbarrier<'k>) {
        self.start_copy_of_tensor(SharedWindow::Cluster, map, corner, done);
    }

    /// The same for a kernel of GPUs without clusters.
    #[track_caller]
    pub fn copy_tensor_to_block(self, map: Val<'k, u64>, corner: &[Val<'k, i32>], done: &Mbarrier<'k>) {
        self.start_copy_of_tensor(SharedWindow::Block, map, corner, done);
    }

    #[track_caller]
    fn start_copy_of_tensor(
        self,
        window: SharedWindow,
        map: Val<'k, u64>,
        corner: &[Val<'k, i32>],
        done: &Mbarrier<'k>,
    ) {
        let dims = corner.len() as u8;
        let mut src = vec![self.address().in_register_operand(), map.operand(), done.operand()];
        src.extend(corner.iter().map(|x| x.operand()));
        self.code().emit(Control::BulkTensorLoad { dims, window }, &[], &src);
    }

    /// Starts copying `bytes` from `from` to here, where all three are multiples of 16; they count at `done`.
    #[track_caller]
    pub fn copy_bulk(self, from: Global<'k, T>, bytes: impl Use<'k, i32>, done: &Mbarrier<'k>) {
        let code = self.code();
        let bytes = bytes.value(code).operand();
        let (to, from) = (self.address().in_register_operand(), from.address().in_register_operand());
        code.emit(Control::BulkLoad, &[], &[to, from, bytes, done.operand()]);
    }
}
