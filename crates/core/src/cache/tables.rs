//! Which page holds which tokens of which sequence.

use std::collections::HashMap;

use crate::{Error, Result};

/// A page to copy before it is written, because another sequence reads it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The shared page.
    pub from: u32,
    /// The page of one's own that takes its place.
    pub to: u32,
}

/// Tokens of one sequence.
#[derive(Clone, Debug, Default)]
struct Entry {
    len: usize,
    pages: Vec<u32>,
}

/// The block table of each sequence, over one pool of pages.
///
/// Pages are numbered from 0. A page may belong to several sequences ([`BlockTables::fork`]) as long as none writes to
/// it; one that no sequence needs any more is handed out again. Nothing here knows what a page holds.
#[derive(Clone, Debug)]
pub struct BlockTables {
    page_size: usize,
    max_pages: Option<usize>,
    sequences: Vec<Entry>,
    /// Sequences that hold each page.
    holders: Vec<u32>,
    free: Vec<u32>,
}

impl BlockTables {
    /// Empty tables of `sequences` sequences; at most `max_pages` pages where a limit is given.
    pub fn new(sequences: usize, page_size: usize, max_pages: Option<usize>) -> Self {
        BlockTables {
            page_size,
            max_pages,
            sequences: vec![Entry::default(); sequences],
            holders: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Most pages there may be.
    pub fn max_pages(&self) -> Option<usize> {
        self.max_pages
    }

    /// Pages numbered so far, in use or free: pages `0..pages()` must exist.
    pub fn pages(&self) -> usize {
        self.holders.len()
    }

    /// Pages that sequences hold.
    pub fn pages_in_use(&self) -> usize {
        self.holders.len() - self.free.len()
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn len(&self, sequence: usize) -> Result<usize> {
        self.entry(sequence).map(|entry| entry.len)
    }

    /// The pages of a sequence, in the order of its tokens.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn table(&self, sequence: usize) -> Result<&[u32]> {
        self.entry(sequence).map(|entry| &entry.pages[..])
    }

    /// Gives every sequence of `sequences` pages of its own for `tokens` more tokens, and says which shared pages must
    /// be copied first. Lengths stay as they are until [`BlockTables::advance`].
    ///
    /// # Errors
    /// When a sequence does not exist or is named twice, would be longer than 2³¹ − 1 tokens, or when the pool has too
    /// few pages. Nothing has changed then.
    pub fn reserve(&mut self, sequences: &[usize], tokens: usize) -> Result<Vec<PageCopy>> {
        let mut needed = 0usize;
        let mut seen = vec![false; self.sequences.len()];
        // The last holder of a shared page keeps it.
        let mut left: HashMap<u32, u32> = HashMap::new();
        for &sequence in sequences {
            let entry = self.entry(sequence)?;
            if std::mem::replace(&mut seen[sequence], true) {
                return Err(Error::value("sequences", format!("{sequences:?}"), "each sequence once"));
            }
            let len = entry.len.checked_add(tokens).filter(|&len| i32::try_from(len).is_ok());
            let len = len.ok_or_else(|| {
                let found = format!("{} cached and {tokens} new tokens", entry.len);
                Error::value(format!("sequence {sequence}"), found, "at most 2147483647 together")
            })?;
            needed += len.div_ceil(self.page_size).saturating_sub(entry.pages.len());
            if let Some(page) = self.shared_tail(sequence, tokens) {
                let holders = left.entry(page).or_insert(self.holders[page as usize]);
                if *holders > 1 {
                    *holders -= 1;
                    needed += 1;
                }
            }
        }
        let limit = self.max_pages.unwrap_or(u32::MAX as usize).min(u32::MAX as usize);
        let available = limit - self.pages_in_use().min(limit);
        if needed > available {
            return Err(Error::value(
                "max_pages",
                limit,
                format!("{} for {tokens} more tokens (free pages: {available})", limit - available + needed),
            ));
        }
        let mut copies = Vec::new();
        for &sequence in sequences {
            if let Some(from) = self.shared_tail(sequence, tokens) {
                let to = self.take();
                self.holders[from as usize] -= 1;
                if let Some(last) = self.sequences[sequence].pages.last_mut() {
                    *last = to;
                }
                copies.push(PageCopy { from, to });
            }
            let pages = (self.sequences[sequence].len + tokens).div_ceil(self.page_size);
            while self.sequences[sequence].pages.len() < pages {
                let page = self.take();
                self.sequences[sequence].pages.push(page);
            }
        }
        Ok(copies)
    }

    /// Gives back the pages that [`BlockTables::reserve`] took for tokens that were not written after all.
    pub fn unreserve(&mut self, sequences: &[usize]) {
        for &sequence in sequences {
            let len = self.sequences[sequence].len;
            self.shorten(sequence, len);
        }
    }

    /// Counts `tokens` tokens that were written to reserved pages.
    ///
    /// # Errors
    /// When a sequence does not exist, or its pages were not reserved.
    pub fn advance(&mut self, sequences: &[usize], tokens: usize) -> Result<()> {
        for &sequence in sequences {
            let entry = self.entry(sequence)?;
            let room = entry.pages.len() * self.page_size - entry.len;
            if tokens > room {
                return Err(Error::value("tokens", tokens, format!("at most the {room} reserved")));
            }
            self.sequences[sequence].len += tokens;
        }
        Ok(())
    }

    /// Forgets all but the first `len` tokens of a sequence; pages that hold none of them are free again.
    ///
    /// # Errors
    /// When there is no such sequence, or it has fewer tokens.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        let entry = self.entry(sequence)?;
        if len > entry.len {
            return Err(Error::value(
                "len",
                len,
                format!("at most the {} tokens of the sequence", entry.len),
            ));
        }
        self.shorten(sequence, len);
        Ok(())
    }

    fn shorten(&mut self, sequence: usize, len: usize) {
        let dropped = self.sequences[sequence].pages.split_off(len.div_ceil(self.page_size));
        self.sequences[sequence].len = len;
        for page in dropped {
            self.holders[page as usize] -= 1;
            if self.holders[page as usize] == 0 {
                self.free.push(page);
            }
        }
    }

    /// Lets sequence `to`, which must be empty, begin with all tokens of `from`, in the same pages.
    ///
    /// # Errors
    /// When there is no such sequence, or `to` has tokens.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        let entry = self.entry(from)?.clone();
        let len = self.len(to)?;
        if len != 0 || from == to {
            return Err(Error::value("to", format!("sequence {to} with {len} tokens"), "an empty sequence"));
        }
        // Pages reserved beyond the tokens stay with `from`.
        let pages = entry.pages[..entry.len.div_ceil(self.page_size)].to_vec();
        self.truncate(to, 0)?;
        pages.iter().for_each(|&page| self.holders[page as usize] += 1);
        self.sequences[to] = Entry { len: entry.len, pages };
        Ok(())
    }

