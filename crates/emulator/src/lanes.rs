//! Values and masks of a warp's lanes.

/// A value for each lane.
pub(crate) type Lanes = [u64; 32];

/// Lanes of a mask.
pub(crate) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            lane
        })
    })
}

/// Lanes whose value is odd: a predicate as a mask.
pub(crate) fn mask_of(values: &Lanes) -> u32 {
    values.iter().enumerate().fold(0, |mask, (lane, value)| mask | ((*value & 1) as u32) << lane)
}
