//! In which order the keys of a tile stand: those of K's rows, and so of columns of scores.

use sage_ptx::Val;

/// Which of a tile's keys are a lane's columns of scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyOrder {
    /// Keys as they follow each other: a lane has two of every eight.
    #[default]
    Natural,
    /// Of every 32 keys a lane has eight that follow each other: what a lane needs of P in 4 bits, whose groups share a
    /// scale. Core's `k_token_of_row`.
    Octets,
}

impl KeyOrder {
    /// The key of a lane's first column.
    #[track_caller]
    pub(crate) fn lane_key(self, lane: Val<'_, i32>) -> Val<'_, i32> {
        let keys = match self {
            KeyOrder::Natural => 2,
            KeyOrder::Octets => 8,
        };
        keys * (lane & 3)
    }

    /// The key of a column from the lane's first on, counted from the key of that.
    pub(crate) const fn offset(self, column: usize) -> usize {
        match self {
            KeyOrder::Natural => column,
            KeyOrder::Octets => column / 32 * 32 + column % 32 / 8 * 2 + column % 2,
        }
    }

    /// Part of a kernel's name.
    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            KeyOrder::Natural => "",
            KeyOrder::Octets => "_octets",
        }
    }
}

#[cfg(test)]
mod tests {
    use sage_core::oracle::k_token_of_row;

    use super::*;

    /// A lane `l` of a quad has the columns `2l` and `2l + 1` of every eight.
    #[test]
    fn octets_are_the_oracles() {
        for (lane, block, within) in
            (0..4).flat_map(|l| (0..8).flat_map(move |block| [0, 1].map(|within| (l, block, within))))
        {
            let row = 8 * block + 2 * lane + within;
            assert_eq!(8 * lane + KeyOrder::Octets.offset(8 * block + within), k_token_of_row(row));
            assert_eq!(2 * lane + KeyOrder::Natural.offset(8 * block + within), row);
        }
    }
}
