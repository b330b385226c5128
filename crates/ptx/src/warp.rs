//! The lanes of a warp together: values of other lanes, votes, reductions.

use crate::code::Code;
use crate::isa::{Redux, Shuffle, Vote, Warp};
use crate::pointer::{Global, Stored};
use crate::scalar::Scalar;
use crate::value::{Use, Val};

impl<'k, T: Scalar> Val<'k, T> {
    #[track_caller]
    fn exchange(self, mode: Shuffle, with: impl Use<'k, i32>) -> Self {
        let src = [self.in_register_operand(), with.value(self.code()).operand()];
        self.code().value(Warp::Shuffle(mode), &src)
    }

    /// The value of lane `lane`.
    #[track_caller]
    pub fn shuffle(self, lane: impl Use<'k, i32>) -> Self {
        self.exchange(Shuffle::Index, lane)
    }

    /// The value of the lane whose index differs in the bits of `mask`.
    #[track_caller]
    pub fn shuffle_xor(self, mask: i32) -> Self {
        self.exchange(Shuffle::Xor, mask)
    }

    /// Combines the values of the lanes whose indices differ in the bits of `mask` only, so that each has the result.
    #[track_caller]
    pub fn reduce_lanes(self, mask: i32, mut combine: impl FnMut(Self, Self) -> Self) -> Self {
        let bits = (0..5).map(|bit| 1 << bit).filter(|bit| mask & bit != 0);
        bits.fold(self, |value, bit| combine(value, value.shuffle_xor(bit)))
    }
}

impl<T: Stored> Global<'_, T> {
    /// The same address, in registers until its last use: the assembler cannot compute a value from a shuffle anew
    /// wherever it is needed, which it otherwise prefers to holding it through a loop.
    #[track_caller]
    pub fn held(self) -> Self {
        let bits = self.address().reinterpret::<i64>();
        let lane = self.code().lane_index();
        let [low, high] = [bits, bits >> 32].map(|half| half.narrow().reinterpret::<u32>().shuffle(lane));
        Global::at_address(low.join(high))
    }
}

macro_rules! reductions {
    ($($ty:ty),*) => {$(
        impl<'k> Val<'k, $ty> {
            /// Largest value over the warp's lanes, in one instruction (sm_80).
            #[track_caller]
            pub fn warp_max(self) -> Self {
                self.code().value(Warp::Redux(Redux::Max, <$ty>::TY), &[self.in_register_operand()])
            }

            /// Sum over the warp's lanes, modulo 2³², in one instruction (sm_80).
            #[track_caller]
            pub fn warp_sum(self) -> Self {
                self.code().value(Warp::Redux(Redux::Add, <$ty>::TY), &[self.in_register_operand()])
            }
        }
    )*};
}

reductions!(i32, u32);

impl Code {
    /// Waits for the other lanes of the warp, and sees what they wrote before.
    #[track_caller]
    pub fn warp_sync(&self) {
        self.emit(Warp::Sync, &[], &[]);
    }

    /// Whether `cond` holds in some lane of the warp.
    #[track_caller]
    pub fn any<'k>(&'k self, cond: Val<'k, bool>) -> Val<'k, bool> {
        self.value(Warp::Vote(Vote::Any), &[cond.in_register_operand()])
    }

    /// Whether `cond` holds in every lane of the warp.
    #[track_caller]
    pub fn all<'k>(&'k self, cond: Val<'k, bool>) -> Val<'k, bool> {
        self.value(Warp::Vote(Vote::All), &[cond.in_register_operand()])
    }

    /// In which lanes of the warp `cond` holds, a bit for each.
    #[track_caller]
    pub fn ballot<'k>(&'k self, cond: Val<'k, bool>) -> Val<'k, u32> {
        self.value(Warp::Vote(Vote::Ballot), &[cond.in_register_operand()])
    }
}
