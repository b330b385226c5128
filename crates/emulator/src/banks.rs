//! What an access costs: wavefronts of shared memory, sectors of global memory.

/// The wavefronts of one access, and how many it would take without conflicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wavefronts {
    pub taken: u32,
    pub ideal: u32,
}

/// 32 banks of 4 bytes. An access of 4 bytes a lane is served at once, of 8 by half warps, of 16 by quarter warps; what
/// remains in conflict takes further turns.
pub(crate) fn wavefronts(addresses: &[u32; 32], lanes: u32, bytes: u32) -> Wavefronts {
    let per_phase = match bytes {
        16 => 8,
        8 => 16,
        _ => 32,
    };
    if lanes == u32::MAX
        && bytes >= 4
        && (1..32).all(|lane| addresses[lane] == addresses[lane - 1].wrapping_add(bytes))
    {
        let phases = (32 / per_phase) as u32;
        return Wavefronts { taken: phases, ideal: phases };
    }
    let mut total = Wavefronts::default();
    for first in (0..32).step_by(per_phase) {
        let mask = (((1u64 << per_phase) - 1) << first) as u32 & lanes;
        if mask != 0 {
            total.taken += phase(addresses, mask, bytes);
            total.ideal += 1;
        }
    }
    total
}

/// The largest number of different words in one bank.
fn phase(addresses: &[u32; 32], lanes: u32, bytes: u32) -> u32 {
    let mut first = [0; 32];
    let mut taken = 0u32;
    let mut conflict = false;
    each_word(addresses, lanes, bytes, |word| {
        let bank = word as usize & 31;
        if taken >> bank & 1 == 0 {
            taken |= 1 << bank;
            first[bank] = word;
        } else {
            conflict |= first[bank] != word;
        }
    });
    if !conflict {
        return 1;
    }
    let mut words = Vec::with_capacity(128);
    each_word(addresses, lanes, bytes, |word| words.push(word));
    words.sort_unstable();
    words.dedup();
    let mut counts = [0; 32];
    for word in words {
        counts[word as usize & 31] += 1;
    }
    counts.into_iter().max().unwrap_or(1)
}

fn each_word(addresses: &[u32; 32], mut lanes: u32, bytes: u32, mut visit: impl FnMut(u32)) {
    while lanes != 0 {
        let lane = lanes.trailing_zeros() as usize;
        lanes &= lanes - 1;
        let first = addresses[lane] / 4;
        for word in first..first.wrapping_add(bytes.div_ceil(4)) {
            visit(word);
        }
    }
}

/// Sectors of 32 bytes touched by one access, and how many its bytes would fill.
pub(crate) fn sectors(addresses: &[u64; 32], mut lanes: u32, bytes: u32) -> (u32, u32) {
    let mut seen = [0; 32];
    let mut count = 0;
    let mut low = u64::MAX;
    let mut distinct = 0;
    let mut last = u64::MAX;
    while lanes != 0 {
        let lane = lanes.trailing_zeros() as usize;
        lanes &= lanes - 1;
        let address = addresses[lane];
        // Lanes that read the same bytes need them once; only neighbours are compared, which is where that happens.
        if address != last {
            distinct += bytes;
        }
        last = address;
        let sector = address / 32;
        if sector != low && !seen[..count].contains(&sector) {
            seen[count] = sector;
            count += 1;
        }
        low = sector;
    }
    (count as u32, distinct.div_ceil(32).min(count as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banks_conflict_as_on_hardware() {
        let strided = |stride: u32| std::array::from_fn(|lane| lane as u32 * stride);
        let of = |stride, bytes| wavefronts(&strided(stride), u32::MAX, bytes).taken;
        assert_eq!(of(4, 4), 1);
        assert_eq!(of(0, 4), 1);
        assert_eq!(of(8, 4), 2);
        assert_eq!(of(128, 4), 32);
        assert_eq!(of(132, 4), 1);
        assert_eq!(of(1, 1), 1);
        assert_eq!(of(8, 8), 2);
        assert_eq!(of(16, 16), 4);
        assert_eq!(of(128, 16), 32);
    }

    #[test]
    fn sectors_count_once() {
        let strided = |stride: u64| std::array::from_fn(|lane| 4096 + lane as u64 * stride);
        assert_eq!(sectors(&strided(4), u32::MAX, 4), (4, 4));
        assert_eq!(sectors(&strided(16), u32::MAX, 16), (16, 16));
        assert_eq!(sectors(&strided(128), u32::MAX, 4), (32, 4));
        assert_eq!(sectors(&strided(0), u32::MAX, 4), (1, 1));
    }
}