    fn entry(&self, sequence: usize) -> Result<&Entry> {
        self.sequences.get(sequence).ok_or_else(|| {
            Error::value(
                "sequence",
                sequence,
                format!("below {}, the sequences of the cache", self.sequences.len()),
            )
        })
    }

    /// The last page of a sequence, where more tokens would be written to it and another sequence holds it too.
    fn shared_tail(&self, sequence: usize, tokens: usize) -> Option<u32> {
        let entry = &self.sequences[sequence];
        let partial = tokens > 0 && !entry.len.is_multiple_of(self.page_size);
        entry.pages.last().copied().filter(|&page| partial && self.holders[page as usize] > 1)
    }

    /// A page that nobody holds, held once; [`BlockTables::reserve`] made sure that there is one.
    fn take(&mut self) -> u32 {
        match self.free.pop() {
            Some(page) => {
                self.holders[page as usize] = 1;
                page
            }
            None => {
                self.holders.push(1);
                (self.holders.len() - 1) as u32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(tables: &mut BlockTables, sequence: usize, tokens: usize) -> Vec<PageCopy> {
        let copies = tables.reserve(&[sequence], tokens).unwrap();
        tables.advance(&[sequence], tokens).unwrap();
        copies
    }

    #[test]
    fn pages_are_taken_as_tokens_need_them_and_given_back() {
        let mut tables = BlockTables::new(2, 16, None);
        append(&mut tables, 0, 16);
        append(&mut tables, 1, 1);
        append(&mut tables, 0, 1);
        assert_eq!((tables.table(0).unwrap(), tables.table(1).unwrap()), (&[0, 2][..], &[1][..]));
        tables.truncate(0, 16).unwrap();
        assert_eq!((tables.pages(), tables.pages_in_use()), (3, 2));
        append(&mut tables, 1, 16);
        assert_eq!(tables.table(1).unwrap(), [1, 2]);
    }

    #[test]
    fn a_pool_that_is_too_small_changes_nothing() {
        let mut tables = BlockTables::new(2, 16, Some(3));
        append(&mut tables, 0, 20);
        // Each sequence alone would fit.
        let error = tables.reserve(&[0, 1], 16).unwrap_err().to_string();
        assert_eq!(error, "max_pages: value is 3, expected 4 for 16 more tokens (free pages: 1)");
        assert_eq!((tables.pages_in_use(), tables.len(0).unwrap()), (2, 20));
        append(&mut tables, 1, 16);
        assert!(tables.reserve(&[1], 1).is_err());
    }

    #[test]
    fn shared_pages_are_copied_before_they_are_written() {
        let mut tables = BlockTables::new(3, 16, None);
        append(&mut tables, 0, 20);
        tables.fork(0, 1).unwrap();
        tables.fork(1, 2).unwrap();
        assert_eq!(tables.pages_in_use(), 2);
        assert_eq!(append(&mut tables, 1, 1), [PageCopy { from: 1, to: 2 }]);
        assert_eq!(append(&mut tables, 0, 1), [PageCopy { from: 1, to: 3 }]);
        // The last holder writes in place.
        assert_eq!(append(&mut tables, 2, 1), []);
        assert_eq!(tables.table(2).unwrap(), [0, 1]);
        // A full last page is never written.
        tables.truncate(0, 16).unwrap();
        assert_eq!(append(&mut tables, 0, 1), []);
        for sequence in 0..3 {
            tables.truncate(sequence, 0).unwrap();
        }
        assert_eq!(tables.pages_in_use(), 0);
    }

    #[test]
    fn holders_of_a_shared_page_that_all_write_need_one_page_less_than_they_are() {
        let mut tables = BlockTables::new(3, 16, Some(3));
        append(&mut tables, 0, 5);
        tables.fork(0, 1).unwrap();
        tables.fork(0, 2).unwrap();
        let copies = tables.reserve(&[2, 0, 1], 1).unwrap();
        assert_eq!(copies, [PageCopy { from: 0, to: 1 }, PageCopy { from: 0, to: 2 }]);
        assert_eq!(tables.table(1).unwrap(), [0]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut tables = BlockTables::new(2, 16, None);
        append(&mut tables, 0, 5);
        let text = |error: Result<()>| error.unwrap_err().to_string();
        assert_eq!(
            text(tables.truncate(2, 0)),
            "sequence: value is 2, expected below 2, the sequences of the cache"
        );
        assert_eq!(
            text(tables.truncate(0, 6)),
            "len: value is 6, expected at most the 5 tokens of the sequence"
        );
        assert_eq!(
            text(tables.fork(1, 0)),
            "to: value is sequence 0 with 5 tokens, expected an empty sequence"
        );
        assert!(text(tables.reserve(&[1, 1], 1).map(|_| ())).contains("each sequence once"));
        assert!(text(tables.reserve(&[0], usize::MAX).map(|_| ())).contains("at most 2147483647"));
        assert!(text(tables.advance(&[0], 12)).contains("at most the 11 reserved"));
    }
}
