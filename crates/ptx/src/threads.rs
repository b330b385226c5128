//! The threads of a block: which is which, barriers among them, and what each may use.

use crate::code::Code;
use crate::isa::{Control, Memory, Special};
use crate::value::{Use, Val};

impl Code {
    fn special(&self, special: Special) -> Val<'_, i32> {
        self.value(Memory::Special(special), &[])
    }

    /// Index of the thread in its block.
    pub fn thread(&self) -> Val<'_, i32> {
        self.special(Special::TidX).named("thread")
    }

    /// Index of the lane in its warp.
    pub fn lane_index(&self) -> Val<'_, i32> {
        (self.special(Special::TidX) & 31).named("lane")
    }

    /// Index of the warp in its block, known to be the same in all lanes.
    pub fn warp_index(&self) -> Val<'_, i32> {
        let warp = self.special(Special::TidX) >> 5;
        warp.shuffle(0).named("warp")
    }

    /// Index of the block in the grid, along x, y and z.
    pub fn block_index(&self) -> [Val<'_, i32>; 3] {
        [Special::CtaIdX, Special::CtaIdY, Special::CtaIdZ]
            .map(|special| self.special(special).named("block"))
    }

    /// Blocks of the grid along x, y and z.
    pub fn grid(&self) -> [Val<'_, i32>; 3] {
        [Special::NumCtaX, Special::NumCtaY, Special::NumCtaZ]
            .map(|special| self.special(special).named("grid"))
    }

    /// Waits for all threads of the block, and sees what they wrote to shared memory before.
    #[track_caller]
    pub fn barrier(&self) {
        self.emit(Control::Barrier { threads: None }, &[], &[self.constant(0i32).operand()]);
    }

    /// Waits at barrier `id` (0–15) for `threads` threads.
    #[track_caller]
    pub fn named_barrier<'k>(&'k self, id: impl Use<'k, i32>, threads: u32) {
        self.emit(Control::Barrier { threads: Some(threads) }, &[], &[id.value(self).operand()]);
    }

    /// Arrives at barrier `id` (0–15) of `threads` threads without waiting.
    #[track_caller]
    pub fn arrive<'k>(&'k self, id: impl Use<'k, i32>, threads: u32) {
        self.emit(Control::BarrierArrive { threads }, &[], &[id.value(self).operand()]);
    }

    /// Makes this thread's writes to shared memory visible to the copy engine and to `wgmma`.
    #[track_caller]
    pub fn fence_async_proxy(&self) {
        self.emit(Control::FenceAsyncProxy, &[], &[]);
    }

    /// Puts the asynchronous copies that this thread started into a group.
    #[track_caller]
    pub fn commit_copies(&self) {
        self.emit(Control::CopyAsyncCommit, &[], &[]);
    }

    /// Waits until at most `pending` of this thread's latest groups of copies are in flight.
    #[track_caller]
    pub fn wait_copies(&self, pending: u32) {
        self.emit(Control::CopyAsyncWait(pending), &[], &[]);
    }

    /// Sleeps about `nanoseconds`.
    #[track_caller]
    pub fn sleep(&self, nanoseconds: i32) {
        self.emit(Control::Sleep, &[], &[self.constant(nanoseconds).operand()]);
    }

    /// Changes the registers that each thread of this warpgroup may use: more registers, waiting until there are that
    /// many.
    #[track_caller]
    pub fn more_registers(&self, count: u32) {
        self.emit(Control::RegistersIncrease(count), &[], &[]);
    }

    /// Gives registers of this warpgroup back: fewer for each thread.
    #[track_caller]
    pub fn fewer_registers(&self, count: u32) {
        self.emit(Control::RegistersDecrease(count), &[], &[]);
    }
}
